"""A Ray Train job whose workers are killed, or stop, ends with the same bytes; what they had
learned until a training checkpoint is not learned again."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from models import open_stack, token_windows

from fusegpt_ray.distributed import cluster, training_job
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion, Importance
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.training.finetune import train_span
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.task import SavedBlocks, TrainingTask
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.local import LocalWorkers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

WINDOWS, LENGTH, BATCH, EPOCHS, WORKERS, MICRO = 32, 12, 8, 5, 2, 2
STEPS = WINDOWS // BATCH
"""Of an epoch. A worker forms its span's weights once in each."""
SETTINGS = Fusion(
    **PRESETS["rounds"]["fusion"]
    | {"group_size": 3, "rank": 4, "lora_rank": 4, "epochs": EPOCHS, "batch": BATCH}
    | {"learning_rate": 0.01, "lora_learning_rate": 0.005}
)
KILLED = 4
"""The epoch at whose beginning a worker is killed."""
GOING_ON = f"  going on after part {KILLED - 1} of {EPOCHS}"
NEVER = 1e6
"""Minutes between training checkpoints, where there shall be none."""


@dataclass(frozen=True)
class Disturbed:
    """A group whose second worker gets a signal, once, when an epoch's first step begins."""

    group: GroupFusion
    epoch: int
    by: signal.Signals
    mark: Path
    """A file that says that it has happened."""
    uses_head = False

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        return self.group.loss(trunk)

    def build(self, *arguments: Any) -> Span:
        span, steps = self.group.build(*arguments), 0

        def hook(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == (self.epoch - 1) * STEPS + 1 and torch.distributed.get_rank() == 1:
                try:
                    self.mark.touch(exist_ok=False)
                except FileExistsError:
                    return
                os.kill(os.getpid(), self.by)

        span.learned.register_forward_pre_hook(hook)
        return span

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return self.group.parameter_groups(span)

    def save(self, span: Span, part: int = 0, parts: int = 1) -> SavedBlocks:
        return self.group.save(span, part, parts)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every block file."""
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }
    assert len(found) == 3
    return found


Fit = Callable[..., tuple[list[float], list[int]]]


def training_of(model: Path, out: Path, minutes: float) -> tuple[Setup, TrainingTask]:
    """The fusion of block 2 of the tiny model into its group."""
    dense = open_stack(model)
    asked = Cluster(
        engine="ray",
        workers=WORKERS,
        zero_stage=1,
        micro_batch=MICRO,
        checkpoint_minutes=minutes,
    )
    setup = Setup(
        Source.find(str(model), None),
        dense,
        asked,
        "float32",
        Importance(batch=BATCH),
        trains=True,
        output_uri=str(out),
        run_folder=str(out / "run"),
    )
    group = GroupFusion(dense, dense, 2, SETTINGS, True, 0, str(out))
    windows_WT = token_windows(WINDOWS, LENGTH).numpy()
    return setup, group.task(windows_WT, asked, "dense", str(out / "checkpoints"))


@pytest.fixture(scope="module")
def fit(ray_session, checkpoint) -> Fit:
    """Two workers train the group, one of them disturbed at an epoch, if one is given. The losses,
    and the epochs heard of.

    `minutes`: between training checkpoints.
    """
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find it

    def fit(
        out: Path,
        epoch: int | None = None,
        by: signal.Signals = signal.SIGKILL,
        minutes: float = NEVER,
        say: Callable[[str], None] = print,
    ) -> tuple[list[float], list[int]]:
        setup, task = training_of(checkpoint("llama"), out, minutes)
        group, heard = task.trainable, []
        if epoch is not None:
            task = replace(task, trainable=Disturbed(group, epoch, by, out / "mark"))

        def news(item: News) -> None:
            if isinstance(item, str):
                say(item)
            else:
                heard.append(item[0])

        with RayWorkers(setup) as workers:
            trained = train_span(workers, task, news)
        assert trained.saved.blocks.keys() == {block.dense for block in group.neighbours}
        assert not (out / "run" / "blocks" / "train").exists()
        assert (out / "mark").exists() == (epoch is not None)
        (out / "mark").unlink(missing_ok=True)
        return trained.losses, heard

    return fit


@pytest.fixture(scope="module")
def undisturbed(fit: Fit, checkpoint, tmp_path_factory) -> tuple[dict[str, str], list[float]]:
    """Hashes and losses of a job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    losses, heard = fit(folder)
    assert heard == [1, 2, 3, 4, 5]
    setup, task = training_of(checkpoint("llama"), tmp_path_factory.mktemp("local"), NEVER)
    with LocalWorkers(setup) as workers:
        alone = train_span(workers, task, lambda _: None)
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    return hashes(folder), losses


def test_without_checkpoints_all_is_learned_again(undisturbed, fit: Fit, tmp_path: Path) -> None:
    losses, heard = fit(tmp_path, epoch=2)
    assert heard == [1, 1, 2, 3, 4, 5]
    assert (hashes(tmp_path), losses) == undisturbed


def test_a_killed_worker_costs_the_epochs_since_the_last_checkpoint(
    undisturbed, fit: Fit, tmp_path: Path
) -> None:
    said: list[str] = []
    losses, heard = fit(tmp_path, epoch=KILLED, minutes=0, say=said.append)
    assert heard == [1, 2, 3, 4, 5]
    *warnings, going_on = said  # the other worker may be ended before it can complain
    assert going_on == GOING_ON
    assert all(text.endswith("this attempt at the group ends") for text in warnings)
    assert (hashes(tmp_path), losses) == undisturbed


def test_a_worker_that_stops_is_given_up_and_costs_as_much(
    undisturbed, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection to it stays, and nothing comes from it."""
    said: list[str] = []
    monkeypatch.setattr(cluster, "JobConfig", partial(cluster.JobConfig, timeout=8))
    losses, heard = fit(tmp_path, KILLED, signal.SIGSTOP, minutes=0, say=said.append)
    assert heard == [1, 2, 3, 4, 5]
    warning, going_on = said
    silence = r"WARNING: .*(no heartbeat|is silent|no part) for 8 s; this attempt at the group ends"
    assert re.fullmatch(silence, warning)
    assert going_on == GOING_ON
    assert (hashes(tmp_path), losses) == undisturbed
    stopped = [
        one
        for one in psutil.Process().children(recursive=True)
        if one.status() == psutil.STATUS_STOPPED
    ]
    assert stopped == []


def test_a_run_that_was_given_up_goes_on(
    undisturbed, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody starts the workers again: the job fails, as if its driver had been killed, and the
    same is begun by another."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(training_job, "MAX_RESTARTS", 0)
        with pytest.raises(RuntimeError, match="the training job ended before its task"):
            fit(tmp_path, epoch=KILLED, minutes=0)
    (tmp_path / "mark").unlink()
    losses, heard = fit(tmp_path, minutes=NEVER, say=said.append)
    assert heard == [4, 5]
    assert said == [GOING_ON]
    assert (hashes(tmp_path), losses) == undisturbed
