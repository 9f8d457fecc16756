"""The way of weights from files to a GPU: through two buffers of pinned memory, in turn.

While one is copied to the device, the other is filled. Only from pinned memory does a copy go on
beside the work of host and device; pinning takes longer than copying, so the two are made once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import torch

from fusegpt_ray.model.empty import in_arithmetic
from fusegpt_ray.store.checkpoint import Seen, TensorRef, in_order
from fusegpt_ray.store.ranges import Range, Reader, memory_of

BUFFER = 1 << 27
"""Bytes of each of the two buffers: a piece for each thread that reads."""


class Staging:
    """Reads tensors onto a device, in the dtype to compute in."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int = BUFFER) -> None:
        """`size`: bytes of a buffer."""
        self.device, self.dtype, self.size = device, dtype, size
        self._turn = threading.Lock()

    def read(
        self, refs: Mapping[str, TensorRef], seen: Seen | None = None
    ) -> dict[str, torch.Tensor]:
        """As `read_tensors`, but onto the device, and cast there.

        The tensors may still be on their way: they are there for what its current stream does next.
        """
        return self._read(refs, seen, self.dtype)

    def read_as_stored(
        self, refs: Mapping[str, TensorRef], seen: Seen | None = None
    ) -> dict[str, torch.Tensor]:
        """As `read`, but not cast."""
        return self._read(refs, seen, None)

    def _read(
        self, refs: Mapping[str, TensorRef], seen: Seen | None, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        landing: dict[str, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        with self._turn, Reader() as reader:
            for step, buffer in self._filled(refs, reader, seen):
                for part in step:
                    ref = refs[part.name]
                    if part.begin == 0:
                        landing[part.name] = torch.empty(
                            ref.end - ref.begin, dtype=torch.uint8, device=self.device
                        )
                    bytes_here = landing[part.name][part.begin : part.end]
                    bytes_here.copy_(part.of(buffer.memory), non_blocking=True)
                    if part.end == ref.end - ref.begin:
                        whole = landing.pop(part.name).view(ref.dtype).view(ref.shape)
                        tensors[part.name] = in_arithmetic(whole, dtype) if dtype else whole
                buffer.is_copied_by(self.device)
        return {name: tensors[name] for name in refs}

    def _filled(
        self, refs: Mapping[str, TensorRef], reader: Reader, seen: Seen | None
    ) -> Iterator[tuple[list[_Part], _Buffer]]:
        """Each step once all of its bytes are in its buffer; the next one is read meanwhile."""
        under_way: list[tuple[list[_Part], _Buffer, Iterator[memoryview]]] = []
        for step, buffer in zip(self._steps(refs), cycle(self._buffers), strict=False):
            buffer.wait()
            ranges = [
                Range(
                    refs[part.name].file,
                    refs[part.name].begin + part.begin,
                    memory_of(part.of(buffer.memory)),
                )
                for part in step
            ]
            under_way.append((step, buffer, reader.start(ranges)))
            if len(under_way) == 2:
                yield _arrived(*under_way.pop(0), seen)
        for started in under_way:
            yield _arrived(*started, seen)

    def _steps(self, refs: Mapping[str, TensorRef]) -> Iterator[list[_Part]]:
        """The tensors in order, in parts, as many as fill a buffer; an empty tensor has one."""
        step: list[_Part] = []
        taken = 0
        for name in in_order(refs):
            size, begin = refs[name].end - refs[name].begin, 0
            while True:
                if taken == self.size:
                    yield step
                    step, taken = [], 0
                end = min(size, begin + self.size - taken)
                step.append(_Part(name, begin, end, taken))
                taken += end - begin
                if end == size:
                    break
                begin = end
        if step:
            yield step

    @cached_property
    def _buffers(self) -> tuple[_Buffer, _Buffer]:
        return _Buffer(self.size, self.device), _Buffer(self.size, self.device)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes [begin, end) of a tensor, from byte `at` of a buffer on."""

    name: str
    begin: int
    end: int
    at: int

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.at : self.at + self.end - self.begin]


class _Buffer:
    """Memory that may be filled again once what was last in it is on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        # Blocking: a thread that waits for a copy leaves its core to others.
        self._copied = torch.cuda.Event(blocking=True) if on_gpu else None

    def is_copied_by(self, device: torch.device) -> None:
        """All copies of its bytes have been given to the device's current stream."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


def _arrived(
    step: list[_Part], buffer: _Buffer, arriving: Iterator[memoryview], seen: Seen | None
) -> tuple[list[_Part], _Buffer]:
    for piece in arriving:
        if seen is not None:
            seen(piece)
    return step, buffer
