"""A model is finished when its manifest is there, which is written last: a finished one is never
overwritten, an unfinished one is written again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from models import open_stack
from published_models import FACTS, REMOVED, contents, dressed, published

from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.store.checkpoint import SINGLE


def test_the_manifest_is_written_last(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published(
        dressed(checkpoint("llama"), tmp_path / "source"), tmp_path / "out", shard_bytes=25_000
    )
    written = {file.name: os.stat(file).st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert max(written.values()) == written.pop(MANIFEST) and written

    (tmp_path / "failed/README.md").mkdir(
        parents=True
    )  # the last file before the manifest cannot be written
    with pytest.raises(OSError, match=r"README\.md"):
        published(checkpoint("llama"), tmp_path / "failed")
    assert (tmp_path / "failed" / SINGLE).exists() and not (tmp_path / "failed" / MANIFEST).exists()


def test_a_source_that_vanishes_leaves_no_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("llama-sharded"), tmp_path / "source")
    dense = open_stack(tmp_path / "source")
    gone = max((tmp_path / "source").glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        publish(
            str(tmp_path / "out"),
            dense,
            dense,
            Source.find(str(tmp_path / "source"), None),
            10**9,
            FACTS,
        )
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("removed", [REMOVED, [1]], ids=["the-same-model", "another-model"])
def test_a_finished_model_is_never_overwritten(
    removed: Sequence[int], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    published(checkpoint("llama"), tmp_path / "out")
    before = contents(tmp_path / "out")
    stack = open_stack(checkpoint("llama"))
    for block in removed:
        stack = stack.drop(block)
    with pytest.raises(FileExistsError):
        published(checkpoint("llama"), tmp_path / "out", stack=stack)
    changed = [
        name for name, data in contents(tmp_path / "out").items() if before.get(name) != data
    ]
    assert changed == []


def test_an_unfinished_model_is_written_again(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    first = published(checkpoint("llama"), tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    (tmp_path / "out" / SINGLE).write_bytes(b"half")
    again = published(checkpoint("llama"), tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name: data for name, data in after.items() if before[name] != data}.keys() <= {MANIFEST}
    took = again.manifest["publishing"]  # all of it that may differ
    assert again.manifest == first.manifest | {"publishing": took}
