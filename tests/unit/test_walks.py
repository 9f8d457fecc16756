"""Walks of many windows: weights are read once, states wait where there is room for them, and no
bit depends on where that is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cramped import tune
from models import DEPTH, open_stack, token_windows
from proving import _folder, opened, shortened  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watching import Watch, size_of

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model import memory, placement, weights
from fusegpt_ray.model import runner as runner_module
from fusegpt_ray.model.perplexity import window_losses
from fusegpt_ray.model.placement import empty_states
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.weights import stored_bytes
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

CPU = torch.device("cpu")
WINDOWS, LENGTH, HIDDEN = 64, 16, 32
IDS = token_windows(WINDOWS, LENGTH)
SET = WINDOWS * LENGTH * HIDDEN * 4
"""Bytes of one set of states."""
CRAMPED = 1e-9
"""Of the free memory: not enough for a single window."""


@pytest.fixture
def stack(checkpoint: Callable[[str], Path]) -> Stack:
    return open_stack(checkpoint("llama"))


def make_runner(stack: Stack, batch_size: int = 4, share: float = 1.0) -> Runner:
    return Runner(stack, CPU, torch.float32, batch_size, memory_share=share, host_share=share)


Walk = Callable[[Runner, Stack], tuple[torch.Tensor, ...]]


def losses(runner: Runner, stack: Stack) -> tuple[torch.Tensor, ...]:
    return (window_losses(runner, stack, IDS),)


def states(runner: Runner, stack: Stack) -> tuple[torch.Tensor, ...]:
    """Of a span at the same blocks as the teacher: one walk serves both ends."""
    return StatesSource(stack.drop(3), 2, stack, 4).walk(runner, IDS)


def states_of_two(runner: Runner, stack: Stack) -> tuple[torch.Tensor, ...]:
    """A block before the span is gone: its states come of another stack than the teacher's."""
    return StatesSource(stack.drop(0), 2, stack, 4).walk(runner, IDS)


# --- once ---


@pytest.mark.parametrize("share", [1.0, CRAMPED], ids=["memory", "file"])
@pytest.mark.parametrize(("walk", "blocks"), [(losses, DEPTH), (states, 4), (states_of_two, 2 + 4)])
def test_weights_are_read_once_for_all_windows(
    walk: Walk,
    blocks: int,
    share: float,
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch()
    monkeypatch.setattr(weights, "read_tensors", watch)
    runner = make_runner(stack, share=share)
    walk(runner, stack)
    block = size_of(stack.blocks[0].weights)
    assert sum(ref.end - ref.begin for ref in watch.asked) == blocks * block
    assert runner.weights.bytes_read == blocks * block
    assert max(watch.alive) <= block


def test_what_scoring_and_states_read_is_counted(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    recipe = Recipe.parse(
        {
            "model": {"source": str(folder)},
            "calibration": {"data": "unused", "windows": WINDOWS, "length": LENGTH},
            "importance": {"windows": 8, "all": True},
            "fusion": {"group_size": 2, "epochs": 1, "batch": 8, "rank": 2, "lora_rank": 2},
            "cluster": {"engine": "local", "weights": "streamed"},
            "output": {"uri": str(tmp_path), "name": "x"},
        }
    )
    dense = open_stack(folder)
    job = GroupFusion(dense, dense, 1, recipe.fusion, True, 0, str(tmp_path / "blocks"))
    with LocalWorkers(Setup.of(recipe, Source.find(str(folder), None), dense)) as engine:
        ranking = score(engine, dense, IDS[:8].numpy(), recipe.importance)
        trained = tune(engine, job, IDS.numpy(), recipe)
    assert ranking.bytes_read == stored_bytes(dense.blocks)
    assert Ranking.from_record(ranking.to_record()).bytes_read == ranking.bytes_read
    assert trained.states_bytes_read == stored_bytes(dense.blocks[: job.source.stop])


@pytest.mark.parametrize("kept", ["streamed", "resident"])
@pytest.mark.parametrize("which", ["dense", "dropped", "published"])
def test_an_evaluation_reads_each_block_once(
    which: str,
    kept: str,
    checkpoint: Callable[[str], Path],
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a published model, of which no replica keeps a block for its next task."""
    source = Source.find(str(checkpoint("llama")), None)
    dense = source.stack()
    model = {"dense": dense, "dropped": shortened(dense), "published": dense}[which]
    if which == "published":
        model = opened(folder("llama"), dense)
    cluster = Cluster.model_validate({"engine": "local", "weights": kept})
    monkeypatch.setattr(weights, "read_tensors", watch := Watch())
    with LocalWorkers(Setup(source, dense, cluster, importance=Importance(batch=4))) as engine:
        found = evaluation.losses(engine, model, IDS.numpy())
        assert engine.streams == (kept == "streamed")
    assert sum(ref.end - ref.begin for ref in watch.asked) == stored_bytes(model.blocks)
    assert found.mean_W.tolist() == window_losses(make_runner(model), model, IDS).tolist()


# --- the same bits ---


@pytest.mark.parametrize("batch_size", [1, 3, WINDOWS, WINDOWS + 1])
@pytest.mark.parametrize("share", [1.0, CRAMPED], ids=["memory", "file"])
def test_a_window_depends_on_its_batch_alone(share: float, batch_size: int, stack: Stack) -> None:
    """Batches, the last of which may be smaller, are run one by one, with nothing in between."""
    runner = make_runner(stack, batch_size, share)
    alone = []
    for part in IDS.split(batch_size):
        h_BTD = runner.enter(part)[0]
        alone.append([h_BTD])
        for block in stack.blocks:
            h_BTD = runner.apply(runner.weights.of(block), block.dense, h_BTD)
            alone[-1].append(h_BTD)
    walked = 0
    for h_WTD, parts in zip(runner.walk(stack, IDS), zip(*alone, strict=True), strict=True):
        assert torch.equal(h_WTD, torch.cat(parts))
        walked += 1
    assert walked == DEPTH + 1


@pytest.mark.parametrize("walk", [losses, states, states_of_two])
def test_where_states_wait_changes_no_bit(walk: Walk, stack: Stack) -> None:
    roomy, cramped = make_runner(stack), make_runner(stack, share=CRAMPED)
    for one, other in zip(walk(roomy, stack), walk(cramped, stack), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [1.0, CRAMPED], ids=["pinned", "file"])
def test_states_that_pass_a_gpu_are_those_that_stay_there(share: float, stack: Stack) -> None:
    gpu = torch.device("cuda")
    staying = Runner(stack, gpu, torch.float32, 3)
    passing = Runner(stack, gpu, torch.float32, 3, memory_share=CRAMPED, host_share=share)
    for here, there in zip(staying.walk(stack, IDS), passing.walk(stack, IDS), strict=True):
        assert here.is_cuda and there.is_pinned() == (share == 1.0) and not there.is_cuda
        assert torch.equal(here.cpu(), there)
    assert torch.equal(*losses(staying, stack), *losses(passing, stack))


def test_states_of_another_dtype_are_not_rounded(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner_module.run_block
    monkeypatch.setattr(runner_module, "run_block", lambda *given: real(*given).double())
    with pytest.raises(UserError, match=r"model\.dtype .*block 0 returns torch\.float64"):
        losses(make_runner(stack), stack)


# --- what is held ---


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}
        """Bytes that count of each storage: none of those made before."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), before=True)
        made = call(*args, **(kwargs or {}))
        self._see(made, before=False)
        self.peak = max(self.peak, self.alive)
        return made

    def _see(self, values: Any, before: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = 0 if before else storage.nbytes()
                    self.alive += self._known[storage._cdata]
                    weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.alive -= self._known.pop(key)


@pytest.mark.parametrize(("walk", "sets"), [(losses, 1), (states, 2), (states_of_two, 2)])
def test_a_walk_holds_one_set_of_states_and_training_a_second(
    walk: Walk, sets: int, stack: Stack
) -> None:
    runner = Runner(stack, CPU, torch.float32, 1, weights="resident")
    walk(runner, stack)  # which loads the weights
    with Held() as held:
        walk(runner, stack)
    assert sets * SET <= held.peak < (sets + 0.5) * SET


def test_states_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: 4 * SET)  # half of it for states
    made: list[str] = []
    monkeypatch.setattr(placement, "_in_file", lambda *_: made.append("file"))
    shape = (WINDOWS, LENGTH, HIDDEN)
    for sets, share, files in ((1, 1.0, 0), (2, 1.0, 0), (3, 1.0, 3), (2, 0.9, 2), (1, 0.5, 0)):
        made.clear()
        assert len(empty_states(shape, torch.float32, CPU, sets, host_share=share)) == sets
        assert len(made) == files


def test_a_file_of_states_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, other = empty_states((3, 5, 7), torch.bfloat16, CPU, 2, host_share=0)
    assert not list(tmp_path.iterdir())
    one.fill_(1)
    other.fill_(2)
    assert (one.shape, one.dtype) == ((3, 5, 7), torch.bfloat16)
    assert one.sum() == 105 and other.sum() == 210
    mapped = Path("/proc/self/maps").read_text()
    assert mapped.count(f"{tmp_path}/fusegpt-states-") == 2


def test_a_disk_without_room_says_so_before_the_walk() -> None:
    with pytest.raises(StorageError, match=r"no room for 4000000\.0 GB of states.* set TMPDIR"):
        empty_states((10**9, 10**3, 10**3), torch.float32, CPU)


def test_what_torch_has_reserved_on_a_gpu_for_nobody_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert memory.free_bytes(torch.device("cuda")) == 10 + 70 - 30
