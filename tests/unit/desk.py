"""A user's folder: a tiny model with a tokenizer, texts in its words, and a recipe."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from models import VOCAB
from words import SPECIAL, add_tokenizer

LENGTH = 12
"""Tokens a window."""


def text_of(ids: torch.Tensor) -> str:
    """The text that the tokenizer above turns into these tokens, ten words a line."""
    words = [f"w{number}" for number in ids.tolist()]
    return (
        "\n".join(" ".join(words[first : first + 10]) for first in range(0, len(words), 10)) + "\n"
    )


def random_text(tokens: int, seed: int) -> str:
    return text_of(
        torch.randint(len(SPECIAL), VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))
    )


@dataclass(frozen=True)
class Desk:
    """A user's folder: a tiny model with a tokenizer, two texts, and a recipe that makes the
    model shallower.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, checkpoint: Path) -> Desk:
        shutil.copytree(checkpoint, folder / "model")
        add_tokenizer(folder / "model")
        (folder / "calibration.txt").write_text(random_text(200, seed=1))
        (folder / "heldout.txt").write_text(random_text(5 * LENGTH + 7, seed=2))
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.txt"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """The recipe, with whole sections or keys replaced."""
        return {
            "model": {"source": str(self.model)},
            "preset": "rounds",
            "sparsity": 0.4,
            "calibration": {
                "data": str(self.folder / "calibration.txt"),
                "windows": 8,
                "length": LENGTH,
            },
            "importance": {"windows": 4, "batch": 2},
            # What was learned is saved as well, so that more files can be damaged.
            "fusion": {"group_size": 3, "rank": 2, "lora_rank": 2, "epochs": 2, "batch": 4}
            | {"fold": "at_end"},
            "cluster": {"engine": "local"},
            "output": {"uri": str(self.out), "name": "demo", "report": False, "samples": []},
        } | changes

    def write(self, **changes: Any) -> str:
        """Write the recipe; returns the file's path."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe(**changes)))
        return str(path)
