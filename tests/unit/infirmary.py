"""A tiny model with a block dropped, healed by the local engine, and by plain torch from the
formulas.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import MODELS, load_model, open_stack, token_windows, without_blocks
from torch import nn

from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Heal, Importance
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.local import LocalWorkers

WINDOWS, HELD_OUT, LENGTH, BATCH, PARTS = 16, 4, 7, 4, 4
IDS = token_windows(WINDOWS + HELD_OUT, LENGTH)
TRAINED, HELD = IDS[:WINDOWS], IDS[WINDOWS:]
DROPPED = 2
STEPS = WINDOWS // BATCH


class Stopped(Exception):
    """Stands for a kill: nothing is tidied up after it."""


@dataclass
class Infirmary:
    """Heals the model of a checkpoint as often as asked."""

    name: str
    folder: Path
    out: Path
    said: list[str] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    states: list[dict[int, int]] = field(default_factory=list)
    """At the end of each part, the windows whose states are there, by part (0: held-out ones)."""

    def __post_init__(self) -> None:
        self.dense = open_stack(self.folder)
        self.stack = self.dense.drop(DROPPED)

    def job(self, **settings: Any) -> WholeModel:
        given = {"batch": BATCH, "looks": PARTS, "held_out": HELD_OUT, "rank": 4, "warmup": 0.3}
        heal = Heal(**given | settings)
        return WholeModel(self.stack, self.dense, heal, 0, str(self.out / "blocks"))

    def heal(
        self,
        stop: int | None = None,
        cluster: dict[str, Any] | None = None,
        windows_WT: torch.Tensor = TRAINED,
        **settings: Any,
    ) -> Trained:
        """As one start of a run; `stop`: the part after which it is killed."""
        asked = Cluster(engine="local", **{"checkpoint_minutes": 0} | (cluster or {}))
        self.said, self.heard, self.states = [], [], []

        def news(item: News) -> None:
            if isinstance(item, str):
                self.said.append(item)
                return
            self.heard.append(item[0])
            kept = here._memory.items()
            self.states.append({part: len(states.entering_WTD) for (*_, part), states in kept})
            if item[0] == stop:
                raise Stopped

        source = Source.find(str(self.folder), None)
        place = str(self.out / "checkpoints")
        with LocalWorkers(Setup(source, self.dense, asked, "float32", Importance(batch=4))) as here:
            held = HELD.numpy()
            job, these = self.job(**settings), windows_WT.numpy()
            task = job.task(these, held, asked, {"of": "these"}, place)
            return train_span(here, task, news)

    def forget(self) -> None:
        """Its training checkpoints, which a run removes once the healing is committed."""
        shutil.rmtree(self.out / "checkpoints")

    def plain(self) -> tuple[Any, Any]:
        """The real student and the real teacher."""
        teacher = load_model(self.folder)
        student = without_blocks(load_model(self.folder), self.name, self.stack.kept)
        return student.requires_grad_(False), teacher.requires_grad_(False)

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        found = model.get_submodule(MODELS[self.name].blocks)
        assert isinstance(found, nn.ModuleList)
        return found


def kl(student: Any, teacher: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of Σ_v p_v log(p_v / q_v), written out."""
    p = teacher(ids_BT).logits.double().softmax(-1)
    q = student(ids_BT).logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def rate(step: int, highest: float, warmup: int = int(0.3 * STEPS)) -> float:
    """Warm-up and cosine, written out."""
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
