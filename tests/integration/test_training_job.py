"""One Ray Train job serves a whole run: its workers keep their processes from task to task, and
what a task raises reaches the driver."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from groups import LENGTH, SMALL
from models import open_stack, token_windows

from fusegpt_ray.distributed import silence, training_job
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.distributed.silence import SilentError
from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Block
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion, Heal, Importance
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.workers.base import News, Setup, TrainingWorker, Workers
from fusegpt_ray.workers.local import LocalWorkers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

Weights = dict[str, torch.Tensor]
WINDOWS, BATCH, EPOCHS, WORKERS = 16, 4, 2, 2  # 8 steps


def setup_of(model: Path, out: Path, dtype: str = "bfloat16", **cluster: Any) -> Setup:
    return Setup(
        Source.find(str(model), None),
        open_stack(model),
        Cluster(**{"engine": "ray", "workers": WORKERS, "zero_stage": 1} | cluster),
        dtype,  # type: ignore[arg-type]
        Importance(batch=BATCH),
        trains=True,
        output_uri=str(out),
        run_folder=str(out / "run"),
    )


@pytest.fixture(scope="module")
def workers(
    ray_session: None, checkpoint: Callable[[str], Path], tmp_path_factory: Any
) -> Iterator[RayWorkers]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find it
    out = tmp_path_factory.mktemp("out")
    with RayWorkers(setup_of(checkpoint("llama"), out)) as opened:
        yield opened


def nothing(_: News) -> None:
    """Hears what workers report."""


def fuse(workers: Workers, donor: int, out: Path) -> Trained:
    """Two fusions of one run differ in their donor."""
    dense = workers.setup.dense
    settings = Fusion(**SMALL | {"batch": BATCH, "epochs": EPOCHS})
    group = GroupFusion(dense, dense, donor, settings, True, 0, str(out))
    windows_WT = token_windows(WINDOWS, LENGTH).numpy()
    task = group.task(windows_WT, workers.setup.cluster, "dense", str(out / "checkpoints"))
    return train_span(workers, task, nothing)


def heal(workers: Workers, out: Path) -> Trained:
    dense = workers.setup.dense
    settings = Heal(batch=BATCH, held_out=4, looks=EPOCHS, train="all", learning_rate=3e-4)
    model = WholeModel(dense.drop(2), dense, settings, 0, str(out / "blocks"))
    ids_WT = token_windows(WINDOWS + 4, LENGTH).numpy()
    texts = ids_WT[:WINDOWS], ids_WT[WINDOWS:]
    place = str(out / "checkpoints")
    return train_span(workers, model.task(*texts, workers.setup.cluster, {}, place), nothing)


def process(worker: TrainingWorker) -> tuple[int, int]:
    return worker.rank, os.getpid()


def test_bf16_with_float32_masters_learns_what_one_process_learns(
    workers: RayWorkers, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two groups and the whole model, one after the other, by the same two processes. The single
    process passes as many windows at once as each of them: some CPUs round a batch of another size
    in another way. So between both ways, only the order differs in which gradients are added."""
    before = workers.spmd(process, news=nothing)
    ours = trainings(workers, tmp_path / "ray")
    assert workers.spmd(process, news=nothing) == before
    share = {"workers": 1, "micro_batch": BATCH // WORKERS}
    with LocalWorkers(setup_of(checkpoint("llama"), tmp_path, **share)) as alone:
        theirs = trainings(alone, tmp_path / "local")
    for one, other in zip(ours, theirs, strict=True):
        # A rounding of bf16 is 4e-3; the mean over thousands of numbers hides most of it. Later
        # losses may use all of it: the order of adding has moved their weights apart, too.
        assert one.losses[0] == pytest.approx(other.losses[0], rel=2e-3)
        assert one.losses == pytest.approx(other.losses, rel=4e-3)
        assert one.losses[-1] < 0.97 * one.losses[0]
        assert one.saved.blocks.keys() == other.saved.blocks.keys()
        for dense, block in other.saved.blocks.items():
            before_training = workers.setup.dense.blocks[dense]
            compare(*(read(each) for each in (one.saved.blocks[dense], block, before_training)))


def trainings(workers: Workers, out: Path) -> list[Trained]:
    groups = [fuse(workers, donor, out / f"without-{donor}") for donor in (2, 4)]
    return [*groups, heal(workers, out / "healed")]


def read(block: Block) -> dict[str, torch.Tensor]:
    return read_tensors(block.weights)


def compare(ours: Weights, theirs: Weights, before: Weights) -> None:
    """Adam's first steps have the size of the learning rate whatever the gradient's, so where the
    sign of a gradient is a matter of rounding, a weight may move the other way. There are few of
    them: on average, weights are apart by a small part of how far they moved."""
    assert ours.keys() == theirs.keys() == before.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float32
        moved = (theirs[name] - before[name].float()).abs().mean()
        assert (tensor - theirs[name]).abs().mean() < 0.05 * moved, name


@pytest.mark.parametrize("kind", [FloatingPointError, MemoryError, UserError])
def test_what_a_task_raises_reaches_the_driver_and_the_next_task_is_done(
    workers: RayWorkers, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="because"):
        workers.spmd(fail, kind, news=nothing)
    assert [rank for rank, _ in workers.spmd(process, news=nothing)] == [0, 1]


def fail(worker: TrainingWorker, kind: type[Exception]) -> None:
    raise kind("because") if kind is not UserError else UserError("key", 1, "because", "mend it")


@pytest.mark.parametrize("fails", [False, True])
def test_workers_have_made_room_when_the_driver_hears_of_the_end(
    workers: RayWorkers, tmp_path: Path, fails: bool
) -> None:
    """Replicas bring their weights back to the same GPUs at once. (Of a failure the driver hears
    from the first worker that tells it.)
    """
    with pytest.raises(FloatingPointError) if fails else nullcontext():
        workers.spmd(make_room_slowly, str(tmp_path), fails, news=nothing)
    made_room = {path.name for path in tmp_path.iterdir()}
    assert made_room if fails else made_room == {"0", "1"}


def make_room_slowly(worker: TrainingWorker, folder: str, fails: bool) -> None:
    real = worker.runner.offload

    def offload() -> None:
        time.sleep(1)
        real()
        del worker.runner.offload  # the class's again
        (Path(folder) / str(worker.rank)).touch()

    worker.runner.offload = offload  # type: ignore[method-assign]
    worker.meet(0)
    if fails:
        raise FloatingPointError("the loss is not finite")


def test_an_error_of_a_library_is_tried_again_and_then_raised(
    workers: RayWorkers, tmp_path: Path
) -> None:
    heard: list[News] = []
    with pytest.raises(KeyError, match="unlucky"):
        workers.spmd(count_and_fail, str(tmp_path), news=heard.append)
    attempts = len(list(tmp_path.iterdir()))
    assert attempts == 4
    assert all(isinstance(news, str) and "KeyError: 'unlucky'" in news for news in heard)
    assert [rank for rank, _ in workers.spmd(process, news=nothing)] == [0, 1]


def count_and_fail(worker: TrainingWorker, folder: str) -> None:
    (Path(folder) / f"{worker.rank}-{os.getpid()}").touch()
    worker.meet(0)
    if worker.rank == 1:
        (Path(folder) / f"{worker.rank}-{os.getpid()}").unlink()
    raise KeyError("unlucky")


def test_a_worker_that_is_killed_between_tasks_is_replaced(workers: RayWorkers) -> None:
    _, (_, victim) = workers.spmd(process, news=nothing)
    os.kill(victim, signal.SIGKILL)
    again = workers.spmd(process, news=nothing)
    assert [rank for rank, _ in again] == [0, 1]
    assert victim not in {pid for _, pid in again}


def test_a_worker_that_is_killed_in_a_task_is_replaced(workers: RayWorkers, tmp_path: Path) -> None:
    found = workers.spmd(die_once, str(tmp_path / "mark"), news=nothing)
    assert found == [0, 1]


def die_once(worker: TrainingWorker, mark: str) -> int:
    if worker.rank == 1 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    worker.meet(0)
    return worker.rank


def test_a_mailbox_that_hangs_is_told_and_ended(
    workers: RayWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: Ray takes it for alive."""
    workers._start_training()
    look = workers._job._mailbox.__ray_call__.remote(lambda _: os.getpid())
    mailbox = psutil.Process(ray.get(look))
    monkeypatch.setattr(silence, "TIMEOUT", 3.0)
    monkeypatch.setattr(training_job, "END_SECONDS", 2.0)
    mailbox.suspend()
    with pytest.raises(SilentError, match=r"for 3 s.*give the command again"):
        workers.spmd(process, news=nothing)
    workers._end_training()
    mailbox.wait(30)
