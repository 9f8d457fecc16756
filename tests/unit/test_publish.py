"""Published models against transformers itself: plain `from_pretrained` must give the dense model
without the dropped blocks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import DEPTH, MODELS, VOCAB, load_model, rewrite, without_blocks
from published_models import IDS, KEPT, Tensors, load, published, same_logits
from safetensors.torch import load_file

from fusegpt_ray.store.checkpoint import SINGLE

TIED = {"llama-tied", "gpt2", "gemma3", "opt", "falcon"}
"""The tiny models whose head is their embedding."""


def in_dtype(name: str, folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """The checkpoint as transformers writes it in another dtype."""
    load_model(folder).to(dtype).save_pretrained(
        out, max_shard_size="20KB" if name == "llama-sharded" else "1GB"
    )
    return out


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {
        name: value.dtype
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16 if number % 2 else torch.float32) for number, name in enumerate(MODELS)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_from_pretrained_gives_the_dense_model_without_the_blocks(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = in_dtype(name, checkpoint(name), tmp_path / "source", dtype)
    published(source, tmp_path / "out")
    dense, model = load(source), load(tmp_path / "out")

    assert len(model.get_submodule(MODELS[name].blocks)) == len(KEPT)
    assert same_logits(model, without_blocks(dense, name, KEPT))
    assert not same_logits(model, dense)
    assert set(dtypes(tmp_path / "out").values()) == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_configuration_in_step(dense.config, model.config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in TIED)
    assert ("lm_head.weight" in dtypes(tmp_path / "out")) == ("lm_head.weight" in dtypes(source))


def assert_configuration_in_step(dense: tf.PretrainedConfig, short: tf.PretrainedConfig) -> None:
    """Lists with one entry a block have lost the removed ones' entries, the depth is right, the
    rest is as it was."""
    before, after = dense.get_text_config().to_dict(), short.get_text_config().to_dict()
    depth = dense.get_text_config().attribute_map.get("num_hidden_layers", "num_hidden_layers")
    expected = {
        key: [value[i] for i in KEPT] if isinstance(value, list) and len(value) == DEPTH else value
        for key, value in before.items()
    } | {depth: len(KEPT)}
    if "full_attn_idxs" in before:  # numbers of blocks, which have moved
        attention = before["full_attn_idxs"]
        expected["full_attn_idxs"] = [new for new, old in enumerate(KEPT) if old in attention]
    assert after == expected | {key: after[key] for key in ("_name_or_path",) if key in after}
    if dense.model_type in ("qwen2", "gemma3_text", "lfm2"):
        assert len(set(before["layer_types"])) == 2, "or the comparison shows little"


def test_the_vision_tower_still_sees(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published(checkpoint("llava"), tmp_path / "out")
    dense, model = load(checkpoint("llava")), load(tmp_path / "out")
    image = torch.full((1, 4), VOCAB - 1)
    ids = torch.cat([IDS[:1, :3], image, IDS[:1, 3:]], dim=1)
    seen, other = ({"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(2))
    assert same_logits(model, without_blocks(dense, "llava", KEPT), **seen)
    assert not torch.equal(model(**seen).logits, model(**other).logits)
    assert model.config.vision_config.num_hidden_layers == DEPTH


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    for old, new in changes:
        assert any(re.match(old, name) for name in tensors), old
        tensors = {re.sub(f"^{old}", new, name): value for name, value in tensors.items()}
    return tensors


def newer_llava(tensors: Tensors) -> Tensors:
    inner = [
        ("vision_tower", "model.vision_tower"),
        ("multi_modal_projector", "model.multi_modal_projector"),
    ]
    heads = [
        (r"language_model\.lm_head", "lm_head"),
        (r"language_model\.model", "model.language_model"),
    ]
    return renamed(tensors, *inner, *heads)


def first_gpt2(tensors: Tensors) -> Tensors:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(DEPTH)}
    return renamed(tensors, (r"transformer\.", "")) | masks


def first_llama(tensors: Tensors) -> Tensors:
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 10000 ** (-torch.arange(4) / 4)
        for i in range(DEPTH)
    }
    return tensors | frequencies


@pytest.mark.parametrize(
    ("name", "change", "first"),
    [
        ("llava", newer_llava, "model.language_model.layers.0."),
        ("gpt2", first_gpt2, "h.0."),
        ("llama", first_llama, "model.layers.0."),
    ],
    ids=["llava-as-in-memory", "gpt2-as-on-the-hub", "llama-with-stored-buffers"],
)
def test_other_names_on_disk(
    name: str,
    change: Callable[[Tensors], Tensors],
    first: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = rewrite(checkpoint(name), tmp_path / "source", change)
    published(source, tmp_path / "out")
    assert same_logits(
        load(tmp_path / "out"), without_blocks(load_model(checkpoint(name)), name, KEPT)
    )
    stored, written = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert any(name.startswith(first) for name in written)
    assert {re.sub(r"\.\d+\.", ".N.", name) for name in written} == {
        re.sub(r"\.\d+\.", ".N.", name) for name in stored
    }


def test_a_list_as_long_as_the_model_is_deep_need_not_be_one_of_the_blocks(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    ends = list(range(2, 2 + DEPTH))
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    published(tmp_path / "source", tmp_path / "out")
    assert load(tmp_path / "out").config.eos_token_id == ends
