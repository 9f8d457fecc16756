"""Counts what is read from checkpoints and what of it is still alive."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch

from fusegpt_ray.store.checkpoint import TensorRef, read_tensors


class Memory(bytearray):
    """What a tensor lies in, in a form that can be watched: it lives exactly as long as the
    tensor's storage.
    """


class Watch:
    """Reads tensors as the package does, and remembers which are asked for and what of it is still
    alive.
    """

    def __init__(self) -> None:
        self.asked: list[TensorRef] = []
        self.memory: list[weakref.ref[Memory]] = []
        self.alive: list[int] = []
        """Bytes of earlier reads still alive whenever something is read."""

    def __call__(self, refs: Mapping[str, TensorRef]) -> dict[str, torch.Tensor]:
        self.alive.append(sum(len(memory) for ref in self.memory if (memory := ref()) is not None))
        self.asked += refs.values()
        return {name: self._moved(tensor) for name, tensor in read_tensors(refs).items()}

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        memory = Memory(tensor.flatten().view(torch.uint8).numpy().tobytes())
        self.memory.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape)


def size_of(refs: Mapping[str, TensorRef]) -> int:
    """Bytes of these tensors."""
    return sum(ref.end - ref.begin for ref in refs.values())
