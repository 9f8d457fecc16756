"""Workers do the work of a run: this process alone (`local.py`), or a Ray cluster (`distributed/`).

A phase of a run (scoring, evaluation, the proof, fine-tuning) is written once, as functions that
workers call: `map` gives tasks to model replicas, `spmd` runs one function on all training workers
at once. Both implementations give the same results.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch

from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Dtype, Importance
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Listener
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import PACKED, Reading
from fusegpt_ray.text.images import Processing

R = TypeVar("R")
TASKS_EACH = 4
"""Tasks for each replica, so that fast ones do more than slow ones."""
News = tuple[int, float, float | None] | str
"""From training workers: an epoch's number (from 1), its mean loss, and that of held-out windows
after it, if there are any; or a line of text."""


@dataclass(frozen=True)
class Setup:
    """What workers need to know to compute with one dense model."""

    source: Source
    dense: Stack
    cluster: Cluster = field(default_factory=Cluster)
    dtype: Dtype = "auto"
    """The recipe's `model.dtype`."""
    importance: Importance = field(default_factory=Importance)
    """`importance.batch` windows pass a block in one call."""
    piece_mb: int = 16
    """The recipe's `calibration.piece_mb`."""
    trains: bool = False
    """Whether training workers will be needed."""
    output_uri: str | None = None
    """Where workers write, if they do."""
    run_folder: str | None = None
    """The folder of the run, for files that live as long as it does."""
    sets: int = 1
    """How many sets of workers compute in the cluster at the same time."""
    roomy: bool = False
    """Where there are others: whether training workers have a place beside the replicas."""

    @classmethod
    def of(cls, recipe: Recipe, source: Source, dense: Stack) -> Self:
        """The setup of a whole compression."""
        output = storage.absolute(recipe.output.uri)
        return cls(
            source,
            dense,
            recipe.cluster,
            recipe.model.dtype,
            recipe.importance,
            recipe.calibration.piece_mb,
            recipe.trains,
            recipe.output.uri,
            storage.join(output, f"{recipe.output.name}.run"),
        )

    @property
    def publisher(self) -> Self:
        """For the least workers that can publish."""
        cluster = self.cluster.model_copy(update={"replicas": 1, "workers": 1})
        return replace(self, cluster=cluster, trains=False)

    @property
    def cache_gb(self) -> float | None:
        """The recipe's `cluster.cache_gb` where weights are read from object storage, else 0, so
        that no cache is made for nothing.
        """
        places = [ref.file for ref in self.dense.trunk.values()]
        if self.output_uri is not None:
            places.append(self.output_uri)
        return self.cluster.cache_gb if any(map(storage.is_remote, places)) else 0


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Notices:
    """What a training worker has been told."""

    ended: Callable[[], bool] = _never
    """Whether the run is to end as soon as a training checkpoint is made."""
    leaving: Callable[[], bool] = _never
    """Whether, since the last call, it became known that a worker's node will be taken away.
    Called by all workers at once, which get the same answer."""


@dataclass
class TrainingWorker:
    """One of the processes that train together, as a function given to `spmd` sees it."""

    rank: int
    count: int
    device: torch.device
    zero_stage: int | None
    """Of DeepSpeed; None for a single process with plain torch."""
    runner: Runner
    """Runs stacks on this worker's device; see `Runner.offload` for making room."""
    report: Callable[[News], None]
    """Tells the driver."""
    meet: Callable[[int], None] = lambda moved: None
    """Waits for all workers, after work that may take one of them longer. The argument bounds the
    bytes that one of them reads or writes by itself on the way."""
    timeout: float = math.inf
    """Seconds that a worker may be silent before the others give it up."""
    notices: Notices = field(default_factory=Notices)
    memory: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)
    """What one task leaves for the next. A process that is lost loses it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.runner.dtype


class Workers(Protocol):
    """The workers of one run, between `__enter__` and `__exit__`."""

    setup: Setup
    dtype: torch.dtype
    """Of the arithmetic."""
    replicas: int
    """How many tasks are computed at once."""
    training_workers: int
    """How many processes train together."""

    @property
    def description(self) -> str:
        """Where and how they compute, for a person."""

    @property
    def hardware(self) -> Mapping[str, str]:
        """What the bits of the results depend on besides the program and the recipe (see
        `model.device.hardware`); of one replica."""

    @property
    def device_bytes(self) -> int:
        """A process's part of its device's memory: of all that a GPU has, of what is free on a
        CPU."""

    @property
    def gpus_held(self) -> float:
        """GPUs that all of them hold together."""

    @property
    def streams(self) -> bool:
        """Whether a replica reads the weights for every walk, so that its tasks should be large."""

    @property
    def training_setup(self) -> Mapping[str, str | int]:
        """What a training checkpoint's files depend on besides what is trained."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def monitor(self, run: str) -> Listener:
        """Tells the cluster's own monitoring, where there is one, of the run of this name."""

    def tokens(
        self, text: Text, key: str, reading: Reading = PACKED
    ) -> Callable[[], Iterator[np.ndarray]]:
        """The text's tokens, piece by piece, from the beginning at each call (see
        `text/calibration.py`). `key` is the recipe key of the text, for messages.
        """

    def album(self, text: Text, processing: Processing) -> Album:
        """The text's conversations with images (see `text/album.py`)."""

    def map(
        self,
        function: Callable[..., R],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, R]]:
        """Yield (number of the task, `function(runner, *task)`) for each task, in any order.

        A task may be computed more than once, where a replica is lost or slow.

        Args:
            function: defined at the top of a module; `runner` is a replica's.
            batch_size: of the runner.
            costs: of the tasks, in any unit, where they are not all about the same; `math.inf`: a
                task is given to another replica only if its own is lost, however long it takes.

        Raises:
            Exception: what the function raises; memory that runs out satisfies `is_out_of_memory`.
        """

    def prepare_training(self) -> None:
        """Begin to start the training workers, without waiting, where that takes a while."""

    def spmd(
        self, function: Callable[..., R], *arguments: Any, news: Callable[[News], None]
    ) -> list[R]:
        """`function(worker, *arguments)` on all training workers at once; their results by rank.

        Where a worker is lost, the function begins again on all of them, so it must be safe to
        repeat.

        Raises:
            MemoryError: a worker's memory ran out.
            Terminated: SIGTERM came, and what the function had learned is saved.
            Exception: what the function raised, at last, on one of the workers.
        """
