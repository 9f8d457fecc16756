"""A model is saved by several processes: each writes, and reads back, a few of its shards."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from models import open_stack
from safetensors.torch import load_file, save_file

from fusegpt_ray.compressing.saving import put_shards as put_on_workers
from fusegpt_ray.errors import StorageError
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.publishing.proof import ProofError
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.publishing.shards import AT_ONCE, put_shards
from fusegpt_ray.publishing.shrink import model_entries
from fusegpt_ray.run.lease import Fence, Lease, OwnedByAnother, Owner
from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import nobody_else
from fusegpt_ray.store.writer import plan_shards
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

SHARD = 9_000
"""Bytes: less than a block has, so that there are many shards."""


class Elsewhere(LocalWorkers):
    """Several replicas in other processes, as far as what they are given and give back can tell: it
    travels as bytes. They finish in another order than they were asked, and share one machine.
    """

    replicas = 3  # type: ignore[assignment]

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        self.tasks = list(tasks)
        for number, task in reversed(list(enumerate(tasks))):
            sent = pickle.loads(pickle.dumps((function, task)))
            yield number, pickle.loads(pickle.dumps(sent[0](self.runner, *sent[1])))


@pytest.fixture
def workers(checkpoint: Callable[[str], Path]) -> Elsewhere:
    source = Source.find(str(checkpoint("llama")), None)
    return Elsewhere(Setup(source, source.stack()))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_workers_save_what_one_process_saves(workers: Elsewhere, tmp_path: Path) -> None:
    dense = workers.setup.dense
    shards = plan_shards(model_entries(dense, dense), SHARD)
    assert len(shards) > workers.replicas * AT_ONCE
    here = put_shards(str(tmp_path / "here"), shards, nobody_else)
    there = put_on_workers(workers, str(tmp_path / "there"), shards, nobody_else)
    assert list(there.items()) == list(here.items())
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    each = [len(part) for _, part, _ in workers.tasks]
    assert max(each) <= AT_ONCE and sum(each) == len(shards)


def test_few_shards_are_shared_by_all(workers: Elsewhere, tmp_path: Path) -> None:
    dense = workers.setup.dense
    shards = plan_shards(model_entries(dense, dense), SHARD)
    few = {name: shards[name] for name in list(shards)[: workers.replicas]}
    put_on_workers(workers, str(tmp_path), few, nobody_else)
    assert [len(part) for _, part, _ in workers.tasks] == [1] * workers.replicas


def test_a_slow_writer_is_not_doubled(workers: Elsewhere) -> None:
    """As a slow task that only computes is."""
    from fusegpt_ray.distributed.process import RunnerConfig
    from fusegpt_ray.distributed.replicas import Replicas, _Call

    pool = Replicas(workers.setup.dense, RunnerConfig(workers.dtype, 2), 2, cpus=1, gpus=0)
    pool._calls = {number: _Call(None, number, time.monotonic() - 1000) for number in range(2)}
    assert pool._next(deque(), [1.0, math.inf], [0.1]) == 0
    assert pool._next(deque(), [math.inf, math.inf], [0.0]) is None


def test_the_fence_is_asked_where_a_shard_is_written(workers: Elsewhere, tmp_path: Path) -> None:
    dense = workers.setup.dense
    shards = plan_shards(model_entries(dense, dense), SHARD)
    run, out = str(tmp_path / "demo.run"), tmp_path / "out"
    with Lease.take(run, lambda text: None, lambda: "saving") as lease:
        put_on_workers(workers, str(out), shards, lease.fence.check)
        before = contents(out)
        storage.create(f"{run}/lease-000002.json", _lease_of_another())
        for file in out.iterdir():
            file.unlink()
        with pytest.raises(OwnedByAnother):
            put_on_workers(workers, str(out), shards, Fence(run, lease.fence.owner).check)
    assert before and contents(out) == {}


def _lease_of_another() -> bytes:
    from dataclasses import asdict

    from fusegpt_ray.store.records import sealed

    return sealed({"owner": asdict(Owner.this())})


@pytest.mark.parametrize("kind", [StorageError, ProofError])
def test_what_a_worker_raises_is_what_the_caller_gets(
    kind: type[Exception], workers: Elsewhere, tmp_path: Path
) -> None:
    dense = workers.setup.dense
    if kind is StorageError:
        from faults import full_disk

        shards = plan_shards(model_entries(dense, dense), SHARD)
        with pytest.raises(StorageError, match="File too large") as raised, full_disk(1000):
            put_on_workers(workers, str(tmp_path / "out"), shards, nobody_else)
        assert raised.value.fix
    else:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in Path(workers.setup.source.folder).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        bad = open_stack(folder)
        shards = plan_shards(model_entries(bad, bad), SHARD)
        with pytest.raises(ProofError, match=r"model\.norm\.weight holds NaN or Inf"):
            put_on_workers(workers, str(tmp_path / "out"), shards, nobody_else)


def test_what_a_killed_writer_left_goes_and_the_rate_is_told(
    workers: Elsewhere, tmp_path: Path
) -> None:
    dense, out = workers.setup.dense, tmp_path / "demo-p20"
    out.mkdir()
    for name in (".model-00001-of-00009.safetensors.0123abcd", ".config.json.89abcdef"):
        (out / name).write_bytes(b"half")
    (out / ".mine").write_text("a user's")
    facts = {
        "method": "mi",
        "recipe": {"importance": {"metric": "mi"}},
        "removed": [2],
        "rounds": [],
        "perplexity": {},
    }
    source = workers.setup.source
    published = publish(str(out), dense.drop(2), dense, source, SHARD, facts)
    left = {file.name for file in out.iterdir()}
    assert left - published.manifest["files"].keys() == {".mine", MANIFEST}
    told = published.manifest["publishing"]
    shards = list(out.glob("*.safetensors"))
    assert told["bytes"] == sum(os.path.getsize(file) for file in shards)
    assert told["seconds"] > 0
    assert told["gb_per_second"] == pytest.approx(told["bytes"] / 1e9 / told["seconds"], abs=2e-3)
