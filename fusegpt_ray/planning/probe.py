"""How fast this machine does the work of a run: a block of the model's shape, with random weights,
is timed there and back.

Shapes: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from fusegpt_ray.cost.cost import attention_flops
from fusegpt_ray.cost.matrices import matrices
from fusegpt_ray.model.compiled import RunBlock, block_function, compiles, rehearse
from fusegpt_ray.model.device import (
    deterministic_kernels,
    deterministic_or_not,
    deterministic_where_possible,
    pick_device,
    pick_dtype,
)
from fusegpt_ray.model.empty import load_block
from fusegpt_ray.model.names import Tensors
from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.preparing.generation import ROWS

SECONDS = 20.0


def probe(plan: Plan, seconds: float = SECONDS) -> dict[str, float]:
    """FLOP/s by stage, counted as `cost.py` counts them, on this machine's GPU or all its cores.

    It computes as the run does: with compiled blocks and deterministic kernels where that has them.
    One block in the middle of the model stands for all. Scoring, states and evaluation are walks
    there; fine-tuning, healing and a search are taken to be as fast as a block there and back;
    a repair as its products in float64. What is not computing (starting, reading, writing) is not
    in it.

    Args:
        seconds: for all measurements together, after one pass of each to warm up.
    """
    device = pick_device()
    with deterministic_kernels(device, plan.recipe.cluster.deterministic):
        return _rates(plan, device, seconds)


def _rates(plan: Plan, device: torch.device, seconds: float) -> dict[str, float]:
    recipe, dense = plan.recipe, plan.model.stack
    dtype = pick_dtype(recipe.model.dtype, dense, device)
    windows, length = recipe.importance.batch, recipe.calibration.length
    chosen = dense.blocks[len(dense) // 2]
    trunk = Trunk(dense, device, dtype, _random)
    block = load_block(trunk.meta_blocks[chosen.dense], _random(chosen.weights), device, dtype)
    run = block_function(compiles(recipe.cluster.compile, device))
    active = matrices(dense, [chosen]).active_elements

    def flops(rows: int, tokens: int) -> float:
        return rows * (2 * tokens * active + attention_flops(dense, tokens))

    def passing(run: RunBlock, rows: int, tokens: int) -> Callable[[], torch.Tensor]:
        h_BTD = trunk.embed(torch.zeros(rows, tokens, dtype=torch.int64))
        context = trunk.contexts(rows, tokens)[chosen.dense]
        return lambda: deterministic_or_not(lambda: run(block, h_BTD, context))

    def rate(count: float, call: Callable[[], object]) -> float:
        return count / _median_time(call, seconds / 4, device)

    passes = passing(run, windows, length)

    def there_and_back() -> None:
        passes().float().sum().backward()

    with torch.no_grad():
        walked = rate(flops(windows, length), passes)
        with deterministic_where_possible():  # transformers' `generate`, with blocks as they are
            written = rate(flops(ROWS, 1), passing(run_block, ROWS, 1))
    block.requires_grad_(True)
    rehearse(run, there_and_back)
    learned = rate(3 * flops(windows, length), there_and_back)
    a_ND = trunk.embed(torch.zeros(windows, length, dtype=torch.int64)).flatten(0, 1).double()
    solved = rate(2 * a_ND.shape[0] * a_ND.shape[1] ** 2, lambda: a_ND.T @ a_ND)
    return {
        "scoring": walked,
        "states": walked,
        "evaluation": walked,
        "fine-tuning": learned,
        "healing": learned,
        "search": learned,
        "repair": solved,
        "slicing": solved,
        "generating": written,
    }


def _random(refs: Refs) -> Tensors:
    """Values for tensors of which only the headers are known: small ones, as trained weights are,
    so that nothing overflows.
    """
    made = {}
    for name, ref in refs.items():
        values = torch.ones(ref.shape) if len(ref.shape) < 2 else 0.02 * torch.randn(ref.shape)
        made[name] = values.to(ref.dtype)
    return made


def _median_time(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Of calls for so many seconds, at least two, after one that does not count."""
    times: list[float] = []
    end = 0.0
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        end = end or time.perf_counter() + seconds
    return statistics.median(times[1:])
