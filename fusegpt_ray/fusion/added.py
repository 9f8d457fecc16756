"""A replica's part of a repair: what a block adds to the residual stream, beside what the last
linear layer of the block before it is given and gives, as sums over windows.

Shapes: W windows, B windows of a batch, T tokens, n tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fusegpt_ray.fusion.compensation import Way, features, last_linear
from fusegpt_ray.fusion.least_squares import Moments
from fusegpt_ray.model.rows import as_rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.samples import PADDING, Batch, tokens_of

OFF = 0.05
"""By how much, relatively, an output may miss what was added to it: bfloat16 is off by 0.01, a norm
behind the layer by 1."""


def gather(
    runner: Runner,
    stack: Stack,
    donor: int,
    way: Way,
    windows: Batch,
    pieces: list[int],
    summed_WT: np.ndarray,
) -> tuple[str | None, list[Moments], int]:
    """The task: for each piece (so many windows, in order) the moments of what is fitted; first the
    name of the layer, or None if there is none, and last the bytes of blocks that were read.

    Args:
        donor: position of the block to remove.
        summed_WT: which tokens are fitted or held out, bool [W, T], if they are no padding.

    All windows walk together to the block before it; then
    they pass both, a batch at a time. So a window's part depends on its batch alone.
    """
    before, rows = runner.weights.bytes_read, as_rows(windows)
    assert not runner.by_sample(rows), "refused before (see `preflight.check_repair`)"
    counted_WT = torch.from_numpy(summed_WT & (tokens_of(windows) != PADDING))
    (h_WTD,) = runner.empty_states(rows)
    for _ in runner.walk(stack, rows, donor - 1, h_WTD):
        pass
    last, removed = stack.blocks[donor - 1 : donor + 1]
    modules = [runner.weights.of(block) for block in (last, removed)]
    read = runner.weights.bytes_read - before
    with torch.no_grad():
        run = partial(runner.apply_hooked, modules[0], last.dense)
        first = h_WTD[:1].to(runner.device)
        name = last_linear(modules[0], lambda: run(first))
        if name is None or not is_added(modules[0].get_submodule(name), lambda: run(first)):
            return None, [], read

        def after(h_BTD: torch.Tensor) -> torch.Tensor:
            return runner.apply(modules[1], removed.dense, h_BTD)

        layer = modules[0].get_submodule(name)

        def batches(first: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for begin in range(first, end, runner.batch_size):
                rows = slice(begin, min(begin + runner.batch_size, end))
                counted_BT = counted_WT[rows].to(runner.device)
                yield _batch(layer, run, after, way, counted_BT, h_WTD[rows].to(runner.device))

        ends = [0, *accumulate(pieces)]
        return name, [Moments.of(batches(*piece)) for piece in pairwise(ends)], read


def _batch(
    layer: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[torch.Tensor], torch.Tensor],
    way: Way,
    counted_BT: torch.Tensor,
    h_BTD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is fitted to what, of the tokens of one batch that count. The
    difference of the states is taken in float64.
    """
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, given: Sequence[Any], out: torch.Tensor) -> None:
        seen[:] = [given[0], out]

    hook = layer.register_forward_hook(keep)
    try:
        out_BTD = run(h_BTD)
    finally:
        hook.remove()
    delta_BTD = after(out_BTD).double() - out_BTD.double()
    found = [value.flatten(0, -2)[counted_BT.flatten()] for value in (*seen, delta_BTD)]
    return features(way, *found)


def is_added(layer: nn.Module, run: Callable[[], torch.Tensor]) -> bool:
    """Whether a block's output is the sum of this layer's and what does not depend on it.

    Tried out: noise as large as the states is added to the layer's output, and must arrive as it
    is. It does not where a norm or a factor follows the layer.
    """
    out_BTD = run().double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out_BTD.shape, generator=generator, dtype=torch.float64)
    noise_BTD = noise.to(out_BTD.device) * out_BTD.square().mean(-1, keepdim=True).sqrt()

    def disturb(_: nn.Module, given: Sequence[Any], out: torch.Tensor) -> torch.Tensor:
        return out + noise_BTD.reshape(out.shape).to(out.dtype)

    hook = layer.register_forward_hook(disturb)
    try:
        arrived_BTD = run().double() - out_BTD
    finally:
        hook.remove()
    return bool((arrived_BTD - noise_BTD).norm() <= OFF * noise_BTD.norm())
