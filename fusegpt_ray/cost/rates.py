"""How fast GPUs do each stage of a run, and how much memory they have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fusegpt_ray.errors import UserError

MEASURED = "NVIDIA H200"
_MEASURED_RATES: Mapping[str, float] = {
    # A large product: 726 to 790. A sweep of compiled blocks; states with their way to the host;
    # 61.4 k tokens a second with compiled blocks, fused Adam and TensorFloat32.
    "scoring": 625e12,
    "states": 390e12,
    "fine-tuning": 565e12,
    "healing": 565e12,
    "search": 565e12,
    "evaluation": 390e12,
    "repair": 30e12,
    "slicing": 30e12,
    "generating": 7e12,
}


@dataclass(frozen=True)
class Gpu:
    """A type of GPU."""

    memory: int
    """Bytes."""
    peak: float
    """FLOP/s of dense bfloat16 products, as its maker publishes them."""


GPUS: Mapping[str, Gpu] = {
    MEASURED: Gpu(141 * 10**9, 989e12),
    "NVIDIA H100": Gpu(80 * 10**9, 989e12),
    "NVIDIA A100": Gpu(80 * 10**9, 312e12),
}
"""Of the SXM form; of an A100 the one with 80 GB."""


def _scaled(gpu: Gpu) -> dict[str, float]:
    share = gpu.peak / GPUS[MEASURED].peak
    return {
        stage: rate * (1 if stage == "generating" else share)
        for stage, rate in _MEASURED_RATES.items()
    }


RATES: Mapping[str, Mapping[str, float]] = {name: _scaled(gpu) for name, gpu in GPUS.items()}
"""FLOP/s by stage, counted as `cost.py` does.

Those of the H200 were measured for LLaMA-2-7B's shape in bfloat16 with windows of 2048 tokens
(docs/performance.md); evaluation is taken to be as fast as states, healing and search as
fine-tuning. Not measured: a repair's products in float64, taken to reach half of what the maker
says; and generating, where a step of 16 texts is taken to last 30 ms, most of which goes by between
its kernels.

No other GPU was measured. Each is taken to reach the same share of its published peak as the H200
does of its own (`Gpu.peak`), but for generating, which does not wait for products: the same rate.
"""


def known_gpu(name: str) -> str | None:
    """The table's name of a GPU as torch, Ray or a person calls it ("NVIDIA H100 80GB HBM3",
    "H100"); None if its rates are not known.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return next((known for known in GPUS if known.split()[-1] in words), None)


def find_gpu(name: str, key: str = "--gpu") -> str:
    """As `known_gpu`.

    Raises:
        UserError: it is not known.
    """
    if known := known_gpu(name):
        return known
    fix = f"use one of {', '.join(GPUS)}"
    raise UserError(key, name, "the rates of this GPU are not known", fix)
