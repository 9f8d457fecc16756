"""Proof that what lies in the store is the model, before its manifest says so. Everything here
reads; nothing is written.

Three steps, each from the published files alone: 1. every file is read back once: its size, its
SHA-256, and that all its tensors are finite (`read_back`); 2. the folder is opened as a user's
checkpoint would be: it holds exactly the tensors of the stack, in their shapes and dtypes, all
that the model class of its config.json expects, and the same weights are tied (`open_published`);
3. on real text it computes what the stack computes, block by block (`compare`), and its logits are
those of the model that plain `from_pretrained` loads (`plain.py`). No block is compiled for that.

Shapes: W windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.empty import load_block
from fusegpt_ray.model.finite import finite
from fusegpt_ray.model.rows import Rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.publishing.plain import KL_TOLERANCE, compare_plain, mean_kl
from fusegpt_ray.publishing.ties import tied
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import (
    INDEX,
    FileRecord,
    TensorRef,
    read_header,
    read_index,
)
from fusegpt_ray.store.writer import Entry

KEY = "published model"
WINDOWS = 2
"""Windows on which the published model and the stack are compared."""
STATES_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""By the arithmetic's dtype: how far a block's output may be from the stack's, as a share of its
size (root mean square).

The stack's weights are rounded to their published dtype first, and both sides run the same code on
the same device, so 0 is expected; the tolerance leaves room for kernels that add in another order
from call to call: some 1000 roundings in float32, two in bfloat16."""


class ProofError(RuntimeError):
    """What lies in the store is not the model that should be there."""


# --- 1. the bytes ---


def read_back(file: str, record: FileRecord) -> None:
    """Read a file once, as it lies in the store, `storage.STEP` bytes at a time.

    While a step is hashed, its values are looked at by another thread and the next one is read by a
    third.

    Raises:
        ProofError: another size or checksum than was written, or a tensor with NaN or Inf.
    """
    if (there := storage.size(file)) != record.size:
        raise ProofError(f"{file} has {there} bytes in the store, {record.size} were written")
    digest = hashlib.sha256()
    refs = (
        sorted(_header(file).values(), key=lambda ref: ref.begin)
        if file.endswith(".safetensors")
        else []
    )
    watch = _FiniteWatch(refs)
    bad = ""
    with ThreadPoolExecutor(1, "look") as other:
        for part in storage.stream(file):
            seen = other.submit(watch.see, part)
            digest.update(part)
            bad = bad or seen.result()
    if digest.hexdigest() != record.sha256:
        raise ProofError(f"{file} has another checksum in the store than was written")
    if bad:
        raise ProofError(f"{file}: {bad}")


def _header(file: str) -> dict[str, TensorRef]:
    try:
        return read_header(file, KEY)
    except UserError as error:
        raise ProofError(f"{error.value}: {error.problem}") from error


class _FiniteWatch:
    """Sees a file's bytes pass and finds the first tensor with NaN or Inf; holds less than one
    element.
    """

    def __init__(self, refs: list[TensorRef]) -> None:
        self.refs = iter([ref for ref in refs if ref.end > ref.begin])
        self.ref = next(self.refs, None)
        self.at, self.cut = 0, b""
        """Bytes seen, and those of an element of which the rest is still to come."""

    def see(self, part: memoryview) -> str:
        """What is wrong with the tensors in the next bytes of the file, or nothing."""
        begin, self.at = self.at, self.at + len(part)
        while self.ref is not None and self.ref.begin < self.at:
            inside = part[max(self.ref.begin - begin, 0) : self.ref.end - begin]
            if not self._finite(inside, self.ref.dtype):
                return f"{self.ref.name} holds NaN or Inf"
            if self.ref.end > self.at:
                break
            self.ref = next(self.refs, None)
        return ""

    def _finite(self, inside: memoryview, dtype: torch.dtype) -> bool:
        """The next bytes of one tensor. They are looked at where they lie."""
        size = dtype.itemsize
        missing = -len(self.cut) % size
        whole, inside = self.cut + bytes(inside[:missing]), inside[missing:]
        if len(whole) % size:
            self.cut = whole
            return True
        end = len(inside) - len(inside) % size
        self.cut = bytes(inside[end:])
        pieces = (bytearray(whole), inside[:end])
        return all(finite(torch.frombuffer(piece, dtype=dtype)) for piece in pieces if piece)


# --- 2. names, shapes, ties ---


def open_published(folder: str, entries: Mapping[str, Entry], sent: Stack) -> Stack:
    """The published checkpoint's stack, read from its own config.json and headers; `entries`: the
    tensors it should hold, by name.

    Raises:
        ProofError: a tensor is missing, empty, extra, or has another shape or dtype;
        `from_pretrained` would miss a weight; or other
            weights are tied than in the stack that was sent.
    """
    source = Source.find(folder, None, KEY)
    try:
        tensors = read_index(folder, KEY)
        weights = {ref.file.rsplit("/", 1)[-1] for ref in tensors.values()} | (
            {INDEX} & set(storage.names(folder))
        )
        if stray := sorted(
            name for name in storage.names(folder) if ".safetensors" in name and name not in weights
        ):
            raise ProofError(
                f"{folder} holds {stray[0]}, which is not part of this model: remove it"
            )
        _check_tensors(folder, tensors, entries)
        stack = source.stack()
    except UserError as error:
        raise ProofError(f"{folder}: {error.value}: {error.problem}") from error
    # By its config.json alone: not every loader looks at the tensors.
    found, expected = set(build_skeleton(stack.config).all_tied_weights_keys), tied(sent)
    if found != expected:
        names = ", ".join(sorted(found ^ expected))
        raise ProofError(
            f"{folder}: {names} is {'no longer' if expected - found else 'newly'} tied by its"
            " config.json"
        )
    return stack


def _check_tensors(
    folder: str, tensors: Mapping[str, TensorRef], entries: Mapping[str, Entry]
) -> None:
    if missing := sorted(set(entries) - set(tensors)):
        raise ProofError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} in all)")
    if extra := sorted(set(tensors) - set(entries)):
        raise ProofError(
            f"{folder} holds {extra[0]}, which the model does not have ({len(extra)} in all)"
        )
    for name, ref in tensors.items():
        expected = entries[name]
        if (ref.shape, ref.dtype) != (expected.shape, expected.dtype):
            raise ProofError(
                f"{folder}: {name} is {list(ref.shape)} {ref.dtype}, it should be"
                f" {list(expected.shape)} {expected.dtype}"
            )
        if ref.begin == ref.end:
            raise ProofError(f"{folder}: {name} is empty")


# --- 3. the arithmetic ---


@dataclass(frozen=True)
class Proof:
    """How close the published model came; for the manifest."""

    states: float
    """The largest difference of a block's output, as a share of its size."""
    kl: float
    """Mean KL divergence in nats a token, streamed against the stack."""
    plain_kl: float
    """The same for plain `from_pretrained` against the streamed walk (see `plain.py`)."""


def prove(
    published: Stack,
    folder: str,
    stack: Stack,
    here: Runner,
    there: Runner,
    windows: Rows,
) -> Proof:
    """Compare the published model with the stack; `here` runs the stack, `there` the published one,
    on the same device.

    Raises:
        ProofError: a block's states or the logits are not the stack's; the message names the block
        or the number.
    """
    here, there, windows = here.not_compiled(), there.not_compiled(), windows[:WINDOWS]
    states, kl = compare(published, stack, here, there, windows)
    plain = compare_plain(folder, published, there, windows)
    if plain.kl is None or plain.problem:
        raise ProofError(f"{folder}: {plain.problem}")
    return Proof(states, kl, plain.kl)


@torch.no_grad()
def compare(
    published: Stack, stack: Stack, here: Runner, there: Runner, windows: Rows
) -> tuple[float, float]:
    """Walk both models together, a block of each in memory: the largest difference, and the KL."""
    if len(published) != len(stack):
        raise ProofError(f"the published model has {len(published)} blocks, the stack {len(stack)}")
    (ours, own), (theirs, their_own) = here.enter(windows), there.enter(windows)
    largest = _difference(theirs, ours, here.dtype, "its embedding")
    for position, (block, found) in enumerate(zip(stack.blocks, published.blocks, strict=True)):
        ours = here.apply(_rounded(here, block, found), block.kind, ours, own)
        theirs = there.apply(there.weights.of(found), found.dense, theirs, their_own)
        what = f"its block {position} (block {block.kind} of the dense model)"
        largest = max(largest, _difference(theirs, ours, here.dtype, what))
    rows = zip(theirs.split(1), ours.split(1), strict=True)
    kl = mean_kl((there.trunk.logits(h_1TD), here.trunk.logits(g_1TD)) for h_1TD, g_1TD in rows)
    return largest, _checked(kl, here.dtype, "the published model's logits differ from the stack's")


def _rounded(runner: Runner, block: Block, stored: Block) -> nn.Module:
    """The stack's block with its weights rounded to the dtypes they are published in."""
    weights = {
        name: tensor.to(stored.weights[name].dtype)
        for name, tensor in runner.weights.stored(block.weights).items()
    }
    return load_block(runner.trunk.meta_blocks[block.kind], weights, runner.device, runner.dtype)


def _difference(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Root mean square of the difference as a share of that of `wanted`."""
    if found.shape != wanted.shape:
        raise ProofError(
            f"the published model's states are {list(found.shape)}, the stack's"
            f" {list(wanted.shape)}"
        )
    size = wanted.float().square().mean().sqrt().item()
    share = (found.float() - wanted.float()).square().mean().sqrt().item() / (size or 1.0)
    if not share <= STATES_TOLERANCE[dtype]:  # also where it is NaN
        raise ProofError(
            f"the published model computes something else: {what} is off by {share:.2g},"
            f" {STATES_TOLERANCE[dtype]} allowed"
        )
    return share


def _checked(kl: float, dtype: torch.dtype, problem: str) -> float:
    if not kl <= KL_TOLERANCE[dtype]:
        raise ProofError(f"{problem}: mean KL {kl:.3g} nats a token, {KL_TOLERANCE[dtype]} allowed")
    return kl
