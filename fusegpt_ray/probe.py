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
from fusegpt_ray.generation import ROWS
from fusegpt_ray.model.compiled import block_function, compiles
from fusegpt_ray.model.device import pick_device, pick_dtype
from fusegpt_ray.model.empty import load_block
from fusegpt_ray.model.names import Tensors
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.plan import Plan

SECONDS = 20.0


def probe(plan: Plan, seconds: float = SECONDS) -> dict[str, float]:
    """FLOP/s by stage, counted as `cost.py` counts them, on this machine's GPU or all its cores.

    One block in the middle of the model stands for all. Scoring, states and evaluation are walks
    there; fine-tuning, healing and a search are taken to be as fast as a block there and back;
    a repair as its products in float64. What is not computing (starting, reading, writing) is not
    in it.

    Args:
        seconds: for all measurements together, after one pass of each to warm up.
    """
    recipe, dense = plan.recipe, plan.model.stack
    device = pick_device()
    dtype = pick_dtype(recipe.model.dtype, dense, device)
    windows, length = recipe.importance.batch, recipe.calibration.length
    chosen = dense.blocks[len(dense) // 2]
    trunk = Trunk(dense, device, dtype, _random)
    block = load_block(trunk.meta_blocks[chosen.dense], _random(chosen.weights), device, dtype)
    run_block = block_function(compiles(recipe.cluster.compile, device))
    active = matrices(dense, [chosen]).active_elements

    def flops(rows: int, tokens: int) -> float:
        return rows * (2 * tokens * active + attention_flops(dense, tokens))

    def passing(rows: int, tokens: int, there_and_back: bool) -> Callable[[], object]:
        h_BTD = trunk.embed(torch.zeros(rows, tokens, dtype=torch.int64))
        context = trunk.contexts(rows, tokens)[chosen.dense]

        def passes() -> None:
            block.requires_grad_(there_and_back)
            with torch.set_grad_enabled(there_and_back):
                out_BTD = run_block(block, h_BTD, context)
            if there_and_back:
                out_BTD.float().sum().backward()

        return passes

    def rate(count: float, call: Callable[[], object]) -> float:
        return count / _median_time(call, seconds / 4, device)

    walked = rate(flops(windows, length), passing(windows, length, there_and_back=False))
    learned = rate(3 * flops(windows, length), passing(windows, length, there_and_back=True))
    written = rate(flops(ROWS, 1), passing(ROWS, 1, there_and_back=False))
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
