"""The recipe: what it fills in, how many blocks it removes, and what the model is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from recipes import SMALLEST, recipe, written

from fusegpt_ray.recipe.recipe import Recipe, blocks_to_remove, percent

# --- what is filled in ---


def test_defaults() -> None:
    r = recipe()
    assert (r.method, r.sparsity, r.seed) == ("fusegpt", (0.25,), 0)
    assert (
        r.calibration.windows,
        r.calibration.length,
        r.calibration.seed,
        r.calibration.column,
    ) == (1024, 2048, 0, "text")
    assert r.importance.windows == 32
    f = r.fusion
    # method.md: 7 neighbours, r = 128 for both, batches of 8, Adam's betas and eps.
    assert (f.group_size, f.rank, f.lora_rank, f.epochs, f.batch) == (7, 128, 128, 1, 8)
    assert (f.betas, f.eps, f.learning_rate) == ((0.9, 0.95), 1e-8, 3e-4)
    assert (r.cluster.engine, r.cluster.workers, r.cluster.replicas, r.cluster.cache_gb) == (
        "ray",
        1,
        1,
        None,
    )
    assert (r.cluster.checkpoint_minutes, r.cluster.recompute_activations) == (5, False)
    assert (r.model.dtype, r.evaluation, r.output.shard_gb) == ("auto", {}, 5.0)


PAPER = {
    "loss": "batch_kl",
    "teacher": "current",
    "learning_rate": 1e-3,
    "lora_learning_rate": 9.65e-6,
    "trained_dtype": "model",
    "fold": "at_end",
    "epochs": 20,
    "start": "none",
}
ROUNDS = {
    "loss": "normalized_mse",
    "teacher": "dense",
    "start": "none",
    "learning_rate": 1e-3,
    "lora_learning_rate": 3e-4,
    "trained_dtype": "float32",
    "fold": "each_round",
    "epochs": 20,
}
BEST = ROUNDS | {"start": "auto", "learning_rate": 3e-4, "lora_learning_rate": 2e-4, "epochs": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, BEST),
        ({"fusion": None}, BEST),
        ({"preset": "best"}, BEST),
        ({"preset": "rounds"}, ROUNDS),
        ({"preset": "paper"}, PAPER),
        # What the recipe says itself counts.
        (
            {"preset": "paper", "fusion": {"loss": "normalized_mse"}},
            PAPER | {"loss": "normalized_mse"},
        ),
        (
            {"preset": "paper", "fusion": {"teacher": "dense", "fold": "each_round"}},
            PAPER | {"teacher": "dense", "fold": "each_round"},
        ),
        ({"fusion": {"learning_rate": 0.5}}, BEST | {"learning_rate": 0.5}),
        ({"fusion": {"trained_dtype": "model"}}, BEST | {"trained_dtype": "model"}),
    ],
)
def test_presets_fill_in_what_is_left_out(given: dict[str, Any], expected: dict[str, Any]) -> None:
    got = Recipe.parse(SMALLEST | given).fusion
    assert {key: getattr(got, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("method", "start"), [("mi", "none"), ("mi+linear", "linear"), ("mi+ft", "auto")]
)
def test_only_what_trains_may_start_as_the_preset_says(method: str, start: str) -> None:
    assert Recipe.parse(SMALLEST | {"method": method}).fusion.start == start


@pytest.mark.parametrize(
    ("given", "heals"),
    [
        ({}, True),
        ({"heal": {"rank": 8}}, True),
        ({"heal": None}, False),
        ({"preset": "rounds"}, False),
        ({"preset": "paper"}, False),
        ({"preset": "paper", "heal": {}}, True),
        ({"method": "mi"}, False),
        ({"method": "mi", "heal": {}}, True),
        ({"method": "mi+ft"}, False),
    ],
)
def test_the_best_preset_heals_what_is_fused(given: dict[str, Any], heals: bool) -> None:
    """Other methods are what their names say, unless healing is asked for."""
    assert (Recipe.parse(SMALLEST | given).heal is not None) == heals


def test_presets_hold_for_recipes_from_files_and_overrides(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(SMALLEST))
    assert Recipe.load(file, ["preset=paper"]).fusion.loss == "batch_kl"
    assert (
        Recipe.load(file, ["preset=paper", "fusion.loss=normalized_mse"]).fusion.loss
        == "normalized_mse"
    )


@pytest.mark.parametrize("preset", ["best", "rounds", "paper"])
def test_json_and_back_changes_nothing(preset: str) -> None:
    r = recipe(
        sparsity=[0.2, 0.25, 0.3],
        evaluation={"wiki": {"data": "wikitext", "config": "wikitext-2-raw-v1", "length": 512}},
        preset=preset,
        fusion={"betas": [0.8, 0.9]},
        cluster={"workers": 2, "object_store_gb": 2.5},
    )
    again = Recipe.parse(json.loads(json.dumps(r.model_dump(mode="json"))))
    assert again == r
    assert again.model_dump_json() == r.model_dump_json()
    assert again.evaluation["wiki"].split == "test"  # evaluation's default, not calibration's


def test_a_single_text_is_written_as_ever() -> None:
    """The recipe as JSON is part of what a run is, and of manifests."""
    text = {"data": "text.txt", "config": None, "split": "train", "revision": None}
    text |= {"column": "text", "windows": 1024, "length": 2048, "pack": True}
    text |= {"images": False, "bos": "auto", "seed": 0}
    assert list(recipe().model_dump(mode="json")["calibration"].items()) == [
        *(text | {"piece_mb": 16}).items()
    ]


def test_a_part_that_says_nothing_of_images_is_written_as_ever() -> None:
    part = {"data": "a.txt", "config": None, "split": "train", "revision": None}
    part |= {"column": "text", "weight": 1.0}
    seen = {"data": "b.jsonl", "images": True}
    calibration = recipe(calibration={"data": [{"data": "a.txt"}, seen]}).calibration
    written = calibration.model_dump(mode="json")["data"]
    assert list(written[0].items()) == [*part.items()]
    assert written[1] == part | seen


def test_several_texts() -> None:
    two = [{"data": "a.txt", "weight": 3}, {"data": "b.jsonl", "column": "body"}]
    r = recipe(calibration={"data": two})
    assert [(part.data, part.column, part.weight) for part in r.calibration.parts] == [
        ("a.txt", "text", 3),
        ("b.jsonl", "body", 1),
    ]
    again = Recipe.parse(json.loads(json.dumps(r.model_dump(mode="json"))))
    assert again == r and again.model_dump_json() == r.model_dump_json()
    (alone,) = recipe(calibration={"data": "a.csv", "column": "body"}).calibration.parts
    assert (alone.data, alone.column, alone.split, alone.weight) == ("a.csv", "body", "train", 1)


def test_recipes_do_not_change() -> None:
    r = recipe()
    for section, key in (
        (r, "seed"),
        (r.fusion, "epochs"),
        (r.calibration, "windows"),
        (r.output, "uri"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_a_recipe_needs_no_torch() -> None:
    code = (
        "import sys, fusegpt_ray.recipe.recipe; print([m for m in ('torch', 'transformers', 'ray',"
        " 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- how many blocks, and what the model is called ---


@pytest.mark.parametrize(
    ("blocks", "sparsity", "removed"),
    [
        (32, 0.25, 8),
        (32, 0.2, 7),  # ceil(6.4)
        (32, 0.3, 10),  # ceil(9.6)
        (40, 0.25, 10),
        (80, 0.3, 24),
        (20, 0.15, 3),  # 20 × 0.15 is 3.0000000000000004 in floats
        (20, 0.35, 7),
        (100, 0.07, 7),
        (100, 0.29, 29),
        (12, 0.25, 3),
        (12, 0.26, 4),
        (16, 0.125, 2),
        (5, 0.01, 1),
        (1, 0.5, 1),
        (2, 0.5, 1),
    ],
)
def test_blocks_to_remove(blocks: int, sparsity: float, removed: int) -> None:
    assert blocks_to_remove(blocks, sparsity) == removed


@given(blocks=st.integers(1, 200), hundredths=st.integers(1, 99))
def test_blocks_to_remove_is_the_exact_ceiling(blocks: int, hundredths: int) -> None:
    assert blocks_to_remove(blocks, hundredths / 100) == -(-blocks * hundredths // 100)


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [
        (0.25, "25"),
        (0.125, "12.5"),
        (0.3, "30"),
        (0.07, "7"),
        (0.29, "29"),
        (0.005, "0.5"),
        (1 / 3, "33.333333"),
        (0.999, "99.9"),
    ],
)
def test_percent(sparsity: float, name: str) -> None:
    assert percent(sparsity) == name
