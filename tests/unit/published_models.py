"""Tiny models without some of their blocks, published and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from desk import add_tokenizer
from models import open_stack, token_windows

from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.publish import Published, publish

Tensors = dict[str, torch.Tensor]
REMOVED, KEPT = [3, 0], [1, 2, 4]
"""What is left has other attention types, in order, than the first three blocks of the models that
mix them."""
IDS = token_windows(2, 9)
FACTS: dict[str, Any] = {
    "method": "mi",
    "sparsity": 0.4,
    "recipe": {"sparsity": [0.4], "method": "mi", "importance": {"metric": "mi"}},
    "removed": REMOVED,
    "rounds": [{"removed": 3}, {"removed": 0}],
    "perplexity": {"held-out": {"dense": 10.5, "dropped": 12.25, "fused": 11.75, "length": 9}},
}


def shortened(dense: Stack) -> Stack:
    return dense.drop(*REMOVED)


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


def same_logits(a: tf.PreTrainedModel, b: tf.PreTrainedModel, **inputs: torch.Tensor) -> bool:
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        return torch.equal(a(**inputs).logits, b(**inputs).logits)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
