"""How much memory is free; and when it runs out, the same work begins again with fewer windows at a time.

What was computed before is thrown away, so that one result is one arithmetic: the same as if the smaller number had been asked for.
"""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from fusegpt_ray.recipe import Recipe

T = TypeVar("T")
_SIGNS = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|_ALLOC_FAILED|MemoryError|low on memory",
    re.IGNORECASE,
)


_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What may still be taken on the device; on a CPU the least of what the machine, the container and the process's limits leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    mine = psutil.Process().memory_info()
    limits = {resource.RLIMIT_DATA: mine.data, resource.RLIMIT_AS: mine.vms}
    left = [
        limit - taken
        for kind, taken in limits.items()
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
    ]
    return max(0, min([psutil.virtual_memory().available, *left, *_left_in_container()]))


def _left_in_container() -> list[int]:
    """What cgroup v2 leaves, if it sets a limit; pages of files that nobody needs at the moment count as free."""
    with suppress(OSError, ValueError):  # no cgroup v2, or "max"
        limit, taken = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        idle = re.search(
            r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE
        )
        return [limit - taken + int(idle[1] if idle else 0)]
    return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory or the host's ran out, here or in a Ray task.

    torch's CPU allocator and the CUDA libraries raise a plain RuntimeError, and Ray Data keeps only the text of what was raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    tells = isinstance(error, RuntimeError) or type(error).__module__ == "ray.exceptions"
    return tells and _SIGNS.search(str(error)) is not None


def find_batch_size(attempt: Callable[[int], T], rows: int, share: int, what: str) -> tuple[T, int]:
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
                raise MemoryError(
                    f"{what} runs out of memory with a single window at a time: it needs {fix} ({error})"
                ) from error
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
    asked = {
        "rows": (batch, "scoring"),
        "states_rows": (batch, "states"),
        "micro_batch": (micro_batch, "fine-tuning"),
    }
    found = []
    for key, (wanted, what) in asked.items():
        least = min((record[key] for record in rounds if record.get(key)), default=wanted)
        if least < wanted:
            found.append(f"{least} of {wanted} in {what}")
    return ", ".join(found)
