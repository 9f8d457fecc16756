"""What plain `from_pretrained` makes of a checkpoint, beside the streamed walk: two readers that
share nothing.

A large model is compared on its first blocks, as many as it takes to have one of each kind, so that
no process holds more of it than that.

Shapes: W windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from fusegpt_ray.errors import StorageError, first_line
from fusegpt_ray.model.config import ALONE, auto_class, read_config
from fusegpt_ray.model.empty import in_arithmetic
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.rows import Rows, one_sample
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.publishing.shrink import model_entries, shrink_config
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import SINGLE
from fusegpt_ray.store.writer import write_safetensors

SMALL_BYTES = 2_000_000_000
"""Of weights that are loaded as a whole."""
TOKENS = 256
"""Of a window that are compared."""
KL_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""By the arithmetic's dtype: mean Kullback-Leibler divergence of logits in nats a token.

It grows with the square of the logits' differences: 1e-6 are differences of about 1e-3, 1e-3 of
about 0.05. Honest readings differ by 0 (`benchmarks/comparison.py`); kernels may add in another
order."""


@dataclass(frozen=True)
class Plain:
    """How close the streamed walk came to what plain `from_pretrained` computes."""

    kl: float | None
    """Mean KL divergence in nats a token; NaN where the model's logits are, None where it does not
    load."""
    problem: str = ""
    """What is wrong, if they are not the same model."""


@torch.no_grad()
def compare_plain(folder: str, stack: Stack, runner: Runner, windows: Rows) -> Plain:
    """`stack` is all of the checkpoint in `folder`; `runner` runs it. Memory that runs out is
    raised.
    """
    if isinstance(windows, torch.Tensor):  # an image cannot be cut
        windows = windows[:, :TOKENS]
    small = sum(ref.end - ref.begin for ref in stack.refs) <= SMALL_BYTES
    part = stack if small else one_of_each_kind(stack)
    for h_WTD in runner.walk(part, windows):  # noqa: B007 - the last states are wanted
        pass
    with _local(folder, stack, part) as place:
        try:
            model, report = load(place, auto_class(stack.config), runner.dtype)
        except StorageError:
            raise
        except (
            Exception
        ) as error:  # of whatever kind: what the files hold decides how the library fails
            if is_out_of_memory(error):
                raise
            why = first_line(error).replace(place, folder)  # perhaps a copy
            return Plain(None, f"from_pretrained does not load it ({type(error).__name__}: {why})")
    if problem := incomplete(report):
        return Plain(None, problem)
    model.eval().to(runner.device)
    samples = [one_sample(windows, number) for number in range(len(windows))]
    pairs = (
        (_logits(model, *sample), runner.trunk.logits(h_1TD[:, : sample[0].shape[1]]))
        for sample, h_1TD in zip(samples, h_WTD.split(1), strict=True)
    )
    kl = mean_kl(pairs)
    tolerance = KL_TOLERANCE[runner.dtype]
    if not kl <= tolerance:  # also where it is NaN
        what = "the logits of the model that from_pretrained loads differ from the streamed ones"
        return Plain(kl, f"{what}: mean KL {kl:.3g} nats a token, {tolerance} allowed")
    return Plain(kl)


def _logits(model: Any, ids_1n: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    given = {
        name: in_arithmetic(value.to(model.device), model.dtype) for name, value in inputs.items()
    }
    ids_1n = ids_1n.to(model.device)
    logits: torch.Tensor = model(input_ids=ids_1n, use_cache=False, **given).logits
    return logits


def one_of_each_kind(stack: Stack) -> Stack:
    """The first blocks up to the last that is of another kind than those before it, and at least
    two.
    """
    config = read_config(stack.config).get_text_config().to_dict()
    lists = [
        value for value in config.values() if isinstance(value, list) and len(value) == len(stack)
    ]

    def kind(position: int, block: Block) -> object:
        shapes = tuple(sorted((name, ref.shape) for name, ref in block.weights.items()))
        return shapes, tuple(json.dumps(values[position]) for values in lists)

    seen: set[object] = set()
    needed = 2
    for position, block in enumerate(stack.blocks):
        if (found := kind(position, block)) not in seen:
            seen.add(found)
            needed = max(needed, position + 1)
    return replace(stack, blocks=stack.blocks[:needed])


@contextmanager
def _local(folder: str, stack: Stack, part: Stack) -> Iterator[str]:
    """A local folder from which `from_pretrained` loads the part of the checkpoint."""
    remote = "://" in folder
    if part is stack and not remote:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fusegpt-plain-") as place:
        target = Path(place)
        names = storage.names(folder)
        if part is stack:
            for name in names:
                if name.endswith((".safetensors", ".json")):
                    storage.download(storage.join(folder, name), str(target / name))
        else:
            if remote:
                write_safetensors(str(target / SINGLE), list(model_entries(part, stack)))
            else:
                for name in {*names} - {
                    "config.json"
                }:  # weights of the other blocks are not loaded
                    os.symlink(Path(folder).absolute() / name, target / name)
            (target / "config.json").write_text(json.dumps(shrink_config(part)))
        yield place


def load(folder: str, auto: str, dtype: torch.dtype) -> tuple[Any, dict[str, Sequence[Any]]]:
    """What `from_pretrained` of that class makes of a local folder, and what it reports (see
    `incomplete`), without transformers' own progress bar: our display is the one display.
    """
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with ALONE:
        shown = transformers.logging.is_progress_bar_enabled()
        transformers.logging.disable_progress_bar()
        try:
            kind = getattr(transformers, auto)
            model, report = kind.from_pretrained(folder, dtype=dtype, **options)
        finally:
            if shown:
                transformers.logging.enable_progress_bar()
    return model, report


def incomplete(report: Mapping[str, Sequence[Any]]) -> str:
    """What is wrong with a model that was loaded, or nothing: transformers gives random values to
    weights that it does not find.
    """
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            return f"from_pretrained reports {kind} {sorted(map(str, report[kind]))[:3]}"
    return ""


def mean_kl(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean KL(wanted ‖ found) in nats a token over pairs (found, wanted) of logits [1, T, V]."""
    total, tokens = 0.0, 0
    for found_1TV, wanted_1TV in pairs:
        for found_TV, wanted_TV in zip(
            found_1TV[0].split(256), wanted_1TV[0].split(256), strict=True
        ):
            log_q, log_p = (logits.double().log_softmax(-1) for logits in (found_TV, wanted_TV))
            total += (log_p.exp() * (log_p - log_q)).sum().item()
            tokens += len(log_p)
    return total / tokens
