"""A run's memory: one small immutable record a round in `<output.uri>/<name>.run/`, from which the same command goes on.

What a round wrote is trusted only through its record, which is created last and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusegpt_ray import storage
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.stack import Stack

METHOD_VERSION = 1
"""Raised whenever the same recipe would give another model than before."""


def identity(recipe: Recipe, windows_sha256: str, dense: Stack) -> dict[str, Any]:
    """What a run may not change and still be resumed: all of the recipe that shapes the result, the data and the model."""
    settings = recipe.model_dump(mode="json", exclude={"cluster", "output", "evaluation", "sparsity"})
    tensors = {name: [ref.code, list(ref.shape)] for block in dense.blocks for name, ref in block.weights.items()}
    return {
        "method_version": METHOD_VERSION,
        "recipe": settings,
        "windows_sha256": windows_sha256,
        "model": {"config": dict(dense.config), "block": tensors},
    }


@dataclass(frozen=True)
class Journal:
    """The records of one run, at a folder of their own."""

    folder: str

    @classmethod
    def of(cls, recipe: Recipe) -> Journal:
        return cls(storage.join(storage.absolute(recipe.output.uri), f"{recipe.output.name}.run"))

    @property
    def blocks_folder(self) -> str:
        """Where the rounds' new blocks lie."""
        return storage.join(self.folder, "blocks")

    def begin(self, this: Mapping[str, Any]) -> None:
        """Start, or go on with, the run of this identity.

        Raises:
            UserError: another run is in this folder; the message shows the first key that differs.
        """
        file = storage.join(self.folder, "identity.json")
        try:
            storage.create(file, json.dumps(this, indent=1).encode())
        except FileExistsError:
            there = storage.read_json(file)
            if (difference := _difference(there, json.loads(json.dumps(this)), "")) is not None:
                key, old, new = difference
                problem = f"an unfinished run in {self.folder} has {key} = {old!r}, this one has {new!r}"
                fix = "use the recipe of that run, choose another output.name, or remove that folder"
                raise UserError("output.name", self.folder.rsplit("/", 1)[-1].removesuffix(".run"), problem, fix) from None

    def commit(self, number: int, stack: Stack, record: Mapping[str, Any]) -> None:
        """Record round `number` (from 1) as done."""
        data = {"round": record, "stack": stack.to_json()}
        storage.create(self._file(number), json.dumps(data, separators=(",", ":")).encode())

    def rounds(self) -> list[tuple[dict[str, Any], Stack]]:
        """The rounds done so far, in order: what each recorded, and the stack after it."""
        done: list[tuple[dict[str, Any], Stack]] = []
        while storage.exists(self._file(len(done) + 1)):
            data = storage.read_json(self._file(len(done) + 1))
            done.append((data["round"], Stack.from_json(data["stack"])))
        return done

    def remove_blocks(self) -> None:
        """Free the rounds' blocks once all models are published."""
        storage.remove(self.blocks_folder, recursive=True)

    def _file(self, number: int) -> str:
        return storage.join(self.folder, f"round-{number:03d}.json")


def _difference(old: Any, new: Any, path: str) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: key path, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)
