"""Published models against transformers itself: plain `from_pretrained` must give the dense model
without the dropped blocks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from desk import add_tokenizer
from models import (
    DEPTH,
    MODELS,
    VOCAB,
    load_model,
    open_stack,
    rewrite,
    token_windows,
    without_blocks,
)
from safetensors.torch import load_file, save_file

from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.publishing.publish import Published, publish
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, read_header

REMOVED, KEPT = [3, 0], [1, 2, 4]
"""What is left has other attention types, in order, than the first three blocks of the models that
mix them."""
IDS = token_windows(2, 9)
FACTS: dict[str, Any] = {
    "method": "mi",
    "sparsity": 0.4,
    "recipe": {"sparsity": [0.4], "method": "mi"},
    "removed": REMOVED,
    "rounds": [{"removed": 3}, {"removed": 0}],
    "perplexity": {"held-out": {"dense": 10.5, "dropped": 12.25, "fused": 11.75, "length": 9}},
}
TIED = {"llama-tied", "gpt2", "gemma3", "opt", "falcon"}
"""The tiny models whose head is their embedding."""


def shortened(dense: Stack) -> Stack:
    stack = dense
    for block in REMOVED:
        stack = stack.drop(block)
    return stack


def published(
    source: Path, out: Path, shard_bytes: int = 10**9, stack: Stack | None = None
) -> Published:
    """The checkpoint in `source` without the blocks `REMOVED`, in the folder `out`."""
    dense = open_stack(source)
    return publish(
        str(out),
        stack or shortened(dense),
        dense,
        Source.find(str(source), None),
        shard_bytes,
        FACTS,
    )


def load(folder: Path) -> tf.PreTrainedModel:
    """By the plain Auto class, in the checkpoint's own dtype, nothing missing or left over."""
    auto = tf.AutoModelForImageTextToText if is_llava(folder) else tf.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    return model.eval()


def is_llava(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "llava"


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


def same_logits(a: tf.PreTrainedModel, b: tf.PreTrainedModel, **inputs: torch.Tensor) -> bool:
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        return torch.equal(a(**inputs).logits, b(**inputs).logits)


# --- every architecture ---


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


Tensors = dict[str, torch.Tensor]


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


# --- weights and files ---


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


TAKEN_ALONG = {
    "LICENSE": "do as you like",
    "NOTICE": "thanks",
    "USE_POLICY.md": "but be kind",
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}',
    "processor_config.json": '{"processor_class": "LlavaProcessor", "patch_size": 4}',
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b",
    "tokenizer.model": "sentencepiece",
    "special_tokens_map.json": "{}",
}
LEFT_BEHIND = {
    "modeling_own.py": "raise SystemExit",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin.index.json": "{}",
    "training_args.bin": "pickle",
    "consolidated.00.pth": "pickle",
    "model.gguf": "GGUF",
    "README.md": "the source's own card",
    MANIFEST: '{"files": {}}',
    ".gitattributes": "*",
}


def dressed(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint with all that lies beside weights on the hub."""
    shutil.copytree(folder, out)
    add_tokenizer(out)
    for name, text in {**TAKEN_ALONG, **LEFT_BEHIND}.items():
        (out / name).write_text(text)
    (out / "original").mkdir()
    (out / "original/params.json").write_text("{}")
    return out


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


# --- the manifest and the card ---


def test_the_manifest_tells_the_truth_about_every_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = dressed(checkpoint("llama"), tmp_path / "source")
    result = published(source, tmp_path / "out", shard_bytes=25_000)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert result == Published(str(tmp_path / "out"), manifest)
    there = {
        file.name: file.read_bytes()
        for file in (tmp_path / "out").iterdir()
        if file.name != MANIFEST
    }
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in there.items()
    }
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert (manifest["dense_blocks"], manifest["kept"]) == (DEPTH, KEPT)
    assert manifest["source"] == {"name": str(source), "revision": None, "on_hub": False}
    assert {name: manifest["versions"][name] for name in ("torch", "transformers")} == {
        name: version(name) for name in ("torch", "transformers")
    }


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's front matter and the rest."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_tells_the_truth(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published(checkpoint("llama"), tmp_path / "demo-p40")
    front, body = card_of(tmp_path / "demo-p40")
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert "# demo-p40\n" in body
    assert (
        f"{checkpoint('llama')} with 2 of its 5 decoder blocks removed: "
        "blocks with the lowest Macro Influence dropped" in body
    )
    assert "in order (numbers in the dense model): 3, 0." in body
    assert "| held-out (9 tokens a window) | 10.50 | 12.25 | 11.75 |" in body
    (recipe,) = re.findall(r"```json\n(.*?)```", body, re.DOTALL)
    assert json.loads(recipe) == FACTS["recipe"]


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_the_cards_python_runs(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = dressed(checkpoint(name), tmp_path / "source")
    published(source, tmp_path / "out")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(code.replace("<this folder>", str(tmp_path / "out")), names)
    assert same_logits(names["model"].eval(), load(tmp_path / "out"))


def test_a_hub_model_is_named_as_the_base(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = open_stack(checkpoint("llama"))
    source = Source("some-lab/tiny", "v1.0", str(checkpoint("llama")))
    publish(str(tmp_path / "out"), shortened(dense), dense, source, 10**9, FACTS)
    front, body = card_of(tmp_path / "out")
    assert front["base_model"] == "some-lab/tiny" and "some-lab/tiny (revision v1.0) with 2" in body


def test_a_local_folder_is_not_taken_for_a_hub_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "models/llama")
    monkeypatch.chdir(tmp_path)
    dense = open_stack(Path("models/llama"))
    publish("out", shortened(dense), dense, Source.find("models/llama", None), 10**9, FACTS)
    assert "base_model" not in card_of(Path("out"))[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_manifest_is_written_last(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published(
        dressed(checkpoint("llama"), tmp_path / "source"), tmp_path / "out", shard_bytes=25_000
    )
    written = {file.name: os.stat(file).st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert max(written.values()) == written.pop(MANIFEST) and written

    (tmp_path / "failed/README.md").mkdir(
        parents=True
    )  # the last file before the manifest cannot be written
    with pytest.raises(OSError, match=r"README\.md"):
        published(checkpoint("llama"), tmp_path / "failed")
    assert (tmp_path / "failed" / SINGLE).exists() and not (tmp_path / "failed" / MANIFEST).exists()


def test_a_source_that_vanishes_leaves_no_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("llama-sharded"), tmp_path / "source")
    dense = open_stack(tmp_path / "source")
    gone = max((tmp_path / "source").glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        publish(
            str(tmp_path / "out"),
            dense,
            dense,
            Source.find(str(tmp_path / "source"), None),
            10**9,
            FACTS,
        )
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("removed", [REMOVED, [1]], ids=["the-same-model", "another-model"])
def test_a_finished_model_is_never_overwritten(
    removed: Sequence[int], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    published(checkpoint("llama"), tmp_path / "out")
    before = contents(tmp_path / "out")
    stack = open_stack(checkpoint("llama"))
    for block in removed:
        stack = stack.drop(block)
    with pytest.raises(FileExistsError):
        published(checkpoint("llama"), tmp_path / "out", stack=stack)
    changed = [
        name for name, data in contents(tmp_path / "out").items() if before.get(name) != data
    ]
    assert changed == []


def test_an_unfinished_model_is_written_again(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    first = published(checkpoint("llama"), tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    (tmp_path / "out" / SINGLE).write_bytes(b"half")
    again = published(checkpoint("llama"), tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name: data for name, data in after.items() if before[name] != data}.keys() <= {MANIFEST}
    took = again.manifest["publishing"]  # all of it that may differ
    assert again.manifest == first.manifest | {"publishing": took}
