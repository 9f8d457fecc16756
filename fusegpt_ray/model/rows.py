"""Rows that blocks are not called alike for: each with contexts of its own.

Most models call a block with what depends on the number of tokens alone, so that it is found once
and serves every batch (`Trunk.contexts`). What depends on the sample (embeddings of a block's own,
positions and masks around an image) is found for each sample by a pass of its own, without padding,
and each passes the blocks alone: in the memory and the kernels of one row, whatever stands beside
it. Windows of text among samples, which fill their rows and need nothing of their own, pass
together.

Shapes: W windows, B rows, T tokens, n tokens of one sample, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from fusegpt_ray.model.recorder import Context, moved
from fusegpt_ray.samples import PADDING, Batch, Samples

Rows = torch.Tensor | Samples
"""Windows on their way through a model: token ids [W, T], or samples with images."""


@dataclass(frozen=True)
class Own:
    """What the blocks are called with for one sample."""

    length: int
    """Its tokens, without padding."""
    contexts: Sequence[Context]
    """By dense block number, for one row of so many tokens; on the host."""
    alike: bool = False
    """Whether they are those of any row of the batch's length (`Trunk.contexts`), so that such rows
    may pass together."""

    @classmethod
    def of(cls, length: int, contexts: Sequence[Context], alike: bool = False) -> Own:
        return cls(length, moved(contexts, "cpu"), alike)


Owns = Sequence[Own]
"""Of each row of a batch."""


def as_rows(windows: Batch) -> Rows:
    """A copy of token ids as a tensor; samples as they are."""
    return windows if isinstance(windows, Samples) else torch.tensor(windows)


def as_tensor(array: np.ndarray | None) -> torch.Tensor | None:
    """A copy, where there is something."""
    return None if array is None else torch.tensor(array)


def ids_of(windows: Rows) -> torch.Tensor:
    """Token ids [W, T]; `PADDING` where there are none."""
    return torch.from_numpy(windows.tokens_WT) if isinstance(windows, Samples) else windows


def one_sample(windows: Rows, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The ids [1, n] of one window without padding, and what else the model is called with."""
    ids_T = ids_of(windows)[number]
    given = windows.inputs[number].load() if isinstance(windows, Samples) else {}
    inputs = {name: torch.tensor(value) for name, value in given.items()}
    return ids_T[ids_T != PADDING][None], inputs


def all_alike(owns: Owns | None) -> bool:
    """Whether rows pass together: none is called with anything of its own."""
    return owns is None or all(own.alike for own in owns)


def each(
    run: Callable[[torch.Tensor, Own], torch.Tensor],
    h_BTD: torch.Tensor,
    owns: Owns,
    together: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `run` makes of the states [1, n, D] of each row, with zeros in place of padding, and
    `together`, if it is given, of those [b, T, D] that are alike: [B, T, D].
    """
    length = h_BTD.shape[1]
    found: dict[int, torch.Tensor] = {}
    if together:
        for rows in _powers([row for row, own in enumerate(owns) if own.alike]):
            found |= zip(rows, together(h_BTD[rows]).split(1), strict=True)
    for row, own in enumerate(owns):
        if row not in found:
            out_1nD = run(h_BTD[row : row + 1, : own.length], own)
            found[row] = pad(out_1nD, (0, 0, 0, length - own.length))
    return torch.cat([found[row] for row in range(len(owns))])


def _powers(rows: list[int]) -> Iterator[list[int]]:
    """Parts of a power of two each, the largest first. Contexts are kept for each number of rows
    that there is, so that these are to be few.
    """
    while rows:
        size = 1 << (len(rows).bit_length() - 1)
        yield rows[:size]
        rows = rows[size:]
