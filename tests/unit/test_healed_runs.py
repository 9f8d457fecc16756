"""Whole runs that heal: what they publish and say, how they go on, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import LENGTH, Desk
from models import load_model
from stopped_runs import Watching, Weights, contents, flip, published, recipe, run_folder

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.publishing.publish import Published

TOKENS = 8 * LENGTH
HEAL: dict[str, Any] = {
    "tokens": TOKENS,
    "batch": 4,
    "held_out": 4,
    "looks": 2,
    "rank": 2,
    "train": "all",
    "learning_rate": 3e-4,  # of two steps on random text, the second state is then the best
}
SAVED = {"cluster": {"engine": "local", "checkpoint_minutes": 0}}


def changes(desk: Desk, **heal: Any) -> dict[str, Any]:
    held_out = {"heldout": {"data": str(desk.heldout)}}
    return {"heal": HEAL | heal, "evaluation": held_out} | SAVED


class StoppedInHealing(Watching):
    """The user presses Ctrl-C after a part of the healing of the model of that name."""

    def __init__(self, name: str, part: int) -> None:
        super().__init__()
        self.name, self.part, self.healed = name, part, list[tuple[str, int]]()

    def epoch(
        self,
        number: int,
        epochs: int,
        loss: float,
        what: str = "epoch",
        held_out: float | None = None,
    ) -> None:
        super().epoch(number, epochs, loss, what, held_out)
        if what == "part":
            name = self.doing.split()[1]
            self.healed.append((name, number))
            if (name, number) == (self.name, self.part):
                raise KeyboardInterrupt


@pytest.fixture(name="undisturbed", scope="module")
def _undisturbed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Weights, list[Published]]:
    desk = Desk.make(tmp_path_factory.mktemp("healed"), checkpoint("llama"))
    results = compress(recipe(desk, **changes(desk)), Watching())
    assert not run_folder(desk).exists()
    return published(desk), results


def plain_perplexity(folder: str, heldout: Path) -> float:
    """By transformers alone, over the text's consecutive windows."""
    words = heldout.read_text().split()
    ids = torch.tensor([int(word.removeprefix("w")) for word in words])
    windows_WT = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    model = load_model(Path(folder))
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.double() for row in windows_WT]
    return float(torch.stack(losses).mean().exp())


def test_the_manifest_tells_what_each_stage_contributed(
    undisturbed: tuple[Weights, list[Published]], checkpoint: Callable[[str], Path]
) -> None:
    for item in undisturbed[1]:
        row = item.manifest["perplexity"]["heldout"]
        stages = ["dense", "dropped", "fused", "healed"]
        assert [key for key in row if key in stages] == stages
        assert len({row[stage] for stage in stages}) == 4
        heldout = Path(item.uri).parents[1] / "heldout.txt"
        assert row["healed"] == pytest.approx(plain_perplexity(item.uri, heldout), rel=1e-5)
        healing = item.manifest["healing"]
        assert healing["tokens"] == TOKENS and len(healing["losses"]) == 2
        assert healing["held_out"][2] < healing["held_out"][0]
        card = (Path(item.uri) / "README.md").read_text()
        assert "| perplexity on | dense | dropped | fused | this model |" in card
        values = " | ".join(f"{row[stage]:.2f}" for stage in stages)
        assert values in card and "*Fused*: the removed blocks' weights fused" in card
        assert f"Healing: 8 windows of {LENGTH} tokens" in card


@pytest.mark.parametrize(("name", "part"), [("demo-p20", 1), ("demo-p60", 1), ("demo-p60", 2)])
def test_a_run_that_is_stopped_in_healing_ends_with_the_same_bytes(
    desk: Desk, undisturbed: tuple[Weights, list[Published]], name: str, part: int
) -> None:
    """No round and no part is done again, but for one that ended as the run did."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk)), StoppedInHealing(name, part))
    names = contents(run_folder(desk))
    assert (f"blocks/heal-00{1 if name == 'demo-p20' else 3}/checkpoints/checkpoint.json") in names
    again = StoppedInHealing("none", 0)
    compress(recipe(desk, **changes(desk)), again)
    assert published(desk) == undisturbed[0]
    assert again.rounds == []
    assert f"  going on after part {part} of 2" in again.said
    expected = [(n, p) for n in ("demo-p20", "demo-p60") for p in (1, 2)]
    assert again.healed == expected[expected.index((name, part)) + 1 :]
    assert not run_folder(desk).exists()


def test_what_is_healed_is_not_healed_again(
    desk: Desk, undisturbed: tuple[Weights, list[Published]]
) -> None:
    class BeforePublishing(Watching):
        def stage(self, text: str, total: int | None = None) -> None:
            if text.startswith("evaluating and publishing"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk)), BeforePublishing())
    assert "heal-001.json" in contents(run_folder(desk))
    again = StoppedInHealing("none", 0)
    compress(recipe(desk, **changes(desk)), again)
    assert f"demo-p20 is healed (found in {run_folder(desk)})" in again.said
    assert {name for name, _ in again.healed} == {"demo-p60"}
    assert published(desk) == undisturbed[0]


@pytest.mark.parametrize("damaged", ["heal-001.json", "blocks/heal-001/block-000.safetensors"])
def test_a_damaged_healed_model_is_healed_again(
    desk: Desk, undisturbed: tuple[Weights, list[Published]], damaged: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk)), StoppedInHealing("demo-p60", 1))
    flip(run_folder(desk) / damaged)
    # The first model is published already: once it is removed it has to be made again.
    shutil.rmtree(desk.out / "demo-p20")
    again = StoppedInHealing("none", 0)
    compress(recipe(desk, **changes(desk)), again)
    assert any(line.startswith("WARNING") and line.endswith("healing again") for line in again.said)
    assert ("demo-p20", 1) in again.healed
    assert published(desk) == undisturbed[0]


def test_a_rate_that_diverges_keeps_the_rounds_for_a_lower_one(
    desk: Desk, undisturbed: tuple[Weights, list[Published]]
) -> None:
    with pytest.raises(FloatingPointError, match=r"lower heal\.learning_rate") as caught:
        compress(recipe(desk, **changes(desk, learning_rate=1e30)), Watching())
    notes = " ".join(caught.value.__notes__)
    assert "its 1 rounds are finished" in notes and "other values in heal" in notes
    assert not list(desk.out.glob("*/fusegpt.json"))
    again = Watching()
    compress(recipe(desk, **changes(desk)), again)
    assert again.rounds == []
    assert published(desk) == undisturbed[0]


def test_a_finished_model_belongs_to_its_healing(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2, **changes(desk)), Watching())
    again = Watching()
    compress(recipe(desk, sparsity=0.2, **changes(desk)), again)
    assert "nothing is left to do: this very run has published everything" in again.said
    with pytest.raises(UserError, match="a finished model is already at"):
        compress(recipe(desk, sparsity=0.2, **changes(desk, rank=3)), Watching())


def test_a_dropped_model_is_healed_without_rounds_of_training(desk: Desk) -> None:
    given = changes(desk, train="all")
    (item,) = compress(recipe(desk, sparsity=0.2, method="mi", **given), Watching())
    row = item.manifest["perplexity"]["heldout"]
    assert "fused" not in row and row["healed"] != row["dropped"]
    assert json.loads((Path(item.uri) / "config.json").read_text())["num_hidden_layers"] == 4


def test_left_out_the_tokens_are_what_the_text_has(desk: Desk) -> None:
    """Of 200 tokens, 16 windows: four are held out, where the calibration has 16."""
    given = changes(desk)
    given["calibration"] = desk.recipe()["calibration"] | {"windows": 16}
    del given["heal"]["tokens"]
    (item,) = compress(recipe(desk, sparsity=0.2, method="mi", **given), Watching())
    assert item.manifest["healing"]["tokens"] == 12 * LENGTH


@pytest.mark.parametrize(
    ("heal", "key", "fix"),
    [
        ({"tokens": 300}, "heal.tokens", "heal.repeat"),
        ({"held_out": 6}, "heal.held_out", "use 8"),
        ({"tokens": LENGTH}, "heal.tokens", f"use at least {4 * LENGTH}"),
        ({"column": "words"}, "heal.column", "give data"),
        ({"train": "loar"}, "heal.train", ""),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    desk: Desk, heal: dict[str, Any], key: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        compress(recipe(desk, **changes(desk, **heal)), Watching())
    assert caught.value.key == key
    assert fix in str(caught.value)
    assert not desk.out.exists()


def test_a_short_text_is_repeated_where_that_is_asked(desk: Desk) -> None:
    given = changes(desk, tokens=24 * LENGTH, repeat=True)
    (item,) = compress(recipe(desk, sparsity=0.2, method="mi", **given), Watching())
    assert item.manifest["healing"]["tokens"] == 24 * LENGTH
