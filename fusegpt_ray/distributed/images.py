"""The samples of `text/album.py`, made by Ray Data on all nodes at once.

Notable:
- what a sample's model is called with beside tokens, pixels above all, stays in the object store as
  the task left it: one block for each sample. The driver has references, and whoever computes with
  a sample fetches its block;
- before each such block comes a small one that tells of it, so that the driver reads no other;
- a user's mistake travels as a row, in its place, as in `text.py`.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import ray
import ray.data

from fusegpt_ray.distributed.text import context
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import InMemoryInputs
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.conversations import conversation_sources, conversations, picked
from fusegpt_ray.text.images import Processing, Sample

Row = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """Inputs that lie in the object store (see `samples.Inputs`)."""

    digest: bytes
    block: ray.ObjectRef
    """A table of one row."""

    def load(self) -> Mapping[str, np.ndarray]:
        """See `Inputs`."""
        found: Mapping[str, np.ndarray] = pickle.loads(
            ray.get(self.block).column("inputs")[0].as_buffer()
        )
        if InMemoryInputs(found).digest != self.digest:  # made again after the loss of a node
            raise OSError("an image of the text has changed since the run read it")
        return found


def album(text: Text, processing: Processing) -> Album:
    """As `text.album.album`: the same samples.

    Raises:
        UserError: see `conversations`, read on any node.
    """
    found = conversation_sources(text, processing.key)
    shared = ray.put(processing)

    def count(row: Row) -> Row:
        try:
            return {"rows": sum(1 for _ in conversations(found[row["source"]])), "error": b""}
        except UserError as error:
            return {"rows": 0, "error": pickle.dumps(error)}

    def read(row: Row) -> Iterator[Row]:
        try:
            for conversation in picked(conversations(found[row["source"]]), row["places"]):
                yield {"conversation": pickle.dumps(conversation), "error": b""}
        except UserError as error:
            yield {"conversation": b"", "error": pickle.dumps(error)}

    def process(row: Row) -> Iterator[Row]:
        if row["error"]:
            yield {"about": row["error"], "inputs": b""}
            return
        try:
            sample = _got(shared).sample(pickle.loads(row["conversation"]))
        except UserError as error:
            yield {"about": pickle.dumps(error), "inputs": b""}
            return
        if sample is None:
            yield {"about": pickle.dumps(None), "inputs": b""}
            return
        about = (sample.tokens_n, sample.targets_n, sample.inputs.digest)
        yield {"about": pickle.dumps(about), "inputs": b""}
        yield {"about": b"", "inputs": pickle.dumps(dict(sample.inputs.load()), protocol=5)}

    with ray.data.DataContext.current(context(1)):
        every = ray.data.from_items([{"source": number} for number in range(len(found))])
        counts = [_checked(row)["rows"] for row in every.map(count, num_cpus=0.5).iter_rows()]

    def make(places: Sequence[int]) -> Iterator[Sample | None]:
        items = _by_source(places, counts)
        with ray.data.DataContext.current(context(1)):
            rows = ray.data.from_items(items).flat_map(read, num_cpus=0.5)
            rows = rows.flat_map(process, num_cpus=1)
        return _samples(entry for each in rows.iter_internal_ref_bundles() for entry in each.blocks)

    return Album(sum(counts), make, processing)


def _by_source(places: Sequence[int], counts: Sequence[int]) -> list[Row]:
    """The places in each source that has any."""
    items = []
    for source, (first, end) in enumerate(pairwise(accumulate(counts, initial=0))):
        inside = places[bisect_left(places, first) : bisect_left(places, end)]
        if inside:
            items.append({"source": source, "places": [place - first for place in inside]})
    return items


def _samples(blocks: Iterator[Any]) -> Iterator[Sample | None]:
    """Of what `process` has left, in its order."""
    for entry in blocks:
        assert entry.metadata.num_rows == 1, "Ray Data put two rows into one block"
        about = pickle.loads(ray.get(entry.ref).column("about")[0].as_py())
        if isinstance(about, UserError):
            raise about
        if about is None:
            yield None
            continue
        tokens_n, targets_n, digest = about
        stored = next(blocks)
        assert stored.metadata.num_rows == 1, "Ray Data put two rows into one block"
        yield Sample(tokens_n, targets_n, Stored(digest, stored.ref))


def _checked(row: Row) -> Row:
    if row["error"]:
        raise pickle.loads(row["error"])
    return row


@lru_cache(maxsize=1)
def _got(shared: ray.ObjectRef) -> Processing:
    """In each process once: a tokenizer takes longer to unpickle than an image to process."""
    found: Processing = ray.get(shared)
    return found
