"""The methods to compare with choose as their papers say, by whole forward passes of the real
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backwards import Backwards
from desk import Desk
from infirmary import TRAINED, Infirmary
from models import load_model, without_blocks
from stopped_runs import Watching, published, recipe
from test_tournament import workers
from torch.nn.functional import cosine_similarity, cross_entropy

from fusegpt_ray.errors import UserError
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.angular import angular_distance
from fusegpt_ray.methods.base import Question
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers


@pytest.fixture(name="infirmary")
def _infirmary(checkpoint: Callable[[str], Path], tmp_path: Path) -> Infirmary:
    return Infirmary("llama", checkpoint("llama"), tmp_path)


def removed(place: Infirmary, method: str, count: int, seed: int = 0, **more: Any) -> list[int]:
    """The blocks that a method removes, round after round."""
    settings, stack, last = Importance(windows=len(TRAINED), batch=4, **more), place.dense, None
    gone: list[int] = []
    with workers(place) as here:
        while len(gone) < count:
            left = count - len(gone)
            asked = Question(here, stack, TRAINED.numpy(), settings, seed, left, last)
            last = METHODS[method].choose(asked)
            gone.append(last.lowest)
            stack = stack.drop(last.lowest)
    return gone


def states(place: Infirmary) -> list[torch.Tensor]:
    """That enter each block, and leave the last one: [W, T, D], by transformers."""
    model, last = load_model(place.folder), list[torch.Tensor]()
    place.blocks_of(model)[-1].register_forward_hook(
        lambda _module, _given, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hidden = model(TRAINED, output_hidden_states=True).hidden_states
    return [*hidden[:-1], *last]


def test_shortgpt_takes_the_least_influential_blocks_of_the_dense_model(
    infirmary: Infirmary,
) -> None:
    h = states(infirmary)
    influence = [1 - cosine_similarity(a, b, dim=-1).double().mean().item() for a, b in pairwise(h)]
    expected = sorted(range(len(influence)), key=influence.__getitem__)
    assert removed(infirmary, "shortgpt", 4, metric="bi") == expected[:4]


def test_sleb_takes_the_block_without_which_the_loss_is_lowest(infirmary: Infirmary) -> None:
    expected, depth = list[int](), len(infirmary.dense)
    for _ in range(3):
        losses = {}
        left = [n for n in range(depth) if n not in expected]
        for number in left:
            kept = [n for n in left if n != number]
            model = without_blocks(load_model(infirmary.folder), "llama", kept)
            with torch.no_grad():
                logits = model(TRAINED).logits[:, :-1].flatten(0, 1)
            losses[number] = cross_entropy(logits, TRAINED[:, 1:].flatten()).item()
        expected.append(min(losses, key=losses.__getitem__))
    assert removed(infirmary, "sleb", 3, metric="loss") == expected


def test_angular_takes_the_run_that_turns_the_last_token_least(infirmary: Infirmary) -> None:
    h = [item[:, -1].double() for item in states(infirmary)]
    for count in (1, 2, 3):
        turns = []
        for a, b in zip(h, h[count:], strict=False):
            cosines = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
            turns.append(sum(math.acos(c) / math.pi for c in cosines.tolist()))
        first = min(range(len(turns)), key=turns.__getitem__)
        blocks = removed(infirmary, "angular", count)
        assert sorted(blocks) == list(range(first, first + count))


def test_the_angle_is_that_of_the_last_token_that_counts() -> None:
    entering = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]] * 2)
    leaving = torch.tensor([[[0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]]] * 2)
    assert angular_distance(entering, leaving).tolist() == pytest.approx([0.25, 0.25])
    counted = torch.tensor([[True, False, False], [True, True, False]])
    assert angular_distance(entering, leaving, counted).tolist() == pytest.approx([0.5, 1.0])
    counted[1] = False  # a window of text beside images, where those are what counts
    assert angular_distance(entering, leaving, counted).tolist() == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("method", ["angular", "streamline"])
def test_replicas_and_their_order_change_no_bit(
    method: str, weights: Any, infirmary: Infirmary
) -> None:
    """Of any score. The angles of seven batches are added in the order of these; cosines in float32
    add up exactly in float64, whatever the order, but only of the same batches.
    """
    source, dense = Source.find(str(infirmary.folder), None), infirmary.dense
    windows = np.random.default_rng(0).integers(3, 90, (13, 16)).astype(np.int32)
    settings = Importance(windows=13, batch=2)
    scores = []
    for kind in (LocalWorkers, Backwards):
        cluster = Cluster(engine="local", weights=weights)
        with kind(Setup(source, dense, cluster, importance=settings)) as here:
            asked = Question(here, dense, windows, settings, seed=0, left=2)
            scores.append(METHODS[method].choose(asked).scores)
    assert scores[0] == scores[1] and len({*scores[0].values()}) > 1


def test_last_keeps_the_final_block(infirmary: Infirmary) -> None:
    depth = len(infirmary.dense)
    assert removed(infirmary, "last", 3) == [depth - 2, depth - 3, depth - 4]


def test_random_is_drawn_from_the_seed_and_nested(infirmary: Infirmary) -> None:
    draws = [removed(infirmary, "random", 4, seed=seed) for seed in range(6)]
    assert removed(infirmary, "random", 4, seed=3) == draws[3]
    assert removed(infirmary, "random", 2, seed=3) == draws[3][:2]
    assert len({frozenset(draw) for draw in draws}) > 1


@pytest.mark.parametrize(
    "method", ["random", "last", "shortgpt", "sleb", "angular", "streamline", "foldgpt"]
)
def test_a_stopped_run_ends_with_the_same_bytes(desk: Desk, method: str, tmp_path: Path) -> None:
    asked = {"method": method, "sparsity": 0.6}
    compress(recipe(desk, **asked), Watching())
    expected = published(desk)
    assert len(expected) == 2
    desk.out.rename(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **asked), Watching(3))
    compress(recipe(desk, **asked), Watching())
    assert published(desk) == expected
    assert len(Source.find(str(desk.out / "demo-p60"), None).stack()) == 2


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        (
            {"method": "sleb", "importance": {"windows": 4, "metric": "kl"}},
            "importance.metric",
            "goes by loss",
        ),
        ({"method": "angular", "sparsity": [0.2, 0.4]}, "sparsity", "other blocks for each"),
        ({"method": "random", "heal": {}, "search": {}}, "search", "chooses the blocks itself"),
    ],
)
def test_what_a_method_cannot_do_is_refused(
    desk: Desk, changes: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        Recipe.parse(desk.recipe(**changes))
    assert caught.value.key == key
