"""Ray's tasks and training workers whose memory runs out; the limit is a real one of their
processes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cramped
import pytest
import ray
import torch
from cramped import LENGTH, LIMITS, MB, TRAINED, limit_memory, save_wide
from models import open_stack, token_windows

from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion, Importance
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.training.finetune import train_span
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.task import SavedBlocks
from fusegpt_ray.workers.base import Setup

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

WORKERS = 2


@dataclass(frozen=True)
class Cramped:
    """A group whose workers may take only `more` bytes from their first step on: their threads have
    started by then.
    """

    group: GroupFusion
    more: int

    def build(self, *arguments: Any) -> Span:
        span = self.group.build(*arguments)

        def limit(*_: Any) -> None:
            hook.remove()
            limit_memory(self.more)

        hook = span.learned.register_forward_pre_hook(limit)
        return span

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return self.group.parameter_groups(span)

    def save(self, span: Span, part: int = 0, parts: int = 1) -> SavedBlocks:
        return self.group.save(span, part, parts)


def test_training_workers_that_run_out_of_memory_start_again_with_less(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cramped, sys.modules[__name__]):  # workers do not find the tests' modules
        ray.cloudpickle.register_pickle_by_value(module)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    model = save_wide(tmp_path / "wide")
    dense = open_stack(model)
    cluster = Cluster(engine="ray", workers=WORKERS, zero_stage=2)
    setup = Setup(
        Source.find(str(model), None),
        dense,
        cluster,
        "float32",
        Importance(batch=4),
        trains=True,
        output_uri=str(tmp_path),
        run_folder=str(tmp_path / "run"),
    )
    values = {"group_size": 3, "rank": 4, "lora_rank": 4, "epochs": 1, "batch": TRAINED}
    group = GroupFusion(
        dense, dense, 2, Fusion(**PRESETS["paper"]["fusion"] | values), True, 0, str(tmp_path)
    )
    windows_WT = token_windows(TRAINED * 2, LENGTH).numpy()
    task = group.task(windows_WT, cluster, "dense", str(tmp_path / "checkpoints"))
    # Two workers hold half of the loss batch each. What gloo and DeepSpeed take themselves comes on
    # top; with DeepSpeed's own bucket of 2 GB nothing would fit.
    task = replace(task, trainable=Cramped(group, LIMITS["finetune"] // WORKERS + 20 * MB))
    with RayWorkers(setup) as workers:
        trained = train_span(workers, task, lambda _: None)
    assert trained.micro_batch < TRAINED // WORKERS
    assert trained.losses[0] > 0


def test_errors_of_tasks_and_of_ray_data_are_known(ray_session: None) -> None:
    def ask(rows: dict[str, object]) -> dict[str, object]:
        torch.empty(10**15)
        return rows

    with pytest.raises(Exception, match="can't allocate memory") as of_task:
        ray.get(ray.remote(ask).remote({}))
    with pytest.raises(Exception, match="can't allocate memory") as of_data:
        ray.data.range(2).map_batches(ask).materialize()
    assert is_out_of_memory(of_task.value)
    assert is_out_of_memory(of_data.value)
