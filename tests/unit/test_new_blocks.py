"""`heal.train: new`: only the blocks that were put in learn, as in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from infirmary import BATCH, HELD, TRAINED, Infirmary, rate
from models import load_model
from safetensors.torch import load_file
from stopped_runs import Watching, published, recipe
from test_deeper_runs import DUS, HEAL, TLI, Stopped, changes
from test_next_token import cross_entropy

from fusegpt_ray.cost.footprint import healing_bytes
from fusegpt_ray.errors import UserError
from fusegpt_ray.methods.base import Copy
from fusegpt_ray.methods.inserting import deeper
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.terminal.display import Display

COPIES = (Copy(after=1, like=1), Copy(after=3, like=2))
PLACES = (2, 5)
"""Where these stand in the deeper model."""
AGAIN = HELD.repeat(len(TRAINED) // len(HELD), 1)
"""Trained on: what is held out, so that the last state is the best, which is kept."""
NEW = {"heal": HEAL | {"train": "new"}}


def real(place: Infirmary) -> Any:
    """The deeper model, of modules of transformers."""
    model = load_model(place.folder).requires_grad_(False)
    old = [*model.model.layers]
    layers = [old[0], old[1], copy.deepcopy(old[1]), old[2], old[3], copy.deepcopy(old[2])]
    model.model.layers = torch.nn.ModuleList([*layers, *old[4:]])
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.use_cache = False  # layers have the numbers of their originals
    return model


@pytest.mark.parametrize("cluster", [{"micro_batch": 1}, {"recompute_activations": True}])
def test_training_is_adam_on_the_new_blocks_of_the_real_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, cluster: dict[str, Any]
) -> None:
    place, highest = Infirmary("llama", checkpoint("llama"), tmp_path), 0.001
    place.stack = deeper(place.dense, COPIES)
    asked = {"train": "new", "loss": "tokens", "learning_rate": highest}
    trained = place.heal(cluster=cluster, windows_WT=AGAIN, **asked)
    model = real(place)
    new = [model.model.layers[at].requires_grad_() for at in PLACES]
    adam = torch.optim.Adam([p for one in new for p in one.parameters()], betas=(0.9, 0.95))
    held = [cross_entropy(model, HELD).item()]
    for step, ids_BT in enumerate(AGAIN.split(BATCH)):
        adam.param_groups[0]["lr"] = rate(step, highest)
        adam.zero_grad()
        cross_entropy(model, ids_BT).backward()
        adam.step()
        held.append(cross_entropy(model, HELD).item())
    assert trained.held_out == pytest.approx(held, rel=1e-4)
    assert min(held) == held[-1] < held[0], "or it is not the last state that is kept"
    depth = len(place.dense)
    assert [*trained.saved.blocks] == [depth, depth + 1]
    for number, block in zip(trained.saved.blocks, new, strict=True):
        for name, value in read_tensors(trained.saved.blocks[number].weights).items():
            # As in `test_healing`: Adam makes much of gradients that are little more than rounding.
            assert (value - block.get_parameter(name)).abs().mean() < 2e-2 * highest, name


def test_a_run_leaves_the_old_blocks_and_goes_on_where_it_was_stopped(
    desk: Desk, tmp_path: Path
) -> None:
    (one,) = compress(recipe(desk, **changes(desk, DUS) | NEW), Watching())
    card = (Path(one.uri) / "README.md").read_text()
    assert "then the new blocks alone trained on the next tokens of text" in card
    dense = load_model(desk.model).state_dict()
    tensors = load_file(Path(one.uri) / "model.safetensors")
    for place, number in enumerate(one.manifest["kept"]):
        for name in (n for n in tensors if n.startswith(f"model.layers.{place}.")):
            old = dense[name.replace(f".{place}.", f".{number}.", 1)]
            assert place in (4, 5) or torch.equal(tensors[name], old), name
    for place, number in ((4, 2), (5, 3)):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert not torch.equal(tensors[name.format(place)], dense[name.format(number)])
    expected = published(desk)
    desk.out.rename(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk, DUS) | NEW), Stopped("a part"))
    compress(recipe(desk, **changes(desk, DUS) | NEW), Watching())
    assert published(desk) == expected


def test_fewer_masters_than_of_all_blocks(desk: Desk) -> None:
    every, new = (recipe(desk, **changes(desk, TLI) | more) for more in ({}, NEW))
    dense = plan(every, Display()).model.stack
    needed = [healing_bytes(asked, dense, torch.float32, 7) for asked in (new, every)]
    assert needed[0] < needed[1]
    flops = [
        next(s for s in plan(asked, Display()).cost.stages if s.name == "healing").flops
        for asked in (new, every)
    ]
    assert flops[0] < flops[1]


@pytest.mark.parametrize(
    ("method", "heal", "key", "problem"),
    [
        ({"method": "mi"}, {"train": "new"}, "heal.train", "puts in no new blocks"),
        (TLI, {"share": 2}, "heal.share", "learn what their originals do not"),
        (
            {"method": "dus", "depth": "+40%", "sparsity": []},
            {"share": 2},
            "heal.share",
            "learn what their originals do not",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    desk: Desk, method: dict[str, Any], heal: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        Recipe.parse(desk.recipe(**method, heal=HEAL | heal))
    assert caught.value.key == key
