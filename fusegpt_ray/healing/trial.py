"""Training on one replica by itself: a short healing, of which only the held-out loss is wanted.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    task = model.task(windows, held_out, cluster, {}, "")
    with learning_alone(runner) as worker:
        try:
            return learn(worker, task, runner.batch_size, runner.batch_size).held_out
        except FloatingPointError:
            return []


@contextmanager
def learning_alone(runner: Runner) -> Iterator[TrainingWorker]:
    """A training worker on the replica's device, for one task."""
    worker = TrainingWorker(0, 1, runner.device, None, runner, _unheard)
    try:
        yield worker
    finally:
        worker.memory.clear()
        empty_cache()


def _unheard(news: News) -> None:
    """Nobody waits for its epochs."""
