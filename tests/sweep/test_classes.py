"""A dozen classes of the sweep, one of each kind (`make sweep` tries all)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from classes import all_classes
from trial import EXACT, REFUSED, try_class

CLASSES = {
    "BambaForCausalLM": EXACT,  # attention in some blocks, a state space in others
    "BartForCausalLM": EXACT,  # the decoder of an encoder-decoder
    "BloomForCausalLM": EXACT,  # ALiBi, fused query, key and value
    "DbrxForCausalLM": EXACT,  # experts that are run one by one, those that have tokens
    "DeepseekV4ForCausalLM": REFUSED,  # blocks are given the tokens
    "DiffLlamaForCausalLM": EXACT,  # a constant of each block comes of its number
    "Emu3ForCausalLM": EXACT,  # no auto class loads what it writes
    "FalconMambaForCausalLM": EXACT,  # no attention at all
    "GPTNeoXJapaneseForCausalLM": EXACT,  # the last block alone has a bias
    "Gemma3ForConditionalGeneration": EXACT,  # sliding and full attention, images
    "Gemma4ForCausalLM": REFUSED,  # embeddings of each block's own
    "GptOssForCausalLM": EXACT,  # experts whose layout on disk is the model's
    "HYV4ForCausalLM": REFUSED,  # blocks hand on more than states
    "LlavaForConditionalGeneration": EXACT,
    "MuseSparkForConditionalGeneration": EXACT,  # a norm among the experts' own tensors
    "Qwen3NextForCausalLM": EXACT,  # one block of attention, without which it cannot generate
    "BertLMHeadModel": EXACT,  # a decoder, whose blocks lie in what it calls its encoder
    "Qwen4ExpForCausalLM": REFUSED,  # which tokens are attended to is looked at as values
    "Zamba2ForCausalLM": REFUSED,  # several blocks have one set of weights
    "xLSTMForCausalLM": EXACT,  # its depth has a second name
}

REASONS = {"Qwen4ExpForCausalLM": "look at values", "Zamba2ForCausalLM": "share weights"}
"""In the messages of some that are refused."""
FUSED = ("BambaForCausalLM", "GPTNeoXJapaneseForCausalLM", "MuseSparkForConditionalGeneration")
"""Fusing, too: blocks of several kinds, and experts with more than layers. Elsewhere it is tried by
the sweep alone."""


@pytest.mark.parametrize("name", CLASSES)
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    outcomes = try_class(name, tmp_path, fuse=name in FUSED)
    assert outcomes["mi"].kind == CLASSES[name], outcomes["mi"].why
    assert REASONS.get(name, "") in outcomes["mi"].why
    if name in FUSED:
        assert outcomes["fusegpt"].kind == EXACT, outcomes["fusegpt"].why


def test_the_page_has_every_class_once() -> None:
    """It is written by `make sweep`; a class that transformers got is to be swept."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert re.findall(r"^\| (\w+) \| (?!outcome)", page, re.MULTILINE) == all_classes()
