"""Recipes from files, and what `--set` changes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import SMALLEST, merged, mistake, written

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("fusion.epochs=5", ("fusion", "epochs"), 5),
        ("seed=7", ("seed",), 7),
        ("sparsity=[0.2, 0.3]", ("sparsity",), (0.2, 0.3)),
        ("sparsity=0.5", ("sparsity",), (0.5,)),
        ("fusion.learning_rate=1e-4", ("fusion", "learning_rate"), 1e-4),
        (
            "model.source=s3://bucket/a=b",
            ("model", "source"),
            "s3://bucket/a=b",
        ),  # only the first = divides
        ("model.revision='123'", ("model", "revision"), "123"),
        ("model.revision=", ("model", "revision"), None),
        ("model.revision=null", ("model", "revision"), None),
        ("cluster.workers=2", ("cluster", "workers"), 2),  # a section that the file does not have
        ("calibration={data: other.txt, windows: 64}", ("calibration", "windows"), 64),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], expected: Any, tmp_path: Path) -> None:
    value: Any = Recipe.load(written(tmp_path, yaml.safe_dump(SMALLEST)), [override])
    for part in path:
        value = getattr(value, part)
    assert value == expected


def test_later_overrides_count_and_other_keys_stay(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(merged({"fusion": {"rank": 3, "epochs": 1}})))
    r = Recipe.load(file, ["fusion.epochs=2", "evaluation.c4.data=c4.txt", "fusion.epochs=3"])
    assert (r.fusion.rank, r.fusion.epochs) == (3, 3)
    assert r.evaluation == {"c4": Evaluation(data="c4.txt")}


@pytest.mark.parametrize(
    "override",
    [
        "fusion.epochs",
        "=5",
        "",
        ".epochs=5",
        "fusion.=5",
        "fusion..epochs=5",
        "fusion.epochs=[",
        "fusion.epochs=\t{",
        "model.source.x=1",
        "sparsity.x=1",
        "seed=2024-13-45",
    ],
)
def test_overrides_that_say_nothing(override: str, tmp_path: Path) -> None:
    error = mistake(merged({"sparsity": [0.5]}), (override,), tmp_path)
    assert (error.key, error.value) == ("--set", override)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- list\n",
        "model: [",
        "a: b: c",
        "\tmodel: x",
        "model: !!python/object/apply:os.system ['false']",
        "model: &a [*a",
        "[" * 5000,
        "seed: 2024-13-45",
        "a: 1\n? [b]\n: 2",
    ],
)
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    error = mistake(text, folder=tmp_path)
    assert (error.key, error.value) == ("recipe", str(tmp_path / "recipe.yaml"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: {source: caf\xe9}".encode("latin-1"))
    for file in (tmp_path / "absent.yaml", tmp_path, latin):
        with pytest.raises(UserError) as caught:
            Recipe.load(file)
        assert (caught.value.key, caught.value.value) == ("recipe", str(file))


def test_a_key_said_twice_is_a_mistake(tmp_path: Path) -> None:
    """YAML's readers keep the last one in silence: half of a section would be lost."""
    text = yaml.safe_dump(SMALLEST) + "fusion: {rank: 4}\nseed: 1\nfusion: {epochs: 3}\n"
    assert "fusion" in str(mistake(text, folder=tmp_path))
