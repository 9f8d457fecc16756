"""Whole runs with a repair in closed form: by itself, and as the start of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import LENGTH, Desk
from experts import save_split
from models import load_model
from safetensors.torch import load_file
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion import repair
from fusegpt_ray.fusion.compensation import last_linears
from fusegpt_ray.model import recorder
from fusegpt_ray.model import runner as runner_module
from fusegpt_ray.model.structure import observe
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.preflight import with_start
from fusegpt_ray.publishing.publish import Published
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display

WINDOWS = 12
"""Of 12 tokens, with batches of 2: the last of six pieces is held out, and 120 tokens are fitted to
the layer's 48 inputs."""


def recipe(desk: Desk, **changes: Any) -> Recipe:
    text = {"data": str(desk.folder / "calibration.txt"), "windows": WINDOWS, "length": LENGTH}
    held = {"heldout": {"data": str(desk.heldout)}}
    sections = {"method": "mi+linear", "calibration": text, "evaluation": held, "sparsity": 0.2}
    return Recipe.load(desk.write(**(sections | changes)))


def fusion(desk: Desk, **keys: Any) -> dict[str, Any]:
    return desk.recipe()["fusion"] | keys


def weights(published: Published) -> dict[str, torch.Tensor]:
    files = sorted(Path(published.uri).glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@torch.no_grad()
def perplexity(folder: str | Path, desk: Desk) -> float:
    """By plain transformers, over the held-out text's whole windows."""
    ids = torch.tensor([int(word[1:]) for word in desk.heldout.read_text().split()])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    logits = load_model(Path(folder))(input_ids=rows).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return float(loss.exp())


def test_blocks_that_end_in_experts_are_not_repaired(desk: Desk) -> None:
    """Told before the work: what experts write is no single layer's. With a shared expert that is
    called last, there is one.
    """
    (desk.model / "model.safetensors").unlink()
    save_split("mixtral", desk.model)
    with pytest.raises(UserError, match="no block of MixtralForCausalLM ends in one"):
        plan(recipe(desk), Display())
    save_split("deepseek_v3", desk.model)
    plan(recipe(desk), Display())
    structure = observe(json.loads((desk.model / "config.json").read_text()))
    layers, blocks = last_linears(structure.calls), structure.blocks
    assert layers[0] is blocks[0].get_submodule("mlp.down_proj")
    assert layers[1] is blocks[1].get_submodule("mlp.shared_experts.down_proj")


@pytest.mark.parametrize("start", [None, "matrix", "scale"])
def test_the_published_model_is_the_dense_one_with_one_layer_changed(
    start: str | None, desk: Desk
) -> None:
    keys = {} if start is None else {"fusion": fusion(desk, start=start)}
    asked = recipe(
        desk, evaluation={"heldout": {"data": str(desk.heldout), "bos": "never"}}, **keys
    )
    assert asked.fusion.start == (start or "linear")
    (published,) = compress(asked, Display())
    (record,) = published.manifest["rounds"]
    donor, told = record["removed"], record["repair"]
    dense, made = load_file(desk.model / "model.safetensors"), weights(published)
    kept = [number for number in range(5) if number != donor]
    changed = {
        name
        for name, value in made.items()
        if not torch.equal(
            value,
            dense[name]
            if "layers" not in name
            else dense[
                name.replace(f".{name.split('.')[2]}.", f".{kept[int(name.split('.')[2])]}.")
            ],
        )
    }
    assert told["way"] == asked.fusion.start and told["block"] == kept[kept.index(donor - 1)]
    assert changed == {f"model.layers.{kept.index(donor - 1)}.{told['layer']}.weight"}
    assert 0 < told["left"] < 1 and told["layer"] == "mlp.down_proj"
    # What was measured is what plain transformers measures of what was published.
    found = published.manifest["perplexity"]["heldout"]
    assert found["repaired"] == pytest.approx(perplexity(published.uri, desk), rel=1e-4)
    assert found["repaired"] != pytest.approx(found["dropped"], rel=1e-3)


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("moment", ["solve", "write_safetensors"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    moment: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = recipe(desk, sparsity=0.4, output={"uri": str(desk.out), "name": "undisturbed"})
    (undisturbed,) = compress(here, Display())
    asked = recipe(desk, sparsity=0.4)
    real, calls = getattr(repair, moment), 0

    def second_kills(*arguments: Any) -> Any:
        nonlocal calls
        result = real(*arguments)
        calls += 1
        if calls == 2:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(repair, moment, second_kills)
        with pytest.raises(Killed):
            compress(asked, Display())
    (published,) = compress(asked, Display())
    assert calls == 2, "the first round is not done again"
    for name in ("model.safetensors", "config.json"):
        one, other = (Path(item.uri) / name for item in (published, undisturbed))
        assert one.read_bytes() == other.read_bytes()
    assert published.manifest["rounds"][1]["repair"] == undisturbed.manifest["rounds"][1]["repair"]


@pytest.mark.parametrize("fold", ["each_round", "at_end"])
@pytest.mark.parametrize("method", ["fusegpt", "mi+ft"])
def test_fine_tuning_starts_from_the_repaired_block(
    method: str, fold: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At rates that move nothing, two rounds with a start are the two repairs."""
    still = {"learning_rate": 1e-12, "lora_learning_rate": 1e-12, "fold": fold, "start": "linear"}
    trained = recipe(desk, method=method, sparsity=0.4, fusion=fusion(desk, **still))
    (started,) = compress(trained, Display())
    other = {"uri": str(desk.out), "name": "repaired"}
    (repaired,) = compress(recipe(desk, sparsity=0.4, output=other), Display())
    assert started.manifest["removed"] == repaired.manifest["removed"]
    rows = [item.manifest["perplexity"]["heldout"] for item in (started, repaired)]
    assert rows[0]["repaired"] == pytest.approx(rows[1]["repaired"], rel=1e-6)
    stage = trained.spec.stage
    assert stage not in rows[1] and rows[0][stage] == pytest.approx(rows[0]["repaired"], rel=1e-4)
    one, two = weights(started), weights(repaired)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert any((one[name] - two[name]).abs().max() > 0 for name in one), "something is trained"


def test_a_start_makes_the_first_loss_smaller(desk: Desk) -> None:
    losses = {}
    for start in ("none", "linear"):
        keys = fusion(desk, start=start, epochs=1, learning_rate=1e-9, lora_learning_rate=1e-9)
        output = {"uri": str(desk.out), "name": start}
        asked = recipe(desk, method="fusegpt", fusion=keys, output=output, evaluation={})
        (published,) = compress(asked, Display())
        (record,) = published.manifest["rounds"]
        losses[start] = record["loss_first"]
        assert ("repair" in record) == (start == "linear")
    assert losses["linear"] < 0.95 * losses["none"]


@pytest.mark.parametrize(("windows", "start"), [(12, "linear"), (4, "none")])
def test_auto_is_a_start_where_there_are_enough_tokens(
    windows: int, start: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"data": str(desk.folder / "calibration.txt"), "windows": windows, "length": LENGTH}
    keys = fusion(desk, start="auto")
    asked = recipe(desk, method="fusegpt", calibration=text, fusion=keys)
    assert plan(asked, Display()).recipe.fusion.start == start
    assert ("without a start in closed form" in capsys.readouterr().err) == (start == "none")


def test_auto_is_no_start_for_a_mixture_of_experts(desk: Desk) -> None:
    (desk.model / "model.safetensors").unlink()
    save_split("mixtral", desk.model)
    asked = recipe(desk, method="fusegpt", fusion=fusion(desk, start="auto"))
    assert plan(asked, Display()).recipe.fusion.start == "none"


def test_auto_is_no_start_where_blocks_are_called_by_sample(desk: Desk) -> None:
    structure = observe(json.loads((desk.model / "config.json").read_text()))
    asked = recipe(desk, method="fusegpt", fusion=fusion(desk, start="auto"))
    said: list[str] = []
    for by_sample, start in ((False, "linear"), (True, "none")):
        found = with_start(asked, replace(structure, by_sample=by_sample), said.append)
        assert found.fusion.start == start
    assert len(said) == 1 and "what depends on the sample" in said[0]


@pytest.mark.parametrize(
    ("name", "way", "length", "windows", "needed"),
    [
        ("llama", "linear", 12, 4, 5),  # 48 inputs: four windows of 12, and one held out
        ("gpt2", "linear", 12, 12, 13),  # 128 inputs and a bias: eleven windows
        ("llama", "matrix", 12, 4, 5),  # 32 outputs: three windows, in batches of two
        ("llama", "scale", 12, 2, 3),
    ],
)
def test_too_few_tokens_are_refused_before_a_weight_is_read(
    name: str,
    way: str,
    length: int,
    windows: int,
    needed: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    weight_reads: list[str],
) -> None:
    desk = Desk.make(tmp_path, checkpoint(name))
    text = {"data": str(desk.folder / "calibration.txt"), "length": length}
    few = recipe(
        desk,
        calibration=text | {"windows": windows},
        importance={"windows": 2, "batch": 2},
        fusion=fusion(desk, start=way),
    )
    with pytest.raises(UserError) as caught:
        compress(few, Display())
    error = caught.value
    assert (error.key, error.value) == ("calibration.windows", windows)
    assert error.fix == f"use at least {needed}"
    assert not weight_reads and not desk.out.exists()
    enough = few.model_copy(
        update={"calibration": few.calibration.model_copy(update={"windows": needed})}
    )
    plan(enough, Display())


def test_a_start_needs_a_method_that_starts(desk: Desk) -> None:
    for method, start, other in (("mi", "linear", "mi+linear"), ("mi+linear", "none", "mi")):
        with pytest.raises(UserError) as caught:
            recipe(desk, method=method, fusion=fusion(desk, start=start))
        assert (caught.value.key, caught.value.value) == ("fusion.start", start)
        assert caught.value.fix.endswith(f"method: {other}")
    assert recipe(desk, method="fusegpt").fusion.start == "none"


def test_the_walks_of_a_repair_are_in_the_cost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(desk, evaluation={})
    cost = plan(asked, Display()).cost
    counted = {stage.name: stage.block_forwards for stage in cost.stages}
    assert counted.keys() == {"scoring", "states", "repair"}
    assert all(stage.flops > 0 for stage in cost.stages)
    walked, gather, run_block = 0, repair.gather, recorder.run_block

    def count(block: nn.Module, h_BTD: torch.Tensor, context: recorder.Context) -> torch.Tensor:
        nonlocal walked
        walked += len(h_BTD)
        return run_block(block, h_BTD, context)

    def counted_gather(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(runner_module, "run_block", count)
            return gather(*arguments)

    monkeypatch.setattr(repair, "gather", counted_gather)
    (published,) = compress(asked, Display())
    donor = published.manifest["removed"][0]
    looks = 3 * 6  # of one window each, in each piece: which layer it is, and whether it is added
    assert walked == WINDOWS * (donor + 1) + looks
    assert WINDOWS * donor < counted["states"] == 5 * WINDOWS
