"""Throws malformed input at every reader of other people's files. `make chaos` runs this file;
`--examples N` says how much.

A reader may answer in two ways: with what it read, or with the one error that it documents. What
the reader of safetensors headers accepts, the safetensors library must read, too, with the same
names, shapes and dtypes. (Not the other way round: ours refuses more. Names twice, unknown keys and
more than 64 dimensions, which no writer makes; dtypes of less than a byte or that torch may lack;
and headers of more than 32 MB.)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from bad_input import (
    EDITS,
    FILES,
    INDEXED,
    MANIFEST,
    RECIPE,
    RECORD,
    TREES,
    YAML,
    altered,
    edited,
    malformed,
)
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store.checkpoint import INDEX, read_header, read_weight_map
from fusegpt_ray.store.manifest import Manifest
from fusegpt_ray.store.records import DamagedRecord, opened, sealed


@dataclass(frozen=True)
class Reader:
    name: str
    thrown: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]
    """Reads it (a file's bytes, or a tree), with a folder at hand; raises `refuses` or returns."""
    refuses: type[Exception] = UserError


def _recipe_text(data: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    recipe = Recipe.load(folder / "recipe.yaml")
    assert Recipe.parse(recipe.model_dump()) == recipe


def _recipe_tree(tree: Any, folder: Path) -> None:
    recipe = Recipe.parse(tree)
    assert Recipe.parse(recipe.model_dump()) == recipe


def _override(text: str, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(YAML)
    Recipe.load(folder / "recipe.yaml", [text])


def _header(data: bytes, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(data)
    refs = read_header(str(file), "model.source")
    ours = {
        name: (list(ref.shape), ref.code, data[ref.begin : ref.end]) for name, ref in refs.items()
    }
    theirs = {
        name: (entry["shape"], entry["dtype"], bytes(entry["data"]))
        for name, entry in safetensors.deserialize(data)
    }
    assert ours == theirs


def _index(data: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(data)
    for shard in read_weight_map(str(folder), "model.source").values():
        assert (folder / shard).parent == folder and shard.endswith(".safetensors")


def _manifest(data: bytes, folder: Path) -> None:
    manifest = Manifest.parse(data, str(folder))
    assert manifest.files and manifest.size >= 0
    assert all((folder / name).parent == folder for name in manifest.files)


def _record(data: bytes, folder: Path) -> None:
    assert sealed(opened(data))


KEYS = ["seed", "sparsity", "model", "model.source", "evaluation.new", "fusion.rank", "a.b"]
OVERRIDES = st.one_of(
    st.text(max_size=30),
    st.tuples(st.sampled_from(KEYS), TREES).map(lambda parts: f"{parts[0]}={json.dumps(parts[1])}"),
    st.integers(1, 99).map(lambda number: f"fusion.rank={number}"),
)
READERS = [
    Reader(
        "recipe, its text",
        EDITS.map(lambda edits: edited(YAML, edits)) | st.binary(max_size=64),
        _recipe_text,
    ),
    Reader("recipe, as a tree", altered(RECIPE) | TREES, _recipe_tree),
    Reader("--set", OVERRIDES, _override),
    Reader("safetensors header", FILES, _header),
    Reader("index", malformed(INDEXED), _index),
    Reader("manifest", malformed(MANIFEST), _manifest),
    Reader(
        "record",
        malformed(json.loads(sealed(RECORD))) | altered(RECORD).map(sealed),
        _record,
        DamagedRecord,
    ),
]


@dataclass
class Outcome:
    reader: str
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def examples(self) -> int:
        return self.accepted + self.refused


def fuzz(reader: Reader, examples: int, seed: int | None = None) -> Outcome:
    """Throw so many examples at a reader, the same ones each time unless there is a seed; raises
    what it should not have raised.
    """
    outcome = Outcome(reader.name)
    with tempfile.TemporaryDirectory() as folder:

        def throw(thrown: Any) -> None:
            began = time.process_time()
            try:
                reader.read(thrown, Path(folder))
                outcome.accepted += 1
            except reader.refuses:
                outcome.refused += 1
            took = time.process_time() - began
            outcome.seconds += took
            outcome.slowest = max(outcome.slowest, took)

        calm = settings(
            max_examples=examples,
            derandomize=seed is None,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            verbosity=Verbosity.quiet,
        )
        test = calm(given(reader.thrown)(throw))
        if seed is not None:
            from hypothesis import seed as seeded

            test = seeded(seed)(test)
        test()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Throw malformed input at every reader; print what became of it."
    )
    parser.add_argument("--examples", type=int, default=20_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        f"{'reader':<22}{'examples':>9}{'accepted':>10}{'refused':>9}{'seconds':>9}{'slowest':>10}"
    )
    for reader in READERS:
        row = fuzz(reader, arguments.examples, arguments.seed)
        times = f"{row.seconds:>9.1f}{row.slowest * 1000:>7.0f} ms"
        print(
            f"{row.reader:<22}{row.examples:>9}{row.accepted:>10}{row.refused:>9}{times}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
