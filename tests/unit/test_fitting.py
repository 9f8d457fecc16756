"""What `fusegpt plan` tells of the room for a run: GPUs, memory that processes share, disks, and
Ray's object store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from safetensors.torch import load_file
from stopped_runs import recipe, run_folder
from test_healed_runs import HEAL, SAVED, StoppedInHealing
from test_report_under_way import DyingInTraining

from fusegpt_ray.cli import main
from fusegpt_ray.cost import rates
from fusegpt_ray.cost.footprint import checkpoint_bytes, generating_bytes
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning import fitting
from fusegpt_ray.recipe.recipe import Recipe

RAY = {"engine": "ray", "replicas": 4, "workers": 2}


@pytest.fixture(name="plan")
def _plan(desk: Desk, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What `fusegpt plan` tells of a recipe with these changes."""

    def plan(*options: str, **changes: Any) -> dict[str, Any]:
        assert main(["plan", desk.write(**changes), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


def rows(told: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in told[part]}


@pytest.mark.parametrize(
    ("cluster", "gpus", "needed"),
    [
        (RAY, 2, 4), (RAY, 4, 4), (RAY | {"workers": 8, "replicas": 1}, 7, 8),
        ({"engine": "local"}, 1, 1), (RAY | {"gpus_per_replica": 0.5}, 1, 2),
    ],
)  # fmt: skip
def test_gpus_that_are_missing(
    cluster: dict[str, Any], gpus: int, needed: int, plan: Callable[..., dict[str, Any]]
) -> None:
    fusion = {"batch": 8, "epochs": 1, "group_size": 3}
    told = plan("--gpu", "H100", "--gpus", str(gpus), cluster=cluster, fusion=fusion)
    (row,) = told["processes"]
    assert (row["needs"], row["there"], row["enough"]) == (needed, gpus, needed <= gpus)
    assert bool(row["advice"]) == (needed > gpus)


def test_they_are_told_on_the_page(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", desk.write(cluster=RAY), "--gpu", "H100", "--gpus", "2"]) == 0
    page = capsys.readouterr().out
    assert "GPUs: 4 needed, there: 2\n  too few, so that the run would not begin" in page
    assert max(map(len, page.splitlines())) <= 80
    assert main(["plan", desk.write(cluster=RAY), "--gpu", "H100"]) == 0
    page = capsys.readouterr().out
    assert "GPUs: 4 needed, there: not known" in page and "too few" not in page


def test_this_machine_is_compared_with_what_is_here(plan: Callable[..., dict[str, Any]]) -> None:
    """Without GPUs there is nothing without which a local Ray would not begin."""
    told = plan(cluster=RAY)
    expected = [] if not fitting.There.here().gpus else ["GPUs"]
    assert [row["what"] for row in told["processes"]] == expected


def test_replicas_that_share_a_gpu_need_it_together(
    plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = RAY | {"gpus_per_replica": 0.5}
    memory = rows(plan("--gpu", "A100", cluster=cluster), "memory")
    apiece = memory["scoring, each replica"]["bytes"]
    small = replace(rates.GPUS["NVIDIA A100"], memory=apiece * 3 // 2)
    monkeypatch.setitem(rates.GPUS, "NVIDIA A100", small)  # type: ignore[arg-type]
    memory = rows(plan("--gpu", "A100", cluster=cluster), "memory")
    assert memory["scoring, each replica"]["fits"]
    together = memory["scoring, 2 replicas of a GPU"]
    assert together["bytes"] == 2 * apiece and not together["fits"]
    assert "cluster.gpus_per_replica" in together["advice"]


@pytest.mark.skipif(fitting.pick_device().type != "cpu", reason="it is about a machine of CPUs")
def test_processes_of_a_machine_need_its_memory_together(
    plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    apiece = rows(plan(cluster=RAY), "memory")
    needed = apiece["fine-tuning, each worker"]["bytes"]
    for name in ("device_bytes", "free_bytes"):
        monkeypatch.setattr(fitting, name, lambda _: needed * 3 // 2)
    memory = rows(plan(cluster=RAY), "memory")
    assert memory["fine-tuning, each worker"]["fits"]
    together = memory["fine-tuning, 2 workers and 4 replicas of this machine"]
    assert together["bytes"] > 2 * needed and not together["fits"] and together["advice"]
    replicas = memory["scoring, 4 replicas of this machine"]["bytes"]
    assert replicas == 4 * memory["scoring, each replica"]["bytes"]


def test_a_replica_that_writes_text_holds_the_whole_model(
    desk: Desk, plan: Callable[..., dict[str, Any]]
) -> None:
    written = {"data": [{"generate": True}], "windows": 8, "length": 12}
    name = "writing text, each replica"
    told = rows(plan("--gpu", "H100", calibration=written), "memory")[name]
    checked = Recipe.parse(desk.recipe(calibration=written))
    dense = Source.find(str(desk.model), None).stack()
    dtype = fitting.pick_dtype("auto", dense, fitting.torch.device("cuda"))
    assert told["bytes"] == generating_bytes(dense, dtype, checked.calibration.length)
    assert name not in rows(plan("--gpu", "H100"), "memory")


def kept(folder: Path) -> int:
    """Bytes of all tensors."""
    tensors = [value for file in folder.glob("*.safetensors") for value in load_file(file).values()]
    return sum(value.numel() * value.element_size() for value in tensors)


def test_training_checkpoints_take_what_is_told(desk: Desk) -> None:
    """Two of them, of which the second is there while it takes the place of the first."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **SAVED), DyingInTraining(1))
    asked, dense = recipe(desk, **SAVED), Source.find(str(desk.model), None).stack()
    there = kept(run_folder(desk) / "blocks" / "round-001" / "checkpoints")
    assert there == pytest.approx(checkpoint_bytes(asked, dense, 1, 4) / 2, rel=0.2)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_those_of_healing_too(train: str, desk: Desk) -> None:
    """One that was made before the best look so far has been passed keeps a fourth less."""
    asked = recipe(desk, sparsity=0.4, method="last", heal=HEAL | {"train": train}, **SAVED)
    with pytest.raises(KeyboardInterrupt):
        compress(asked, StoppedInHealing("demo-p40", 1))
    there = kept(run_folder(desk) / "blocks" / "heal-002" / "checkpoints")
    dense = Source.find(str(desk.model), None).stack()
    told = checkpoint_bytes(asked, dense, 2, 3) / 2
    assert 0.7 * told < there < 1.1 * told


def test_disks_and_the_object_store(plan: Callable[..., dict[str, Any]], desk: Desk) -> None:
    told = rows(plan(cluster=RAY), "storage")
    written = told["all that is written below output.uri"]
    assert written["fits"] and written["room"] > 10**6
    assert "sums that replicas send, in the object store" not in told
    assert "blocks kept on each node's disk" not in told, "all of it is local"

    far = {"uri": "memory://models", "name": "demo"}
    cluster = RAY | {"cache_gb": 1e-6, "object_store_gb": 1e-6}
    fusion = desk.recipe()["fusion"] | {"start": "linear"}
    told = rows(plan(cluster=cluster, output=far, fusion=fusion), "storage")
    assert told["all that is written below output.uri"]["room"] is None
    for what in (
        "blocks kept on each node's disk",
        "sums that replicas send, in the object store",
    ):
        assert not told[what]["fits"] and told[what]["room"] == 1000 and told[what]["advice"]
    told = rows(plan(cluster=RAY | {"cache_gb": 0}, output=far), "storage")
    assert "blocks kept on each node's disk" not in told


def test_the_order_of_the_work(plan: Callable[..., dict[str, Any]], desk: Desk) -> None:
    held_out = {"heldout": {"data": str(desk.heldout)}}
    search = {"tokens": 48, "candidates": ["mi", "run"]}
    told = plan(heal=HEAL, search=search, evaluation=held_out, method="mi")
    assert told["order"] == [
        "search",
        "evaluation of the dense model",
        "2 rounds: a block less in each",
        "demo-p40: healing, evaluation, publishing",
    ]
    assert told["whole_seconds"] is None, "nobody knows how fast this machine is"
    told = plan(method="shortgpt")
    assert told["order"] == ["scoring", "2 rounds: a block less in each", "demo-p40: publishing"]
