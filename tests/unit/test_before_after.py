"""Text samples of the dense and the published model, beside what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
from desk import Desk
from stopped_runs import Watching
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from fusegpt_ray.cli import main
from fusegpt_ray.measuring import before_after
from fusegpt_ray.measuring.before_after import TOKENS
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.outlook import Device, outlook
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.reporting import page
from fusegpt_ray.reporting.facts import facts, of_manifest
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.training.validation import Validation

PROMPTS = ["w20 <b>w21</b>", "w33 w7\nw11 ```"]


def written(desk: Desk, samples: list[str]) -> str:
    output = {**desk.recipe()["output"], "samples": samples}
    return desk.write(method="mi", output=output)


def plain(folder: Path, prompt: str) -> str:
    """The greedy continuation by `from_pretrained`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    length = ids["input_ids"].shape[1]
    found = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS)
    return str(tokenizer.decode(found[0, length:], skip_special_tokens=True))


def test_samples_are_what_transformers_writes(desk: Desk) -> None:
    compress(Recipe.load(written(desk, PROMPTS)))
    folder = next(desk.out.glob("demo-p40"))
    found = json.loads((folder / "fusegpt.json").read_text())["samples"]
    assert [sample["prompt"] for sample in found] == PROMPTS
    for sample in found:
        assert sample["dense"] == plain(desk.model, sample["prompt"])
        assert sample["published"] == plain(folder, sample["prompt"])
    assert any(sample["dense"] != sample["published"] for sample in found)
    card, shown = (folder / "README.md").read_text(), page.html(facts(str(folder)))
    assert "## What it writes" in card and "prompt      w20 <b>w21</b>" in card
    assert "````text" in card, "a prompt's own fence does not end the card's"
    assert "What the models write" in shown and "w20 &lt;b&gt;w21&lt;/b&gt;" in shown


def test_a_price_of_the_recipe_is_told_beside_the_time_that_it_took() -> None:
    """Two GPUs were held, at 3 an hour: half an hour costs 3."""
    priced = {"gpu_hour_price": 3.0, "replicas": 1, "workers": 1, "gpus_per_replica": None}
    told = {
        "source": {"name": "dense"},
        "method": "fusegpt",
        "gpu": "NVIDIA H200",
        "gpus": 2.0,
        "planned_bytes": [{"stage": "scoring", "read": 4_000_000, "written": 0}],
        "moved": {"scoring": {"read": 2_000_000, "written": 0}},
        "planned": [{"stage": "scoring", "flops": 10**15, "seconds": 900.0}],
        "rounds": [{"removed": 1, "seconds": {"score": 1800.0}}],
        "recipe": {"cluster": priced},
    }
    told["spent"] = {"seconds": 2700.0, "gpu_seconds": 5400.0}
    shown = page.html(of_manifest("demo", told, 10))
    assert "time of the run</dt><dd>45 min 00 s<" in shown
    assert "GPU hours of the run</dt><dd>1.50<" in shown
    assert "price of these hours</dt><dd>4.50<" in shown
    row = ("scoring", "4.0 MB", "2.0 MB", "–", "–")
    assert "".join(f"<td>{cell}</td>" for cell in row) in shown
    assert "<td>1.50</td><td>3.00</td></tr>" in shown
    unpriced = ({**priced, "gpu_hour_price": None}, {"gpu_hour_price": "much"}, None)
    for cluster, gpus in ((priced, 0.0), *((cluster, 2.0) for cluster in unpriced)):
        changed = {**told, "gpus": gpus, "spent": None, "recipe": {"cluster": cluster}}
        shown = page.html(of_manifest("demo", changed, 10))
        assert (
            "price" not in shown.partition("<details><summary>The recipe")[0].partition("<dl>")[2]
        )


def test_a_rank_that_plays_no_part_is_told(desk: Desk) -> None:
    for rank, told in ((8, True), (64, False)):
        heal = {"train": "all", "rank": rank, "batch": 4, "held_out": 4}
        show = Watching()
        plan(Recipe.load(desk.write(method="mi", heal=heal)), show, looks=True)
        assert any("heal.rank plays no part" in line for line in show.said) == told


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (" in part 1 of 8", r"became nan in part 1 of 8: lower heal\.learning_rate"),
        ("", r"is nan before the first step: where arithmetic overflows, model\.dtype: float32"),
    ],
)
def test_a_held_out_loss_that_is_not_finite_ends_the_training(where: str, told: str) -> None:
    class Diverged:
        def validate(self, batches: object) -> float:
            return float("nan")

    looked = Validation(lambda: ())
    with pytest.raises(FloatingPointError, match=told):
        looked.look(cast("Stepper", Diverged()), where)
    assert looked.losses == []


def test_a_plan_tells_the_price_of_a_gpu_that_is_known(desk: Desk) -> None:
    file = desk.write(method="mi", cluster={"engine": "local", "gpu_hour_price": 2.5})
    found = outlook(plan(Recipe.load(file), Display(), looks=True), Device.named("NVIDIA H200"), 4)
    assert found["price"] == pytest.approx(found["seconds"] / 3600 * 4 * 2.5) and found["price"] > 0
    assert sum(row["price"] for row in found["stages"]) == pytest.approx(found["price"])
    file = desk.write(method="mi")
    assert (
        outlook(plan(Recipe.load(file), Display()), Device.named("NVIDIA H200"), 4)["price"] is None
    )


def test_a_plan_tells_whether_the_budget_is_enough(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"engine": "local", "gpu_hour_price": 2.5, "max_hours": 9, "max_cost": 1e-12}
    command = ["plan", desk.write(method="mi", cluster=told), "--gpu", "H200"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "cluster.max_cost = 1e-12 is not enough" in shown and "max_hours" not in shown
    assert main([*command, "--json"]) == 0
    hours, cost = json.loads(capsys.readouterr().out)["budget"]
    assert (hours["key"], hours["limit"], hours["enough"]) == ("cluster.max_hours", 9, True)
    assert cost["enough"] is False and cost["needs"] == pytest.approx(hours["needs"] * 2.5)
    assert main(command[:2]) == 0
    assert "whether cluster.max_hours = 9 is enough, is not known" in capsys.readouterr().out


def test_what_a_class_cannot_write_costs_no_model(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a failure that is none of the model's ends the run."""

    def broken(*_: object, **__: object) -> None:
        raise TypeError("this class does not generate")

    monkeypatch.setattr(GenerationMixin, "generate", broken)
    show = Watching()
    (made,) = compress(Recipe.load(written(desk, PROMPTS)), show)
    told = "no text samples: the models cannot write them here (this class does not generate)"
    assert told in show.said and "samples" not in made.manifest
    another = Recipe.load(written(desk, PROMPTS), ["output.name=other"])
    monkeypatch.setattr(before_after, "_continued", lost)
    with pytest.raises(ConnectionError, match="a replica was lost"):
        compress(another)


def lost(*_: object) -> None:
    raise ConnectionError("a replica was lost")


def test_none_are_written_where_none_are_wanted(desk: Desk) -> None:
    compress(Recipe.load(written(desk, [])))
    folder = next(desk.out.glob("demo-p40"))
    assert "samples" not in json.loads((folder / "fusegpt.json").read_text())
    assert "What it writes" not in (folder / "README.md").read_text()
