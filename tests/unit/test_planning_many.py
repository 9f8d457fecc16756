"""`fusegpt plan` and `fusegpt validate` of a family or a comparison: what they tell is true, all
mistakes are told at once, and nothing is read or written that a look does not need.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from desk import Desk
from mistakes import tree

from fusegpt_ray.cli import main
from fusegpt_ray.cost import rates
from fusegpt_ray.family.members import Members
from fusegpt_ray.planning.outlook import Device
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.scheduling.forecast import Premises
from fusegpt_ray.terminal.display import Display

H100 = ("--gpu", "H100")


def family(desk: Desk, **section: Any) -> dict[str, Any]:
    """Two members on Ray, whose methods score alike."""
    members = [{"name": "one"}, {"name": "two", "priority": 1, "cluster": {"workers": 2}}]
    held_out = {"held": {"data": str(desk.heldout), "windows": 2}}
    return {
        "cluster": {"gpu_hour_price": 3.0}, "evaluation": held_out,
        "family": {"members": members, "methods": ["mi", "mi+ft"], "sparsities": 0.4, **section},
    }  # fmt: skip


def told(desk: Desk, capsys: pytest.CaptureFixture[str], *arguments: str, **changes: Any) -> Any:
    assert main(["plan", desk.write(**changes), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_of_a_family_is_those_of_its_runs(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asks = family(desk)
    desk.write(**asks)
    before = tree(desk.folder)
    found = told(desk, capsys, *H100, "--gpus", "2", **asks)
    assert tree(desk.folder) == before and weight_reads == []
    assert (found["kind"], found["name"], found["gpus"]) == ("family", "demo", 2)
    rows = {row["run"]: row for row in found["runs"]}
    runs = [run for one in Members.parse(desk.recipe(**asks)).members for run in one.runs]
    costs = {run.recipe.output.name: plan(run.recipe, Display()).cost for run in runs}
    assert {name: row["flops"] for name, row in rows.items()} == {
        name: cost.flops for name, cost in costs.items()
    }
    # What several need is computed once: first scores, and the dense model on the held-out text.
    assert {(len(part["runs"]), part["what"].split()[0]) for part in found["shared"]} == {
        (4, "first"), (4, "perplexity"),
    }  # fmt: skip
    saved = sum(part["flops"] * (len(part["runs"]) - 1) for part in found["shared"])
    assert found["flops"] == sum(cost.flops for cost in costs.values()) - saved
    # The more urgent member's runs have both GPUs one after another, if they need two.
    assert [rows[f"demo-two-{method}"]["needs_gpus"] for method in ("mi", "mi-ft")] == [1, 2]
    assert rows["demo-two-mi"]["begins"] == 0 and found["most_gpus"] == 2
    first = min(row["begins"] for name, row in rows.items() if "one" in name)
    assert first >= rows["demo-two-mi-ft"]["begins"]
    assert found["seconds"] == max(row["ends"] for row in rows.values())
    hours = sum(row["gpu_hours"] for row in rows.values())
    assert found["gpu_hours"] == pytest.approx(hours)
    assert found["price"] == pytest.approx(3 * hours) and found["lacking"] == []


def test_the_room_that_is_foretold_is_that_of_the_recipe(desk: Desk) -> None:
    recipes = [run.recipe for run in Members.parse(desk.recipe(**family(desk, gpus=3))).runs]
    on = Premises(Device.named("NVIDIA H100"), 8, quota=3)
    assert on.room(recipes).total.gpus == 3
    assert Premises(Device.named("NVIDIA H100"), 2, quota=3).room(recipes).total.gpus == 2
    cpu = Premises(Device("a CPU", "cpu", 10**9), 1)
    assert cpu.room(recipes).at_once == 1 and cpu.room(recipes).total.gpus > 3
    local = [one.model_copy(update={"cluster": one.cluster.model_copy(update={"engine": "local"})})
             for one in recipes]  # fmt: skip
    assert on.room(local).at_once == 1


def test_what_does_not_fit_is_told_of_each_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = rates.Gpu(100_000, 1e12)
    monkeypatch.setitem(rates.GPUS, "NVIDIA A100", small)  # type: ignore[arg-type]
    found = told(desk, capsys, "--gpu", "A100", "--gpus", "1", **family(desk))
    tight = [item for row in found["runs"] for item in row["memory"] if not item["fits"]]
    assert len(tight) >= 4 and found["lacking"] == [{"run": "demo-two-mi-ft", "gpus": 2}]
    recipe = desk.write(**family(desk))
    assert main(["plan", recipe, "--gpu", "A100", "--gpus", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = " ".join(" ".join(lines).split())
    assert page.count("does not fit") == len(tight) and max(map(len, lines)) <= 80
    assert "cluster.recompute_activations" in page
    assert "demo-two-mi-ft needs 2 GPUs, and there are 1" in page
    assert main(["plan", recipe]) == 0
    assert "--probe measures it" in capsys.readouterr().out


def test_the_plan_of_a_comparison(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {"held": {"data": str(desk.heldout)}}
    section = {"methods": ["mi", "angular"], "sparsities": [0.2, 0.4]}
    found = told(desk, capsys, *H100, evaluation=held_out, compare=section)
    assert [row["run"] for row in found["runs"]] == [
        "demo-mi",
        "demo-angular-20",
        "demo-angular-40",
    ]
    begins = [row["begins"] for row in found["runs"]]
    assert begins == sorted(begins) and found["most_gpus"] == 1, "one process"


def test_the_plan_of_a_narrower_model_tells_widths(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = {"held": {"data": str(desk.heldout)}}
    section = {"methods": ["mi", "slicegpt"], "sparsities": [0.25]}
    recipe = desk.write(evaluation=held_out, compare=section)
    assert main(["plan", recipe]) == 0
    page = capsys.readouterr().out
    assert "│ 5 → 3" in page and "│ width 32 → 24" in page
    # And what nobody can count yet.
    assert "evaluation on held is not counted" in page and "evaluation.held.windows" in page


def test_all_mistakes_of_all_members_are_listed(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asks = family(desk)
    asks["family"]["members"] += [
        {"name": "gone", "model": {"source": "./gone"}},
        {"name": "short", "sparsities": 0.95, "methods": ["mi"]},
    ]
    recipe = desk.write(**asks, calibration={"data": "none.txt", "windows": 8, "length": 12})
    before = tree(desk.folder)
    assert main(["validate", recipe]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "error: calibration.data", "error: model.source", "error: sparsity",
    ]  # fmt: skip
    assert "of the member one, mi; of the member one, mi+ft; of the member two, mi" in lines[0]
    assert "and 4 more" in lines[0] and "of the member gone, mi; " in lines[1]
    assert lines[2].count("of the member") == 1 and "of the member short, mi" in lines[2]
    # Keys and values come first, those of every member.
    asks["family"]["members"] += [{"name": "odd", "priority": "high"}, {"name": "worse", "sed": 1}]
    recipe = desk.write(**asks, seed="one")
    assert main(["validate", recipe, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["mistakes"]
    assert {one["key"] for one in found} == {"seed", "family.members.odd.priority", "sed"}
    assert main(["validate", desk.write(**family(desk))]) == 0
    assert main(["validate", desk.write(family={"members": []})]) == 2
    assert tree(desk.folder).keys() == before.keys() and weight_reads == []


def test_all_mistakes_of_a_comparison(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["mi", {"name": "odd", "method": "mi+ft", "fusion": {"epochs": 0}}]
    section = {"methods": methods, "sparsities": [0.2, 0.2], "baseline": "none"}
    assert main(["validate", desk.write(compare=section), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["mistakes"]
    assert {one["key"] for one in found} >= {
        "compare.sparsities", "compare.baseline", "fusion.epochs",
    }  # fmt: skip
