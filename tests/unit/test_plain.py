"""The streamed walk beside plain `from_pretrained`, whole and on the first blocks of a large
model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from models import DEPTH, open_stack, token_windows

from fusegpt_ray.model.architecture import dense_stack
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing import plain
from fusegpt_ray.publishing.plain import KL_TOLERANCE, Plain, compare_plain, one_of_each_kind
from fusegpt_ray.store.checkpoint import read_index

CPU = torch.device("cpu")
IDS = token_windows(2, 9)


def compared(folder: str, stack: Stack) -> Plain:
    return compare_plain(folder, stack, Runner(stack, CPU, torch.float32, batch_size=8), IDS)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["llama-sharded", "llama-tied", "gpt2", "gemma3", "lfm2", "llava"])
def test_both_read_the_same_model(
    name: str, small: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "SMALL_BYTES", 10**9 if small else 0)
    folder = checkpoint(name)
    found = compared(str(folder), open_stack(folder))
    assert found.problem == "" and found.kl is not None and found.kl <= KL_TOLERANCE[torch.float32]


@pytest.mark.parametrize("small", [True, False])
def test_in_a_store(
    small: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "SMALL_BYTES", 10**9 if small else 0)
    folder, there = checkpoint("lfm2"), f"memory://plain-{small}"
    store = fsspec.filesystem("memory")
    for file in folder.iterdir():
        store.pipe(f"{there}/{file.name}", file.read_bytes())
    stack = dense_stack(open_stack(folder).config, read_index(there, "model.source"))
    found = compared(there, stack)
    assert found.problem == "" and found.kl is not None and found.kl <= KL_TOLERANCE[torch.float32]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("what", ["blocks", "trunk"])
def test_another_reading_is_found(
    what: str, small: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if we had read the wrong shards: two blocks change places, or the head is the
    embedding."""
    monkeypatch.setattr(plain, "SMALL_BYTES", 10**9 if small else 0)
    folder = checkpoint("llama")
    stack = open_stack(folder)
    first, second, *others = stack.blocks
    if what == "blocks":
        exchanged = (replace(first, weights=second.weights), replace(second, weights=first.weights))
        stack = replace(stack, blocks=(*exchanged, *others))
    else:
        head = {"lm_head.weight": stack.trunk["model.embed_tokens.weight"]}
        stack = replace(stack, trunk={**stack.trunk, **head})
    found = compared(str(folder), stack)
    assert "differ from the streamed ones" in found.problem and found.kl is not None
    assert found.kl > 100 * KL_TOLERANCE[torch.float32]


def test_a_checkpoint_that_does_not_load_is_said(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    stack = open_stack(checkpoint("llama"))
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    found = compared(str(tmp_path), stack)
    assert found.kl is None and "from_pretrained does not load it (OSError" in found.problem


def test_a_large_model_is_compared_on_one_block_of_each_kind(
    checkpoint: Callable[[str], Path],
) -> None:
    assert len(one_of_each_kind(open_stack(checkpoint("llama")))) == 2
    assert len(one_of_each_kind(open_stack(checkpoint("gemma3")))) == 2  # the second differs
    hybrid = open_stack(checkpoint("lfm2"))
    assert [len(block.weights) for block in hybrid.blocks] == [8, 11, 11, 8, 8]
    assert len(one_of_each_kind(hybrid)) < DEPTH
