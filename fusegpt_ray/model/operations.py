"""Operations as they are run: by which two computations are told apart without values."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Operations(TorchDispatchMode):
    """Notes every operation that runs: its name, and all it is given but the tensors' values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.seen.append((str(function), tree_map(_note, (args, kwargs or {}, out))))
        return out


def _note(value: object) -> object:
    """Of a tensor its shape; it has no values on the meta device. Buffers are compared by
    themselves.
    """
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    known = is_plain(value) or isinstance(value, torch.dtype | torch.device)
    return value if known else type(value).__name__


def is_plain(value: object) -> bool:
    """Whether it is a number, a text, or a list of such."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
