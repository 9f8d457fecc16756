"""The states of many windows between two blocks: where they lie, and how they pass the device.

Shapes: W windows, B windows of a batch, T tokens, D hidden size.

A walk takes all of its windows through one block before it reads the next, so that weights are read
once however many windows there are. What waits meanwhile is one set of states, and it need not lie
on the device.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable

import torch

from fusegpt_ray.errors import StorageError
from fusegpt_ray.model.device import copying_stream
from fusegpt_ray.model.memory import empty_cache, free_bytes, pinned_bytes

DEVICE_SHARE = 0.15
"""Share of a GPU's free memory that states may take; blocks, activations and training need the
rest."""
HOST_SHARE = 0.5
"""Share of the host's free memory that the states of all processes on it may take."""


def empty_states(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    sets: int = 1,
    device_share: float = 1.0,
    host_share: float = 1.0,
) -> list[torch.Tensor]:
    """Room for so many sets of states [W, T, D]: on a GPU where they are few, else in the host's
    memory (pinned, if there is a GPU), else in temporary files. All sets lie in one kind of place.

    Args:
        device_share, host_share: share of the free memory that this process may count on.

    Raises:
        StorageError: the disk has no room for the files.
    """
    on_gpu = device.type == "cuda"
    taken = sets * math.prod(shape) * dtype.itemsize
    if on_gpu:
        empty_cache()  # what pinned memory of earlier states is kept for reuse would count as taken
        if taken <= DEVICE_SHARE * device_share * free_bytes(device):
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(sets)]
        taken = sets * pinned_bytes(taken // sets)
    if taken <= HOST_SHARE * host_share * free_bytes(torch.device("cpu")):
        return [torch.empty(shape, dtype=dtype, pin_memory=on_gpu) for _ in range(sets)]
    return [_in_file(shape, dtype) for _ in range(sets)]


def transform(
    change: Callable[[torch.Tensor], torch.Tensor],
    source: torch.Tensor,
    target_WTD: torch.Tensor,
    size: int,
    device: torch.device,
) -> None:
    """Put what `change` makes of each batch of `size` windows of `source` into its place in
    `target_WTD`, which may be the same tensor.

    `change` computes on the device. On a CPU, and where states lie on the device, it is given views
    and nothing is moved.
    """
    batches = list(zip(source.split(size), target_WTD.split(size), strict=True))
    if target_WTD.device.type != device.type:
        _transform_by_copies(change, batches, device)
        return
    for given, place_BTD in batches:
        place_BTD.copy_(change(given))


def _transform_by_copies(
    change: Callable[[torch.Tensor], torch.Tensor],
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> None:
    """On a GPU, of states in the host's memory. A stream of its own copies the next batch there and
    the last result back while one computes. (Copies of a file's pages, which are not pinned, wait.)

    All copies are made in the order in which they are asked for, so a batch of the next block is
    fetched after it was put back. What a batch takes on the device is held until its result has
    been copied: neither stream can use that memory too early, and the host, which waits for this,
    is never more than two batches ahead.
    """
    aside, here = copying_stream(device), torch.cuda.current_stream(device)
    under_way: deque[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = deque()

    def fetch(number: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(aside):
            return batches[number][0].to(device, non_blocking=True), aside.record_event()

    ahead = fetch(0)
    try:
        for number, (_, place_BTD) in enumerate(batches):
            given, arrived = ahead
            if number + 1 < len(batches):
                ahead = fetch(number + 1)
            here.wait_event(arrived)
            out_BTD = change(given)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                place_BTD.copy_(out_BTD, non_blocking=True)
                under_way.append((aside.record_event(), given, out_BTD))
            if len(under_way) > 1:
                under_way[0][0].synchronize()
                under_way.popleft()
    finally:
        aside.synchronize()


def _in_file(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """States in a temporary file, which has no name any more and so ends with the process. It is
    read and written in order, block after block or epoch after epoch.
    """
    with tempfile.NamedTemporaryFile(prefix="fusegpt-states-") as file:
        size = math.prod(shape)
        try:
            # A full disk says so now. Later, it would kill whoever writes to the mapped file.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            need = f"no room for {size * dtype.itemsize / 1e9:.1f} GB of states"
            problem = f"{need}, for which the host's memory is short, too ({error.strerror})"
            fix = "set TMPDIR to a folder on a larger disk, or have fewer or shorter windows"
            raise StorageError(tempfile.gettempdir(), problem, fix) from error
        flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        return flat.reshape(shape)
