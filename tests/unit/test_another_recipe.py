"""A run that stopped goes on only under what shapes its result: the same recipe, text and model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from desk import Desk, random_text
from models import load_model
from safetensors.torch import load_file, save_file
from stopped_runs import (  # noqa: F401 - fixtures
    Watching,
    Weights,
    _undisturbed,
    contents,
    published,
    recipe,
    run_folder,
    stopped,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.workers.local import LocalWorkers


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("recipe.seed", 1),
        ("recipe.method", "mi+ft"),
        ("recipe.fusion.rank", {"rank": 3}),
        ("recipe.calibration.seed", {"seed": 1}),
        ("recipe.importance.batch", {"batch": 4}),
        ("recipe.model.dtype", {"dtype": "bfloat16"}),
    ],
)
def test_another_recipe_is_refused_and_the_difference_shown(
    key: str, section: Any, desk: Desk
) -> None:
    stopped(desk)
    before = contents(desk.folder)
    name = key.split(".")[1]
    changed = desk.recipe()[name] | section if isinstance(section, dict) else section
    with pytest.raises(UserError) as refused:
        compress(recipe(desk, **{name: changed}), Watching())
    assert (refused.value.key, refused.value.value) == ("output.name", "demo")
    assert f"an unfinished run in {run_folder(desk)} has {key} = " in refused.value.problem
    assert contents(desk.folder) == before


A_GPU = {"gpu": "NVIDIA H200", "torch": "2.13.0", "cuda": "13.0", "blocks": "compiled"}


def on(hardware: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, as on other hardware. (The bits are those of this CPU all the same.)"""
    monkeypatch.setattr(LocalWorkers, "hardware", hardware)


@pytest.mark.parametrize("there", [{}, A_GPU | {"gpu": "NVIDIA H100"}, A_GPU | {"cuda": "12.8"}])
def test_a_run_begun_on_a_gpu_is_not_gone_on_with_elsewhere(
    there: dict[str, str], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(A_GPU, monkeypatch)
    stopped(desk)
    before = contents(desk.folder)
    on(there, monkeypatch)
    with pytest.raises(UserError, match=r"hardware"):
        compress(recipe(desk), Watching())
    assert contents(desk.folder) == before
    on(A_GPU, monkeypatch)
    compress(recipe(desk), Watching())


def test_without_exact_bits_hardware_may_change(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = desk.recipe()["cluster"] | {"deterministic": False}
    on(A_GPU, monkeypatch)
    stopped(desk, cluster=cluster)
    on({}, monkeypatch)
    show = Watching()
    compress(recipe(desk, cluster=cluster), show)
    assert any(line.startswith("going on after round") for line in show.said)


def test_what_is_published_is_found_on_other_hardware(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(recipe(desk), Watching())
    before = contents(desk.out)
    on(A_GPU, monkeypatch)
    show = Watching()
    compress(recipe(desk), show)
    assert show.said[-1].startswith("published ")
    assert "nothing is left to do: this very run has published everything" in show.said
    assert contents(desk.out) == before


def other_text(desk: Desk) -> None:
    (desk.folder / "calibration.txt").write_text(random_text(200, seed=3))


def other_config(desk: Desk) -> None:
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def other_dtype(desk: Desk) -> None:
    load_model(desk.model).to(torch.bfloat16).save_pretrained(desk.model)


def other_weights(desk: Desk) -> None:
    tensors = load_file(desk.model / "model.safetensors")
    changed = {name: value * 1.5 for name, value in tensors.items()}
    save_file(changed, desk.model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_text, "windows_sha256"),
        (other_config, "rms_norm_eps"),
        (other_dtype, "dtype"),
        (other_weights, "model"),
    ],
    ids=["text", "config", "dtype", "weights"],
)
def test_another_text_or_model_is_refused(
    change: Callable[[Desk], None], named: str, desk: Desk
) -> None:
    stopped(desk)
    change(desk)
    with pytest.raises(UserError, match=f"an unfinished run .*{named}"):
        compress(recipe(desk), Watching())


def test_what_does_not_shape_the_result_may_change(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    stopped(desk)
    changes = {
        "cluster": {"engine": "local", "workers": 2, "replicas": 3},
        "evaluation": {"held-out": {"data": str(desk.heldout)}},
        "output": {"uri": str(desk.out), "name": "demo", "shard_gb": 1.0},
    }
    show = Watching()
    compress(recipe(desk, **changes), show)
    assert show.rounds == [2, 3]
    assert published(desk) == undisturbed["at_end"]


def test_all_differences_are_shown(desk: Desk) -> None:
    stopped(desk)
    fusion = desk.recipe()["fusion"] | {"rank": 3}
    with pytest.raises(
        UserError,
        match=r"recipe\.seed = 0, this one has 1; and recipe\.fusion\.rank = 2, this one has 3",
    ):
        compress(recipe(desk, seed=1, fusion=fusion), Watching())
