"""One process does it all: a laptop, a notebook, a bare GPU box. Imports neither ray nor
deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.compiled import compiles
from fusegpt_ray.model.device import deterministic_kernels, hardware, pick_device, pick_dtype
from fusegpt_ray.model.memory import device_bytes, empty_cache, is_out_of_memory
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.terminal.display import Listener
from fusegpt_ray.termination import came
from fusegpt_ray.text import album
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import PACKED, Reading, token_stream
from fusegpt_ray.text.images import Processing
from fusegpt_ray.workers.base import News, Notices, Setup, TrainingWorker

R = TypeVar("R")


class LocalWorkers:
    """See `base.Workers`."""

    replicas = training_workers = 1

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.device = pick_device()
        self.dtype = pick_dtype(setup.dtype, setup.dense, self.device)
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        kernels = deterministic_kernels(self.device, self.setup.cluster.deterministic)
        self._inside.enter_context(kernels)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in ("runner", "_memory"):
            self.__dict__.pop(name, None)
        self._inside.close()

    @property
    def description(self) -> str:
        return f"one process on {self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def runner(self) -> Runner:
        """The only replica's."""
        cache = BlockCache.open(self.setup.cache_gb)
        cluster = self.setup.cluster
        return Runner(
            self.setup.dense,
            self.device,
            self.dtype,
            self.setup.importance.batch,
            cluster.weights,
            cache=cache,
            compiled=compiles(cluster.compile, self.device),
        )

    @cached_property
    def _memory(self) -> dict[Any, Any]:
        return {}

    @property
    def hardware(self) -> Mapping[str, str]:
        return hardware(self.device, self.runner.compiled)

    @property
    def device_bytes(self) -> int:
        return device_bytes(self.device)

    @property
    def gpus_held(self) -> float:
        return float(self.device.type == "cuda")

    @property
    def streams(self) -> bool:
        return not self.runner.resident

    @property
    def training_setup(self) -> Mapping[str, str | int]:
        return {"engine": "local", "device": self.device.type}

    def monitor(self, run: str) -> Listener:
        return lambda event, values: None

    def tokens(
        self, text: Text, key: str, reading: Reading = PACKED
    ) -> Callable[[], Iterator[np.ndarray]]:
        piece_bytes, tokenizer = self.setup.piece_mb * 1_000_000, self.setup.source.tokenizer()
        return token_stream(text, piece_bytes, tokenizer, key, reading)

    def album(self, text: Text, processing: Processing) -> Album:
        return album.album(text, processing)

    def map(
        self,
        function: Callable[..., R],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, R]]:
        self.runner.reload()
        for number, task in enumerate(tasks):
            yield number, function(self.runner.with_batch_size(batch_size), *task)

    def prepare_training(self) -> None:
        """Nothing has to be started."""

    def spmd(
        self, function: Callable[..., R], *arguments: Any, news: Callable[[News], None]
    ) -> list[R]:
        self.runner.reload()
        worker = TrainingWorker(
            0,
            1,
            self.device,
            None,
            self.runner,
            news,
            notices=Notices(ended=came),
            memory=self._memory,
        )
        try:
            return [function(worker, *arguments)]
        except Exception as error:
            if not self.runner.weights.kept or not is_out_of_memory(error):
                raise
        # Before the work is made smaller, it is tried without the weights that are kept.
        self.runner.weights.forget()
        empty_cache()
        return [function(worker, *arguments)]
