"""Training checkpoints of DeepSpeed's workers: every ZeRO stage, one worker and two, goes on to the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import Group, fusion, process_group
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.errors import Terminated
from fusegpt_ray.training import deepspeed_stepper, pauses
from fusegpt_ray.training.checkpoints import Checkpoints
from fusegpt_ray.training.deepspeed_stepper import DeepSpeedStepper, deepspeed_config
from fusegpt_ray.training.loop import train
from fusegpt_ray.workers.base import Notices

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

WINDOWS, BATCH, EPOCHS, STOP = 8, 4, 4, 2
STAGES = ("0", "1", "2", "3", "3 in parts")
"""ZeRO's; "in parts": without exempting small parameters from being split, which would be all of
the tiny model's."""
MODES = [
    *(("float32", stage) for stage in STAGES),
    ("bfloat16", "1"),
    ("bfloat16", "2"),
    ("bfloat16", "3 in parts"),
]
"""Arithmetic and all that learns in it, and stage."""
DAMAGED = ("float32", "3")
TOLD = (("float32", "3 in parts"), ("bfloat16", "2"))
"""In these, one worker is told to end within an epoch."""

Mode = tuple[str, str]


@dataclass(frozen=True)
class Outcome:
    """What one worker saw."""

    files: dict[str, str]
    """SHA-256 of the blocks that it wrote, by name."""
    losses: list[float]
    epochs: list[int]
    said: list[str]


class Stopped(Exception):
    """Stands for a kill."""


def work(rank: int, workers: int, folder: Path, out: Path) -> None:
    """One of the workers, in every mode: undisturbed, by recomputing activations, stopped and
    gone on, and with a damaged file.
    """
    found: dict[tuple[Mode, str], Outcome] = {}
    pauses.ASK_SECONDS = 0.0  # of this process alone
    with process_group(rank, workers, out):
        for mode in MODES:
            place = f"{out}/{workers}-{'-'.join(mode)}-"
            tune = Tune(rank, workers, folder, mode)
            found[mode, "undisturbed"] = tune(f"{place}undisturbed", minutes=1e6)
            found[mode, "recomputed"] = tune(f"{place}recomputed", minutes=1e6, recompute=True)
            tune(f"{place}stopped", stop=STOP)
            found[mode, "stopped"] = tune(f"{place}stopped")
            if mode in TOLD:
                tune(f"{place}told", minutes=1e6, told=True)
                found[mode, "told"] = tune(f"{place}told", minutes=1e6)
            if (workers, mode) == (2, DAMAGED):
                tune(f"{place}damaged", stop=STOP)
                if rank == 0:
                    (file,) = Path(f"{place}damaged/checkpoints").glob("*worker-1.safetensors")
                    file.write_bytes(file.read_bytes()[:-1] + b"?")
                dist.barrier()
                found[mode, "damaged"] = tune(f"{place}damaged")
        torch.save(found, out / f"found{workers}-{rank}.pt")


def config(*arguments: Any, parts: bool, **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    found = deepspeed_config(*arguments, **more)
    if parts:
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return found


@dataclass
class Tune:
    """Fine-tunes the tiny model's group without block 2, in the way of `train_and_save`."""

    rank: int
    workers: int
    folder: Path
    mode: Mode

    def __call__(
        self,
        out: str,
        stop: int = 0,
        minutes: float = 0,
        recompute: bool = False,
        told: bool = False,
    ) -> Outcome:
        """`stop`: the epoch after which it is killed; `told`: the last worker is to end after an
        epoch and a step.
        """
        name, label = self.mode
        dtype = getattr(torch, name)
        trained = "float32" if dtype == torch.float32 else "model"
        settings = {"batch": BATCH, "epochs": EPOCHS, "trained_dtype": trained}
        group = Group(
            fusion(self.folder, out, **settings),
            WINDOWS,
            self.rank,
            self.workers,
            zero_stage=int(label[0]),
            dtype=dtype,
            recompute=recompute,
            checkpoints=f"{out}/checkpoints",
        )
        span, states = group.span(), group.states()
        with pytest.MonkeyPatch.context() as patch:
            in_parts = partial(config, parts=label.endswith("parts"))
            patch.setattr(deepspeed_stepper, "deepspeed_config", in_parts)
            stepper = group.stepper(span)
        assert isinstance(stepper, DeepSpeedStepper)
        checkpoints = Checkpoints.find(
            group.task.folder,
            minutes,
            {**group.task.identity, "workers": self.workers, "mode": list(self.mode)},
            group.share,
            group.task.fence,
        )
        said, epochs = list[str](), list[int]()

        def done(number: int, _: float) -> None:
            epochs.append(number)
            if number == stop:
                raise Stopped

        asked = 0

        def ended() -> bool:
            nonlocal asked
            asked += 1
            return told and self.rank == self.workers - 1 and asked == WINDOWS // BATCH + 2

        losses, files = list[float](), dict[str, str]()
        try:
            losses = train(
                stepper,
                lambda _: states.batches(group.share),
                EPOCHS,
                done,
                checkpoints,
                said.append,
                notices=Notices(ended),
            )
        except (Stopped, Terminated):
            pass
        else:
            with stepper.whole(span.learned.blocks):
                saved = group.fusion.save(span, self.rank, self.workers).files
                dist.barrier()
            files = {uri.rsplit("/", 1)[-1]: record.sha256 for uri, record in saved.items()}
        stepper.close()
        dist.barrier()
        return Outcome(files, losses, epochs, said)


Found = dict[int, list[dict[tuple[Mode, str], Outcome]]]


@pytest.fixture(scope="module")
def found(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Workers → what each of them saw."""
    out = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(out / "compiled"))
        groups = [
            spawn(work, (count, checkpoint("llama"), out), nprocs=count, join=False)
            for count in (1, 2)
        ]
    for group in groups:
        while not group.join():
            pass
    assert not (out / "compiled").exists()  # users may have no compiler
    return {
        count: [
            torch.load(out / f"found{count}-{rank}.pt", weights_only=False) for rank in range(count)
        ]
        for count in (1, 2)
    }


def files(found: Found, workers: int, mode: Mode, way: str) -> dict[str, str]:
    """What all workers together wrote: each saves a part of the blocks."""
    parts = [worker[mode, way].files for worker in found[workers]]
    assert all(parts)
    assert sum(map(len, parts)) == 6
    return {name: sha256 for part in parts for name, sha256 in part.items()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_going_on_ends_with_the_same_bytes(mode: Mode, workers: int, found: Found) -> None:
    first = found[workers][0]
    undisturbed, stopped = first[mode, "undisturbed"], first[mode, "stopped"]
    assert (undisturbed.epochs, undisturbed.said) == ([1, 2, 3, 4], [])
    assert stopped.epochs == [3, 4]
    assert stopped.said == [f"  going on after part {STOP} of {EPOCHS}"]
    assert stopped.losses == undisturbed.losses
    assert files(found, workers, mode, "stopped") == files(found, workers, mode, "undisturbed")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", TOLD, ids=" ".join)
def test_told_to_end_it_goes_on_within_an_epoch(mode: Mode, workers: int, found: Found) -> None:
    undisturbed, told = (found[workers][0][mode, way] for way in ("undisturbed", "told"))
    assert told.said == [f"  going on after part 1 of {EPOCHS} and 1 step"]
    assert (told.epochs, told.losses) == ([2, 3, 4], undisturbed.losses)
    assert files(found, workers, mode, "told") == files(found, workers, mode, "undisturbed")


def test_damage_that_one_worker_finds_is_damage_to_all(found: Found) -> None:
    first, second = (worker[DAMAGED, "damaged"] for worker in found[2])
    assert first.epochs == second.epochs == [1, 2, 3, 4]
    (line,) = first.said
    assert line.startswith("WARNING: not every worker finds the training checkpoint good;")
    assert len(second.said) == 1
    assert "worker-1.safetensors is not what was written" in second.said[0]
    assert files(found, 2, DAMAGED, "damaged") == files(found, 2, DAMAGED, "undisturbed")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_activations_computed_again_change_no_bit(mode: Mode, workers: int, found: Found) -> None:
    kept, again = (found[workers][0][mode, way] for way in ("undisturbed", "recomputed"))
    assert kept.losses == again.losses
    assert files(found, workers, mode, "undisturbed") == files(found, workers, mode, "recomputed")
