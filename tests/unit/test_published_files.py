"""The files of a published model: its shards and their index, and what comes along from the
source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from models import open_stack, rewrite
from published_models import (
    LEFT_BEHIND,
    TAKEN_ALONG,
    Tensors,
    dressed,
    load,
    published,
    same_logits,
    shortened,
)
from safetensors.torch import load_file, save_file

from fusegpt_ray.model.source import MANIFEST
from fusegpt_ray.model.stack import Block
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, read_header


def test_working_blocks_are_cast_to_each_tensors_own_dtype(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def mixed(tensors: Tensors) -> Tensors:
        return {
            name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()
        }

    source = rewrite(checkpoint("llama"), tmp_path / "source", mixed)
    dense = open_stack(source)
    work = {name: torch.randn(ref.shape) for name, ref in dense.blocks[2].weights.items()}
    save_file(work, tmp_path / "work.safetensors")
    block = Block(2, read_header(str(tmp_path / "work.safetensors"), "work"))
    published(source, tmp_path / "out", stack=shortened(dense).swap({2: block}))

    written = load_file(tmp_path / "out" / SINGLE)
    expected = mixed({f"model.layers.1.{name}": value for name, value in work.items()})
    assert {value.dtype for value in expected.values()} == {torch.float32, torch.bfloat16}
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value), name


def test_small_shards_have_an_index(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    limit = 25_000
    published(checkpoint("llama"), tmp_path / "one")
    published(checkpoint("llama"), tmp_path / "many", shard_bytes=limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2 and not (tmp_path / "one" / INDEX).exists()
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert max(sizes) <= limit
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_logits(load(tmp_path / "many"), load(tmp_path / "one"))


def test_one_file_from_a_sharded_source_has_no_index(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    published(checkpoint("llama-sharded"), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*safetensors*")] == [SINGLE]


def test_tokenizer_processor_and_licence_come_along_code_and_pickles_do_not(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = dressed(checkpoint("llava"), tmp_path / "source")
    published(source, tmp_path / "out")
    taken = {*TAKEN_ALONG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == taken | {
        "config.json",
        SINGLE,
        "README.md",
        MANIFEST,
    }
    for name in taken:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert LEFT_BEHIND["README.md"] not in (tmp_path / "out/README.md").read_text()
    words = "w5 w6 w99"
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")(words, add_special_tokens=False)[
        "input_ids"
    ] == [5, 6, 99]
    assert (
        load(tmp_path / "out").generation_config.eos_token_id
        == load(source).generation_config.eos_token_id
    )
