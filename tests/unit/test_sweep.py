"""The single walk that scores every block, against one full forward pass of the real model for each left-out block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import DEPTH, hidden_states, load_model, open_stack, token_windows, without_blocks
from watching import Watch, size_of

from fusegpt_ray import runner as runner_module
from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.importance.sweep import lowest, scores, sweep
from fusegpt_ray.runner import Runner

CPU = torch.device("cpu")
WINDOWS, LENGTH = 6, 9
IDS = token_windows(WINDOWS, LENGTH)


def make_runner(folder: Path, rows: int = 16) -> Runner:
    return Runner(open_stack(folder), CPU, torch.float32, rows)


def one_minus_cosine(full_WTD: torch.Tensor, without_WTD: torch.Tensor) -> torch.Tensor:
    """1 − a·b / (|a| |b|) of every token, written out in float64: [W, T]."""
    a, b = full_WTD.double(), without_WTD.double()
    return 1 - (a * b).sum(-1) / (a.pow(2).sum(-1).sqrt() * b.pow(2).sum(-1).sqrt())


def brute_force(folder: Path, name: str, kept: list[int]) -> torch.Tensor:
    """1 − cos summed over tokens, [W, N], from N + 1 full forward passes of the real model."""
    model = load_model(folder)
    full = hidden_states(without_blocks(model, name, kept), name, IDS)[-1]
    columns = []
    for dense in kept:
        rest = [other for other in kept if other != dense]
        without = hidden_states(without_blocks(model, name, rest), name, IDS)[-1]
        columns.append(one_minus_cosine(full, without).sum(-1))
    return torch.stack(columns, dim=1)


# A cosine of float32 states of 32 numbers is known to about 1e-7 a token; sums run over 9 tokens.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [1, 2, 4]], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2"])
def test_equals_a_full_forward_pass_for_every_block(name: str, kept: list[int], checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    for dense in set(range(DEPTH)) - set(kept):
        stack = stack.drop(dense)
    expected = brute_force(folder, name, kept)
    assert expected.min() > 0.01  # or the comparison would show nothing

    sums = sweep(make_runner(folder), stack, IDS, batch=2)

    torch.testing.assert_close(sums, expected, **CLOSE)
    table = scores(stack, sums, LENGTH)
    means = (expected.sum(0) / (WINDOWS * LENGTH)).tolist()
    assert table == pytest.approx(dict(zip(kept, means, strict=True)), rel=1e-5)
    assert lowest(table) == kept[int(expected.sum(0).argmin())]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_does_not_depend_on_how_many_rows_pass_at_once(rows: int, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gemma3")
    stack = open_stack(folder)
    # Only the order of additions inside a matrix product may change with the number of rows.
    expected = sweep(make_runner(folder), stack, IDS, batch=3)
    torch.testing.assert_close(sweep(make_runner(folder, rows), stack, IDS, batch=3), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("rows", [3, 16])
def test_splitting_batches_over_replicas_changes_no_bit(name: str, rows: int, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    whole = sweep(make_runner(folder, rows), stack, IDS, batch=2)
    for sizes in ([2, 4], [4, 2], [2, 2, 2]):
        parts = [sweep(make_runner(folder, rows), stack, part, batch=2) for part in IDS.split(sizes)]
        assert torch.equal(torch.cat(parts), whole)


def test_an_incomplete_last_batch_counts_too(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    sums = sweep(make_runner(folder), open_stack(folder), IDS[:5], batch=2)
    assert sums.shape == (5, DEPTH)
    torch.testing.assert_close(sums, brute_force(folder, "llama", list(range(DEPTH)))[:5], **CLOSE)


def test_costs_k_plus_one_block_forwards_for_block_k(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = runner_module.run_block

    def counting(block: torch.nn.Module, h_BTD: torch.Tensor, context: runner_module.Context) -> torch.Tensor:
        counted.append(len(h_BTD))
        return real(block, h_BTD, context)

    monkeypatch.setattr(runner_module, "run_block", counting)
    folder = checkpoint("llama")
    sweep(make_runner(folder, rows=7), open_stack(folder), IDS, batch=3)
    assert sum(counted) == WINDOWS * DEPTH * (DEPTH + 1) // 2
    assert max(counted) <= 7


@pytest.mark.parametrize("use", ["sweep", "walk"])
def test_every_block_is_read_once_and_forgotten(use: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, CPU, torch.float32, rows=4)
    watch = Watch()
    monkeypatch.setattr(runner_module, "read_tensors", watch)
    if use == "sweep":
        sweep(runner, stack, IDS, batch=2)
    else:
        for _ in runner.walk(stack, IDS):
            pass
    assert watch.asked == [ref for block in stack.blocks for ref in block.weights.values()]
    assert watch.alive == [0] * DEPTH  # whenever a block is read, no other is there
    assert not any(ref() for ref in watch.memory)


def test_watching_sees_what_stays_alive(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: blocks that are kept are counted."""
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, CPU, torch.float32, rows=4)
    watch = Watch()
    monkeypatch.setattr(runner_module, "read_tensors", watch)
    kept = [runner.load(block) for block in stack.blocks]
    block_bytes = size_of(stack.blocks[0].weights)
    assert watch.alive == [i * block_bytes for i in range(len(kept))]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({0: 0.3, 1: 0.1, 2: 0.2}, 1),
        ({4: 0.1, 1: 0.1, 2: 0.2}, 1),
        ({7: 0.0}, 7),
        ({3: 0.5, 5: -1e-9, 8: 0.0}, 5),
    ],
)
def test_lowest_score_goes_and_the_earlier_block_on_a_tie(table: dict[int, float], expected: int) -> None:
    assert lowest(table) == expected


def test_macro_influence_by_hand() -> None:
    full = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    without = torch.tensor([[[0.0, 5.0], [0.0, 1.0]], [[-3.0, -4.0], [1.0, 0.0]]])
    # Orthogonal: 1; parallel: 0. Opposite: 2; 45 degrees: 1 − 1/√2.
    expected = torch.tensor([1.0, 3 - 0.5**0.5], dtype=torch.float64)
    sums = macro_influence(full, without)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=0, atol=2e-7)  # the cosines are float32
