"""`fusegpt compare`: its cells are ordinary runs, what they have in common is done once, and what
fails or is stopped is done later.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from desk import Desk
from mistakes import MESSAGE, tree
from stopped_runs import Watching, published
from test_measured_once import Measuring

from fusegpt_ray.cli import main
from fusegpt_ray.comparison import tables
from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.errors import UserError
from fusegpt_ray.importance import scoring
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.pipeline import compress
from fusegpt_ray.text import calibration

METHODS: list[Any] = [
    "mi",
    "angular",
    {"name": "mi+ft, 1 epoch", "method": "mi+ft", "fusion": {"epochs": 1}},
]


def asked(desk: Desk, methods: list[Any] = METHODS, **changes: Any) -> dict[str, Any]:
    base = desk.recipe(evaluation={"heldout": {"data": str(desk.heldout)}})
    return base | {"compare": {"methods": methods, "sparsities": [0.2, 0.4]}} | changes


def parsed(desk: Desk, *methods: Any) -> Comparison:
    return Comparison.parse(asked(desk, list(methods) or METHODS))


def perplexities(result: dict[str, Any]) -> dict[tuple[str, float], float]:
    return {(row["method"], row["sparsity"]): row["perplexity"] for row in result["rows"]}


def test_cells_are_the_runs_that_they_stand_for(desk: Desk, tmp_path: Path) -> None:
    asked = parsed(desk)
    result = compare(asked, Watching())
    assert result["failed"] == [] and len(result["rows"]) == 6
    together = published(desk)
    assert len(together) == 12
    found = {
        (row["uri"].rsplit("/", 1)[-1]): (row["dense"], row["perplexity"]) for row in result["rows"]
    }
    desk.out.rename(tmp_path / "together")
    for run in asked.runs:
        for model in compress(run.recipe, Watching()):
            row = model.manifest["perplexity"]["heldout"]
            last = row.get("trained", row["dropped"])
            assert found[model.uri.rsplit("/", 1)[-1]] == (row["dense"], last)
    assert published(desk) == together


def test_what_cells_have_in_common_is_done_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the real work is done."""
    measuring, walked, read = Measuring(), list[int](), list[str]()
    monkeypatch.setattr("fusegpt_ray.measuring.evaluation.perplexity", measuring)
    sweep, stream = scoring.sweep_batches, calibration.token_stream

    def sweeping(runner: Any, stack: Any, *rest: Any) -> Any:
        walked.append(len(stack))
        return sweep(runner, stack, *rest)

    def reading(text: Any, size: int, tokenizer: Any, key: str, *rest: Any) -> Any:
        read.append(key)
        return stream(text, size, tokenizer, key, *rest)

    plain, compared = evaluation.compare_source, list[int]()

    def comparing(*arguments: Any) -> Any:
        compared.append(1)
        return plain(*arguments)

    monkeypatch.setattr(scoring, "sweep_batches", sweeping)
    monkeypatch.setattr("fusegpt_ray.workers.local.token_stream", reading)
    monkeypatch.setattr(evaluation, "compare_source", comparing)
    compare(parsed(desk, "mi"), Watching())
    alone = walked.count(5)
    assert alone and measuring.depths.count(5) == 1 and len(compared) == 1

    for path in (desk.out / "compare").rglob("*.json"):
        path.unlink()
    for name in ("mi-p20", "mi-p40"):
        (desk.out / f"demo-{name}").rename(desk.folder / name)
    for counted in (walked, read, measuring.depths, compared):
        counted.clear()
    compare(parsed(desk), Watching())
    assert walked.count(5) == alone, "the first round's scores"
    assert measuring.depths.count(5) == 1, "the dense model's perplexity"
    assert len(compared) == 1
    assert len(read) == 2 and len({*read}) == 2, "each text once"


def fails(desk: Desk) -> dict[str, Any]:
    """A method whose groups diverge."""
    fusion = {"learning_rate": 1e30, "lora_learning_rate": 1e30}
    return {"name": "too fast", "method": "mi+ft", "fusion": fusion}


def test_a_failed_cell_is_told_and_the_others_go_on(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.folder / "compare.yaml"
    recipe.write_text(yaml.safe_dump(asked(desk, [fails(desk), "mi", "last"])))
    assert main(["compare", str(recipe), "--quiet", "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {item["method"] for item in result["failed"]} == {"too fast"}
    assert all(item["problem"] in err for item in result["failed"])
    assert {row["method"] for row in result["rows"]} == {"mi", "last"}
    before = published(desk)
    assert main(["compare", str(recipe)]) == 1
    out, _ = capsys.readouterr()
    table, _, _ = out.partition("heldout:")
    assert "last" in table and max(map(len, table.splitlines())) <= 80
    assert published(desk) == before


def test_stopped_between_cells_it_does_what_is_missing(desk: Desk, tmp_path: Path) -> None:
    expected = perplexities(compare(parsed(desk), Watching()))
    bytes_expected = published(desk)
    desk.out.rename(tmp_path / "undisturbed")

    class Stopped(Watching):
        def say(self, text: str) -> None:
            if "angular" in text and text.startswith("—"):
                raise KeyboardInterrupt
            super().say(text)

    with pytest.raises(KeyboardInterrupt) as stop:
        compare(parsed(desk), Stopped())
    kept = f"1 of {len(parsed(desk).runs)} cells are finished and stay so"
    assert stop.value.__notes__ == [f"{kept}; the same command goes on with the others."]
    assert {path.name for path in desk.out.glob("demo-*")} == {"demo-mi-p20", "demo-mi-p40"}
    show = Watching()
    assert perplexities(compare(parsed(desk), show)) == expected
    assert published(desk) == bytes_expected
    made = [line for line in show.said if line.startswith("evaluating and publishing demo-")]
    assert "evaluating and publishing demo-mi-ft-1-epoch-p20" in made
    assert "evaluating and publishing demo-mi-p20" not in made


def test_an_unfinished_cell_of_another_recipe_is_forgotten_if_asked(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(parsed(desk, "mi"), Watching(stop=2))
    other = Comparison.parse(asked(desk, ["mi"], seed=3))
    with pytest.raises(UserError, match="--restart"):
        compare(other, Watching())
    result = compare(other, Watching(), restart=True)
    assert (len(result["rows"]), result["failed"]) == (2, [])


def test_the_dense_model_is_said_to_be_measured_once(desk: Desk) -> None:
    show = Watching()
    compare(parsed(desk, "mi", "last"), show)
    assert show.said.count("evaluating the dense model") == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"methods": ["mi", "slebb"]}, "slebb"),
    "two of one name": ({"methods": ["mi", "mi"]}, "two of them have this name"),
    "no such model": ({"methods": ["mi"], "models": ["no/such-folder"]}, "no/such-folder"),
    "one model is missing": ({"methods": ["mi"], "models": ["MODEL", "./gone"]}, "./gone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_the_command(
    desk: Desk, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section, problem = BAD[name]
    (desk.folder / "MODEL").symlink_to(desk.model)
    monkeypatch.chdir(desk.folder)
    recipe = desk.folder / "compare.yaml"
    recipe.write_text(yaml.safe_dump(asked(desk) | {"compare": section}))
    before = tree(desk.folder)
    assert main(["compare", str(recipe), "--quiet", "--json"]) == 2
    out, err = capsys.readouterr()
    message = MESSAGE.fullmatch(err.rstrip("\n"))
    assert out == "" and message and problem in err, err
    assert tree(desk.folder) == before


def test_the_tables_are_those_of_the_manifests(desk: Desk) -> None:
    compare(parsed(desk), Watching())
    folder = desk.out / "compare/demo"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 6
    for row in rows:
        manifest = json.loads((Path(row["uri"]) / "fusegpt.json").read_text())
        told = manifest["perplexity"]["heldout"]
        assert float(row["dense"]) == told["dense"]
        assert float(row["perplexity"]) == told.get("trained", told["dropped"])
        base = next(
            float(other["perplexity"])
            for other in rows
            if (other["method"], other["sparsity"]) == ("mi", row["sparsity"])
        )
        lost = math.log(float(row["perplexity"]) / told["dense"])
        if base > told["dense"]:
            assert float(row["damage_left"]) == pytest.approx(lost / math.log(base / told["dense"]))
    lines = (folder / "table.md").read_text().splitlines()
    assert "| method | 20 % heldout | 40 % heldout |" in lines
    assert lines[lines.index("|---|---:|---:|") + 1].startswith("| dense |")
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_text_to_measure_on_nothing_is_compared(desk: Desk) -> None:
    data = {key: value for key, value in asked(desk).items() if key != "evaluation"}
    for none in ({}, {"evaluation": {}}):
        with pytest.raises(UserError, match="compares perplexities") as refused:
            Comparison.parse(data | none)
        assert refused.value.key == "evaluation"


def test_any_letters_make_a_name(desk: Desk) -> None:
    names = ["слияние", "融合", "a | b"]
    methods = [{"name": name, "method": "mi"} for name in names]
    comparison = parsed(desk, *methods)
    assert [run.method for run in comparison.runs] == names
    assert len({run.recipe.output.name for run in comparison.runs}) == 3
    rows = [
        {"method": name, "sparsity": 0.25, "text": "heldout", "dense": 1.0, "perplexity": 2.0}
        for name in names
    ]
    assert r"| a \| b | 2.00 |" in tables._grid(rows, "perplexity")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"methods": []}, "compare.methods"),
        ({"methods": ["mi", "mi"]}, "compare.methods"),
        ({"methods": ["mi+ft", {"name": "mi ft", "method": "mi"}]}, "compare.methods"),
        ({"methods": ["nonsense"]}, "method"),
        ({"methods": ["mi"], "sparsities": [0.0]}, "sparsity"),
        ({"methods": ["mi"], "sparsities": [0.9]}, "sparsity"),
        ({"methods": ["mi"], "baseline": "sleb"}, "compare.baseline"),
        ({"methods": ["mi"], "models": []}, "compare.models"),
        ({"methods": ["mi"], "nonsense": 1}, "compare.nonsense"),
        ({"methods": ["mi", {"method": "mi+ft", "fusion": {"ranks": 1}}]}, "fusion.ranks"),
    ],
)
def test_mistakes_are_found_before_any_work(
    desk: Desk, section: dict[str, Any], key: str, weight_reads: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        compare(Comparison.parse(asked(desk) | {"compare": section}), Watching())
    assert caught.value.key.startswith(key)
    assert not desk.out.exists() and weight_reads == []


def test_several_models_stand_apart(desk: Desk, checkpoint: Callable[[str], Path]) -> None:
    other = Desk.make(desk.folder / "second", checkpoint("llama-tied"))
    section = {
        "methods": ["last"],
        "models": [str(desk.model), {"name": "b", "source": str(other.model)}],
    }
    result = compare(Comparison.parse(asked(desk) | {"compare": section}), Watching())
    assert [row["model"] for row in result["rows"]] == [str(desk.model), "b"]
    assert len({row["dense"] for row in result["rows"]}) == 2


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"models": ["a", "a-b"], "methods": ["last", {"name": "b-last", "method": "last"}]},
         "compare.methods", "both would be called demo-a-b-last"),
        ({"methods": ["angular", {"name": "angular-25", "method": "mi"}], "sparsities": 0.25},
         "compare.methods", "both would be called demo-angular-25"),
        ({"methods": ["angular"], "sparsities": [0.25, 0.25]}, "compare.sparsities", "twice"),
        ({"methods": ["angular"], "sparsities": []}, "compare.sparsities", "none"),
        ({"methods": [{"method": "mi", "model": {"source": "b"}}]},
         "compare.methods.model", "the same for all"),
        ({"models": ["s3://KEY:SECRET@b/m"] * 2, "methods": ["mi"]}, "compare.models", "this name"),
        ({"methods": [{"name": name, "method": "mi"} for name in ("mi é", "mi à")]},
         "compare.methods", "letters that folders can have"),
    ],
    ids=["models", "sparsities", "twice", "none", "model", "secret", "letters"],
)  # fmt: skip
def test_what_would_be_mixed_up_is_refused(
    desk: Desk, changes: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        Comparison.parse(asked(desk) | {"compare": changes})
    assert refused.value.key == key and "SECRET" not in str(refused.value)


@pytest.mark.parametrize("model", [["gpt2"], 5, None])
def test_a_model_that_is_none_is_told_by_the_recipe(desk: Desk, model: Any) -> None:
    with pytest.raises(UserError, match="model"):
        Comparison.parse(asked(desk, ["mi"]) | {"model": model})
    with pytest.raises(UserError, match=r"output\.name"):
        Comparison.parse(asked(desk, ["mi"]) | {"output": {"uri": "out", "name": None}})


def test_another_model_has_no_revision_of_the_first(desk: Desk) -> None:
    sources = ["gpt2", {"source": "opt", "revision": "main"}]
    compared = {"methods": ["mi"], "models": sources}
    base = {"model": {"source": "gpt2", "revision": "abc"}, "compare": compared}
    revisions = [run.recipe.model.revision for run in Comparison.parse(asked(desk) | base).runs]
    assert revisions == [None, "main"]


def test_another_runs_model_is_not_shown_as_the_cells(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text has changed since a cell was made, so that its run is another one."""
    compare(parsed(desk, "mi"), Watching())
    changed = asked(desk, ["last", "mi"], seed=3)
    monkeypatch.setattr("fusegpt_ray.preparing.preflight.check_output", lambda *a, **o: None)
    monkeypatch.setattr("fusegpt_ray.planning.plan.check_output", lambda *a, **o: None)
    monkeypatch.setattr(
        "fusegpt_ray.compressing.compression.Compression.check", lambda *a, **o: None
    )
    result = compare(Comparison.parse(changed), Watching())
    assert {row["method"] for row in result["rows"]} == {"last"}
    assert {row["method"] for row in result["failed"]} == {"mi"}
