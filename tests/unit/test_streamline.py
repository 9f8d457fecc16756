"""Method `streamline`: the light block is what plain torch makes of the run's first block."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from infirmary import BATCH, TRAINED, Infirmary
from models import load_model
from stopped_runs import Watching, published, recipe
from test_compared_methods import removed, states
from test_tournament import workers
from torch.nn.functional import cosine_similarity

from fusegpt_ray.cost.footprint import activation_bytes, shortage, training_bytes
from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.writers import mixers
from fusegpt_ray.healing.light_block import LightBlock
from fusegpt_ray.model.structure import observe
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Fusion
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.training.losses import mse

SETTINGS = Fusion(learning_rate=1e-3, epochs=3, batch=BATCH)
FIRST, LAST = 1, 3
OUT = "self_attn.o_proj.weight"
# Float32 through a few steps of Adam, where only the order of additions differs. A step moves a
# weight by about the rate, so a step of the wrong sign would be 100 times as much.
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


@pytest.fixture(name="infirmary")
def _infirmary(checkpoint: Callable[[str], Path], tmp_path: Path) -> Infirmary:
    return Infirmary("llama", checkpoint("llama"), tmp_path)


def train(place: Infirmary, cluster: Cluster, kind: str = "block") -> Trained:
    light = LightBlock(place.dense, FIRST, LAST, SETTINGS, 0, str(place.out / "blocks"))
    if kind == "mlp":
        zeros = {OUT: torch.zeros(32, 32)}
        _, refs = write_safetensors(str(place.out / "zeros.safetensors"), entries_of(zeros))
        light = replace(light, zeros=refs, frozen=frozenset(zeros))
    task = light.task(TRAINED.numpy(), cluster, "these", str(place.out / "checkpoints"))
    with workers(place) as here:
        return train_span(here, task, lambda _: None)


def test_the_run_is_the_one_across_which_all_tokens_turn_least(infirmary: Infirmary) -> None:
    """Of n + 1 blocks; the first of them stays, and n go from front to back."""
    h = states(infirmary)
    for count in (1, 2, 3, 4):
        cosines = [
            cosine_similarity(a, b, dim=-1).double().mean().item()
            for a, b in zip(h, h[count + 1 :], strict=False)
        ]
        first = max(range(len(cosines)), key=cosines.__getitem__)
        gone = removed(infirmary, "streamline", count)
        assert gone == list(range(first + 1, first + count + 1))


@pytest.mark.parametrize(("micro_batch", "kind"), [(None, "block"), (1, "block"), (None, "mlp")])
def test_the_light_block_is_what_plain_torch_trains(
    infirmary: Infirmary, micro_batch: int | None, kind: str
) -> None:
    """An MLP is h + MLP(norm(h)), written out: the block's attention plays no part."""
    trained = train(infirmary, Cluster(engine="local", micro_batch=micro_batch), kind)

    h, model = states(infirmary), load_model(infirmary.folder)
    block = copy.deepcopy(infirmary.blocks_of(model)[FIRST]).requires_grad_(True)
    positions = torch.arange(TRAINED.shape[1])[None]
    context = {"position_embeddings": model.model.rotary_emb(h[0], positions)}
    adam = torch.optim.Adam(block.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    steps, losses = SETTINGS.epochs * len(TRAINED) // BATCH, list[float]()
    for step in range(steps):
        rows = slice(step * BATCH % len(TRAINED), step * BATCH % len(TRAINED) + BATCH)
        for group in adam.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        if kind == "mlp":
            out = h[FIRST][rows] + block.mlp(block.post_attention_layernorm(h[FIRST][rows]))
        else:
            out = block(h[FIRST][rows], attention_mask=None, **context)
        out = out[0] if isinstance(out, tuple) else out
        loss = ((out - h[LAST + 1][rows]) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    size = len(losses) // SETTINGS.epochs
    means = [sum(losses[first : first + size]) / size for first in range(0, steps, size)]
    assert trained.losses == pytest.approx(means, rel=1e-4)
    assert means[-1] < means[0]

    assert [*trained.saved.blocks] == [FIRST]
    found = read_tensors(trained.saved.blocks[FIRST].weights)
    wanted = block.state_dict()
    if kind == "mlp":
        assert torch.equal(found["self_attn.q_proj.weight"], wanted["self_attn.q_proj.weight"])
        wanted[OUT] = torch.zeros_like(wanted[OUT])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def test_padding_is_no_part_of_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, generator=generator)
    error = (student - teacher) ** 2
    assert mse(student, teacher, False).item() == pytest.approx(error.mean().item())
    # Weights have a mean of 1 (see `token_weights`).
    weights = torch.tensor([[1.2, 1.2, 1.2], [1.2, 1.2, 0.0]])
    counted = torch.cat([error[0], error[1, :2]]).mean().item()
    assert mse(student, teacher, False, weights).item() == pytest.approx(counted)


def test_a_run_publishes_the_dense_model_with_one_block_changed(desk: Desk) -> None:
    """Every other tensor is the dense model's, and the card says what was done."""
    (done,) = compress(recipe(desk, method="streamline", sparsity=0.4), Watching())
    gone = done.manifest["removed"]
    first = gone[0] - 1
    assert gone == [first + 1, first + 2]
    assert [record["group"] for record in done.manifest["rounds"]] == [[], [first]]
    assert done.manifest["rounds"][0]["losses"] == []
    assert len(done.manifest["rounds"][1]["losses"]) == 2
    dense, model = load_model(desk.model), load_model(Path(done.uri))
    old, new = dense.state_dict(), model.state_dict()
    for position, number in enumerate(n for n in range(5) if n not in gone):
        names = [key for key in new if key.startswith(f"model.layers.{position}.")]
        alike = [torch.equal(new[k], old[k.replace(f".{position}.", f".{number}.", 1)])
                 for k in names]  # fmt: skip
        assert names
        assert all(alike) == (number != first)
        assert any(alike) == (number != first)
    card = (Path(done.uri) / "README.md").read_text()
    assert METHOD_SPECS["streamline"].about in " ".join(card.split())
    assert done.manifest["rounds"][1]["replaced"] == [first, *gone]
    assert f"Block {first} was trained to stand for blocks {first} to {gone[-1]}." in card


def test_an_mlp_in_place_of_a_run(desk: Desk, tmp_path: Path) -> None:
    """Its attention gives nothing, its MLP has learned; and a stopped run ends with these bytes."""
    fusion = desk.recipe()["fusion"] | {"light": "mlp"}
    asked = recipe(desk, method="streamline", sparsity=0.4, fusion=fusion)
    (done,) = compress(asked, Watching())
    first = done.manifest["removed"][0] - 1
    dense, model = load_model(desk.model), load_model(Path(done.uri))
    old, new = (each.model.layers[first].state_dict() for each in (dense, model))
    assert not new[OUT].any()
    changed = {name for name in new if not torch.equal(new[name], old[name])} - {OUT}
    assert changed == {name for name in new if name.startswith(("mlp.", "post_attention"))}
    expected = published(desk)
    desk.out.rename(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        compress(asked, Watching(2))
    compress(asked, Watching())
    assert published(desk) == expected


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gpt2", {"attn.c_proj.weight", "attn.c_proj.bias"}),
        ("opt", {"self_attn.out_proj.weight", "self_attn.out_proj.bias"}),
        ("gemma3", {"self_attn.o_proj.weight"}),
    ],
)
def test_the_attentions_last_layer_is_found(
    checkpoint: Callable[[str], Path], name: str, names: set[str]
) -> None:
    raw = json.loads((checkpoint(name) / "config.json").read_text())
    assert {*mixers(observe(raw), 1)} == names


def test_a_healed_run_has_a_perplexity_of_each_stage(desk: Desk) -> None:
    held = {"heldout": {"data": str(desk.heldout)}}
    heal = {"tokens": 96, "train": "all", "batch": 4, "held_out": 4, "looks": 2}
    asked = recipe(desk, method="streamline", sparsity=0.4, evaluation=held, heal=heal)
    (done,) = compress(asked, Watching())
    row = done.manifest["perplexity"]["heldout"]
    assert {"dense", "dropped", "replaced", "healed"} <= row.keys()


def asked_for(desk: Desk, **changes: Any) -> Recipe:
    return Recipe.parse(desk.recipe(**changes))


def test_a_light_block_is_one_that_learns_whole(desk: Desk) -> None:
    """Its weights, their gradients, masters and Adam's state; and there is one of it."""
    asked, groups = asked_for(desk, method="streamline"), asked_for(desk)
    dense = plan(asked, Display()).model.stack
    values = sum(math.prod(ref.shape) for ref in dense.blocks[0].weights.values())
    assert training_bytes(asked, dense, torch.bfloat16, 3) == values * (2 + 2 + 4 * 4)
    frugal = {"engine": "local", "micro_batch": 1, "recompute_activations": True}
    one = asked_for(desk, method="streamline", cluster=frugal)
    assert training_bytes(one, dense, torch.bfloat16) == values * (2 + 4 + 4 * 4)
    activations = [activation_bytes(each, dense, torch.float32) for each in (asked, groups)]
    assert activations[1] == 3 * activations[0]
    told = shortage(asked, dense, torch.float32, 2, 1)
    assert "micro_batch" in told and "group_size" not in told and "fold" not in told
    assert "less is needed" in told
    told = shortage(one, dense, torch.float32, 2, 1)
    assert told and "less is needed" not in told


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"sparsity": [0.2, 0.4]}, "sparsity", "other blocks for each"),
        ({"fusion": {"start": "linear"}}, "fusion.start", "all that method streamline does"),
        ({"fusion": {"batch": 3}}, "calibration.windows", "not a multiple"),
        ({"method": "mi", "fusion": {"light": "mlp"}}, "fusion.light", "has no light block"),
        ({"heal": {}, "search": {}}, "search", "chooses the blocks itself"),
    ],
)
def test_what_it_cannot_do_is_refused(
    desk: Desk, changes: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        Recipe.parse(desk.recipe(**{"method": "streamline"} | changes))
    assert caught.value.key == key
