"""Prices by kinds of GPUs: how a table is read, what it says of a GPU, and what plans cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from recipes import recipe, written

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.planning import fitting
from fusegpt_ray.planning.fitting import Device
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.gpu_prices import Prices, cost, price_of
from fusegpt_ray.recipe.recipe import Recipe

HOUR = 3600.0
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
TABLE = {"H100": 2.5, "A100": 1.0}
LABEL = "ray.io/accelerator-type"


@pytest.mark.parametrize(
    ("prices", "gpu", "price"),
    [
        ({"H100": 2.5, "A100": 1.4}, H100, 2.5), ({"H100": 2.5, "A100": 1.4}, A100, 1.4),
        ({"h100": 2.5}, H100, 2.5), ({"NVIDIA H100": 2.5}, H100, 2.5),
        ({"A100": 1.4}, "NVIDIA A10", None), ({"A10": 1.4}, A100, None),
        ({"L4": 0.7}, "NVIDIA L40S", None), ({"L40S": 0.7}, "NVIDIA L4", None),
        ({"RTX-PRO-6000": 1.1}, "NVIDIA RTX PRO 6000 Blackwell Server Edition", 1.1),
        ({"RTX-PRO-6000": 1.1}, "NVIDIA RTX 6000 Ada Generation", None),
        ({"T4": 0.3}, "Tesla T4", 0.3), ({"MI300X": 3}, "AMD Instinct MI300X", 3),
        # The most words, in whatever order the table has them.
        ({"A100": 1.4, "A100-40GB": 1.1}, A100, 1.4), ({"A100-80GB": 2, "A100": 3}, A100, 2),
        ({"A100": 3, "A100-80G": 2}, A100, 2), ({"A100-40G": 1}, A100, None),
        ({"80GB": 1, "A100": 2}, A100, 2), ({"A100": 2, "SXM4": 3}, A100, 3),
        (2.5, A100, 2.5), (2.5, "", 2.5), (None, A100, None), ({"H100": 1}, "", None),
    ],
)  # fmt: skip
def test_the_price_is_that_of_the_kind_whose_words_the_name_has(
    prices: Prices | None, gpu: str, price: float | None
) -> None:
    assert price_of(prices, gpu) == price


def test_gpus_cost_what_each_kind_costs() -> None:
    held = {H100: 2 * HOUR, A100: 3 * HOUR}
    assert cost(TABLE, held) == 2 * 2.5 + 3 * 1.0 and cost(2, held) == 10
    assert cost({"H100": 2.5}, held) is None and cost(None, held) is None
    assert cost(TABLE, {}) is None and cost(2, {}) is None, "a CPU has no price"


def test_a_table_is_read_from_a_recipe(tmp_path: Path) -> None:
    text = "model: {source: m}\ncalibration: {data: t}\noutput: {uri: o, name: n}\n"
    file = written(tmp_path, f"{text}cluster: {{gpu_hour_price: {{H100: 2.5, 4090: 1}}}}\n")
    prices = {"H100": 2.5, "4090": 1.0}
    assert Recipe.load(file).cluster.gpu_hour_price == prices
    key = "cluster.gpu_hour_price"
    for kind, price in (("H100", 3), ("A100", 1.5)):
        changed = Recipe.load(file, [f"{key}.{kind}={price}"])
        assert changed.cluster.gpu_hour_price == prices | {kind: price}
    bare = written(tmp_path, text)
    assert Recipe.load(bare, [f"{key}.A100=1.5"]).cluster.gpu_hour_price == {"A100": 1.5}
    assert Recipe.load(bare, [f"{key}=2"]).cluster.gpu_hour_price == 2
    loaded = Recipe.load(bare, [f"{key}={{A100: 1.5}}"])
    assert Recipe.parse(loaded.model_dump(mode="json")) == loaded, "as a manifest keeps it"


def test_a_number_is_not_taken_for_a_table_by_set(tmp_path: Path) -> None:
    text = "cluster: {gpu_hour_price: 3.0}\n"
    with pytest.raises(UserError) as found:
        Recipe.load(written(tmp_path, text), ["cluster.gpu_hour_price.H100=2.5"])
    assert found.value.problem == "cluster.gpu_hour_price is not a section, but 3.0"
    assert "--set 'cluster.gpu_hour_price={H100: …}'" in found.value.fix


@pytest.mark.parametrize(
    ("cluster", "refused"),
    [
        ({"labels": {LABEL: "L40S"}}, True), ({"labels": {LABEL: "A10"}}, True),
        ({"labels": {LABEL: "A100"}}, False), ({"labels": {LABEL: "A100-80G"}}, False),
        ({"labels": {LABEL: "L40S"}, "gpu_hour_price": 1}, False), ({}, False),
        ({"labels": {LABEL: "L40S"}, "engine": "local"}, False),
        ({"labels": {LABEL: "L40S"}, "gpus_per_replica": 0}, False),
        ({"labels": {LABEL: "L40S"}, "max_cost": None}, False),
        # What the GPU is called may say more than its label.
        ({"labels": {LABEL: "A100"}, "gpu_hour_price": {"A100-40GB": 1, "A100-80GB": 2}}, False),
        ({"labels": {LABEL: "L40S"}, "gpu_hour_price": None}, True),
    ],
)  # fmt: skip
def test_a_label_without_a_price_is_a_mistake_of_the_recipe(
    cluster: dict[str, Any], refused: bool
) -> None:
    section = {"gpu_hour_price": TABLE, "max_cost": 10, **cluster}
    if not refused:
        assert recipe(cluster=section)
        return
    with pytest.raises(UserError) as found:
        recipe(cluster=section)
    if section["gpu_hour_price"]:
        kind = section["labels"][LABEL]
        assert found.value.key == "cluster.gpu_hour_price" and found.value.value == TABLE
        assert f"has no price of {kind}" in found.value.problem
        assert found.value.fix.startswith(f"add cluster.gpu_hour_price.{kind}, or")
    else:
        assert found.value.key == "cluster.max_cost"


def test_a_plan_has_the_price_of_its_gpu(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(gpu: str) -> tuple[dict[str, Any], str]:
        section = {"engine": "local", "gpu_hour_price": TABLE | {"A100-40GB": 9}, "max_cost": 1}
        command = ["plan", desk.write(method="mi", cluster=section), "--gpu", gpu]
        assert main([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert main(command) == 0
        return told, capsys.readouterr().out

    for gpu, price in (("H100", 2.5), ("A100", 1.0)):  # the one with 80 GB, as docs/recipe.md says
        told, shown = planned(gpu)
        assert told["price"] == pytest.approx(told["seconds"] / HOUR * price)
        assert sum(row["price"] for row in told["stages"]) == pytest.approx(told["price"])
        assert told["unpriced"] is None and "no price" not in shown
    told, shown = planned("H200")
    assert told["price"] is None and {row["price"] for row in told["stages"]} == {None}
    lacking = "no price of NVIDIA H200 in cluster.gpu_hour_price, which has A100, A100-40GB, H100"
    assert told["unpriced"] == lacking and lacking in " ".join(shown.split())
    assert "whether cluster.max_cost = 1 is enough, is not known" in shown


def test_this_machine_s_gpu_is_priced_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = Cluster(gpu_hour_price={"A100-40GB": 1.1, "A100-80GB": 1.6})
    assert Device.named("NVIDIA A100").price(prices) == 1.6
    assert Device("this machine's CPU", "cpu", 1).price(Cluster(gpu_hour_price=3)) is None
    monkeypatch.setattr(fitting, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(fitting, "device_bytes", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert Device.here().name == "NVIDIA A100" and Device.here().price(prices) == 1.1


def test_a_plan_of_a_family_has_the_prices_of_its_members(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(one: Prices, two: Prices) -> tuple[dict[str, Any], str]:
        members = [
            {"name": name, "cluster": {"gpu_hour_price": price}}
            for name, price in (("one", one), ("two", two))
        ]
        section = {"members": members, "methods": ["mi"], "sparsities": 0.4}
        command = ["plan", desk.write(cluster={}, family=section), "--gpu", "A100"]
        assert main([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert main(command) == 0
        return told, " ".join(capsys.readouterr().out.split())

    told, shown = planned(TABLE, {"A100": 3})
    hours = [row["gpu_hours"] for row in told["runs"]]
    assert told["price"] == pytest.approx(hours[0] * 1 + hours[1] * 3) and "no price" not in shown
    told, shown = planned(TABLE, {"H100": 3})
    lacking = "no price of NVIDIA A100 in cluster.gpu_hour_price, which has H100"
    assert told["price"] is None and f"demo-two-mi: {lacking}" in shown
    assert told["runs"][0]["price"] and told["runs"][1]["price"] is None
    assert planned({"H100": 2}, {"H100": 3})[1].count(lacking) == 1
