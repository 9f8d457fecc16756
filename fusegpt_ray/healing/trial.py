"""A short healing on one replica, of which only the held-out loss is wanted.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.memory import empty_cache
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.samples import Batch
from fusegpt_ray.training.finetune import learn
from fusegpt_ray.workers.base import News, TrainingWorker


def trial(
    runner: Runner,
    model: WholeModel,
    windows: Batch,
    held_out: Batch,
    cluster: Cluster,
) -> list[float]:
    """The task of a replica: the held-out loss before the training and after each part; nothing if
    the training diverged. As many windows pass a block at once as the runner is set to.
    """
    worker = TrainingWorker(0, 1, runner.device, None, runner, _unheard)
    task = model.task(windows, held_out, cluster, {}, "")
    try:
        return learn(worker, task, runner.batch_size, runner.batch_size).held_out
    except FloatingPointError:
        return []
    finally:
        worker.memory.clear()
        empty_cache()


def _unheard(news: News) -> None:
    """Nobody waits for a trial's epochs."""
