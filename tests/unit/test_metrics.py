"""Every importance metric, against its formula on full forward passes of the real model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from desk import Desk
from models import (
    DEPTH,
    hidden_states,
    load_model,
    open_stack,
    rewrite,
    token_windows,
    without_blocks,
)

from fusegpt_ray.cli import main
from fusegpt_ray.cost.cost import scored_tokens
from fusegpt_ray.importance import metrics
from fusegpt_ray.importance.metrics import METRICS, kl_divergence, token_loss
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model import runner as runner_module
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.recipe.specs import METRIC_SPECS
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

WINDOWS, LENGTH = 6, 9
IDS = token_windows(WINDOWS, LENGTH)
NEW = ["kl", "loss", "bi"]
DENSE, PRUNED = [0, 1, 2, 3, 4], [1, 2, 4]
TOKENS = {"mi": LENGTH, "kl": LENGTH, "loss": LENGTH - 1, "bi": LENGTH}
"""That the mean of a window is over."""


def one_minus_cosine(a_WTD: torch.Tensor, b_WTD: torch.Tensor) -> torch.Tensor:
    a, b = a_WTD.double(), b_WTD.double()
    return 1 - (a * b).sum(-1) / (a.pow(2).sum(-1).sqrt() * b.pow(2).sum(-1).sqrt())


@torch.no_grad()
def by_formula(folder: Path, name: str, metric: str, kept: list[int]) -> torch.Tensor:
    """The metric summed over tokens, [W, N] float64, by full forward passes of the real model."""
    dense = load_model(folder)
    current = without_blocks(dense, name, kept)
    entering = hidden_states(current, name, IDS)
    log_p = dense(input_ids=IDS).logits.double().log_softmax(-1)
    columns = []
    for position, block in enumerate(kept):
        short = without_blocks(dense, name, [other for other in kept if other != block])
        log_q = short(input_ids=IDS).logits.double().log_softmax(-1)
        column_WT = {
            "mi": lambda: one_minus_cosine(entering[-1], hidden_states(short, name, IDS)[-1]),  # noqa: B023 - called at once
            "kl": lambda: (log_p.exp() * (log_p - log_q)).sum(-1),  # noqa: B023
            "loss": lambda: -log_q[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0],  # noqa: B023
            "bi": lambda: one_minus_cosine(entering[position], entering[position + 1]),  # noqa: B023
        }[metric]()
        columns.append(column_WT.sum(-1))
    return torch.stack(columns, dim=1)


def pruned(dense: Stack, kept: list[int]) -> Stack:
    for block in set(range(DEPTH)) - set(kept):
        dense = dense.drop(block)
    return dense


def engine(folder: Path, batch: int = 2) -> LocalWorkers:
    importance = Importance(windows=WINDOWS, batch=batch)
    return LocalWorkers(
        Setup(Source.find(str(folder), None), open_stack(folder), importance=importance)
    )


def ranked(
    workers: LocalWorkers, stack: Stack, metric: str, last: Ranking | None = None, **how: object
) -> Ranking:
    settings = workers.setup.importance.model_copy(update={"metric": metric, **how})
    return score(workers, stack, IDS.numpy(), settings, last)


@pytest.mark.parametrize("at_once", [1024, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("kept", [DENSE, PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_equals_the_formula_on_full_forward_passes(
    name: str,
    metric: str,
    kept: list[int],
    at_once: int,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a pruned stack, `kl` still compares with the dense model."""
    monkeypatch.setattr(metrics, "AT_ONCE", at_once)
    folder = checkpoint(name)
    dense = open_stack(folder)
    stack, runner = pruned(dense, kept), Runner(dense, torch.device("cpu"), torch.float32, 2)
    expected = by_formula(folder, name, metric, kept)
    assert expected.min() > 0.01  # or the comparison would show nothing
    everyone = tuple(range(len(kept)))
    parts = [Part(ids, everyone) for ids in IDS.split(2)]
    found = torch.cat(sweep(runner, stack, parts, METRICS[metric], dense))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    means = (expected.sum(0) / (WINDOWS * TOKENS[metric])).tolist()
    table = ranked(engine(folder), stack, metric, all=True)
    assert table.scores == pytest.approx(dict(zip(kept, means, strict=True)), rel=1e-4)
    assert table.lowest == kept[int(expected.sum(0).argmin())]


@pytest.mark.parametrize("name", ["llama", "opt", "llava", "lfm2"])
@pytest.mark.parametrize("metric", NEW)
def test_chooses_what_the_full_table_chooses_round_after_round(
    metric: str, name: str, checkpoint: Callable[[str], Path]
) -> None:
    workers = engine(checkpoint(name), batch=1)
    stack, last = workers.setup.dense, None
    while len(stack) > 1:
        table = ranked(workers, stack, metric, all=True)
        for before in (None, last):
            found = ranked(workers, stack, metric, before)
            assert found.lowest == table.lowest
            assert found.scores.items() <= table.scores.items()  # to the last bit
            for dense, item in found.stopped.items():
                assert found.scores[found.lowest] < item.at_least <= table.scores[dense]
        stack, last = stack.drop(table.lowest), found


@pytest.mark.parametrize("how", [{}, {"all": True}, {"racing": 0.5}], ids=["exact", "all", "race"])
@pytest.mark.parametrize("kept", [DENSE, PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize("metric", METRICS)
def test_block_forwards_are_counted_truly(
    metric: str,
    kept: list[int],
    how: dict[str, object],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = 0
    real = runner_module.run_block

    def counting(
        block: torch.nn.Module, h_BTD: torch.Tensor, context: runner_module.Context
    ) -> torch.Tensor:
        nonlocal counted
        counted += len(h_BTD)
        return real(block, h_BTD, context)

    monkeypatch.setattr(runner_module, "run_block", counting)
    workers = engine(checkpoint("llama"))
    found = ranked(workers, pruned(workers.setup.dense, kept), metric, **how)
    depth = len(kept)
    beside = DEPTH if metric == "kl" and depth < DEPTH else 0
    walked, passes = (depth, 1) if metric == "bi" else (depth * (depth + 1) // 2, depth)
    assert counted == found.cost.done <= found.cost.single_walk + 2 * WINDOWS * (depth + beside)
    assert found.cost.single_walk == WINDOWS * (beside + walked)
    assert found.cost.brute_force == WINDOWS * (beside + depth * passes)
    if metric == "bi":
        assert found.cost.done == found.cost.single_walk


@pytest.mark.parametrize("everything", [True, False], ids=["all", "exact"])
@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_pass_the_head_are_known_before(
    metric: str,
    everything: bool,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = 0
    real = Trunk.logits

    def counting(trunk: Trunk, h_BTD: torch.Tensor) -> torch.Tensor:
        nonlocal passed
        passed += h_BTD.shape[0] * h_BTD.shape[1]
        return real(trunk, h_BTD)

    monkeypatch.setattr(Trunk, "logits", counting)
    workers = engine(checkpoint("llama"))
    ranked(workers, workers.setup.dense, metric, all=everything)
    settings = Importance.model_validate({"metric": metric, "all": everything})
    most = WINDOWS * scored_tokens(settings, DEPTH, LENGTH)
    assert passed == most if everything else passed <= most


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_a_number_is_told(
    metric: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    where = {"kl": "lm_head.weight", "loss": "lm_head.weight"}
    tensor = where.get(metric, "model.layers.2.mlp.down_proj.weight")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {tensor: torch.full_like(tensors[tensor], math.nan)}

    workers = engine(rewrite(checkpoint("llama"), tmp_path / "bad", spoil))
    with pytest.raises(FloatingPointError, match="are nan"):
        ranked(workers, workers.setup.dense, metric)


# --- single functions ---


def as_logits(states_1nD: torch.Tensor) -> torch.Tensor:
    """A head for states that are logits already."""
    return states_1nD


def test_kl_by_hand() -> None:
    p_BTV = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    q_BTV = torch.tensor([[[0.25, 0.75], [0.25, 0.75]], [[0.5, 0.5], [1.0, 0.0]]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    (found, same) = kl_divergence(as_logits, p_BTV.log(), [q_BTV.log(), p_BTV.log()])
    # A token that the dense model gives no probability counts nothing; one that only the other
    # gives none is infinitely far.
    torch.testing.assert_close(found, torch.tensor([first, math.inf], dtype=torch.float64))
    assert same.tolist() == [0, 0]
    assert torch.isnan(kl_divergence(as_logits, p_BTV * math.nan, [q_BTV])[0]).all()
    assert torch.isnan(kl_divergence(as_logits, p_BTV, [q_BTV * math.nan])[0]).all()


def test_loss_by_hand() -> None:
    """Of three tokens two are predicted, from the two before them."""
    ids_BT = torch.tensor([[0, 1, 2], [2, 2, 0]])
    p_BTV = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, 3, 3).clone()
    p_BTV[:, 2] = 1 / 3  # predicts what is not in the window
    (found,) = token_loss(as_logits, ids_BT, [p_BTV.log()])
    expected = [-math.log(0.3 * 0.5), -math.log(0.5 * 0.2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found.dtype == torch.float64


def test_no_token_counts_below_zero() -> None:
    """Or the sum over some windows were no lower bound of the sum over all."""
    logits_B1V = torch.randn(500, 1, 300, generator=torch.Generator().manual_seed(0))
    nearly = logits_B1V + 1e-4
    p, q = logits_B1V.log_softmax(-1), nearly.log_softmax(-1)
    assert ((p.exp() * (p - q)).sum(-1) < 0).any()  # rounding alone
    (divergence,) = kl_divergence(as_logits, logits_B1V, [nearly])
    assert divergence.min() == 0
    sure_12V = torch.tensor([[[99.0, 0.0], [0.0, 99.0]]])
    (loss,) = token_loss(as_logits, torch.tensor([[1, 0]]), [sure_12V])
    assert loss.item() >= 0


# --- what a person sees ---


@pytest.fixture
def desk(checkpoint: Callable[[str], Path], tmp_path: Path) -> Desk:
    return Desk.make(tmp_path, checkpoint("llama"))


@pytest.mark.parametrize("metric", METRICS)
def test_score_names_the_metric(
    metric: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.write(importance={"windows": 4, "batch": 2, "metric": metric})
    name = METRIC_SPECS[metric].name
    assert main(["score", recipe, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == name
    assert len(result["blocks"]) == DEPTH
    assert main(["score", recipe]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_and_its_card_name_the_metric_and_the_cost_is_known_before(
    metric: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    importance = {"windows": 4, "batch": 2, "metric": metric, "all": True}
    recipe = Recipe.load(desk.write(method="mi", importance=importance))
    (scoring, *_) = plan(recipe, Display()).cost.stages
    (published,) = compress(recipe, Display())
    title = METRIC_SPECS[metric].title
    assert f"lowest {title}  " in " ".join(capsys.readouterr().err.split("\n"))
    card = (Path(published.uri) / "README.md").read_text()
    assert f"blocks with the lowest {title} dropped, nothing trained." in card
    rounds = published.manifest["rounds"]
    assert scoring.block_forwards == sum(record["block_forwards"]["done"] for record in rounds)


def test_another_metric_is_another_run(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither sums nor scores of one are taken for those of another."""
    importance = {"windows": 4, "batch": 2}
    assert main(["compress", desk.write(method="mi", importance=importance)]) == 0
    capsys.readouterr()
    other = desk.write(method="mi", importance=importance | {"metric": "kl"})
    assert main(["compress", other]) == 2
