"""Small files that anybody may have written, and what is said where they cannot be used. Light: no
torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.store import storage
from fusegpt_ray.uris import refuse_secret, shown

KEY = "URI"
"""What messages call the argument that names a folder."""
Share = Annotated[float, Field(gt=0, lt=1)]
"""Of blocks, or of width, removed."""
Level = Annotated[float, Field(gt=0)]
"""A perplexity; infinity is one."""
Amount = Annotated[FiniteFloat, Field(ge=0)]
"""Of seconds, or of money."""


class Part(BaseModel):
    """Keys that nobody asks for may be anything."""

    model_config = ConfigDict(extra="ignore")


P = TypeVar("P", bound=Part)


def read_foreign(folder: str, name: str, fix: str) -> bytes:
    """The file of this name in a folder, any fsspec URI.

    Args:
        fix: what to do where there is none.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    refuse_secret(KEY, folder)
    try:
        return storage.read(storage.join(folder, name), storage.SMALL)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(KEY, folder, f"holds no {name}", fix) from error
    except PermissionError as error:
        problem = f"may not be read ({error})"
        raise UserError(KEY, folder, problem, "check your rights and credentials") from error
    except (ValueError, ImportError) as error:  # the protocol is unknown, or its package is missing
        problem = f"cannot be reached ({error})"
        raise UserError(KEY, folder, problem, "check the URI's protocol") from error
    except StorageError:
        raise
    except OSError as error:  # too large, a device, a link to itself, …
        problem = f"its {name} cannot be read ({error})"
        raise UserError(KEY, folder, problem, "check the path") from error


def told(kind: type[P], folder: str, name: str, known: int, fix: str) -> P:
    """What the JSON file of this name in a folder says, any fsspec URI.

    Args:
        known: see `checked`.

    Raises:
        UserError: there is none, or not one that this version can trust.
    """
    try:
        data = json.loads(read_foreign(folder, name, fix))
    except (ValueError, RecursionError) as error:
        raise UserError(KEY, folder, f"{name} is not JSON ({error})", fix) from error
    return checked(kind, data, folder, name, known, fix)


def checked(kind: type[P], data: Any, folder: str, name: str, known: int, fix: str) -> P:
    """What was read of a file in a folder.

    Args:
        known: the `format` that this version knows.

    Raises:
        UserError: it has another format, or another shape.
    """
    found = data.get("format") if isinstance(data, dict) else None
    if found != known:
        problem = f"{name} has the format {shown(found)!r}, this version knows {known}"
        raise UserError(KEY, folder, problem, fix)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(KEY, folder, f"{name} says {nonsense(error)}", fix) from error


def nonsense(error: ValidationError) -> str:
    """The first mistake, in words."""
    first = error.errors()[0]
    where = ".".join(str(part)[:99] for part in first["loc"])
    return f"nonsense: {where}: {first['msg'].lower()}"
