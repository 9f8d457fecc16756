"""Which half-published models are a run's own: those whose names it noted in its folder before it
wrote their first file. Light: no torch.

Without such a note, files in a model's folder are somebody else's, whatever they look like: a run
does not write over them, and nothing removes them. The note goes once the manifest is there, or
with the half model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import Fence
from fusegpt_ray.store.manifest import MANIFEST
from fusegpt_ray.store.records import sealed

_END = r"p\d+(\.\d+)?|d\d+"
MODEL = re.compile(rf"(?P<name>.+)-({_END})")
"""What a published model's folder is called; `name` is the run's."""
BEGUN = rf"begun-({_END})\.json"
"""What a note's file is called."""


def begun(run: str, files: Iterable[str]) -> list[str]:
    """The folders of the models that the run in this folder, which holds these files, has begun to
    publish.
    """
    notes = (re.fullmatch(BEGUN, name) for name in files)
    return [f"{run.removesuffix('.run')}-{note[1]}" for note in notes if note]


def check_place(model: str) -> None:
    """
    Raises:
        UserError: this model's folder holds files, neither a finished model nor what the run of its
            name began.
    """
    files = storage.below(model)
    if files and MANIFEST not in files and not storage.exists(_note(model)):
        problem = f"files that no run of this name has written are in the way at {model}"
        fix = "choose another output.name or output.uri, or move them away"
        raise UserError("output.name", _name(model), problem, fix)


@contextmanager
def being_published(model: str, fence: Fence) -> Iterator[None]:
    """While the block lasts, and after it if an exception ends it, the model's folder is this
    run's.

    Args:
        fence: raises if another run has the name.

    Raises:
        UserError: see `check_place`; nothing is written then.
    """
    fence()
    check_place(model)
    with suppress(FileExistsError):  # an earlier attempt of this run noted it
        storage.create(_note(model), sealed({"model": model.rsplit("/", 1)[-1]}))
    yield
    storage.remove(_note(model))


def remove_half(model: str) -> None:
    """Remove a model that its run has begun, unless it is finished, and then the note."""
    if not storage.exists(storage.join(model, MANIFEST)):
        if os.path.islink(model):  # the link is the user's
            for name in storage.below(model):
                storage.remove(storage.join(model, name))
        else:
            storage.remove(model, recursive=True)
    storage.remove(_note(model))


def _name(model: str) -> str:
    """Of the run."""
    return model.rsplit("/", 1)[-1].rpartition("-")[0]


def _note(model: str) -> str:
    run, _, end = model.rpartition("-")
    return storage.join(f"{run}.run", f"begun-{end}.json")
