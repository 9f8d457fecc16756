"""How much memory is free; and what to do when it runs out: the same work again, with fewer windows
at a time.

What was computed before is thrown away, so that a result comes of one arithmetic: it is the same as
if the smaller number had been asked for.
"""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")
_SIGNS = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|_ALLOC_FAILED|MemoryError|low on memory",
    re.IGNORECASE,
)
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken on the device; on a CPU the least of what the machine, the
    container and the process's limits leave.

    On a GPU, what torch has reserved and nobody uses counts as free. It may lie in pieces. But
    torch gives whole segments back before it lets an allocation fail, and whoever asks here takes
    many tensors and a part of what is free, not one tensor of all of it.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    mine = psutil.Process().memory_info()
    left = [psutil.virtual_memory().available, *_left_in_container()]
    for kind, taken in ((resource.RLIMIT_DATA, mine.data), (resource.RLIMIT_AS, mine.vms)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(limit - taken)
    return max(0, min(left))


def device_bytes(device: torch.device) -> int:
    """All memory of a GPU; of a CPU what may still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return free_bytes(device)


def pinned_bytes(size: int) -> int:
    """What a tensor of so many bytes takes of the host's memory when it is pinned: torch rounds up
    to a power of two.
    """
    return 1 << (size - 1).bit_length() if size else 0


def _left_in_container() -> list[int]:
    """What cgroup v2 leaves, if it sets a limit. Cached pages of files that nobody reads at the
    moment count as free.
    """
    with suppress(OSError, ValueError):  # no cgroup v2, or "max"
        limit, taken = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        statistics = (_CGROUP / "memory.stat").read_text()
        idle = re.search(r"^inactive_file (\d+)", statistics, re.MULTILINE)
        return [limit - taken + int(idle[1] if idle else 0)]
    return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory or the host's ran out, here or in a Ray task.

    torch's CPU allocator and the CUDA libraries raise a plain RuntimeError, and Ray Data keeps only
    the text of what was raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    tells = isinstance(error, RuntimeError) or type(error).__module__ == "ray.exceptions"
    return tells and _SIGNS.search(str(error)) is not None


def find_batch_size(
    attempt: Callable[[int], T], batch_size: int, whole: int, what: str
) -> tuple[T, int]:
    """`attempt(batch_size)`, repeated with about half the size whenever memory runs out.

    Args:
        whole: every size that is tried divides this number.
        what: names the attempt in the error.

    Returns:
        The attempt's result, and the size it was made with.

    Raises:
        MemoryError: not even a single window fits.
    """
    while True:
        try:
            return attempt(batch_size), batch_size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                fix = (
                    "a shorter calibration.length, a smaller fusion.group_size or rank, "
                    "or more memory"
                )
                raise MemoryError(
                    f"{what} runs out of memory with a single window at a time: "
                    f"it needs {fix} ({error})"
                ) from error
        batch_size = max(n for n in range(1, batch_size // 2 + 1) if whole % n == 0)
        empty_cache()  # here, where the error no longer holds the frames in which it was raised


def empty_cache() -> None:
    """Give back memory that nobody uses, the host's pinned memory included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # not in older versions
            torch.accelerator.empty_host_cache()
