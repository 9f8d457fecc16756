"""The single walk that scores every block, against one full forward pass of the real model for
each left-out block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    DEPTH,
    SUPPORTED,
    hidden_states,
    load_model,
    open_stack,
    rewrite,
    token_windows,
    without_blocks,
)
from watching import Watch, size_of

from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.importance.ranking import Ranking, lowest
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model import runner as runner_module
from fusegpt_ray.model import weights
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

CPU = torch.device("cpu")
WINDOWS, LENGTH = 6, 9
IDS = token_windows(WINDOWS, LENGTH)


def make_runner(folder: Path) -> Runner:
    return Runner(open_stack(folder), CPU, torch.float32, batch_size=2)


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


def full_table(runner: Runner, stack: Stack, ids_WT: torch.Tensor, batch: int) -> torch.Tensor:
    """1 − cos of every window and candidate: [W, N]."""
    everyone = tuple(range(len(stack)))
    return torch.cat(sweep(runner, stack, [Part(part, everyone) for part in ids_WT.split(batch)]))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [1, 2, 4]], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2"])
def test_equals_a_full_forward_pass_for_every_block(
    name: str, kept: list[int], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    for dense in set(range(DEPTH)) - set(kept):
        stack = stack.drop(dense)
    expected = brute_force(folder, name, kept)
    assert expected.min() > 0.01  # or the comparison would show nothing
    torch.testing.assert_close(
        full_table(make_runner(folder), stack, IDS, batch=2), expected, **CLOSE
    )

    means = (expected.sum(0) / (WINDOWS * LENGTH)).tolist()
    everything = ranked(engine_of(folder, all=True), stack, IDS.numpy())
    assert everything.scores == pytest.approx(dict(zip(kept, means, strict=True)), rel=1e-5)
    found = ranked(engine_of(folder), stack, IDS.numpy())
    assert found.lowest == everything.lowest == kept[int(expected.sum(0).argmin())]
    assert found.scores == {
        dense: everything.scores[dense] for dense in found.scores
    }  # to the last bit


def ranked(
    workers: LocalWorkers, stack: Stack, windows_WT: np.ndarray, last: Ranking | None = None
) -> Ranking:
    return score(workers, stack, windows_WT, workers.setup.importance, last)


def engine_of(folder: Path, **importance: object) -> LocalWorkers:
    settings = {
        "model": {"source": str(folder)},
        "calibration": {"data": "unused", "length": LENGTH},
        "importance": {"windows": WINDOWS, "batch": 2} | importance,
        "output": {"uri": ".", "name": "unused"},
    }
    return LocalWorkers(
        Setup.of(Recipe.parse(settings), Source.find(str(folder), None), open_stack(folder))
    )


@pytest.mark.parametrize("name", SUPPORTED)
def test_chooses_what_the_full_table_chooses_round_after_round(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Models of every architecture, down to two blocks, with and without what the last round
    found.
    """
    folder = checkpoint(name)
    exact, full = engine_of(folder, batch=1), engine_of(folder, batch=1, all=True)
    stack, last = open_stack(folder), None
    while len(stack) > 1:
        expected = ranked(full, stack, IDS.numpy())
        for found in (ranked(exact, stack, IDS.numpy()), ranked(exact, stack, IDS.numpy(), last)):
            assert found.lowest == expected.lowest
            assert all(score == expected.scores[dense] for dense, score in found.scores.items())
            assert all(
                item.at_least <= expected.scores[dense] for dense, item in found.stopped.items()
            )
        stack, last = stack.drop(found.lowest), found


def test_blocks_that_do_nothing_tie_and_the_earlier_one_goes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = without_effect(checkpoint("llama"), tmp_path, blocks=(1, 3))
    found = ranked(engine_of(folder, batch=1), open_stack(folder), IDS.numpy())
    assert (found.lowest, found.scores[1]) == (1, found.scores[3])
    assert found.scores[1] >= 0  # the cosine of a state with itself may be rounded above 1
    assert found.scores.keys() == {1, 3}


def without_effect(folder: Path, out: Path, blocks: tuple[int, ...]) -> Path:
    """The checkpoint with these blocks' outputs zeroed, so that they hand on what enters them."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = [
            f"model.layers.{i}.{name}.weight"
            for i in blocks
            for name in ("self_attn.o_proj", "mlp.down_proj")
        ]
        return tensors | {name: torch.zeros_like(tensors[name]) for name in outputs}

    return rewrite(folder, out, change)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_no_bit_depends_on_the_other_candidates_or_batches(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack, runner = open_stack(folder), make_runner(folder)
    whole = full_table(runner, stack, IDS, batch=2)
    for positions in ([3], [4, 0], [2, 1, 3], [4, 3, 2, 1, 0]):
        for sizes in ([2], [2, 2], [2, 2, 2]):
            parts = IDS.split(2)[: len(sizes)]
            sums = sweep(runner, stack, [Part(part, tuple(positions)) for part in parts])
            assert torch.equal(torch.cat(sums), whole[: 2 * len(sizes)][:, positions])
    # Batches with candidates of their own, as the search asks for.
    first, second = sweep(runner, stack, [Part(IDS[4:], (4,)), Part(IDS[:2], (0, 2))])
    assert torch.equal(first, whole[4:, [4]])
    assert torch.equal(second, whole[:2, [0, 2]])


def test_an_incomplete_last_batch_counts_too(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    sums = full_table(make_runner(folder), open_stack(folder), IDS[:5], batch=2)
    assert sums.shape == (5, DEPTH)
    torch.testing.assert_close(sums, brute_force(folder, "llama", list(range(DEPTH)))[:5], **CLOSE)


@pytest.mark.parametrize("importance", [{}, {"all": True}, {"racing": 0.5}])
def test_block_forwards_are_counted_truly(
    importance: dict[str, object],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    real = runner_module.run_block

    def counting(
        block: torch.nn.Module, h_BTD: torch.Tensor, context: runner_module.Context
    ) -> torch.Tensor:
        counted.append(len(h_BTD))
        return real(block, h_BTD, context)

    monkeypatch.setattr(runner_module, "run_block", counting)
    folder = checkpoint("llama")
    found = ranked(engine_of(folder, **importance), open_stack(folder), IDS.numpy())
    assert sum(counted) == found.cost.done
    assert found.cost.single_walk == WINDOWS * DEPTH * (DEPTH + 1) // 2
    assert (found.cost.done == found.cost.single_walk) == ("all" in importance)
    assert max(counted) == 2  # one candidate of one batch at a time


@pytest.mark.parametrize("use", ["sweep", "walk"])
def test_every_block_is_read_once_beside_the_one_in_use(
    use: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, CPU, torch.float32, batch_size=4)
    watch = Watch()
    monkeypatch.setattr(weights, "read_tensors", watch)
    if use == "sweep":
        full_table(runner, stack, IDS, batch=2)
    else:
        for _ in runner.walk(stack, IDS):
            pass
    assert watch.asked == [ref for block in stack.blocks for ref in block.weights.values()]
    block_bytes = size_of(stack.blocks[0].weights)
    assert watch.alive[0] == 0
    assert (
        max(watch.alive) <= block_bytes
    )  # whenever a block is read, no more than the one in use is there
    assert not any(ref() for ref in watch.memory)


def test_watching_sees_what_stays_alive(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: blocks that are kept are counted."""
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, CPU, torch.float32, batch_size=4)
    watch = Watch()
    monkeypatch.setattr(weights, "read_tensors", watch)
    kept = [runner.weights.of(block) for block in stack.blocks]
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
def test_lowest_score_goes_and_the_earlier_block_on_a_tie(
    table: dict[int, float], expected: int
) -> None:
    assert lowest(table) == expected


def test_macro_influence_by_hand() -> None:
    full = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    without = torch.tensor([[[0.0, 5.0], [0.0, 1.0]], [[-3.0, -4.0], [1.0, 0.0]]])
    # Orthogonal: 1; parallel: 0. Opposite: 2; 45 degrees: 1 − 1/√2.
    expected = torch.tensor([1.0, 3 - 0.5**0.5], dtype=torch.float64)
    sums = macro_influence(full, without)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=0, atol=2e-7)  # the cosines are float32


def test_no_token_counts_below_zero() -> None:
    """Or the sum over some windows were no lower bound of the sum over all. Cosines of parallel
    float32 vectors pass 1.
    """
    states = torch.randn(50, 40, 48)
    assert (torch.nn.functional.cosine_similarity(states, states * 3, dim=-1) > 1).any()
    sums = macro_influence(states[:, :1], states[:, :1] * 3)  # one token each
    assert sums.min() == 0
    assert torch.isnan(macro_influence(states * torch.nan, states)).all()
