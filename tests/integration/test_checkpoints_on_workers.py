"""Savepoints of DeepSpeed's workers: every ZeRO stage, one worker and two, goes on to the same
bytes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import open_stack, token_windows
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.distributed import training
from fusegpt_ray.distributed.training import DeepSpeedStepper, Workers, deepspeed_config
from fusegpt_ray.fusion.round import Round, build_student, group_states
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.sections import PRESETS, Fusion
from fusegpt_ray.training.checkpoints import Savepoints
from fusegpt_ray.training.loop import batches_of, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH, EPOCHS, STOP = 8, 12, 4, 4, 2
STEPS = EPOCHS * WINDOWS // BATCH
SETTINGS = {
    "group_size": 3,
    "rank": 4,
    "lora_rank": 4,
    "epochs": EPOCHS,
    "batch": BATCH,
    "learning_rate": 0.01,
    "lora_learning_rate": 0.005,
}
STAGES = ("0", "1", "2", "3", "3 in parts")
"""ZeRO's; \"in parts\": without exempting small parameters from being split, which would be all
of the tiny model's."""
MODES = [
    *itertools.product(("float32",), STAGES),
    ("bfloat16", "1"),
    ("bfloat16", "2"),
    ("bfloat16", "3 in parts"),
]
"""Arithmetic and all that learns in it, and stage."""

DAMAGED = ("float32", "3")

Mode = tuple[str, str]


@dataclass(frozen=True)
class Outcome:
    """What one worker saw."""

    files: dict[str, str]
    """SHA-256 of the blocks (the first worker's), by name."""
    losses: list[float]
    epochs: list[int]
    said: list[str]


class Stopped(Exception):
    """Stands for a kill."""


def work(rank: int, workers: int, folder: Path, out: Path) -> None:
    """One of the workers, in every mode: undisturbed, by recomputing activations, stopped and
    gone on, and with a damaged file.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meet{workers}", rank=rank, world_size=workers
    )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    found: dict[tuple[Mode, str], Outcome] = {}
    for mode in MODES:
        place = f"{out}/{workers}-{'-'.join(mode)}-"
        tune = Tune(rank, workers, folder, mode)
        found[mode, "undisturbed"] = tune(f"{place}undisturbed", minutes=1e6)
        found[mode, "recomputed"] = tune(f"{place}recomputed", minutes=1e6, recompute=True)
        tune(f"{place}stopped", stop=STOP)
        found[mode, "stopped"] = tune(f"{place}stopped")
        if (workers, mode) == (2, DAMAGED):
            tune(f"{place}damaged", stop=STOP)
            if rank == 0:
                (file,) = Path(f"{place}damaged/savepoints").glob("*worker-1.safetensors")
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            dist.barrier()
            found[mode, "damaged"] = tune(f"{place}damaged")
    torch.save(found, out / f"found{workers}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def config(*arguments: Any, parts: bool, **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    found = deepspeed_config(*arguments, **more)
    if parts:
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return found


@dataclass
class Tune:
    """Fine-tunes the tiny model's group without block 2."""

    rank: int
    workers: int
    folder: Path
    mode: Mode

    def __call__(
        self, out: str, stop: int = 0, minutes: float = 0, recompute: bool = False
    ) -> Outcome:
        (name, label), share = self.mode, BATCH // self.workers
        stage = int(label[0])
        dtype = getattr(torch, name)
        trained = {"trained_dtype": "float32" if dtype == torch.float32 else "model"}
        stack = open_stack(self.folder)
        job = Round(
            stack, stack, 2, Fusion(**PRESETS["default"] | SETTINGS | trained), True, 0, out
        )
        runner = Runner(stack, CPU, dtype, BATCH)
        rows = torch.arange(WINDOWS).view(-1, self.workers, share)[:, self.rank].ravel()
        entering, leaving = (
            states[rows] for states in group_states(runner, job, token_windows(WINDOWS, LENGTH))
        )
        contexts = runner.trunk.contexts(share, LENGTH)
        student = build_student(
            job, build_meta_blocks(stack.config), contexts, job.plan(dtype), CPU, recompute
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training, "deepspeed_config", partial(config, parts=label.endswith("parts"))
            )
            stepper = DeepSpeedStepper.make(student, job.settings, STEPS, stage, CPU, share)
        setup = training.setup(Workers(self.workers, 1, 0, 1, dtype, stage, share))
        said, epochs = list[str](), list[int]()

        def done(number: int, _: float) -> None:
            epochs.append(number)
            if number == stop:
                raise Stopped

        losses, files = list[float](), dict[str, str]()
        try:
            savepoints = Savepoints.of(job, minutes, share, **setup)
            losses = train(
                stepper,
                lambda: batches_of(entering, leaving, share),
                EPOCHS,
                done,
                savepoints,
                said.append,
            )
        except Stopped:
            pass
        else:
            with training._whole(student, stage):
                if self.rank == 0:
                    saved = training.save_group(job, student).files
                    files = {uri.rsplit("/", 1)[-1]: record.sha256 for uri, record in saved.items()}
        stepper.engine.destroy()
        dist.barrier()
        return Outcome(files, losses, epochs, said)


@pytest.fixture(scope="module")
def found(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[Any]]:
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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_going_on_ends_with_the_same_bytes(
    mode: Mode, workers: int, found: dict[int, list[Any]]
) -> None:
    first = found[workers][0]
    undisturbed, stopped = first[mode, "undisturbed"], first[mode, "stopped"]
    assert (
        len(undisturbed.files) == 6
        and undisturbed.epochs == [1, 2, 3, 4]
        and undisturbed.said == []
    )
    assert stopped.epochs == [3, 4] and stopped.said == [
        f"  going on after epoch {STOP} of {EPOCHS}"
    ]
    assert stopped.losses == undisturbed.losses
    assert stopped.files == undisturbed.files


def test_damage_that_one_worker_finds_is_damage_to_all(found: dict[int, list[Any]]) -> None:
    undisturbed, (first, second) = (
        found[2][0][DAMAGED, "undisturbed"],
        (worker[DAMAGED, "damaged"] for worker in found[2]),
    )
    assert first.epochs == second.epochs == [1, 2, 3, 4]
    assert [line.split(";")[0] for line in first.said] == [
        "WARNING: not every worker finds the savepoint good"
    ]
    assert (
        len(second.said) == 1 and "worker-1.safetensors is not what was written" in second.said[0]
    )
    assert first.files == undisturbed.files


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_activations_computed_again_change_no_bit(
    mode: Mode, workers: int, found: dict[int, list[Any]]
) -> None:
    kept, again = (found[workers][0][mode, way] for way in ("undisturbed", "recomputed"))
    assert kept.losses == again.losses
    assert kept.files == again.files
