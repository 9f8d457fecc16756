"""A tiny model as a runner of its blocks, and the windows that it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import token_windows

from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

CPU = torch.device("cpu")
IDS = token_windows(5, 11)
Tensors = dict[str, torch.Tensor]


def make_runner(stack: Stack, dtype: torch.dtype = torch.float32, rows: int = 16) -> Runner:
    return Runner(stack, CPU, dtype, rows)


def local_workers(folder: Path, importance: Importance) -> LocalWorkers:
    """One process that computes with the model in a folder."""
    source = Source.find(str(folder), None)
    return LocalWorkers(Setup(source, source.stack(), importance=importance))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
