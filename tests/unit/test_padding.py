"""Windows of unequal length: padding counts nowhere, and changes no number that is not its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import DEPTH, hidden_states, load_model, open_stack, token_windows, without_blocks
from runners import local_workers

from fusegpt_ray.fusion.added import gather
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Heal, Importance
from fusegpt_ray.samples import PADDING
from fusegpt_ray.training.batch import LossBatch, token_weights
from fusegpt_ray.training.distillation import LogitsKL
from fusegpt_ray.training.losses import LOSSES, Loss
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.states import StatesSource

CPU = torch.device("cpu")
LENGTHS = [9, 5, 2, 7]
IDS = token_windows(len(LENGTHS), max(LENGTHS))


def padded(more: int = 0) -> np.ndarray:
    """The documents as windows, with `more` places behind the longest."""
    windows_WT = np.full((len(LENGTHS), max(LENGTHS) + more), PADDING)
    for row, length in enumerate(LENGTHS):
        windows_WT[row, :length] = IDS[row, :length]
    return windows_WT


def final_states(model: object, kept: list[int]) -> list[torch.Tensor]:
    """Of each document alone, by the real model with these blocks: [n, D] each."""
    short = without_blocks(model, "llama", kept)
    return [
        hidden_states(short, "llama", IDS[row : row + 1, :length])[-1][0].double()
        for row, length in enumerate(LENGTHS)
    ]


def by_hand(folder: Path, metric: str) -> list[float]:
    """The score of each block, from whole passes of the real model without any padding."""
    model = load_model(folder)
    everything = list(range(DEPTH))
    full = final_states(model, everything)

    def logits(states: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model.model.norm(states.float())).double()

    scores = []
    for out in everything:
        without = final_states(model, [block for block in everything if block != out])
        terms: list[float] = []
        for row, (a, b) in enumerate(zip(full, without, strict=True)):
            if metric == "mi":
                terms += (1 - torch.cosine_similarity(a, b, dim=-1)).tolist()
            elif metric == "kl":
                p, q = logits(a).log_softmax(-1), logits(b).log_softmax(-1)
                terms += (p.exp() * (p - q)).sum(-1).tolist()
            else:
                targets = IDS[row, 1 : LENGTHS[row]]
                losses = torch.nn.functional.cross_entropy(
                    logits(b)[:-1], targets, reduction="none"
                )
                terms += losses.tolist()
        scores.append(sum(terms) / len(terms))
    return scores


@torch.no_grad()
@pytest.mark.parametrize("metric", ["mi", "kl", "loss"])
def test_a_score_is_the_mean_over_the_documents_tokens(
    metric: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint("llama")
    settings = Importance(metric=metric, all=True, windows=len(LENGTHS), batch=3)
    expected = by_hand(folder, metric)
    for more in (0, 4):
        with local_workers(folder, settings) as workers:
            found = score(workers, open_stack(folder), padded(more), settings)
        assert list(found.scores.values()) == pytest.approx(expected, rel=2e-5)
    assert max(expected) > 1.1 * min(expected)


def test_stopping_early_finds_the_same_block(checkpoint: Callable[[str], Path]) -> None:
    folder, stack = checkpoint("llama"), open_stack(checkpoint("llama"))
    found = []
    for everything in (True, False):
        settings = Importance(all=everything, windows=len(LENGTHS), batch=1)
        with local_workers(folder, settings) as workers:
            found.append(score(workers, stack, padded(), settings))
    full, early = found
    assert early.lowest == full.lowest and early.stopped
    assert early.scores[early.lowest] == full.scores[full.lowest]


@torch.no_grad()
def test_a_perplexity_is_that_of_all_predicted_tokens(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    model, losses = load_model(folder), list[float]()
    for row, length in enumerate(LENGTHS):
        ids = IDS[row, :length]
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
    expected = math.exp(sum(losses) / len(losses))
    for more in (0, 4):
        with local_workers(folder, Importance(batch=3)) as workers:
            found = evaluation.perplexity(workers, open_stack(folder), padded(more))
        assert found == pytest.approx(expected, rel=1e-6)


def losses_of(runner: Runner) -> dict[str, Loss]:
    return {**LOSSES, "logits_kl": LogitsKL(runner.trunk.head, hidden=0.5, chunk=4)}


@pytest.mark.parametrize("name", ["normalized_mse", "batch_kl", "logits_kl"])
def test_a_loss_leaves_padding_out(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Whatever states stand there, neither the loss nor the gradient changes; and more padding
    changes neither.
    """
    runner = Runner(open_stack(checkpoint("llama")), CPU, torch.float32, 2)
    loss = losses_of(runner)[name]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn((len(LENGTHS), max(LENGTHS) + 4, 32), generator=generator)
    teacher = torch.randn(student.shape, generator=generator)
    found = []
    for more, garbage in ((0, 1.0), (0, 50.0), (4, 3.0)):
        width = max(LENGTHS) + more
        weights = token_weights(padded(more))
        assert weights is not None
        h = torch.where(weights[..., None] > 0, student[:, :width], garbage).requires_grad_()
        value = loss(h, teacher[:, :width], False, weights)
        value.backward()
        assert h.grad is not None and not h.grad[weights == 0].any()
        found.append((value.item(), h.grad[:, : max(LENGTHS)]))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-7)
    # Where nothing is padded, weights of 1 are no weights.
    whole = loss(student, teacher, False)
    assert loss(student, teacher, False, torch.ones(student.shape[:2])).item() == pytest.approx(
        whole.item(), rel=1e-6
    )
    # A mean over the documents' tokens, each alone; a sum, for the loss over the batch.
    if name == "batch_kl":
        return
    alone = [
        length * loss(student[row : row + 1, :length], teacher[row : row + 1, :length], False)
        for row, length in enumerate(LENGTHS)
    ]
    assert found[0][0] == pytest.approx(sum(alone).item() / sum(LENGTHS), rel=1e-5)


def test_batch_kl_compares_the_documents_that_have_a_token_there() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((3, 4, 8), generator=generator) for _ in range(2))
    weights = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    expected = 0.0
    for place in range(4):
        rows = weights[:, place] > 0
        p, q = teacher[rows, place].log_softmax(0), student[rows, place].log_softmax(0)
        expected += (p.exp() * (p - q)).sum().item() / 3
    found = LOSSES["batch_kl"](student, teacher, False, weights).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_fit_leaves_padding_out(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llama"))
    moments = []
    for more in (0, 4):
        runner = Runner(stack, CPU, torch.float32, batch_size=2)
        rows = padded(more)
        all_WT = np.ones(rows.shape, dtype=bool)
        name, (found,), _ = gather(runner, stack, 2, "linear", rows, [len(LENGTHS)], all_WT)
        assert name is not None
        moments.append(found)
    first, second = moments
    assert first.rows == second.rows == sum(LENGTHS)
    assert first.yy == pytest.approx(second.yy, rel=1e-6)
    # An element may be a small difference of large products, each rounded to float32.
    largest = np.abs(second.xy_FK).max()
    np.testing.assert_allclose(first.xy_FK, second.xy_FK, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_healing_learns_the_same_however_much_is_padded(
    train: str, checkpoint: Callable[[str], Path]
) -> None:
    """The gradients of the whole model's weights, through its blocks."""
    dense: Stack = open_stack(checkpoint("llama"))
    stack, gradients = dense.drop(2), []
    for more in (0, 4):
        runner = Runner(dense, CPU, torch.float32, batch_size=2)
        model = WholeModel(stack, dense, Heal(train=train), 0, "nowhere")
        windows = padded(more)
        trunk = runner.trunk
        contexts = trunk.contexts(*windows.shape)
        run = runner.run_block
        span = model.build(trunk.meta_blocks, contexts, CPU, torch.float32, False, run)
        source = StatesSource(stack, 0, dense, len(dense))
        states = source.walk(runner, torch.tensor(windows))
        span.form(span.learned)
        batch = LossBatch(*states, token_weights(windows))
        accumulate(span, batch, model.loss(trunk), 2, False)
        span.root().backward()
        gradients.append([value.grad for value in span.learned.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
