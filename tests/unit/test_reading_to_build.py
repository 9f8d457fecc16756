"""Blocks that are to be trained, or proven, come the way of those that are only run: from the
node's cache, each from its store once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from models import open_stack, token_windows
from proving import _folder, opened, shortened  # noqa: F401 - a fixture
from workshop import settings

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.healing.gates import GatedModel, train_gates
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.publishing.proof import prove
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Heal
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.finetune import learn
from fusegpt_ray.training.task import TrainingTask
from fusegpt_ray.workers.base import TrainingWorker

CPU = torch.device("cpu")
BATCH = 4
IDS = token_windows(2 * BATCH, 7)


@pytest.fixture(name="runner")
def _runner(checkpoint: Callable[[str], Path], tmp_path: Path) -> Runner:
    """Of a model in a store that counts what is read, after a first walk."""
    stack = Source.find(f"faulty://{checkpoint('llama')}", None).stack()
    cache = BlockCache(tmp_path / "cache", None)
    runner = Runner(stack, CPU, torch.float32, BATCH, cache=cache)
    with faulty.failing() as asked:
        list(runner.walk(stack, IDS))
    assert asked, "blocks came from somewhere else"
    return runner


def test_a_walk_names_each_entry_of_the_cache_twice(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read the block, and to know what the walk needs; not all of them for each block."""
    stack = Source.find(f"faulty://{checkpoint('llama')}", None).stack()
    runner = Runner(stack, CPU, torch.float32, BATCH, cache=BlockCache(tmp_path / "cache", None))
    named, name = list[Refs](), BlockCache._name
    monkeypatch.setattr(BlockCache, "_name", lambda self, far: named.append(far) or name(self, far))
    for times in (2, 1):  # in the second walk everything is there
        list(runner.walk(stack, IDS))
        assert len(named) == times * len(stack)
        named.clear()


def task_of(kind: str, runner: Runner, out: Path) -> TrainingTask:
    dense, cluster, windows = runner.stack, Cluster(), IDS.numpy()
    if kind == "group":
        chosen = settings("rounds", epochs=1)
        group = GroupFusion(dense, dense, 2, chosen, True, 0, str(out))
        return group.task(windows, cluster, "dense", str(out / "checkpoints"))
    heal = Heal(batch=BATCH, held_out=BATCH, train="all" if kind == "all" else "lora", rank=2)
    model = WholeModel(dense.drop(2), dense, heal, 0, str(out))
    return model.task(windows, windows[:BATCH], cluster, {}, str(out / "checkpoints"))


@pytest.mark.parametrize("kind", ["group", "all", "lora"])
def test_what_is_trained_is_not_fetched_again(kind: str, runner: Runner, tmp_path: Path) -> None:
    worker = TrainingWorker(0, 1, CPU, None, runner, lambda news: None)
    with faulty.failing() as asked:
        learn(worker, task_of(kind, runner, tmp_path), BATCH, BATCH)
    assert asked == []


def test_gates_are_put_around_blocks_that_are_here(runner: Runner) -> None:
    with faulty.failing() as asked:
        train_gates(runner, GatedModel(runner.stack, 2), IDS.numpy())
    assert asked == []


def test_the_proof_compares_with_blocks_that_are_here(
    runner: Runner, folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    out, near = folder("llama"), open_stack(checkpoint("llama"))
    published = opened(out, near)
    there = Runner(published, CPU, torch.float32, BATCH)
    with faulty.failing() as asked:
        proof = prove(published, str(out), shortened(runner.stack), runner, there, IDS)
    assert proof.states == 0 and asked == []


@pytest.mark.gpu
def test_they_are_on_the_gpu_as_they_are_stored(checkpoint: Callable[[str], Path]) -> None:
    dense = open_stack(checkpoint("llama"))
    runner = Runner(dense, torch.device("cuda"), torch.bfloat16, BATCH)
    for block in dense.blocks:
        found: dict[str, Any] = dict(runner.meta_blocks[block.kind].read(block.weights))
        expected = read_tensors(block.weights)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].is_cuda and found[name].dtype == tensor.dtype
            assert torch.equal(found[name].cpu(), tensor)
