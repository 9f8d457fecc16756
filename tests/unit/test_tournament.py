"""The tournament of sets of blocks: how sets are found, who wins, how it goes on after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk import LENGTH, Desk
from infirmary import HELD, TRAINED, Infirmary
from models import load_model
from stopped_runs import Watching, published, recipe, run_folder
from torch.nn.functional import cosine_similarity

from fusegpt_ray.compressing.tournament import Tournament
from fusegpt_ray.cost.cost import cost
from fusegpt_ray.cost.traffic import traffic
from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.removals import removal
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.targets import Target
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers
from fusegpt_ray.workers.room import Allocation

SETTINGS = Importance(windows=len(TRAINED), batch=4)
HEAL = {"batch": 4, "held_out": 4, "looks": 2, "train": "all", "learning_rate": 1e-3, "warmup": 0.3}
WINDOWS_WT = TRAINED.numpy()


@pytest.fixture(name="infirmary")
def _infirmary(checkpoint: Callable[[str], Path], tmp_path: Path) -> Infirmary:
    return Infirmary("llama", checkpoint("llama"), tmp_path)


def workers(place: Infirmary) -> LocalWorkers:
    source = Source.find(str(place.folder), None)
    return LocalWorkers(Setup(source, place.dense, Cluster(engine="local"), "float32", SETTINGS))


def found(place: Infirmary, way: str, count: int) -> tuple[int, ...] | None:
    with workers(place) as here:
        return removal(way, here, place.dense, WINDOWS_WT, SETTINGS, count)


def test_a_run_is_the_consecutive_blocks_that_change_states_least(infirmary: Infirmary) -> None:
    """By transformers' own states."""
    model = load_model(infirmary.folder)
    with torch.no_grad():
        # The last of transformers' states has passed the norm.
        last: list[torch.Tensor] = []
        infirmary.blocks_of(model)[-1].register_forward_hook(
            lambda _module, _given, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        states = [*model(TRAINED, output_hidden_states=True).hidden_states[:-1], *last]
    for count in (1, 2, 3):
        far = [
            (1 - cosine_similarity(entering, leaving, dim=-1).double()).sum().item()
            for entering, leaving in zip(states, states[count:], strict=False)
        ]
        first = int(np.argmin(far))
        assert found(infirmary, "run", count) == tuple(range(first, first + count))


@pytest.mark.parametrize("metric", ["mi", "kl", "loss", "bi"])
def test_by_a_metric_the_lowest_goes_again_and_again(infirmary: Infirmary, metric: str) -> None:
    settings, stack, expected = SETTINGS.model_copy(update={"metric": metric}), infirmary.dense, []
    with workers(infirmary) as here:
        for _ in range(3):
            expected.append(score(here, stack, WINDOWS_WT, settings).lowest)
            stack = stack.drop(expected[-1])
    assert found(infirmary, metric, 3) == tuple(expected)


def test_spaced_blocks_are_never_side_by_side(infirmary: Infirmary) -> None:
    depth = len(infirmary.dense)
    blocks = found(infirmary, "spaced", 2)
    assert blocks is not None and abs(blocks[0] - blocks[1]) > 1
    assert blocks[0] == (found(infirmary, "mi", 1) or ())[0]
    assert found(infirmary, "spaced", (depth + 1) // 2 + 1) is None


def parsed(place: Infirmary, learning_rate: float = HEAL["learning_rate"], **search: Any) -> Recipe:
    return Recipe.parse(
        {
            "model": {"source": str(place.folder)},
            "method": "mi",
            "calibration": {"data": "t", "windows": 16, "length": TRAINED.shape[1]},
            "importance": {"windows": 16},
            "heal": HEAL | {"learning_rate": learning_rate},
            "search": search,
            "cluster": {"engine": "local"},
            "output": {"uri": str(place.out), "name": "demo", "report": False, "samples": []},
        }
    )


def test_the_winner_has_the_lowest_loss_after_the_same_healing(infirmary: Infirmary) -> None:
    asked = parsed(infirmary, tokens=8 * TRAINED.shape[1])
    texts = WINDOWS_WT, WINDOWS_WT, HELD.numpy()
    with workers(infirmary) as here:
        journal = Journal(str(infirmary.out / "run"))
        contest = Tournament(asked, here, journal, infirmary.dense, *texts, Watching())
        chosen, record = contest.removal(2)
    assert record["tokens"] == 8 * TRAINED.shape[1]
    sets = [frozenset(tried["removed"]) for tried in record["tried"]]
    assert len(set(sets)) == len(sets) >= 3
    assert sum(len(tried["ways"]) for tried in record["tried"]) == 6
    for tried in record["tried"]:
        infirmary.stack = infirmary.dense.drop(*tried["removed"])
        healed = infirmary.heal(windows_WT=TRAINED[:8], **HEAL | {"looks": 1})
        assert tried["held_out"] == healed.held_out
        infirmary.forget()
    best = min(record["tried"], key=lambda tried: min(tried["held_out"]))
    assert chosen == best["removed"]


@pytest.mark.parametrize("streams", [True, False])
def test_it_reads_what_was_planned(infirmary: Infirmary, streams: bool) -> None:
    """At most: equal sets are healed once, and few windows are scored in fewer walks than four."""
    asked = parsed(infirmary, tokens=8 * TRAINED.shape[1])
    cluster = Cluster(engine="local", weights="streamed" if streams else "resident")
    targets = [Target(sparsity=None, remove=2, folder="demo")]
    planned_cost = cost(asked, infirmary.dense, targets)
    rows = traffic(asked, infirmary.dense, targets, planned_cost, Allocation(1, 1, 0), streams)
    (planned,) = [row.read for row in rows if row.stage == "search"]
    source = Source.find(str(infirmary.folder), None)
    texts = WINDOWS_WT, WINDOWS_WT, HELD.numpy()
    with LocalWorkers(Setup(source, infirmary.dense, cluster, "float32", SETTINGS)) as here:
        journal = Journal(str(infirmary.out / "run"))
        Tournament(asked, here, journal, infirmary.dense, *texts, Watching()).removal(2)
        read = here.runner.weights.bytes_read
    assert planned / 3 < read <= planned


def test_a_set_whose_healing_diverges_loses(infirmary: Infirmary) -> None:
    texts = WINDOWS_WT, WINDOWS_WT, HELD.numpy()

    def contest(name: str, **heal: float) -> Tournament:
        asked = parsed(infirmary, tokens=8 * TRAINED.shape[1], **heal)
        journal = Journal(str(infirmary.out / name))
        return Tournament(asked, here, journal, infirmary.dense, *texts, Watching())

    with workers(infirmary) as here:
        steady = contest("run")
        chosen, record = steady.removal(2)
        ways = [*asked_ways(record)]
        for tried in record["tried"]:
            if tried["removed"] == chosen:
                tried["held_out"] = []
        steady.journal.keep("search", 0, {"looked": ways, "entrants": record["tried"]})
        others = [tried for tried in record["tried"] if tried["removed"] != chosen]
        second, again = steady.removal(2)
        assert second == min(others, key=lambda tried: min(tried["held_out"]))["removed"]
        assert [] in [tried["held_out"] for tried in again["tried"]]
        with pytest.raises(FloatingPointError, match="every set of blocks diverged"):
            contest("diverging", learning_rate=1e30).removal(2)


def asked_ways(record: dict[str, Any]) -> list[str]:
    return [way for tried in record["tried"] for way in tried["ways"]]


def changes(desk: Desk) -> dict[str, Any]:
    heal = {**HEAL, "tokens": 8 * LENGTH}
    return {"heal": heal, "search": {"tokens": 4 * LENGTH, "candidates": ["mi", "run", "spaced"]}}


class StoppedInSearch(Watching):
    """The user presses Ctrl-C after so many trials."""

    def __init__(self, trials: int | None = None) -> None:
        super().__init__()
        self.left, self.tried = trials, list[str]()

    def say(self, text: str) -> None:
        super().say(text)
        if "; held-out loss" in text:
            self.tried.append(text)
            if len(self.tried) == self.left:
                raise KeyboardInterrupt


def test_a_run_removes_what_won_and_goes_on_after_any_trial(desk: Desk) -> None:
    watching = StoppedInSearch()
    (light, deep) = compress(recipe(desk, **changes(desk)), watching)
    undisturbed, tried = published(desk), watching.tried
    search = deep.manifest["search"]
    assert len(search["tried"]) == len(tried) >= 2
    best = min(search["tried"], key=lambda one: min(one["held_out"]))
    assert deep.manifest["removed"] == list(best["removed"])
    assert light.manifest["removed"] == deep.manifest["removed"][:1]
    assert all("scores" not in record for record in deep.manifest["rounds"])
    card = (Path(deep.uri) / "README.md").read_text()
    assert f"blocks chosen of {len(tried)} sets by healing each for a while" in card
    assert f"| {', '.join(map(str, best['removed']))} | {', '.join(best['ways'])} |" in card
    for after in range(1, len(tried) + 1):
        shutil.rmtree(desk.out)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe(desk, **changes(desk)), StoppedInSearch(after))
        again = StoppedInSearch()
        compress(recipe(desk, **changes(desk)), again)
        assert again.tried == tried[after:]
        assert published(desk) == undisturbed
        assert not run_folder(desk).exists()


def test_a_set_that_was_found_is_not_looked_for_again(desk: Desk) -> None:
    """Stopped while the last of three sets is looked for."""

    class Looking(Watching):
        def __init__(self, last: str | None = None) -> None:
            super().__init__()
            self.last, self.looked = last, list[str]()

        def stage(self, text: str, total: int | None = None) -> None:
            super().stage(text, total)
            if text.startswith("search: 3 blocks by "):
                self.looked.append(text.rpartition(" ")[2])
                if self.looked[-1] == self.last:
                    raise KeyboardInterrupt

    (_, undisturbed) = compress(recipe(desk, **changes(desk)), Looking())
    shutil.rmtree(desk.out)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk)), Looking("spaced"))
    again = Looking()
    (_, resumed) = compress(recipe(desk, **changes(desk)), again)
    assert again.looked == ["spaced"]
    told = [one.manifest["search"] | {"seconds": None} for one in (resumed, undisturbed)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("search", {"heal": None}, "add heal"),
        ("search.candidates", {"search": {"candidates": ["mi"]}}, "two or more"),
        ("search.candidates", {"search": {"candidates": ["mi", "mi"]}}, "each once"),
    ],
)
def test_a_tournament_needs_rivals_and_a_healing(
    desk: Desk, key: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as told:
        recipe(desk, **{**changes(desk), **change})
    assert told.value.key == key
