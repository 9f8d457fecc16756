"""A tiny model with its own words, texts in them, and a recipe that makes it shallower in
seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from models import GROUPED, randomize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

BLOCKS = 8
WORDS = [
    a + b
    for a in ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "sa")
    for b in ("ba", "de", "fi", "go", "lu", "ma")
]
SETTINGS: dict[str, Any] = {
    "preset": "rounds",
    "sparsity": [0.125, 0.25],  # one and two of the eight blocks
    "calibration": {"windows": 16, "length": 24},
    "evaluation": {"heldout": {"length": 32}},
    "importance": {"windows": 8, "batch": 2},
    # Rates at which a few steps change the tiny model visibly.
    "fusion": {
        "group_size": 3,
        "rank": 4,
        "lora_rank": 4,
        "epochs": 3,
        "batch": 4,
        "learning_rate": 0.02,
        "lora_learning_rate": 0.01,
    },
    "cluster": {"engine": "local"},
}


@dataclass(frozen=True)
class Material:
    """A tiny model in float32 and in bfloat16, with texts for it."""

    model: Path
    model_bf16: Path
    calibration: Path
    heldout: Path

    def recipe(self, output: Path | str, **changes: Any) -> dict[str, Any]:
        """A recipe as in its YAML file; `changes` replace values, and within sections the keys
        they name.
        """
        files = {
            "model": {"source": str(self.model)},
            "calibration": {"data": str(self.calibration)},
            "evaluation": {"heldout": {"data": str(self.heldout)}},
            # Text samples and reports take longer than all else; tests of them ask for them.
            "output": {"uri": str(output), "name": "tiny", "report": False, "samples": []},
        }
        return _merge(_merge(SETTINGS, files), changes)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    both = {
        key: _merge(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }
    return {**base, **both}


def make_material(folder: Path) -> Material:
    calibration, heldout = folder / "calibration.txt", folder / "heldout.txt"
    calibration.write_text(_text(words=2000, seed=1))
    heldout.write_text(_text(words=240, seed=2))
    return Material(
        _model(folder / "float32", torch.float32),
        _model(folder / "bfloat16", torch.bfloat16),
        calibration,
        heldout,
    )


def _model(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(**GROUPED | {"num_hidden_layers": BLOCKS}, tie_word_embeddings=False)
    )
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    words = Tokenizer(
        WordLevel(
            {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *WORDS])},
            unk_token="<unk>",
        )
    )
    words.pre_tokenizer = Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def _text(words: int, seed: int) -> str:
    """Sentences, a line each, in which a word is often followed by one of its two successors."""
    draw = random.Random(seed)
    said, word = [], 0
    for n in range(words):
        word = (
            (3 * word + draw.choice([1, 2])) % len(WORDS)
            if draw.random() < 0.8
            else draw.randrange(len(WORDS))
        )
        said.append(WORDS[word] + (" .\n" if n % 12 == 11 else " "))
    return "".join(said)
