"""A tokenizer for tiny models, whose texts are the numbers of their tokens."""

from __future__ import annotations

from pathlib import Path

from models import VOCAB
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def add_tokenizer(folder: Path) -> None:
    """A tokenizer beside a tiny model: the word w17 is token 17."""
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCAB))]
    tokenizer = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
