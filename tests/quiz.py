"""A small task of multiple choice in the words of tiny models, as lm-eval reads it from a
folder, and what plain transformers says of it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import VOCAB
from transformers import PreTrainedModel
from words import SPECIAL

YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
{metrics}
metadata:
  version: 3
"""


@dataclass(frozen=True)
class Quiz:
    """A folder with the file of one task."""

    folder: Path
    name: str
    rows: list[dict[str, Any]]

    @classmethod
    def make(cls, folder: Path, name: str = "quiz", seed: int = 0, *, norm: bool = True) -> Quiz:
        draw = random.Random(seed)

        def words(count: int) -> str:
            return " ".join(f"w{draw.randrange(len(SPECIAL), VOCAB)}" for _ in range(count))

        rows = [
            {
                "question": words(5),
                "choices": [words(draw.randint(1, 4)) for _ in range(3)],
                "answer": draw.randrange(3),
            }
            for _ in range(15)
        ]
        folder.mkdir(exist_ok=True)
        metrics = "\n".join(f"  - metric: {m}" for m in ("acc", "acc_norm")[: 1 + norm])
        file = folder / f"{name}.jsonl"
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=file, metrics=metrics))
        quiz = cls(folder, name, rows)
        quiz.write()
        return quiz

    def write(self) -> None:
        lines = [json.dumps(row) + "\n" for row in self.rows]
        (self.folder / f"{self.name}.jsonl").write_text("".join(lines))

    @torch.no_grad()
    def accuracies(self, model: PreTrainedModel, limit: int | None = None) -> dict[str, float]:
        """By the sums of the choices' log-likelihoods, and by these for each letter: every choice
        in a forward pass of its own.
        """
        right = {"acc": 0, "acc_norm": 0}
        rows = self.rows[:limit]
        for row in rows:
            sums = [_log_likelihood(model, row["question"], choice) for choice in row["choices"]]
            for metric, lengths in (
                ("acc", [1] * len(sums)),
                ("acc_norm", [len(choice) for choice in row["choices"]]),
            ):
                values = [total / length for total, length in zip(sums, lengths, strict=True)]
                right[metric] += values.index(max(values)) == row["answer"]
        return {metric: count / len(rows) for metric, count in right.items()}


def _log_likelihood(model: PreTrainedModel, question: str, choice: str) -> float:
    given, said = (
        [int(word.removeprefix("w")) for word in text.split()] for text in (question, choice)
    )
    logits = model(input_ids=torch.tensor([given + said])).logits[0]
    log_p = logits.double().log_softmax(-1)[len(given) - 1 : -1]
    return sum(log_p[place, token].item() for place, token in enumerate(said))
