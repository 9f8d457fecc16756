"""The loss of the tokens that follow: beside the library's own, and however a batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from infirmary import BATCH, HELD, LENGTH, PARTS, STEPS, TRAINED, Infirmary, Stopped, rate
from models import SUPPORTED
from test_healing import built, result
from torch import nn

from fusegpt_ray.samples import PADDING, Samples
from fusegpt_ray.training.batch import LossBatch, target_weights
from fusegpt_ray.training.distillation import NextToken
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.states import own_windows


@pytest.fixture(name="infirmary")
def _infirmary(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path
) -> Infirmary:
    name = getattr(request, "param", "llama")
    return Infirmary(name, checkpoint(name), tmp_path)


def cross_entropy(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """−log softmax(z_t)[x_{t+1}], the mean over t < T, written out."""
    q = model(ids_BT).logits.double().softmax(-1)
    found = [q[b, t, ids_BT[b, t + 1]] for b in range(len(ids_BT)) for t in range(LENGTH - 1)]
    return -torch.stack(found).log().mean()


@pytest.mark.parametrize("chunk", [512, 4])
@pytest.mark.parametrize("infirmary", ["llama", "gpt2", "gemma3", "opt"], indirect=True)
def test_loss_and_gradients_are_those_of_the_real_model(infirmary: Infirmary, chunk: int) -> None:
    assert infirmary.name in SUPPORTED
    span, runner, states = built(infirmary, train="all", loss="tokens")
    span.form(span.learned)
    batch = LossBatch(*states, target_weights(TRAINED[:BATCH].numpy()))
    loss = accumulate(span, batch, NextToken(runner.trunk.head, chunk), 2, False)
    span.root().backward()
    student, _ = infirmary.plain()
    blocks = infirmary.blocks_of(student).requires_grad_()
    expected = cross_entropy(student, TRAINED[:BATCH])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for learned, block in zip(span.learned.blocks, blocks, strict=True):
        wanted = {name: value.grad for name, value in block.named_parameters()}
        scale = max(value.abs().max().item() for value in wanted.values())
        for name, value in learned.named_parameters():
            torch.testing.assert_close(value.grad, wanted[name], rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("micro", [None, 1])
def test_training_is_adam_on_the_real_model(infirmary: Infirmary, micro: int | None) -> None:
    """However many windows pass at once."""
    highest = 0.001
    cluster = {"micro_batch": micro}
    trained = infirmary.heal(train="all", learning_rate=highest, loss="tokens", cluster=cluster)
    student, _ = infirmary.plain()
    blocks = infirmary.blocks_of(student).requires_grad_()
    adam = torch.optim.Adam(blocks.parameters(), betas=(0.9, 0.95))
    losses, held = [], [cross_entropy(student, HELD).item()]
    for step, ids_BT in enumerate(TRAINED.split(BATCH)):
        adam.param_groups[0]["lr"] = rate(step, highest)
        adam.zero_grad()
        loss = cross_entropy(student, ids_BT)
        loss.backward()
        adam.step()
        losses.append(loss.item())
        held.append(cross_entropy(student, HELD).item())
    assert PARTS == STEPS, "each part is one step"
    assert trained.losses == pytest.approx(losses, rel=1e-4)
    assert trained.held_out == pytest.approx(held, rel=1e-4)
    assert trained.states_bytes_read == 0, "no block is run for it"


def test_stopped_after_a_part_it_ends_with_the_same_bytes(infirmary: Infirmary) -> None:
    settings = {"train": "all", "learning_rate": 0.001, "loss": "tokens"}
    undisturbed = infirmary.heal(**settings)
    infirmary.forget()
    with pytest.raises(Stopped):
        infirmary.heal(stop=2, **settings)
    assert result(infirmary.heal(**settings)) == result(undisturbed)
    assert infirmary.heard == [3, 4]


# --- which tokens count ---


def test_each_target_counts_alike_in_whichever_window_it_stands() -> None:
    windows = np.array([[5, 6, 7, 8], [9, 5, PADDING, PADDING]])
    weights_WT = target_weights(windows)
    # Three targets and one, of eight places.
    assert weights_WT.tolist() == [[2.0, 2.0, 2.0, 0.0], [2.0, 0.0, 0.0, 0.0]]


def test_of_conversations_with_images_the_tokens_of_answers_count() -> None:
    tokens = np.array([[5, 6, 7, 8]])
    targets = np.array([[False, False, True, True]])
    windows = Samples(tokens, targets, np.zeros_like(targets), ())
    assert target_weights(windows).tolist() == [[0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_mean_over_workers_is_the_loss(workers: int) -> None:
    """Of padded windows, too, where workers hold unequal numbers of targets."""
    draw = torch.Generator().manual_seed(0)
    h_WTD = torch.randn(8, 5, 3, generator=draw, dtype=torch.float64)
    head = torch.randn(3, 11, generator=draw, dtype=torch.float64)
    ids_WT = torch.randint(0, 11, (8, 5), generator=draw)
    lengths = [5, 2, 4, 5, 3, 2, 5, 4]
    for row, length in zip(ids_WT, lengths, strict=True):
        row[length:] = PADDING
    weights_WT = target_weights(ids_WT.numpy())
    aim_WT = ids_WT.clamp(min=0).roll(-1, dims=1)
    loss = NextToken(lambda h: h @ head)
    shares = [own_windows(8, 8, workers, rank) for rank in range(workers)]
    parts = [loss(h_WTD[own], aim_WT[own], False, weights_WT[own]) for own in shares]
    log_q = (h_WTD @ head).log_softmax(-1)
    terms = [
        -log_q[w, t, ids_WT[w, t + 1]]
        for w, length in enumerate(lengths)
        for t in range(length - 1)
    ]
    # The loss takes logarithms in float32.
    torch.testing.assert_close(
        torch.stack(parts).mean().double(), torch.stack(terms).mean(), rtol=1e-5, atol=0
    )
