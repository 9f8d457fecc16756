"""Fine-tuning a group as a Ray Train job that runs DeepSpeed: data-parallel, ZeRO 0–3, on GPUs or (with gloo) on CPUs.

Notable:
- a worker holds the group's blocks and nothing else of the model; contexts (masks, rotary embeddings) are sent to it;
- the loss batch is split over the workers, and the loss keeps its meaning (see `fusion/loss.py`);
- a worker that is lost ends the attempt within `Workers.patience` seconds, and slow work of a single
  one does not (`meeting.py`);
- what learns is float32 beside frozen bf16 buffers, so DeepSpeed runs in float32 and the masters need no second copy; only
  `trained_dtype: model` on a 16-bit model asks DeepSpeed for bf16 masters and optimizer states, as the paper's code has them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import ray.data
import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.distributed import distributed_c10d

from fusegpt_ray.distributed.meeting import PATIENCE, Meeting, lost_worker
from fusegpt_ray.distributed.progress import Progress, watching
from fusegpt_ray.distributed.states import batches
from fusegpt_ray.fusion.round import Round, Saved, build_student, save_group
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.sections import Fusion
from fusegpt_ray.store import storage
from fusegpt_ray.training.checkpoints import Savepoints, Say
from fusegpt_ray.training.loop import (
    Batch,
    cosine_to_zero,
    load_training_state,
    make_optimizer,
    train,
    training_state,
)
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.workers.base import Epoch

MAX_FAILURES = 3
"""How often a group is started again after a lost worker or node; every start gives the same result."""


@dataclass(frozen=True)
class Workers:
    """The training workers of a group."""

    count: int
    cpus: float
    gpus: float
    threads: int
    dtype: torch.dtype
    """Of the arithmetic."""
    zero_stage: int
    micro_batch: int
    """Windows that pass the group at once, of a worker's share of the loss batch."""
    recompute: bool = False
    """See `Student`."""
    source: Source | None = None
    """Of a hub model, which a node that joins later does not have yet."""
    patience: float = PATIENCE
    """Seconds that one of them may be silent before the others give it up."""


def setup(workers: Workers) -> dict[str, str | int]:
    """What a worker's part of a savepoint depends on: how parameters are split, and who splits them."""
    device, version = "cuda" if workers.gpus else "cpu", importlib.metadata.version("deepspeed")
    return {
        "engine": f"deepspeed {version}",
        "device": device,
        "workers": workers.count,
        "zero_stage": workers.zero_stage,
    }


@dataclass
class DeepSpeedStepper:
    """One of the workers: a DeepSpeed engine around the student."""

    engine: Any
    settings: Fusion
    device: torch.device
    micro_batch: int
    meet: Callable[[], None] = lambda: None
    """Wait for the other workers after work that may take one of them longer."""

    @classmethod
    def make(
        cls,
        student: torch.nn.Module,
        settings: Fusion,
        steps: int,
        stage: int,
        device: torch.device,
        micro_batch: int,
        patience: float = PATIENCE,
        meet: Callable[[], None] = lambda: None,
    ) -> DeepSpeedStepper:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Gradients of workers on CPUs meet by gloo: DeepSpeed's own way would be compiled first, for a minute, if there is a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = make_optimizer(student, settings)
        trained = [value for value in student.parameters() if value.requires_grad]
        config = deepspeed_config(
            settings,
            dist.get_world_size(),
            stage,
            trained=sum(value.numel() for value in trained),
            bf16=trained[0].dtype == torch.bfloat16,
        )
        engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=optimizer,
            lr_scheduler=cosine_to_zero(optimizer, steps),
            config=config,
        )
        # DeepSpeed makes a group of its own, which would wait for torch's default, half an hour.
        bound = timedelta(seconds=patience)
        distributed_c10d._set_pg_timeout(bound, engine.data_parallel_group)
        return cls(engine, settings, device, micro_batch, meet)

    def step(self, batch: Batch) -> torch.Tensor:
        entering, leaving = (states.to(self.device, non_blocking=True) for states in batch)
        shared = dist.get_world_size() > 1
        loss = accumulate(
            self.engine,
            self._backward,
            entering,
            leaving,
            self.settings.loss,
            self.micro_batch,
            shared,
        )
        self.engine.step()
        return loss

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(
            last
        )  # the workers' gradients meet, and the optimizer steps, after the last
        self.engine.backward(loss)

    def mean(self, losses: torch.Tensor) -> float:
        mean = losses.mean()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    @property
    def worker(self) -> int:
        return int(dist.get_rank())

    def gather(self, row: list[int]) -> list[list[int]]:
        self.meet()
        mine = torch.tensor(row, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        return [each.tolist() for each in rows]

    def state(self) -> dict[str, torch.Tensor]:
        """Of the masters that this worker updates: with ZeRO its part of each parameter group."""
        return training_state(self.engine.lr_scheduler, self._masters)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """The masters are put in place, then the parameters made of them by what a step of DeepSpeed ends with."""
        load_training_state(state, self.engine.lr_scheduler, self._masters)
        zero, stage = self.engine.optimizer, self.engine.zero_optimization_stage()
        if stage == 3:
            zero.checkpoint_event_prologue()
            for number in range(len(self._masters)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            zero.checkpoint_event_epilogue()
        elif stage:
            zero.update_lp_params()

    @property
    def _masters(self) -> list[torch.Tensor]:
        if (
            self.engine.zero_optimization_stage() == 3
        ):  # it hands them to the optimizer only while that steps
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [
            value for group in self.engine.basic_optimizer.param_groups for value in group["params"]
        ]


def deepspeed_config(
    settings: Fusion, workers: int, stage: int, trained: int, bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration for one loss batch a step, no clipping (its default is 1), our own Adam. We accumulate ourselves.

    `trained`: how many numbers learn. The bucket in which their gradients meet is else of 5e8, 2 GB on every worker.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch // workers,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(trained, 500_000_000)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if bf16:  # DeepSpeed keeps bf16 masters only where ZeRO partitions them; stage 1 is the same arithmetic as 0
        config["zero_optimization"]["stage"] = max(stage, 1)
        config["bf16"] = {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        }
    return config


def unsplit_in_order() -> DataConfig:
    """Every worker can read every dataset, batch after batch in order: Ray Train else lets the formatting threads race."""
    return DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True))


def finetune(
    job: Round,
    contexts: list[Context],
    windows: int,
    datasets: dict[str, ray.data.Dataset],
    workers: Workers,
    folder: str,
    epoch: Epoch,
    savepoints: Savepoints | None = None,
    say: Say = lambda _: None,
) -> tuple[Saved, list[float]]:
    """Run the job; `folder` is Ray Train's own, removed afterwards. Returns the new blocks and the epochs' losses.

    Raises:
        FloatingPointError: the loss is not finite.
        MemoryError: a worker's memory ran out while it trained.
        ray.train.TrainingFailedError: the workers failed more than `MAX_FAILURES` times.
    """
    progress = Progress.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _work,
        torch_config=TorchConfig(timeout_s=math.ceil(workers.patience)),
        train_loop_config={
            "job": job,
            "contexts": ray.put(contexts),
            "steps": job.settings.epochs * windows // job.settings.batch,
            "workers": workers,
            "progress": progress,
            "savepoints": savepoints,
        },
        datasets=datasets,
        dataset_config=unsplit_in_order(),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={
                "CPU": workers.cpus,
                **({"GPU": workers.gpus} if workers.gpus else {}),
            },
        ),
        run_config=RunConfig(
            name=f"without-{job.donor:03d}",
            **_place(folder),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    with watching(progress, epoch, say):
        result = trainer.fit()
    storage.remove(folder, recursive=True)
    done = result.return_value
    if "out_of_memory" in done:
        raise MemoryError(done["out_of_memory"])
    if "error" in done:
        raise FloatingPointError(done["error"])
    return Saved.from_json(done["saved"]), done["losses"]


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """One training worker.

    Where the memory of one runs out, the others may wait for it in a collective for ever. So it leaves a note and fails; Ray Train
    starts all of them again, and now all find the note and end.
    """
    if error := ray.get(config["progress"].has_run_out.remote()):
        return {"out_of_memory": error}
    with Meeting.of_group(config["workers"].patience) as meeting:
        return _learn(config, meeting)


def _learn(config: dict[str, Any], meeting: Meeting) -> dict[str, Any]:
    job, workers = config["job"], config["workers"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(workers.threads)
    if workers.source is not None:
        workers.source.fetch()
    device, dtype = get_device(), workers.dtype
    meta_blocks, contexts = build_meta_blocks(job.dense.config), ray.get(config["contexts"])
    student = build_student(job, meta_blocks, contexts, job.plan(dtype), device, workers.recompute)
    # What one of them reads or writes by itself is no more than all of this in float32, and of a
    # savepoint two moments more.
    moved = 12 * sum(value.numel() for value in (*student.parameters(), *student.buffers()))
    meet = partial(meeting.wait, moved)
    meeting.wait(moved + (_bytes_of(job.dense) if workers.source is not None else 0))
    stage, micro_batch, patience = workers.zero_stage, workers.micro_batch, workers.patience
    settings, steps = job.settings, config["steps"]
    stepper = DeepSpeedStepper.make(
        student, settings, steps, stage, device, micro_batch, patience, meet
    )
    shard = ray.train.get_dataset_shard(f"states-{rank}")

    def epoch() -> Iterator[Batch]:
        for number, batch in enumerate(batches(shard, job.settings.batch // workers.count)):
            if not number:  # the first worker has finished its savepoint, and everyone's data flow
                meet()
            yield batch

    def done(number: int, loss: float) -> None:
        if rank == 0:
            config["progress"].add.remote((number, loss))

    def say(text: str) -> None:
        config["progress"].add.remote(text)

    try:
        losses = train(stepper, epoch, job.settings.epochs, done, config["savepoints"], say)
        saved: dict[str, Any] = {}
        with _whole(student, stage):
            if rank == 0:
                saved = save_group(job, student).to_json()
            meet()  # nobody leaves while the first worker still needs the others' partitions
    except (
        FloatingPointError
    ) as error:  # every worker sees the same mean loss; starting again would end the same way
        return {"error": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            ray.get(config["progress"].ran_out.remote(str(error)))
        if lost := lost_worker(error, workers.patience):
            say(f"WARNING: {lost}; this attempt at the group ends")
            raise lost from error
        raise
    stepper.engine.destroy()
    return {"saved": saved, "losses": losses}


def _bytes_of(stack: Stack) -> int:
    blocks = [block.weights for block in stack.blocks]
    return sum(ref.end - ref.begin for refs in (stack.trunk, *blocks) for ref in refs.values())


def _whole(student: torch.nn.Module, stage: int) -> AbstractContextManager[Any]:
    """ZeRO-3 keeps a part of every parameter on each worker; inside, they are whole."""
    if stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(student.parameters()))


def _place(folder: str) -> dict[str, Any]:
    """Where Ray Train keeps its own files: anywhere fsspec reaches."""
    fs, path = storage.filesystem(folder)
    if "file" in fs.protocol:
        return {"storage_path": path}
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
