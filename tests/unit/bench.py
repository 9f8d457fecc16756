"""A group of a tiny model on a bench: fine-tuned, stopped and started again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_stack, token_windows

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store import storage
from fusegpt_ray.termination import sigterm_stops
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.training.stepper import TorchStepper
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.local import LocalWorkers

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH, EPOCHS = 8, 7, 4, 4
WHOLE = WINDOWS // BATCH
"""Steps of an epoch."""


class Stopped(Exception):
    """Stands for a kill: nothing is tidied up after it."""


@dataclass
class Bench:
    """A group of a tiny model, fine-tuned by the local engine as often as asked; what it says,
    and the steps it makes.
    """

    model: Path
    folder: str
    said: list[str] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """The micro-batch of each."""
    fits: int = BATCH
    """Windows at once that the memory has room for, from the first step on; see `until`."""
    until: int = 0
    """Steps that have room for any number."""

    def tune(
        self,
        stop: int | None = None,
        origin: str = "these rounds",
        terminated: int | None = None,
        **cluster: Any,
    ) -> Trained:
        """As one start of a run; `stop`: the epoch after which it is killed; `terminated`: the step
        in which SIGTERM comes.
        """
        recipe = Recipe.parse(
            {
                "model": {"source": str(self.model)},
                "calibration": {"data": "unused", "windows": WINDOWS, "length": LENGTH},
                "importance": {"windows": WINDOWS, "batch": 4},
                "fusion": {
                    "group_size": 3,
                    "epochs": EPOCHS,
                    "batch": BATCH,
                    "rank": 4,
                    "lora_rank": 4,
                    "fold": "at_end",  # so that what was learned is saved, too
                },
                "cluster": {"engine": "local", "checkpoint_minutes": 0, **cluster},
                "output": {"uri": "unused", "name": "x"},
            }
        )
        dense = open_stack(self.model)
        job = GroupFusion(dense, dense, 2, recipe.fusion, True, 0, self.folder)
        self.said, self.heard, self.steps = [], [], []

        def news(item: News) -> None:
            if isinstance(item, str):
                self.said.append(item)
                return
            self.heard.append(item[0])
            if item[0] == stop:
                raise Stopped

        step = TorchStepper.step

        def counted(stepper: TorchStepper, batch: Any) -> torch.Tensor:
            rows = stepper.micro_batch or BATCH
            if rows > self.fits and len(self.steps) >= self.until:
                raise MemoryError("as if")
            self.steps.append(rows)
            if len(self.steps) == terminated:
                signal.raise_signal(signal.SIGTERM)
            return step(stepper, batch)

        with (
            pytest.MonkeyPatch.context() as patch,
            LocalWorkers(Setup.of(recipe, Source.find(str(self.model), None), dense)) as engine,
            sigterm_stops(),
        ):
            patch.setattr(TorchStepper, "step", counted)
            windows_WT = token_windows(WINDOWS, LENGTH).numpy()
            return train_span(engine, job.task(windows_WT, recipe.cluster, origin, self.kept), news)

    def stopped(self, after: int, **changes: Any) -> None:
        with pytest.raises(Stopped):
            self.tune(after, **changes)

    @property
    def kept(self) -> str:
        return storage.join(self.folder, "checkpoints")

    def files(self) -> dict[str, bytes]:
        return {
            name: storage.read(storage.join(self.kept, name)) for name in storage.names(self.kept)
        }

    def state_file(self) -> str:
        (name,) = [name for name in self.files() if name != "checkpoint.json"]
        return storage.join(self.kept, name)


def result(tuned: Trained) -> tuple[dict[str, tuple[int, str]], list[float], int]:
    """What must not depend on being stopped: all files by name and checksum, the losses, and
    the windows at once.
    """
    files = {
        uri.rsplit("/", 1)[-1]: (record.size, record.sha256)
        for uri, record in tuned.saved.files.items()
    }
    assert len(files) == 6
    return files, tuned.losses, tuned.micro_batch


@pytest.fixture(name="bench")
def _bench(request: Any, checkpoint: Callable[[str], Path], tmp_path: Path) -> Bench:
    store = getattr(request, "param", "")
    return Bench(checkpoint("llama"), f"{store}{tmp_path}/run")


@pytest.fixture(name="undisturbed")
def _undisturbed(bench: Bench, tmp_path: Path) -> Any:
    there = replace(bench, folder=str(tmp_path / "undisturbed"))
    return result(there.tune(checkpoint_minutes=1e6))
