"""The recipe: what it fills in, and how it answers every mistake with the key, the value and the fix."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import Recipe, blocks_to_remove, percent
from fusegpt_ray.sections import Evaluation

SMALLEST: dict[str, Any] = {
    "model": {"source": "some/model"},
    "calibration": {"data": "text.txt"},
    "output": {"uri": "out", "name": "small"},
}


def recipe(**sections: Any) -> Recipe:
    """The smallest recipe with more said in some sections."""
    return Recipe.parse(merged(sections))


def merged(sections: dict[str, Any]) -> dict[str, Any]:
    data = dict(SMALLEST)
    for name, value in sections.items():
        data[name] = {**SMALLEST.get(name, {}), **value} if isinstance(value, dict) else value
    return data


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


# --- what is filled in ---


def test_defaults() -> None:
    r = recipe()
    assert (r.method, r.sparsity, r.seed) == ("fusegpt", (0.25,), 0)
    assert (r.calibration.windows, r.calibration.length, r.calibration.seed, r.calibration.column) == (1024, 2048, 0, "text")
    assert r.importance.windows == 32
    f = r.fusion
    # method.md: 7 neighbours, r = 128 for both, 20 epochs, batches of 8, Adam's betas and eps.
    assert (f.group_size, f.rank, f.lora_rank, f.epochs, f.batch) == (7, 128, 128, 20, 8)
    assert (f.betas, f.eps, f.learning_rate) == ((0.9, 0.95), 1e-8, 1e-3)
    assert (r.cluster.engine, r.cluster.workers, r.cluster.replicas, r.cluster.cache_gb) == ("ray", 1, 1, None)
    assert (r.cluster.savepoint_minutes, r.cluster.recompute_activations) == (5, False)
    assert (r.model.dtype, r.evaluation, r.output.shard_gb) == ("auto", {}, 5.0)


PAPER = {
    "loss": "batch_kl",
    "teacher": "current",
    "learning_rate": 1e-3,
    "lora_learning_rate": 9.65e-6,
    "trained_dtype": "model",
    "fold": "at_end",
}
OURS = {
    "loss": "normalized_mse",
    "teacher": "dense",
    "learning_rate": 1e-3,
    "lora_learning_rate": 3e-4,
    "trained_dtype": "float32",
    "fold": "at_end",
}


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ({}, OURS),
        (None, OURS),
        ({"preset": "default"}, OURS),
        ({"preset": "paper"}, PAPER),
        # What the recipe says itself counts, in any order of the keys.
        ({"loss": "normalized_mse", "preset": "paper"}, PAPER | {"loss": "normalized_mse"}),
        ({"preset": "paper", "teacher": "dense", "fold": "each_round"}, PAPER | {"teacher": "dense", "fold": "each_round"}),
        ({"preset": "paper", "lora_learning_rate": 3e-4}, PAPER | {"lora_learning_rate": 3e-4}),
        ({"learning_rate": 0.5}, OURS | {"learning_rate": 0.5}),
        ({"trained_dtype": "model"}, OURS | {"trained_dtype": "model"}),
    ],
)
def test_presets_fill_in_what_is_left_out(fusion: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    got = Recipe.parse(SMALLEST | {"fusion": fusion}).fusion
    assert {key: getattr(got, key) for key in expected} == expected


def test_presets_hold_for_recipes_from_files_and_overrides(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(SMALLEST))
    assert Recipe.load(file, ["fusion.preset=paper"]).fusion.loss == "batch_kl"
    assert Recipe.load(file, ["fusion.preset=paper", "fusion.loss=normalized_mse"]).fusion.loss == "normalized_mse"


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_json_and_back_changes_nothing(preset: str) -> None:
    r = recipe(
        sparsity=[0.2, 0.25, 0.3],
        evaluation={"wiki": {"data": "wikitext", "config": "wikitext-2-raw-v1", "length": 512}},
        fusion={"preset": preset, "betas": [0.8, 0.9]},
        cluster={"workers": 2, "object_store_gb": 2.5},
    )
    again = Recipe.parse(json.loads(json.dumps(r.model_dump(mode="json"))))
    assert again == r
    assert again.model_dump_json() == r.model_dump_json()
    assert again.evaluation["wiki"].split == "test"  # evaluation's default, not calibration's


def test_recipes_do_not_change() -> None:
    r = recipe()
    for section, key in ((r, "seed"), (r.fusion, "epochs"), (r.calibration, "windows"), (r.output, "uri")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys, fusegpt_ray.recipe; print([m for m in ('torch', 'transformers', 'ray', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- mistakes ---


def mistake(data: Any, overrides: tuple[str, ...] = (), folder: Path | None = None) -> UserError:
    """The error that a recipe gives, from a file if there is a folder for it."""
    if folder is not None:
        file = written(folder, data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(UserError) as caught:
        Recipe.parse(data) if folder is None else Recipe.load(file, overrides)
    error = caught.value
    assert str(error) == f"{error.key} = {error.value!r}: {error.problem}. Fix: {error.fix}."
    return error


@pytest.mark.parametrize(
    ("sections", "key", "fix"),
    [
        ({"sparsty": 0.3}, "sparsty", "did you mean sparsity"),
        ({"model": {"revison": "main"}}, "model.revison", "did you mean model.revision"),
        ({"fusion": {"learningrate": 1}}, "fusion.learningrate", "did you mean fusion.learning_rate"),
        ({"fusion": {"preset": "paper", "epoch": 3}}, "fusion.epoch", "did you mean fusion.epochs"),
        ({"calibration": {"lenght": 3}}, "calibration.lenght", "did you mean calibration.length"),
        ({"evaluation": {"wiki": {"data": "x", "colum": "y"}}}, "evaluation.wiki.colum", "did you mean evaluation.wiki.column"),
        # A name that is also a key of its section.
        ({"evaluation": {"data": {"data": "x", "widnows": 1}}}, "evaluation.data.widnows", "did you mean evaluation.data.windows"),
        # No key is near: all are listed.
        ({"cluster": {"xyzzy": 1}}, "cluster.xyzzy", "the keys here are address, cache_gb,"),
        # Keys of other sections are unknown here.
        ({"importance": {"epochs": 1}}, "importance.epochs", "the keys here are"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(sections: dict[str, Any], key: str, fix: str) -> None:
    error = mistake(merged(sections))
    assert (error.key, error.problem) == (key, "unknown key")
    assert error.fix.startswith(fix)


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


@pytest.mark.parametrize("key", ["model", "calibration", "output", "model.source", "calibration.data", "output.uri", "output.name"])
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
        ({"sparsity": "a quarter"}, "sparsity.0"),
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
        ({"fusion": {"preset": "papers"}}, "fusion.preset"),
        ({"fusion": {"preset": None}}, "fusion.preset"),
        ({"fusion": {"preset": ["paper"]}}, "fusion.preset"),
        ({"fusion": {"preset": {}}}, "fusion.preset"),
        ({"fusion": "paper"}, "fusion"),
        ({"fusion": {"batch": 1}}, "fusion.batch"),
        ({"fusion": {"rank": 0}}, "fusion.rank"),
        ({"fusion": {"loss": "mse"}}, "fusion.loss"),
        ({"fusion": {"learning_rate": 0}}, "fusion.learning_rate"),
        ({"fusion": {"learning_rate": -1e-3}}, "fusion.learning_rate"),
        ({"fusion": {"learning_rate": math.nan}}, "fusion.learning_rate"),
        ({"fusion": {"lora_learning_rate": math.inf}}, "fusion.lora_learning_rate"),
        ({"fusion": {"eps": math.nan}}, "fusion.eps"),
        ({"fusion": {"betas": [0.9]}}, "fusion.betas.1"),
        ({"fusion": {"betas": [0.9, 1.5]}}, "fusion.betas.1"),
        ({"fusion": {"betas": [-0.1, 0.9]}}, "fusion.betas.0"),
        ({"cluster": {"zero_stage": 4}}, "cluster.zero_stage"),
        ({"cluster": {"savepoint_minutes": -1}}, "cluster.savepoint_minutes"),
        ({"cluster": {"savepoint_minutes": math.inf}}, "cluster.savepoint_minutes"),
        ({"cluster": {"recompute_activations": "maybe"}}, "cluster.recompute_activations"),
        ({"cluster": {"engine": "slurm"}}, "cluster.engine"),
        ({"cluster": {"gpus_per_replica": -1}}, "cluster.gpus_per_replica"),
        ({"cluster": {"gpus_per_replica": math.nan}}, "cluster.gpus_per_replica"),
        ({"cluster": {"cache_gb": -1}}, "cluster.cache_gb"),
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


@pytest.mark.parametrize("value", [0, 1, -0.25, 1.5, 25, math.nan, math.inf, -math.inf, True, False])
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
def test_windows_fill_whole_loss_batches(method: str, windows: int, batch: int, fix: str | None) -> None:
    data = merged({"method": method, "calibration": {"windows": windows}, "fusion": {"batch": batch}})
    if fix is None:
        assert Recipe.parse(data).calibration.windows == windows
    else:
        error = mistake(data)
        assert (error.key, error.value, error.fix) == ("calibration.windows", windows, fix)


@pytest.mark.parametrize(("workers", "micro", "good"), [(1, 8, True), (1, 3, False), (2, 4, True), (2, 8, False), (4, 1, True)])
def test_a_micro_batch_divides_a_workers_share(workers: int, micro: int, good: bool) -> None:
    data = merged({"calibration": {"windows": 48}, "fusion": {"batch": 8}, "cluster": {"workers": workers, "micro_batch": micro}})
    if good:
        assert Recipe.parse(data).cluster.micro_batch == micro
    else:
        with pytest.raises(UserError) as caught:
            Recipe.parse(data)
        assert (caught.value.key, caught.value.value) == ("cluster.micro_batch", micro)


@pytest.mark.parametrize(("batch", "workers", "good"), [(8, 3, False), (8, 16, False), (8, 4, True), (8, 8, True), (6, 3, True)])
def test_workers_share_a_loss_batch_equally(batch: int, workers: int, good: bool) -> None:
    data = merged({"calibration": {"windows": 48}, "fusion": {"batch": batch}, "cluster": {"workers": workers}})
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


# --- files and overrides ---


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("fusion.epochs=5", ("fusion", "epochs"), 5),
        ("seed=7", ("seed",), 7),
        ("sparsity=[0.2, 0.3]", ("sparsity",), (0.2, 0.3)),
        ("sparsity=0.5", ("sparsity",), (0.5,)),
        ("fusion.learning_rate=1e-4", ("fusion", "learning_rate"), 1e-4),
        ("model.source=s3://bucket/a=b", ("model", "source"), "s3://bucket/a=b"),  # only the first = divides
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


def test_errors_travel_between_processes() -> None:
    error = UserError("a.b", [1], "wrong", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.key, again.value, again.fix) == (str(error), "a.b", [1], "mend it")


def test_a_long_value_does_not_fill_the_screen() -> None:
    assert len(str(mistake(merged({"calibration": list(range(10_000))})))) < 1000
    assert len(str(mistake(merged({"fusion": {"wrong": "x" * 10_000}})))) < 1000


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
    [(0.25, "25"), (0.125, "12.5"), (0.3, "30"), (0.07, "7"), (0.29, "29"), (0.005, "0.5"), (1 / 3, "33.333333"), (0.999, "99.9")],
)
def test_percent(sparsity: float, name: str) -> None:
    assert percent(sparsity) == name
