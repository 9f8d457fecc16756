"""Rounds of fusing, one after another, against the real model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SUPPORTED, load_model
from safetensors.torch import load_file
from workshop import (  # noqa: F401 - fixtures
    BATCH,
    CLOSE,
    FAST,
    IDS,
    Weights,
    Workshop,
    _workshop,
    collapsed,
    learned,
    over_batches,
    plain_weights,
)

from fusegpt_ray.fusion.linear import FusedLinear
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.losses import normalized_mse
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.optimizer import make_optimizer
from fusegpt_ray.training.span import Span

# --- rounds one after another ---


@pytest.mark.parametrize("workshop", SUPPORTED, indirect=True)
def test_every_architecture_starts_learns_folds_and_reloads(workshop: Workshop) -> None:
    job = workshop.job(2, preset="rounds", **FAST)
    assert list(job.span) == [0, 1, 2, 3]
    entering, leaving = workshop.states(job)
    student = workshop.student(job)
    # At the start: exactly the group without the donor.
    start = over_batches(student, entering)
    torch.testing.assert_close(start, workshop.real_states(workshop.dense.drop(2))[3], **CLOSE)
    assert (start - leaving).abs().max() > 0.1

    means = workshop.train(job, student)
    assert means[-1] < means[0]
    # Everything that learns is reached by the loss, once B and C are no longer zero.
    student.form(student.learned)
    batch = LossBatch(entering[:BATCH], leaving[:BATCH])
    accumulate(student, batch, normalized_mse, None, False)
    student.root().backward()
    untouched = [
        name
        for name, value in student.learned.named_parameters()
        if value.grad is None or not value.grad.any()
    ]
    assert untouched == []

    stack = Stack.from_json(workshop.dense.drop(2).swap(job.save(student).blocks).to_json())
    assert stack.kept == (0, 1, 3, 4)
    # The files, folded, in our runner and in the real model without the donor.
    expected = over_batches(student, entering)
    ours = [h.clone() for h in workshop.runner.walk(stack, IDS)]
    real = workshop.real_states(stack)
    torch.testing.assert_close(ours[3], expected, **CLOSE)
    torch.testing.assert_close(real[3], expected, **CLOSE)
    torch.testing.assert_close(ours[-1], real[-1], **CLOSE)
    assert (expected - start).abs().max() > 0.01


@pytest.mark.parametrize("workshop", ["llama", "gpt2", "qwen2", "lfm2"], indirect=True)
def test_what_is_saved_is_the_formula(workshop: Workshop) -> None:
    stack, _ = workshop.fuse(workshop.job(2, **FAST))
    for dense in (0, 1, 3):
        block = stack.blocks[stack.position(dense)]
        expected = collapsed(workshop, stack, dense)
        assert set(block.weights) == set(expected)
        for name, value in read_tensors(block.weights).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert stack.blocks[-1] == workshop.dense.blocks[4]  # not in the group: as it was


def fused_layers(student: Span, block: int) -> dict[str, FusedLinear]:
    return {
        name: module
        for name, module in student.learned.blocks[block].named_modules()
        if isinstance(module, FusedLinear)
    }


@pytest.mark.parametrize("workshop", ["llama", "gpt2", "gemma3"], indirect=True)
@pytest.mark.parametrize("fold", ["at_end", "each_round"])
def test_a_second_round_starts_as_the_current_stack_without_its_donor(
    workshop: Workshop, fold: str
) -> None:
    stack, _ = workshop.fuse(workshop.job(2, fold=fold, **FAST))
    job = workshop.job(3, stack, fold=fold)
    student = workshop.student(job)
    entering, _ = workshop.states(job)
    torch.testing.assert_close(
        over_batches(student, entering), workshop.real_states(stack.drop(3))[-1], **CLOSE
    )

    fused_before, fresh = fused_layers(student, 0), fused_layers(student, 2)
    assert [block.dense for block in job.neighbours] == [0, 1, 4]
    assert {layer.terms for layer in fused_before.values()} == {2 if fold == "at_end" else 1}
    assert {layer.terms for layer in fresh.values()} == {1}
    own = (
        plain_weights(workshop, 0) if fold == "at_end" else load_file(weights_file(stack.blocks[0]))
    )
    donor = load_file(weights_file(stack.blocks[2]))
    for name, layer in fused_before.items():
        assert torch.equal(layer.weight, own[f"{name}.weight"])
        last = layer.donor_weight1 if fold == "at_end" else layer.donor_weight0
        assert torch.equal(
            last, donor[f"{name}.weight"]
        )  # the donor was fused itself: its collapsed weight


def weights_file(block: Block) -> str:
    (file,) = {ref.file for ref in block.weights.values()}
    return file


def test_a_donor_that_was_fused_counts_as_one_plain_weight(workshop: Workshop) -> None:
    stack, _ = workshop.fuse(workshop.job(2, **FAST))
    student = workshop.student(workshop.job(3, stack))
    expected = collapsed(workshop, stack, 3)
    dense = plain_weights(workshop, 3)
    for name, layer in fused_layers(student, 2).items():
        torch.testing.assert_close(
            layer.donor_weight0, expected[f"{name}.weight"], rtol=1e-5, atol=1e-6
        )
        assert (layer.donor_weight0 - dense[f"{name}.weight"]).abs().max() > 0.01


def test_old_terms_go_on_learning_and_are_saved_again(workshop: Workshop) -> None:
    stack, _ = workshop.fuse(workshop.job(2, **FAST))
    job = workshop.job(3, stack, **FAST)
    student = workshop.student(job)
    before = learned(student)
    (file,) = {ref.file for ref in stack.blocks[0].terms.learned.values()}
    for name, value in load_file(file).items():
        assert torch.equal(before[f"blocks.0.{name}"], value)
    workshop.train(job, student, 1)
    after = learned(student)
    assert all((after[name] != before[name]).any() for name in after)

    twice = stack.drop(3).swap(job.save(student).blocks)
    terms = twice.blocks[0].terms
    assert terms.base == workshop.dense.blocks[0].weights
    (second,) = (block for block in stack.blocks if block.dense == 3)
    assert terms.donors == (workshop.dense.blocks[2], Block(3, second.weights))
    names = {name.rsplit(".", 1)[-1] for name in terms.learned} - {"weight"}
    assert names == {"A", "B", "C0", "D0", "C1", "D1"}
    assert len(twice.blocks[-1].terms.donors) == 1
    # A third round starts where the second ended.
    third = workshop.job(1, twice)
    entering, _ = workshop.states(third)
    real = workshop.real_states(twice.drop(1))
    torch.testing.assert_close(over_batches(workshop.student(third), entering), real[-1], **CLOSE)
    assert {layer.terms for layer in fused_layers(workshop.student(third), 0).values()} == {3}


def test_folding_each_round_keeps_no_terms(workshop: Workshop) -> None:
    stack, _ = workshop.fuse(workshop.job(2, fold="each_round", **FAST))
    assert [block.terms for block in stack.blocks] == [None] * 4
    assert len(list(workshop.out.iterdir())) == 3


def test_fine_tuning_without_fusing_has_no_coefficients(workshop: Workshop) -> None:
    job = workshop.job(2, fuse=False, preset="rounds", fold="at_end", **FAST)
    student = workshop.student(job)
    assert {name.rsplit(".", 1)[-1] for name in learned(student)} == {"A", "B", "weight"}
    means = workshop.train(job, student)
    assert means[-1] < means[0]
    stack = workshop.dense.drop(2).swap(job.save(student).blocks)
    assert {block.terms.donors for block in stack.blocks[:3]} == {()}
    again = workshop.job(3, stack, fuse=False)
    entering, _ = workshop.states(again)
    torch.testing.assert_close(
        over_batches(workshop.student(again), entering),
        workshop.real_states(stack.drop(3))[-1],
        **CLOSE,
    )


# --- what learns, in which dtype, from which start ---


def test_what_learns_in_a_llama_block(workshop: Workshop) -> None:
    student = workshop.student(workshop.job(2))
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = [f"{layer}.{part}" for layer in layers for part in ("A", "B", "C0", "D0")] + norms
    assert set(learned(student)) == {f"blocks.{i}.{name}" for i in range(3) for name in names}
    assert all(value.requires_grad for value in student.learned.parameters())
    groups = workshop.job(2).parameter_groups(student)
    optimizer = make_optimizer(groups, (0.9, 0.95), 1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(learned(student))


def test_the_start_depends_on_the_seed_and_on_nothing_else(workshop: Workshop) -> None:
    def start(seed: int, donor: int = 2) -> Weights:
        torch.rand(5)
        return learned(workshop.student(workshop.job(donor, seed=seed)))

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if name[-1] == "A" or name[-2:] == "D0"]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    # No two layers, blocks or rounds start from the same numbers.
    values = {tuple(one[name].flatten()[:8].tolist()) for name in drawn}
    assert len(values) == len(drawn)
    third = start(1, donor=3)
    assert not any(torch.equal(one[name], third[name]) for name in drawn)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@torch.no_grad()
def test_a_fused_block_keeps_the_precision_of_its_own_weights(
    stored: torch.dtype, checkpoint: Any, tmp_path: Path
) -> None:
    """Fused but not trained, with B = C = 0, a neighbour is what it was, to the last bit,
    though the arithmetic is bfloat16's.
    """
    load_model(checkpoint("qwen3")).to(stored).save_pretrained(tmp_path / "source")
    workshop = Workshop("qwen3", tmp_path / "source", tmp_path / "blocks", torch.bfloat16)
    job = workshop.job(2, trained_dtype="float32")
    blocks = job.save(workshop.student(job)).blocks
    assert len(blocks) > 1
    for dense, block in blocks.items():
        own = read_tensors(workshop.dense.blocks[dense].weights)
        rounded = [
            name for name in own if not torch.equal(own[name].bfloat16().to(stored), own[name])
        ]
        assert len(rounded) > 5, "or bfloat16 would do"
        for name, value in read_tensors(block.weights).items():
            assert torch.equal(value.to(stored), own[name]), name


@pytest.mark.parametrize(
    ("trained_dtype", "dtype", "expected"),
    [
        ("float32", torch.float32, torch.float32),
        ("model", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("model", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(
    trained_dtype: str, dtype: torch.dtype, expected: torch.dtype, checkpoint: Any, tmp_path: Path
) -> None:
    workshop = Workshop("qwen3", checkpoint("qwen3"), tmp_path, dtype)
    job = workshop.job(2, trained_dtype=trained_dtype)
    student = workshop.student(job)
    before = learned(student)
    assert {value.dtype for value in before.values()} == {expected}
    assert {buffer.dtype for buffer in student.learned.buffers()} == {dtype}
    entering, leaving = workshop.states(job)
    assert {entering.dtype, leaving.dtype} == {dtype}
    means = workshop.train(job, student)
    assert all(math.isfinite(mean) for mean in means)

    # At a rate of 1e-5, bfloat16 cannot move values this large; float32 masters can.
    large = [
        (value - before[name])[before[name].abs() > 0.02]
        for name, value in learned(student).items()
        if name[-1] == "A"
    ]
    assert any(change.any() for change in large) == (expected == torch.float32)

    saved = job.save(student).blocks
    ref = saved[0].weights["mlp.up_proj.weight"]
    assert ref.dtype == torch.float32, (
        "the checkpoint's own precision stays, whatever the arithmetic's"
    )
    stack = workshop.dense.drop(2).swap(saved)
    out = [h.clone() for h in workshop.runner.walk(stack, IDS)][3].float()
    trained = over_batches(student, entering).float()
    # The blocks are the same, and their weights too, except that bfloat16 learned beside rounded
    # weights. Each is off by a rounding (2^-9), which three blocks of matrix products add up.
    bound = 1e-6 if dtype == torch.float32 else 0.03
    assert (out - trained).norm() / trained.norm() <= bound
