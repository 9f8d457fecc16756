"""Tensors that are not those of the configuration: of another dtype or shape, missing, or
too many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from desk import Desk
from mistakes import Bad, check, table
from spoilt import configured, model
from spoilt_weights import tensors

NAME, BIAS = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.bias"


def changed(value: torch.Tensor, name: str = NAME) -> Callable[[Desk], object]:
    """Another tensor of this name, or one more."""
    return tensors(lambda held: held.update({name: value}))


WEIGHTS = [
    model(
        "whole-numbers",
        tensors(lambda held: held.update({NAME: held[NAME].long()})),
        NAME,
        "stored as I64",
        "original dtype",
    ),
    model(
        "yes-and-no",
        tensors(lambda held: held.update({NAME: held[NAME] > 0})),
        NAME,
        "stored as BOOL",
        "original dtype",
    ),
    model(
        "float8",
        tensors(lambda held: held.update({NAME: held[NAME].to(torch.float8_e4m3fn)})),
        NAME,
        "stored as F8_E4M3",
        "dtype",
    ),
    model(
        "an-empty-tensor",
        changed(torch.zeros(0, 32)),
        NAME,
        r"saved empty.*\[0, 32\].*\[48, 32\]",
        "ZeRO-3",
    ),
    model(
        "a-tensor-too-many",
        changed(torch.zeros(2), "more"),
        "more",
        "1 tensors that .* not use",
        "belongs",
    ),
    model("biases", changed(torch.zeros(48), BIAS), BIAS, "1 tensors that .* not use", "belongs"),
    model(
        "no-tensor",
        tensors(lambda held: held.pop(NAME)),
        NAME,
        "lacks 1 tensors",
        "download it again",
    ),
    model(
        "no-head",
        tensors(lambda held: held.pop("lm_head.weight")),
        "lm_head.weight",
        "lacks 1 tensors",
        "download it again",
    ),
    model(
        "wrong-shape",
        tensors(lambda held: held.update({NAME: torch.zeros(2, 3)})),
        NAME,
        r"\[2, 3\].*\[48, 32\]",
        "config.json",
    ),
    model(
        "more-blocks-in-config",
        configured(num_hidden_layers=7),
        "model.layers.5",
        "lacks 18 tensors",
        "again",
    ),
    model(
        "fewer-blocks-in-config",
        configured(num_hidden_layers=4),
        "model.layers.4",
        "5 blocks, its config.json says 4.*MTP",
        "of these weights",
    ),
]


@table(WEIGHTS)
def test_weights(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
