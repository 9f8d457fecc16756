"""`fusegpt validate` and `fusegpt plan`: what they tell is true, and they read no weights and write
nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import yaml
from desk import Desk
from functorch.compile import make_boxed_func
from mistakes import tree
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from fusegpt_ray.cli import main
from fusegpt_ray.cost import rates
from fusegpt_ray.cost.cost import attention_flops
from fusegpt_ray.model.compiled import CompiledBlock
from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.planning import probe
from fusegpt_ray.planning.first_recipe import first_recipe
from fusegpt_ray.planning.outlook import Device
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.generation import ROWS
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display

HEAL = {"tokens": 96, "batch": 4, "held_out": 4, "train": "all"}


def test_a_plan_is_that_of_the_run(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.write(sparsity=[0.2, 0.4], heal=HEAL)
    before = tree(desk.folder)
    assert main(["plan", recipe, "--json", "--gpu", "h100", "--gpus", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert tree(desk.folder) == before and weight_reads == []
    cost = plan(Recipe.load(recipe), Display()).cost
    assert told["flops"] == cost.flops == sum(row["flops"] for row in told["stages"])
    assert [row["blocks"] for row in told["targets"]] == [4, 3]
    assert {row["name"]: row["bytes"] for row in told["targets"]} == dict(cost.published_bytes)
    expected = 3600 * cost.hours(rates.RATES["NVIDIA H100"])
    assert told["seconds"] == pytest.approx(expected)
    assert {row["what"] for row in told["memory"]} == {
        "scoring, each replica",
        "fine-tuning, each worker",
        "healing, each worker",
    }
    assert all(row["fits"] and not row["advice"] for row in told["memory"])
    storage = {row["what"]: row["bytes"] for row in told["storage"]}
    assert storage["read first, by each process"] == cost.source_bytes
    assert len(storage) == 4 and all(storage.values())
    assert told["order"] == [
        "2 rounds: scoring, states, fine-tuning",
        "demo-p20: healing, publishing",
        "demo-p40: healing, publishing",
    ]
    assert told["beside_computing"] == {"starting": 0, "rounds": 20, "publishing": ANY}
    assert told["whole_seconds"] == told["seconds"] + sum(told["beside_computing"].values())
    traffic = {row["stage"]: (row["read"], row["written"]) for row in told["traffic"]}
    assert traffic["publishing"] == (sum(cost.published_bytes.values()),) * 2
    stages = {"scoring", "states", "fine-tuning", "healing", "evaluation", "publishing"}
    assert traffic.keys() == stages


def test_what_does_not_fit_is_told_with_what_helps(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(rates.GPUS["NVIDIA A100"], memory=100_000)
    monkeypatch.setitem(rates.GPUS, "NVIDIA A100", small)  # type: ignore[arg-type]
    assert main(["plan", desk.write(heal=HEAL), "--gpu", "A100"]) == 0
    page = capsys.readouterr().out
    assert page.count("does not fit") == 3 and max(map(len, page.splitlines())) <= 80
    assert "cluster.recompute_activations" in page and "heal.train: lora" in page


def test_a_gpu_that_is_not_known(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", desk.write(), "--gpu", "RTX 4090"]) == 2
    assert "--gpu = 'RTX 4090'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "falcon", "lfm2"])
def test_a_machine_is_probed_without_weights(
    name: str,
    desk: Desk,
    checkpoint: Callable[[str], Path],
    weight_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(probe.probe, "__defaults__", (0.01,))  # seconds
    source = shutil.copytree(checkpoint(name), desk.folder / name)
    for file in desk.model.glob("tokenizer*"):
        shutil.copy(file, source)
    recipe = desk.write(model={"source": str(source)}, sparsity=0.2, heal=HEAL)
    before = tree(desk.folder)
    capsys.readouterr()
    assert main(["plan", recipe, "--json", "--probe"]) == 0
    stdout, stderr = capsys.readouterr()
    told = json.loads(stdout)
    assert stderr == "measuring this machine, which takes about 20 seconds\n"
    assert tree(desk.folder) == before and weight_reads == []
    assert told["probed"] and all(row["seconds"] > 0 for row in told["stages"])
    assert told["seconds"] == pytest.approx(sum(row["seconds"] for row in told["stages"]))
    assert main(["plan", recipe, "--probe", "--gpu", "H100"]) == 2
    assert "leave out one of the two" in capsys.readouterr().err


def test_a_probe_counts_what_torch_counts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOP a second, of calls that are taken to last a second each."""
    counted: list[float] = []

    def one_second(call: Callable[[], object], *_: object) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(probe, "_median_time", one_second)
    planned = plan(Recipe.load(desk.write()), Display())
    found, dense = probe.probe(planned), planned.model.stack
    windows, length = planned.recipe.importance.batch, planned.recipe.calibration.length
    # Attention on a CPU is one operation, which torch does not count.
    walk, step = windows * attention_flops(dense, length), ROWS * attention_flops(dense, 1)
    assert found["scoring"] == counted[0] + walk
    assert found["generating"] == counted[1] + step
    assert found["healing"] == counted[2] + 3 * walk
    assert found["repair"] == counted[3]
    assert found.keys() == rates.RATES["NVIDIA H100"].keys()


def test_a_probe_computes_as_the_run_does(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same kernels; and where the way back cannot be compiled, not compiled."""
    asked: list[tuple[bool, bool]] = []
    within = False

    @contextmanager
    def kernels(device: torch.device, wanted: bool) -> Iterator[None]:
        nonlocal within
        within = wanted
        yield
        within = False

    def fails(*_: Any) -> Any:
        raise RuntimeError("no way back")

    def plain(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def timed(call: Callable[[], object], *_: object) -> float:
        call()
        asked.append((within, bool(run.gave_up)))
        return 1.0

    torch._dynamo.reset()
    run = CompiledBlock(aot_autograd(fw_compiler=plain, bw_compiler=fails))
    monkeypatch.setattr(probe, "deterministic_kernels", kernels)
    monkeypatch.setattr(probe, "block_function", lambda compiled: run if compiled else run_block)
    monkeypatch.setattr(probe, "_median_time", timed)
    found = probe.probe(plan(Recipe.load(desk.write(cluster={"compile": True})), Display()))
    # A walk, a text that is written, a block there and back, a repair.
    assert asked == [(True, False), (True, False), (True, True), (True, True)]
    assert all(found.values())
    asked.clear()
    cluster = {"compile": True, "deterministic": False}
    probe.probe(plan(Recipe.load(desk.write(cluster=cluster)), Display()))
    assert not any(deterministic for deterministic, _ in asked)


def test_all_mistakes_are_listed(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.write(sparsity=0.9, evaluation={"held": {"data": "none.txt"}})
    before = tree(desk.folder)
    assert main(["validate", recipe]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" = ")[0] for line in told] == [
        "error: evaluation.held.data",
        "error: sparsity",
    ]
    assert main(["validate", recipe, "--set", "sparsty=1", "--set", "seed=one", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["good"] and {row["key"] for row in found["mistakes"]} == {"sparsty", "seed"}
    assert main(["validate", desk.write()]) == 0
    assert capsys.readouterr().out.startswith("good: ")
    assert tree(desk.folder).keys() == before.keys() and weight_reads == []


def test_what_may_be_on_the_hub_is_named(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there may be a dataset; a file without text is a mistake at once."""
    text = desk.recipe()["calibration"]
    recipe = desk.write(calibration=text | {"data": "data/mytext"})
    assert main(["validate", recipe]) == 0
    good, told = capsys.readouterr().out.splitlines()
    assert good.startswith("good: ")
    assert told.startswith("not looked up: calibration.data: dataset 'data/mytext'")
    assert main(["validate", recipe, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["not_looked_up"]) == 1
    held = {"held": {"data": "empty.txt"}}
    (desk.folder / "empty.txt").touch()
    for mistaken in ("calibration", "heal", "evaluation.held"):
        given = {
            "calibration": {"calibration": text | {"data": "empty.txt"}},
            "heal": {"heal": {"data": "empty.txt"}},
            "evaluation.held": {"evaluation": held},
        }[mistaken]
        assert main(["validate", desk.write(**given)]) == 2
        assert f"{mistaken}.data = 'empty.txt': empty." in capsys.readouterr().err


def test_a_first_recipe_can_be_planned(
    desk: Desk,
    weight_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk.folder)
    text = str(desk.folder / "calibration.txt")
    assert main(["init", str(desk.model), "--data", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"recipe": "recipe.yaml"}
    assert main(["validate", "recipe.yaml"]) == 0
    recipe = Recipe.load("recipe.yaml")
    assert recipe.calibration.length == 64, "the model has no more positions"
    assert (recipe.cluster.engine, recipe.heal and recipe.heal.train) == ("local", "all")
    before = (desk.folder / "recipe.yaml").read_bytes()
    assert main(["init", str(desk.model)]) == 2  # it is there already
    assert main(["init", "nowhere", "--output", "other.yaml"]) == 2
    assert main(["init", "s3://KEY:SECRET@bucket/model", "--output", "other.yaml"]) == 2
    assert "SECRET" not in capsys.readouterr().err and not (desk.folder / "other.yaml").exists()
    assert (desk.folder / "recipe.yaml").read_bytes() == before and weight_reads == []


@pytest.mark.parametrize(
    ("memory", "gpus", "train", "workers"), [(80 * 10**9, 6, "all", 4), (10**5, 1, "lora", 1)]
)
def test_a_first_recipe_fits_the_gpus(
    desk: Desk, memory: int, gpus: int, train: str, workers: int
) -> None:
    device = Device("NVIDIA H100", "cuda", memory)
    recipe = Recipe.parse(yaml.safe_load(first_recipe(str(desk.model), device, gpus)))
    assert recipe.heal and recipe.heal.train == train
    cluster = recipe.cluster
    assert (cluster.engine, cluster.replicas, cluster.workers) == ("ray", gpus, workers)
