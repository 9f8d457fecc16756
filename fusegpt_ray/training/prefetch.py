"""Batches on the device, one ahead of the step that uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fusegpt_ray.model.device import copying_stream
from fusegpt_ray.training.batch import LossBatch


def on_device(batches: Iterable[LossBatch], device: torch.device) -> Iterator[LossBatch]:
    """Each batch on the device. On a GPU the next one is copied from pinned memory, on a stream of
    its own, while one is in use.
    """
    if device.type == "cpu":
        yield from batches
        return
    stream = copying_stream(device)
    ahead: tuple[LossBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = batch.on(device), stream.record_event()
        if ahead:
            yield _arrived(*ahead)
        ahead = following
    if ahead:
        yield _arrived(*ahead)


def _arrived(batch: LossBatch, copied: torch.cuda.Event) -> LossBatch:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.tensors:
        tensor.record_stream(current)  # the copying stream must not use this memory before us
    return batch
