"""How the recipe answers every mistake: with the key, the value and the fix."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from recipes import SMALLEST, merged, mistake, recipe

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.recipe import Recipe

KEY_OF_A_KIND = "cluster.gpu_hour_price.H100"


@pytest.mark.parametrize(
    ("sections", "key", "fix"),
    [
        ({"sparsty": 0.3}, "sparsty", "did you mean sparsity"),
        ({"model": {"revison": "main"}}, "model.revison", "did you mean model.revision"),
        (
            {"fusion": {"learningrate": 1}},
            "fusion.learningrate",
            "did you mean fusion.learning_rate",
        ),
        ({"preset": "paper", "fusion": {"epoch": 3}}, "fusion.epoch", "did you mean fusion.epochs"),
        ({"calibration": {"lenght": 3}}, "calibration.lenght", "did you mean calibration.length"),
        (
            {"evaluation": {"wiki": {"data": "x", "colum": "y"}}},
            "evaluation.wiki.colum",
            "did you mean evaluation.wiki.column",
        ),
        # A name that is also a key of its section.
        (
            {"evaluation": {"data": {"data": "x", "widnows": 1}}},
            "evaluation.data.widnows",
            "did you mean evaluation.data.windows",
        ),
        # A text in a list.
        (
            {"calibration": {"data": [{"data": "x", "wieght": 3}]}},
            "calibration.data.0.wieght",
            "did you mean calibration.data.0.weight",
        ),
        (
            {"calibration": {"data": [{"data": "x"}, {"data": "y", "xyzzy": 3}]}},
            "calibration.data.1.xyzzy",
            "the keys here are column, config, data, generate, image_folder, images, licence,",
        ),
        # No key is near: all are listed.
        ({"cluster": {"xyzzy": 1}}, "cluster.xyzzy", "the keys here are address, cache_gb,"),
        # Keys of other sections are unknown here.
        ({"importance": {"epochs": 1}}, "importance.epochs", "the keys here are"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(
    sections: dict[str, Any], key: str, fix: str
) -> None:
    error = mistake(merged(sections))
    assert (error.key, error.problem) == (key, "unknown key")
    assert error.fix.startswith(fix)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"calibration": {"data": "x.jsonl", "images": True, "column": "c"}}, "calibration"),
        (
            {
                "calibration": {
                    "data": [{"data": "a"}, {"data": "b", "images": True, "column": "c"}]
                }
            },
            "calibration.data.1",
        ),
        (
            {"calibration": {"images": True}, "heal": {"data": "c.jsonl", "column": "c"}},
            "heal",
        ),
        ({"evaluation": {"seen": {"data": "x", "images": True, "column": "c"}}}, "evaluation.seen"),
    ],
)
def test_conversations_with_images_have_no_column_of_ones_choice(
    sections: dict[str, Any], key: str
) -> None:
    error = mistake(merged(sections))
    assert (error.key, error.value) == (f"{key}.column", "c")
    assert "conversations with images" in error.problem


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("fusion.epoch=5", "fusion.epoch", "did you mean fusion.epochs"),
        ("evaluation.c4.leng=5", "evaluation.c4.leng", "did you mean evaluation.c4.length"),
        ("clster.workers=2", "clster", "did you mean cluster"),
    ],
)
def test_unknown_keys_of_overrides_too(override: str, key: str, fix: str, tmp_path: Path) -> None:
    error = mistake(merged({"evaluation": {"c4": {"data": "x"}}}), (override,), tmp_path)
    assert (error.key, error.fix) == (key, fix)


@pytest.mark.parametrize("section", ["compare", "family"])
def test_a_recipe_of_another_command_names_that(section: str) -> None:
    error = mistake({**SMALLEST, section: {"methods": ["mi"]}})
    assert error.key == section and f"`fusegpt {section}`" in str(error)


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "calibration",
        "output",
        "model.source",
        "calibration.data",
        "output.uri",
        "output.name",
    ],
)
def test_missing_keys(key: str) -> None:
    data = json.loads(json.dumps(SMALLEST))
    section, _, last = key.rpartition(".")
    del (data[section] if section else data)[last]
    error = mistake(data)
    assert (error.key, error.problem, error.fix) == (key, "missing", f"add {key} to the recipe")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": "some/model"}, "model"),
        ({"model": {"source": 3}}, "model.source"),
        ({"model": {"source": None}}, "model.source"),
        ({"model": {"dtype": "float8"}}, "model.dtype"),
        ({"method": "fusedgpt"}, "method"),
        ({"sparsity": "a quarter"}, "sparsity"),
        ({"sparsity": [0.1, None]}, "sparsity.1"),
        ({"calibration": {"windows": 0}}, "calibration.windows"),
        ({"calibration": {"windows": "many"}}, "calibration.windows"),
        ({"calibration": {"windows": 8.5}}, "calibration.windows"),
        ({"calibration": {"length": 1}}, "calibration.length"),
        ({"calibration": [1]}, "calibration"),
        ({"evaluation": [{"data": "x"}]}, "evaluation"),
        ({"evaluation": {"wiki": "x"}}, "evaluation.wiki"),
        ({"evaluation": {"wiki": {"split": "test"}}}, "evaluation.wiki.data"),
        ({"importance": {"batch": 0}}, "importance.batch"),
        ({"importance": {"racing": 1}}, "importance.racing"),
        ({"importance": {"racing": math.nan}}, "importance.racing"),
        ({"preset": "papers"}, "preset"),
        ({"preset": None}, "preset"),
        ({"preset": ["paper"]}, "preset"),
        ({"preset": {}}, "preset"),
        ({"fusion": "paper"}, "fusion"),
        ({"fusion": {"batch": 1}}, "fusion.batch"),
        ({"fusion": {"rank": 0}}, "fusion.rank"),
        ({"fusion": {"loss": "mse"}}, "fusion.loss"),
        ({"fusion": {"learning_rate": 0}}, "fusion.learning_rate"),
        ({"fusion": {"learning_rate": -1e-3}}, "fusion.learning_rate"),
        ({"fusion": {"learning_rate": math.nan}}, "fusion.learning_rate"),
        ({"fusion": {"lora_learning_rate": math.inf}}, "fusion.lora_learning_rate"),
        ({"fusion": {"eps": math.nan}}, "fusion.eps"),
        ({"fusion": {"betas": [0.9]}}, "fusion.betas"),
        ({"fusion": {"betas": [0.9, 1.5]}}, "fusion.betas.1"),
        ({"fusion": {"betas": [-0.1, 0.9]}}, "fusion.betas.0"),
        ({"cluster": {"zero_stage": 4}}, "cluster.zero_stage"),
        ({"cluster": {"checkpoint_minutes": -1}}, "cluster.checkpoint_minutes"),
        ({"cluster": {"compile": "maybe"}}, "cluster.compile"),
        ({"cluster": {"compile": 2}}, "cluster.compile"),
        ({"cluster": {"deterministic": "perhaps"}}, "cluster.deterministic"),
        ({"cluster": {"checkpoint_minutes": math.inf}}, "cluster.checkpoint_minutes"),
        ({"cluster": {"recompute_activations": "maybe"}}, "cluster.recompute_activations"),
        ({"cluster": {"engine": "slurm"}}, "cluster.engine"),
        ({"cluster": {"gpus_per_replica": -1}}, "cluster.gpus_per_replica"),
        ({"cluster": {"gpus_per_replica": math.nan}}, "cluster.gpus_per_replica"),
        ({"cluster": {"cache_gb": -1}}, "cluster.cache_gb"),
        *(
            ({"cluster": {"gpu_hour_price": price}}, "cluster.gpu_hour_price")
            for price in (0, -1, math.inf, math.nan, "much", [2.5], {}, {"": 2.5}, {" - ": 2.5})
        ),
        *(
            ({"cluster": {"gpu_hour_price": {"A100": 1, "H100": price}}}, KEY_OF_A_KIND)
            for price in (0, -1, math.inf, math.nan, "much", None, {"A": 1})
        ),
        ({"cluster": {"gpu_hour_price": {"H100": 1, "h100": 2}}}, "cluster.gpu_hour_price"),
        ({"output": {"samples": [""]}}, "output.samples.0"),
        ({"cluster": {"cache_gb": math.inf}}, "cluster.cache_gb"),
        ({"output": {"name": "../up"}}, "output.name"),
        ({"output": {"name": ""}}, "output.name"),
        ({"output": {"name": "a/b"}}, "output.name"),
        ({"output": {"name": "ends in a line\n"}}, "output.name"),
        ({"output": {"shard_gb": 0}}, "output.shard_gb"),
    ],
)
def test_wrong_values_are_named(sections: dict[str, Any], key: str) -> None:
    assert mistake(merged(sections)).key == key


TWO = [{"data": "a.txt"}, {"data": "b.txt"}]
WEIGHTS = ((0, "above 0"), (-1, "above 0"), (math.inf, "finite"), ("x", "not a number"))


@pytest.mark.parametrize(
    ("calibration", "key", "value", "problem", "fix"),
    [
        ({"data": []}, "data", [], "an empty list", "at least one text"),
        ({"data": {"data": "a"}}, "data", {"data": "a"}, "neither .* nor a list", "a dash"),
        ({"data": 3}, "data", 3, "not a text", "in quotes"),
        ({"data": ""}, "data", "", "empty", "write something"),
        ({"data": ["a"]}, "data.0", "a", "keys of its own", r"\{data: …, weight: …\}"),
        ({"data": [*TWO, 3]}, "data.2", 3, "not a section", r"\{data: 3\}"),
        ({"data": [*TWO, {"weight": 3}]}, "data.2.data", None, "missing", "add"),
        ({"data": [{"data": ["a"]}]}, "data.0.data", ["a"], "not a text", "in quotes"),
        ({"data": [*TWO, {"data": ""}]}, "data.2.data", "", "empty", "write something"),
        ({"data": [*TWO, {"data": "b.txt", "weight": 2}]}, "data", "b.txt", "1 and 2", "once"),
        ({"data": TWO, "column": "body"}, "column", "body", "beside a list", "elements"),
        ({"data": TWO, "config": "a"}, "config", "a", "beside a list", "write config into"),
        ({"data": TWO, "split": "test"}, "split", "test", "beside a list", "elements"),
        ({"data": TWO, "revision": "v1"}, "revision", "v1", "beside a list", "elements"),
        *(
            ({"data": [*TWO, {"data": "c", "weight": weight}]}, "data.2.weight", weight, why, "")
            for weight, why in WEIGHTS
        ),
    ],
)
def test_mistakes_in_a_list_of_texts(
    calibration: dict[str, Any], key: str, value: object, problem: str, fix: str
) -> None:
    error = mistake(merged({"calibration": calibration}))
    assert (error.key, error.value) == (f"calibration.{key}", value)
    assert re.search(problem, error.problem) and re.search(fix, error.fix)


@pytest.mark.parametrize(
    "value", [0, 1, -0.25, 1.5, 25, math.nan, math.inf, -math.inf, True, False]
)
@pytest.mark.parametrize("more", [[], [0.5]])
def test_sparsity_lies_between_0_and_1(value: float, more: list[float]) -> None:
    error = mistake(merged({"sparsity": [*more, value]}))
    assert error.key == "sparsity"
    assert "between 0 and 1" in error.problem


@pytest.mark.parametrize("values", [[], [0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25 + 1e-12]])
def test_sparsities_are_named_once(values: list[float]) -> None:
    assert mistake(merged({"sparsity": values})).key == "sparsity"


def test_one_sparsity_or_several() -> None:
    assert recipe(sparsity=0.3).sparsity == (0.3,)
    assert recipe(sparsity=[0.3, 0.1]).sparsity == (0.3, 0.1)


@pytest.mark.parametrize(
    ("method", "windows", "batch", "fix"),
    [
        ("fusegpt", 1023, 8, "use 1024"),
        ("fusegpt", 33, 8, "use 40"),
        ("mi+ft", 33, 32, "use 64"),
        ("fusegpt", 64, 8, None),
        ("fusegpt", 33, 3, None),
        ("mi", 1023, 8, None),  # nothing is fine-tuned
    ],
)
def test_windows_fill_whole_loss_batches(
    method: str, windows: int, batch: int, fix: str | None
) -> None:
    data = merged(
        {"method": method, "calibration": {"windows": windows}, "fusion": {"batch": batch}}
    )
    if fix is None:
        assert Recipe.parse(data).calibration.windows == windows
    else:
        error = mistake(data)
        assert (error.key, error.value, error.fix) == ("calibration.windows", windows, fix)


@pytest.mark.parametrize(
    ("workers", "micro", "good"),
    [(1, 8, True), (1, 3, False), (2, 4, True), (2, 8, False), (4, 1, True)],
)
def test_a_micro_batch_divides_a_workers_share(workers: int, micro: int, good: bool) -> None:
    data = merged(
        {
            "calibration": {"windows": 48},
            "fusion": {"batch": 8},
            "cluster": {"workers": workers, "micro_batch": micro},
        }
    )
    if good:
        assert Recipe.parse(data).cluster.micro_batch == micro
    else:
        with pytest.raises(UserError) as caught:
            Recipe.parse(data)
        assert (caught.value.key, caught.value.value) == ("cluster.micro_batch", micro)


@pytest.mark.parametrize(
    ("batch", "workers", "good"),
    [(8, 3, False), (8, 16, False), (8, 4, True), (8, 8, True), (6, 3, True)],
)
def test_workers_share_a_loss_batch_equally(batch: int, workers: int, good: bool) -> None:
    data = merged(
        {
            "preset": "rounds",
            "calibration": {"windows": 48},
            "fusion": {"batch": batch},
            "cluster": {"workers": workers},
        }
    )
    if good:
        assert Recipe.parse(data).cluster.workers == workers
    else:
        error = mistake(data)
        assert (error.key, error.value) == ("cluster.workers", workers)
        assert error.fix == "use one of [1, 2, 4, 8]"


def test_scoring_has_its_windows() -> None:
    error = mistake(merged({"calibration": {"windows": 16}}))
    assert (error.key, error.value) == ("importance.windows", 32)
    assert recipe(calibration={"windows": 16}, importance={"windows": 16}).importance.windows == 16


def test_racing_is_no_full_table() -> None:
    error = mistake(merged({"importance": {"all": True, "racing": 0.05}}))
    assert (error.key, error.value) == ("importance.racing", 0.05)
    assert recipe(importance={"racing": 0.05}).importance.racing == 0.05


def test_errors_travel_between_processes() -> None:
    error = UserError("a.b", [1], "wrong", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.key, again.value, again.fix) == (str(error), "a.b", [1], "mend it")


def test_a_long_value_does_not_fill_the_screen() -> None:
    assert len(str(mistake(merged({"calibration": list(range(10_000))})))) < 1000
    assert len(str(mistake(merged({"fusion": {"wrong": "x" * 10_000}})))) < 1000
