"""Healing is the same in plain torch and on two DeepSpeed workers, with every stage of ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import CPU, process_group
from models import open_stack, token_windows
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Heal
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.checkpoints import Checkpoints
from fusegpt_ray.training.finetune import Outcome, train_and_save
from fusegpt_ray.training.task import SavedBlocks, TrainingTask
from fusegpt_ray.workers.base import News, TrainingWorker

pytestmark = pytest.mark.integration

WINDOWS, HELD_OUT, LENGTH, BATCH, PARTS = 16, 4, 7, 4, 4
BEST_IN_THE_MIDDLE, BEST_AT_THE_END = 0.01, 0.001
MODES = [
    ("all", 0, BEST_AT_THE_END, 2),
    ("lora", 1, BEST_AT_THE_END, 1),
    ("all", 2, BEST_IN_THE_MIDDLE, 1),
    ("lora", 3, BEST_AT_THE_END, 2),
    ("all", 3, BEST_IN_THE_MIDDLE, 2),
    ("all", 1, BEST_AT_THE_END, 1, {"loss": "tokens"}),
    ("lora", 1, BEST_AT_THE_END, 1, {"share": 2}),
    ("all", 3, BEST_AT_THE_END, 2, {"share": 2}),
]
"""What learns, ZeRO stage, rate, windows at once, and what else `heal` says."""
Mode = tuple[Any, ...]
Healed = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Losses of the parts, losses of the held-out windows, weights by block and name."""


def task_of(folder: Path, out: str, mode: Mode, workers: int) -> TrainingTask:
    train, _, rate, micro_batch, *more = mode
    heal = Heal(
        batch=BATCH,
        looks=PARTS,
        held_out=HELD_OUT,
        rank=4,
        warmup=0.3,
        train=train,
        learning_rate=rate,
        **(more[0] if more else {}),
    )
    ids_WT = token_windows(WINDOWS + HELD_OUT, LENGTH).numpy()
    dense = open_stack(folder)
    stack = Sharing(heal.share).of(dense.drop(2))
    model = WholeModel(stack, dense, heal, 0, storage.join(out, "blocks"))
    cluster = Cluster(workers=workers, micro_batch=micro_batch, checkpoint_minutes=0)
    place = storage.join(out, "checkpoints")
    return model.task(ids_WT[:WINDOWS], ids_WT[WINDOWS:], cluster, {"of": "test"}, place)


def heal(folder: Path, out: str, mode: Mode, rank: int, workers: int) -> Outcome:
    """As one worker of so many."""
    task = task_of(folder, out, mode, workers)
    runner = Runner(open_stack(folder), CPU, torch.float32, BATCH)

    def report(news: News) -> None:
        pass

    zero_stage = mode[1] if workers > 1 else None
    worker = TrainingWorker(rank, workers, CPU, zero_stage, runner, report, timeout=300)
    owner = {**task.identity, "workers": workers, "zero_stage": str(zero_stage)}
    checkpoints = Checkpoints.find(task.folder, 0.0, owner, mode[3], task.fence)
    return train_and_save(worker, task, BATCH, checkpoints)


def heal_in_deepspeed(rank: int, workers: int, folder: Path, out: Path) -> None:
    with process_group(rank, workers, out):
        for number, mode in enumerate(MODES):
            outcome = heal(folder, f"{out}/{number}", mode, rank, workers)
            torch.save(outcome, out / f"{number}-{rank}.pt")


def weights(saved: SavedBlocks) -> dict[str, torch.Tensor]:
    return {
        f"{dense}.{name}": value
        for dense, block in saved.blocks.items()
        for name, value in read_tensors(block.weights).items()
    }


@pytest.fixture(scope="module")
def two_workers(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Healed]:
    """By the number of the mode."""
    out = tmp_path_factory.mktemp("healed")
    spawn(heal_in_deepspeed, (2, checkpoint("llama"), out), nprocs=2)

    def found(number: int) -> Healed:
        parts = [torch.load(out / f"{number}-{rank}.pt", weights_only=False) for rank in (0, 1)]
        losses, held_out = parts[0].losses, parts[0].held_out
        assert (losses, held_out) == (parts[1].losses, parts[1].held_out)
        return losses, held_out, weights(SavedBlocks.merged([part.saved for part in parts]))

    return found


@pytest.mark.parametrize("number", range(len(MODES)), ids=map(str, MODES))
def test_two_workers_heal_as_one_process(
    checkpoint: Callable[[str], Path],
    two_workers: Callable[[int], Healed],
    number: int,
    tmp_path: Path,
) -> None:
    mode: Any = MODES[number]
    losses, held_out, found = two_workers(number)
    alone = heal(checkpoint("llama"), str(tmp_path), mode, 0, 1)
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    assert held_out == pytest.approx(alone.held_out, rel=1e-4)
    best = held_out.index(min(held_out))
    if len(mode) == 4:
        assert best == (PARTS if mode[2] == BEST_AT_THE_END else 1)
    expected = weights(alone.saved)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Adam's steps are of the rate's size, also of a gradient that is little but rounding.
        assert (found[name] - value).abs().mean() < 0.02 * mode[2], name
