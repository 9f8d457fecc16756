"""What the command should say of a desk's model, by whole forward passes of the real one: true
numbers, in plain lines.
"""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import torch
from desk import LENGTH, Desk
from models import hidden_states, without_blocks
from transformers import PreTrainedModel


def windows_of(desk: Desk, windows: int) -> torch.Tensor:
    """The first calibration windows, as the paper's code draws them."""
    ids = tokens_of(desk.folder / "calibration.txt")
    draw = random.Random(0)
    starts = [draw.randint(0, len(ids) - LENGTH - 1) for _ in range(windows)]
    return torch.stack([ids[start : start + LENGTH] for start in starts])


def tokens_of(text: Path) -> torch.Tensor:
    return torch.tensor([int(word.removeprefix("w")) for word in text.read_text().split()])


def macro_influence(model: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """1 − the mean cosine between what enters the final norm with and without each block, one
    full forward pass each.
    """
    blocks = range(model.config.num_hidden_layers)
    full = hidden_states(model, "llama", ids)[-1].double()
    without = [
        hidden_states(
            without_blocks(model, "llama", [b for b in blocks if b != out]), "llama", ids
        )[-1]
        for out in blocks
    ]
    return [
        1 - torch.cosine_similarity(full, states.double(), dim=-1).mean().item()
        for states in without
    ]


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Path, windows: int | None = None) -> float:
    """exp of the mean of the windows' mean losses; the windows follow each other and the tail
    is left out.
    """
    losses = []
    for window in list(tokens_of(text).split(LENGTH))[:windows]:
        if len(window) == LENGTH:
            logits = model(input_ids=window[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def assert_plain(stderr: str) -> None:
    """Lines of a log file: nothing moves, nothing is coloured."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stderr), stderr
