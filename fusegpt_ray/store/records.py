"""Records with checksums of themselves and of the files they point at. Light: no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fusegpt_ray.store import storage


@dataclass(frozen=True)
class FileRecord:
    """What was written: for manifests and journals."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["bytes"], data["sha256"])


def damage(uri: str, record: FileRecord) -> str:
    """What is wrong with a file that was written, or nothing."""
    if not storage.exists(uri):
        return "is missing"
    if (size := storage.size(uri)) != record.size:
        return f"has {size} bytes, {record.size} were written"
    return "" if storage.sha256(uri) == record.sha256 else "has another checksum than was written"


class DamagedRecord(ValueError):
    """A record is not what was written."""


def checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(_text(body).encode()).hexdigest()


def sealed(body: Mapping[str, Any]) -> bytes:
    """A JSON value with its own checksum."""
    return f'{{"sha256":"{checksum(body)}","body":{_text(body)}}}'.encode()


def opened(data: bytes) -> dict[str, Any]:
    """The value that was sealed.

    Raises:
        DamagedRecord: these are other bytes.
    """
    try:
        record = json.loads(data)
        body, digest = dict(record["body"]), record["sha256"]
        whole = checksum(body) == digest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"not a record: {error}") from error
    if not whole:
        raise DamagedRecord("its checksum is wrong")
    return body


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
