"""When memory runs out, the same work begins again with fewer windows at a time.

What was computed before is thrown away, so that one result is one arithmetic: the same as if the smaller number had been asked for.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fusegpt_ray.recipe import Recipe

T = TypeVar("T")
_SIGNS = re.compile(r"out of memory|can't allocate memory|bad_alloc|_ALLOC_FAILED|MemoryError", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory or the host's ran out, here or in a Ray task.

    torch's CPU allocator and the CUDA libraries raise a plain RuntimeError, and Ray Data keeps only the text of what was raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    tells = isinstance(error, RuntimeError) or type(error).__module__ == "ray.exceptions"
    return tells and _SIGNS.search(str(error)) is not None


def fitting(attempt: Callable[[int], T], rows: int, share: int, what: str) -> tuple[T, int]:
    """`attempt(rows)`, begun again with about half the rows (a divisor of `share`) whenever memory runs out: its result, and the rows.

    Raises:
        MemoryError: not even one row fits; `what` was attempted.
    """
    while True:
        try:
            return attempt(rows), rows
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                fix = "a shorter calibration.length, a smaller fusion.group_size or rank, or more memory"
                raise MemoryError(f"{what} runs out of memory with a single window at a time: it needs {fix} ({error})") from error
        rows = max(n for n in range(1, rows // 2 + 1) if share % n == 0)
        release()  # here, where the error no longer holds the frames in which it was raised


def release() -> None:
    """Give back what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fewer_at_once(recipe: Recipe, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Where rounds, given by their records, passed fewer windows at once than the recipe says: "1 of 4 in scoring"; or nothing."""
    batch = recipe.importance.batch
    micro_batch = recipe.cluster.micro_batch or recipe.fusion.batch // recipe.cluster.workers
    asked = {"rows": (batch, "scoring"), "states_rows": (batch, "states"), "micro_batch": (micro_batch, "fine-tuning")}
    found = []
    for key, (wanted, what) in asked.items():
        least = min((record[key] for record in rounds if record.get(key)), default=wanted)
        if least < wanted:
            found.append(f"{least} of {wanted} in {what}")
    return ", ".join(found)
