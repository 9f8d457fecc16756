"""Every architecture block by block, against the real model's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    DEPTH,
    MODELS,
    SUPPORTED,
    hidden_states,
    load_model,
    open_stack,
    rewrite,
    without_blocks,
)
from runners import IDS, Tensors, make_runner
from safetensors.torch import load_file

from fusegpt_ray.model.stack import Stack

REMOVED = ((1, 3), (0,), (DEPTH - 1,))
PAIRS = [
    (name, removed)
    for number, name in enumerate(MODELS)
    for removed in ((), REMOVED[number % len(REMOVED)])
]
"""Every model whole, and without some of its blocks: inner ones, the first or the last."""


@pytest.mark.parametrize(("name", "removed"), PAIRS, ids=str)
def test_states_and_logits_are_the_real_models_to_the_bit(
    name: str, removed: tuple[int, ...], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    kept = [i for i in range(DEPTH) if i not in removed]
    real = without_blocks(load_model(folder), name, kept)
    stack = open_stack(folder).drop(*removed)
    stack = Stack.from_json(
        json.loads(json.dumps(stack.to_json()))
    )  # as it comes back from a journal
    runner = make_runner(stack)

    expected = hidden_states(real, name, IDS)
    got = [h.clone() for h in runner.walk(stack, IDS)]

    # The same operations on the same numbers in the same order: nothing may differ.
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * (
        len(kept) + 1
    )
    assert torch.equal(runner.trunk.logits(got[-1]), real(input_ids=IDS).logits)
    assert torch.equal(runner.enter(IDS)[0], expected[0])


@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_at_once_change_only_the_last_bits(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    stack = open_stack(checkpoint(name))
    *_, expected = make_runner(stack).walk(stack, IDS)
    for rows in (1, 2):
        *_, got = make_runner(stack, rows=rows).walk(stack, IDS)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_token_losses_are_the_real_models(name: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    runner = make_runner(stack)
    *_, last = runner.walk(stack, IDS)
    real = load_model(folder)
    expected = [real(input_ids=window[None], labels=window[None]).loss.item() for window in IDS]
    assert runner.token_losses(last, IDS).tolist() == pytest.approx(expected, rel=1e-5)


def test_layers_of_different_kinds_get_contexts_of_their_own(
    checkpoint: Callable[[str], Path],
) -> None:
    """Or the tests above would not notice one context used for all."""
    for name in ("gemma3", "qwen2"):
        stack = open_stack(checkpoint(name))
        runner = make_runner(stack)
        contexts = runner.trunk.contexts(len(IDS), IDS.shape[1])
        own, borrowed = (
            runner.apply(runner.weights.of(stack.blocks[0]), dense, runner.enter(IDS)[0])
            for dense in (0, 1 if name == "gemma3" else 4)
        )
        assert len(contexts) == DEPTH
        assert (own - borrowed).abs().max() > 1e-3


def test_llava_under_its_names_in_memory(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Newer checkpoints say model.language_model.layers.N, older ones
    language_model.model.layers.N."""
    folder = checkpoint("llava")
    assert any(
        name.startswith("language_model.model.layers.")
        for name in load_file(folder / "model.safetensors")
    )

    def rename(tensors: Tensors) -> Tensors:
        return {new_name(name): value for name, value in tensors.items()}

    def new_name(name: str) -> str:
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.", 1)
        if name.startswith("language_model.lm_head"):
            return name.removeprefix("language_model.")
        return f"model.{name}"

    renamed = rewrite(folder, tmp_path, rename)
    stack = open_stack(renamed)
    assert stack.prefix == "model.language_model.layers."
    *_, last = make_runner(stack).walk(stack, IDS)
    assert torch.equal(last, hidden_states(load_model(folder), "llava", IDS)[-1])


def test_llava_without_its_image_part_would_be_missed(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llava"))
    parts = {name.split(".")[0] for name in stack.trunk}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    assert not any(".layers." in name and name.startswith("language_model") for name in stack.trunk)


def test_gpt2_under_its_old_names(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, and each block's causal mask saved with it."""
    folder = checkpoint("gpt2")

    def rename(tensors: Tensors) -> Tensors:
        old = {
            name.removeprefix("transformer."): value
            for name, value in tensors.items()
            if name != "lm_head.weight"
        }
        return old | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(DEPTH)}

    stack = open_stack(rewrite(folder, tmp_path, rename))
    assert stack.prefix == "h."
    runner = make_runner(stack)
    *_, last = runner.walk(stack, IDS)
    assert torch.equal(runner.trunk.logits(last), load_model(folder)(input_ids=IDS).logits)


def test_saved_rotary_buffers_do_no_harm(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """LLaMA checkpoints of old carry one in every block."""
    folder = checkpoint("llama")
    extra = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(DEPTH)
    }
    stack = open_stack(rewrite(folder, tmp_path, lambda tensors: tensors | extra))
    *_, last = make_runner(stack).walk(stack, IDS)
    assert torch.equal(last, hidden_states(load_model(folder), "llama", IDS)[-1])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16_arithmetic_of_a_float32_checkpoint(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    runner = make_runner(stack, torch.bfloat16)
    auto = transformers.AutoModelForCausalLM
    real = auto.from_pretrained(folder, dtype=torch.bfloat16).eval()
    *_, last = runner.walk(stack, IDS)
    assert last.dtype == torch.bfloat16
    assert torch.equal(last, hidden_states(real, name, IDS)[-1])
    assert torch.equal(runner.trunk.logits(last), real(input_ids=IDS).logits)
