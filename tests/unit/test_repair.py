"""A gap repaired in closed form, against the real model's own forward pass and torch's least
squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backwards import Backwards
from models import (
    MODELS,
    hidden_states,
    load_model,
    open_stack,
    rewrite,
    token_windows,
    without_blocks,
)
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion import added
from fusegpt_ray.fusion.compensation import fitted_windows, last_linears, split
from fusegpt_ray.fusion.least_squares import GRID
from fusegpt_ray.fusion.repair import Repair, Repaired
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Calibration, Importance
from fusegpt_ray.text.mixture import calibration_windows
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

WINDOWS, LENGTH, BATCH = 32, 7, 2
FITTED = WINDOWS * 7 // 8
IDS = token_windows(WINDOWS, LENGTH)
LAYERS = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "lfm2": "feed_forward.w2"}
DONOR = 2


def repair(
    folder: Path,
    out: Path,
    way: Any = "linear",
    donor: int = DONOR,
    kind: type[LocalWorkers] = LocalWorkers,
    stack: Stack | None = None,
    ids: torch.Tensor = IDS,
    place_WT: np.ndarray | None = None,
    **cluster: Any,
) -> Repaired:
    dense = open_stack(folder)
    setup = Setup(
        Source.find(str(folder), None),
        dense,
        Cluster(engine="local", **cluster),
        importance=Importance(batch=BATCH),
    )
    with kind(setup) as workers:
        return Repair(stack or dense, donor, way, str(out)).on(workers, ids.numpy(), place_WT)


def seen(
    model: Any, name: str, layer: nn.Module, ids: torch.Tensor = IDS
) -> tuple[torch.Tensor, ...]:
    """Of the real model: what the layer is given and gives, [W, T, …], and the states."""
    kept: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, given, out: kept.extend([given[0], out]))
    states = hidden_states(model, name, ids)
    hook.remove()
    h, m = (value.reshape(*ids.shape, -1).double() for value in kept)
    return h, m, torch.stack(states).double()


def least_squares(x: torch.Tensor, y: torch.Tensor, ridge: float, ones: bool) -> torch.Tensor:
    """[F (+ 1), K]; λ as rows of their own, which the column of ones does not have."""
    square = (x - x.mean(0) if ones else x).square().sum()
    penalty = math.sqrt(ridge * float(square) / x.shape[1]) * torch.eye(x.shape[1]).double()
    rows = torch.cat([x, penalty])
    if ones:
        rows = torch.cat([rows, (torch.arange(len(rows)) < len(x)).double()[:, None]], 1)
    aims = torch.cat([y, y.new_zeros(len(penalty), y.shape[1])])
    return torch.linalg.lstsq(rows, aims).solution


@pytest.mark.parametrize("way", ["linear", "matrix", "scale"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_repair_is_what_the_formula_says(
    name: str, way: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    found = repair(checkpoint(name), tmp_path, way)
    model = load_model(checkpoint(name))
    blocks = model.get_submodule(MODELS[name].blocks)
    layer = blocks[DONOR - 1].get_submodule(LAYERS[name])
    h, m, states = seen(model, name, layer)
    delta = states[DONOR + 1] - states[DONOR]
    x, y = {"linear": (h, delta), "matrix": (m, delta)}.get(way, (m[..., None], delta[..., None]))
    ones = way == "linear" and layer.bias is not None

    def predicted(ridge: float) -> torch.Tensor:
        """Of what the block adds, [W, T, D]."""
        fitted = (value[:FITTED].reshape(-1, value.shape[-1]) for value in (x, y))
        w = least_squares(*fitted, ridge, ones)
        return (x @ w[:-1] + w[-1] if ones else x @ w).reshape(delta.shape)

    errors = {ridge: float((predicted(ridge) - delta)[FITTED:].square().sum()) for ridge in GRID}
    nothing = float(delta[FITTED:].square().sum())
    if found.block is None:
        assert (name, way) == ("lfm2", "scale") and min(errors.values()) >= nothing
        assert "every fit is worse than none" in found.in_words()
        return
    assert found.layer == LAYERS[name]
    assert errors[found.ridge] == pytest.approx(min(errors.values()), rel=1e-6)
    assert found.left == pytest.approx(errors[found.ridge] / nothing, rel=1e-4)

    # The repaired block in the real model without the removed one, by its own forward pass.
    (file,) = found.files
    tensors = load_file(file)
    kinds = {"weight", "bias"} if layer.bias is not None else {"weight"}
    assert tensors.keys() == {f"{LAYERS[name]}.{kind}" for kind in kinds}
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    short = without_blocks(model, name, [i for i in range(len(blocks)) if i != DONOR])
    repaired = short.get_submodule(MODELS[name].blocks)[DONOR - 1]
    assert not repaired.load_state_dict(tensors, strict=False).unexpected_keys
    after = hidden_states(short, name, IDS)[DONOR].double()
    wanted = states[DONOR] + predicted(found.ridge)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)

    # Closer to what the block gave, on the windows that were fitted and on those that were not.
    for part in (slice(FITTED), slice(FITTED, None)):
        left, dropped = ((h - states[DONOR + 1])[part].norm() for h in (after, states[DONOR]))
        assert left < dropped


def overlapping(tokens: int) -> Windows:
    """Windows at random places of a short text."""
    text = token_windows(1, tokens)[0].numpy()
    settings = Calibration(data="a.txt", windows=WINDOWS, length=LENGTH, seed=3)
    return calibration_windows([lambda: [text]], settings, None, "calibration")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_that_is_held_out_is_fitted(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Windows of a text of 150 tokens overlap."""
    drawn = overlapping(150)
    ids, place_WT = torch.from_numpy(drawn.tokens_WT), drawn.place_WT
    held = {place for row in place_WT[FITTED:].tolist() for place in row}
    alone = torch.tensor([[place not in held for place in row] for row in place_WT.tolist()])
    assert 20 < (~alone[:FITTED]).sum() < 100, "of 196 tokens"
    found = repair(checkpoint(name), tmp_path / "one", "matrix", ids=ids, place_WT=place_WT)

    model = load_model(checkpoint(name))
    layer = model.get_submodule(MODELS[name].blocks)[DONOR - 1].get_submodule(LAYERS[name])
    _, m, states = seen(model, name, layer, ids)
    delta = states[DONOR + 1] - states[DONOR]

    def left(ridge: float, fitted: torch.Tensor) -> float:
        w = least_squares(m[:FITTED][fitted], delta[:FITTED][fitted], ridge, False)
        return float((m @ w - delta)[FITTED:].square().sum() / delta[FITTED:].square().sum())

    honest = {ridge: left(ridge, alone[:FITTED]) for ridge in GRID}
    seen_too = min(left(ridge, torch.ones_like(alone[:FITTED])) for ridge in GRID)
    best = min(honest, key=lambda ridge: honest[ridge])
    assert honest[best] < 1 and found.ridge == best
    assert found.left == pytest.approx(honest[best], rel=1e-4) and seen_too < 0.98 * honest[best]

    where = tmp_path / "several"
    given = {"ids": ids, "place_WT": place_WT, "kind": Backwards, "weights": "streamed"}
    several = repair(checkpoint(name), where, "matrix", **given)
    assert [*several.files.values()] == [*found.files.values()]
    assert several.to_record() == found.to_record()


def test_too_short_a_text_is_told(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """32 windows of 7 tokens are 224, but of a text of 60 fewer than the 48 inputs are left."""
    drawn = overlapping(60)
    given = {"ids": torch.from_numpy(drawn.tokens_WT), "place_WT": drawn.place_WT}
    found = repair(checkpoint("llama"), tmp_path, **given)
    place_WT = drawn.place_WT
    left = len({*place_WT[:FITTED].flatten().tolist()} - {*place_WT[FITTED:].flatten().tolist()})
    assert found.block is None and not found.files
    assert (
        f"linear has 48 unknowns for each output, and beside the windows that are held out the"
        f" text has {left} different tokens" in found.in_words()
    )
    assert repair(checkpoint("llama"), tmp_path, "scale", **given).in_words()


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_replicas_and_their_order_change_no_bit(
    weights: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    one = repair(checkpoint("gpt2"), tmp_path / "one")
    several = repair(checkpoint("gpt2"), tmp_path / "several", kind=Backwards, weights=weights)
    ((_, record),), ((_, other),) = one.files.items(), several.files.items()
    assert record == other
    assert one.to_record() == several.to_record()
    dense = open_stack(checkpoint("gpt2"))
    walked = sum(
        ref.end - ref.begin for b in dense.blocks[: DONOR + 1] for ref in b.weights.values()
    )
    if weights == "streamed":
        assert several.bytes_read == 3 * walked, "each replica reads once, whatever the pieces"


def test_the_first_block_has_none_before_it(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = open_stack(checkpoint("llama"))
    for stack, donor in ((dense, 0), (dense.drop(0), 1)):
        found = repair(checkpoint("llama"), tmp_path, donor=donor, stack=stack)
        assert (found.block, found.files) == (None, {})
        assert found.in_words() == f"nothing repaired: no block is left before block {donor}"
    # The gap of the second block is that of the first that is left.
    assert repair(checkpoint("llama"), tmp_path, donor=2, stack=dense.drop(1)).block.dense == 0


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_the_gap_after_the_first_block(
    weights: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    found = repair(checkpoint("llama"), tmp_path, donor=1, weights=weights)
    assert found.block is not None and found.block.dense == 0 and found.left < 1


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "falcon"])
def test_a_layer_counts_if_the_states_are_its_sum(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A norm follows Gemma's; attention and MLP of the others are added side by side."""
    found = repair(checkpoint(name), tmp_path)
    if name == "gemma3":
        assert found.block is None and not found.files
        assert "ends in no linear layer" in found.in_words()
    else:
        assert found.block is not None and found.left < 1


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_is_known_before_a_weight_is_read(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    config = open_stack(checkpoint(name)).config
    layers = last_linears(observe(config).calls)
    assert list(layers) == list(range(5))
    for layer in layers.values():
        assert isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_meta


@pytest.mark.parametrize(
    ("windows", "batch", "expected"),
    [
        (64, 4, [8] * 8),
        (16, 2, [2] * 8),
        (15, 2, [2] * 7 + [1]),
        (9, 1, [1] * 7 + [2]),
        (20, 2, [2, 2, 2, 4, 2, 2, 2, 4]),
        (5, 4, [4, 1]),
        (4, 4, [4]),
    ],
)
def test_pieces_are_whole_batches(windows: int, batch: int, expected: list[int]) -> None:
    assert split(windows, batch) == expected
    assert fitted_windows(windows, batch) == windows - expected[-1] * (len(expected) > 0)


def test_memory_that_runs_out_halves_the_batch(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, batch = repair(checkpoint("llama"), tmp_path / "whole"), added._batch

    def cramped(*arguments: Any) -> Any:
        if len(arguments[-1]) > 1:
            raise MemoryError("as if")
        return batch(*arguments)

    monkeypatch.setattr(added, "_batch", cramped)
    halved = repair(checkpoint("llama"), tmp_path / "halved")
    assert (whole.batch_size, halved.batch_size) == (2, 1)
    ((one, _),), ((other, _),) = whole.files.items(), halved.files.items()
    torch.testing.assert_close(load_file(one), load_file(other), rtol=1e-3, atol=1e-4)


def test_states_that_are_not_finite_end_the_repair(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"model.layers.{DONOR}.mlp.up_proj.weight"][0, 0] = math.nan
        return tensors

    spoilt = rewrite(checkpoint("llama"), tmp_path / "spoilt", spoil)
    with pytest.raises(FloatingPointError):
        repair(spoilt, tmp_path / "out")
    assert not (tmp_path / "out").exists()
