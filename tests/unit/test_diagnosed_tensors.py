"""Tensors that went wrong in common ways (saved empty by ZeRO-3, quantized, under wrapped names,
with layers or adapters too many): the message says what they are and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from desk import Desk
from mistakes import Bad, check, table
from safetensors.torch import load_file, save_file
from spoilt import SINGLE, configured, model
from spoilt_weights import tensors


def renamed(change: Callable[[str], str]) -> Callable[[Desk], object]:
    def spoil(desk: Desk) -> None:
        held = load_file(desk.model / SINGLE)
        save_file({change(name): value for name, value in held.items()}, desk.model / SINGLE)

    return spoil


def quantized(name: str, **added: torch.Tensor) -> Callable[[Desk], object]:
    """The weight of every linear layer is in other tensors, beside it or in its place."""

    def spoil(held: dict[str, torch.Tensor]) -> None:
        for key in [key for key in held if key.endswith("proj.weight")]:
            kept = held.pop(key)
            if name == "weight":
                held[key] = kept
            held |= {key.replace("weight", more): value.clone() for more, value in added.items()}

    return tensors(spoil)


def mlx(desk: Desk) -> None:
    configured(quantization={"group_size": 32, "bits": 4})(desk)
    tensors(
        lambda held: held.update(
            {k: torch.zeros(len(v), 4, dtype=torch.uint32) for k, v in held.items() if v.dim() == 2}
        )
    )(desk)


def packed(desk: Desk) -> None:
    """As MLX packs them, but without a word in config.json."""
    tensors(
        lambda held: held.update(
            {k: torch.zeros(len(v), 4, dtype=torch.uint32) for k, v in held.items() if v.dim() == 2}
        )
    )(desk)


def unmerged(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.endswith("q_proj.weight")]:
        held[name.replace("weight", "base_layer.weight")] = held.pop(name)
        held |= {name.replace("weight", f"lora_{half}.weight"): torch.zeros(2, 2) for half in "AB"}


def another_layer(held: dict[str, torch.Tensor]) -> None:
    held.update(
        {
            name.replace("layers.4.", "layers.5."): value.clone()
            for name, value in held.items()
            if "layers.4." in name
        }
    )


def prediction_layer(held: dict[str, torch.Tensor]) -> None:
    another_layer(held)
    held["model.layers.5.eh_proj.weight"] = torch.zeros(32, 64)


WRAPPED, INNER = "wrapped: ", "save the model inside|rename"
DIAGNOSES = [
    model(
        "zero-3",
        tensors(lambda held: held.update({n: torch.empty(0) for n in held})),
        "",
        "saved empty",
        "ZeRO-3.*gather",
    ),
    model(
        "zero-3-one",
        tensors(lambda held: held.update({"lm_head.weight": torch.empty(0)})),
        "lm_head",
        "saved empty",
        "ZeRO",
    ),
    model("mlx", mlx, "llama", r"quantized checkpoint \(MLX\)", "original dtype"),
    model("mlx-unsaid", packed, "weight", "stored as U32", "original dtype"),
    model(
        "compressed",
        configured(compression_config={"format": "int"}),
        "llama",
        "quantized",
        "original dtype",
    ),
    model(
        "gptq-unsaid",
        quantized("", qweight=torch.zeros(4, 32, dtype=torch.int32), scales=torch.ones(1, 32)),
        "",
        "quantized weights",
        "original dtype",
    ),
    model(
        "fp8-unsaid",
        quantized("weight", weight_scale_inv=torch.ones(1)),
        "",
        "quantized weights",
        "original dtype",
    ),
    model(
        "a-layer-more",
        tensors(another_layer),
        "layers.5",
        "6 blocks, its config.json says 5.*MTP",
        "take the tensors",
    ),
    model(
        "prediction-layer",
        tensors(prediction_layer),
        "layers.5",
        "6 blocks.*MTP",
        "take the tensors",
    ),
    model(
        "value-head",
        renamed(lambda n: f"pretrained_model.{n}"),
        "pretrained",
        f"{WRAPPED}pretrained_model",
        INNER,
    ),
    model("data-parallel", renamed(lambda n: f"module.{n}"), "module", f"{WRAPPED}module", INNER),
    model(
        "compiled", renamed(lambda n: f"_orig_mod.{n}"), "_orig_mod", f"{WRAPPED}_orig_mod", INNER
    ),
    model(
        "peft",
        renamed(lambda n: f"base_model.model.{n}"),
        "base_model",
        f"{WRAPPED}base_model",
        INNER,
    ),
    model("lora-unmerged", tensors(unmerged), "lora_A", "adapter are among", "merge_and_unload"),
    model(
        "both",
        renamed(lambda n: f"module._orig_mod.{n}"),
        "module",
        f"{WRAPPED}module._orig_mod",
        INNER,
    ),
    model(
        "compiled-blocks",
        renamed(lambda n: n.replace(".mlp.", "._orig_mod.mlp.")),
        "_orig_mod",
        f"{WRAPPED}_orig_mod",
        INNER,
    ),
]


@table(DIAGNOSES)
def test_diagnoses(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
