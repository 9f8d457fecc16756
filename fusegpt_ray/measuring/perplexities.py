"""Perplexities of one model after another on the same texts, and how they differ."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.measuring.as_loaded import compare_source
from fusegpt_ray.measuring.bootstrap import paired_difference
from fusegpt_ray.measuring.evaluation import Losses
from fusegpt_ray.model.finite import explained
from fusegpt_ray.preparing.opening import OpenedModel, find_model, open_model
from fusegpt_ray.preparing.preflight import check_images, check_tokens
from fusegpt_ray.preparing.windows import evaluation_windows
from fusegpt_ray.recipe.sections import Evaluation, Model
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text import calibration
from fusegpt_ray.text.protocol import described
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.uris import is_local
from fusegpt_ray.workers.base import Workers

KEY = "evaluation.data"
"""What messages call a text."""


@dataclass(frozen=True)
class Measured:
    """One model on one text."""

    model: str
    text: Evaluation
    protocol: Mapping[str, Any]
    """See `Windows.protocol`."""
    tokens: str
    """Fingerprint of the windows: equal where they are the same tokens."""
    losses: Losses
    loss: float
    """Their mean, which is finite."""

    def row(self, first: Measured) -> dict[str, Any]:
        """{"model", the protocol's keys, "perplexity", "loss", "targets", "protocol"}, the loss in
        nats a token; beside another model also "against".
        """
        found = {
            "model": self.model,
            **self.protocol,
            "perplexity": math.exp(self.loss),
            "loss": self.loss,
            "targets": int(self.losses.targets_W.sum()),
            "protocol": described(self.protocol),
        }
        return found if first is self else {**found, "against": self._against(first)}

    def _against(self, first: Measured) -> dict[str, Any]:
        """{"model"} and what `Difference.to_json` has, or why there is no comparison: "problem"."""
        if self.tokens != first.tokens:
            problem = "their tokenizers make other tokens of the text, so windows are no pairs"
            return {"model": first.model, "problem": problem}
        targets_W = self.losses.targets_W
        difference = paired_difference(first.losses.mean_W, self.losses.mean_W, targets_W)
        return {"model": first.model, **difference.to_json()}


def check_several(models: Sequence[str], texts: Sequence[Evaluation], revision: str | None) -> None:
    """
    Raises:
        UserError: a model or a text is given twice, or none is, or a revision of several models.
    """
    for key, given in (("model.source", models), (f"{KEY}.data", texts)):
        if not given:
            raise UserError(key, [], "none is given", "name at least one")
    places = [_place(name) for name in models]
    for number, place in enumerate(places):
        if (first := places.index(place)) < number:
            problem = "given twice"
            if models[first] != models[number]:
                problem = f"the same folder as {models[first]}"
            raise UserError("model.source", models[number], problem, "name each model once")
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise UserError(f"{KEY}.data", text.data, "given twice", "name it once")
    if revision and len(models) > 1:
        problem = f"which of the {len(models)} models has it?"
        fix = "measure that model alone, or download the revision and give its folder"
        raise UserError("model.revision", revision, problem, fix)


def _place(model: str) -> str:
    return os.path.realpath(os.path.expanduser(model)) if is_local(model) else model.rstrip("/")


def open_for(model: Model, texts: Sequence[Evaluation], show: Display) -> OpenedModel:
    """A model that can be measured on such texts; its weights are not read.

    Raises:
        UserError: it cannot be found or read, or a window is longer than its positions, or a text
        does not say how long its windows are.
    """
    longest = max(map(_length, texts))
    source, _ = find_model(model, {f"{KEY}.length": longest})
    check_images(source, [f"{KEY}.images"] if any(text.images for text in texts) else [])
    return open_model(source, show)


def _length(text: Evaluation) -> int:
    """Tokens of its windows."""
    if length := text.length_or(0):
        return length
    fix = "give the tokens a window, such as 2048"
    raise UserError(f"{KEY}.length", None, f"missing for {text.label}", fix)


def measure(
    workers: Workers, model: OpenedModel, texts: Sequence[Evaluation], show: Display
) -> list[Measured]:
    """A model on each of the texts, all of which are read first.

    Raises:
        UserError: a text cannot be used, or the model does not compute.
    """
    show.stage("tokenising")
    drawn = [_windows(workers, model, text, len(texts) > 1) for text in texts]
    check_tokens(model.source, model.stack, *(windows.tokens_WT for windows in drawn))
    compare_source(workers, model.source, model.stack, drawn[0].tokens_WT, show)
    found = []
    for text, windows in zip(texts, drawn, strict=True):
        count, length = windows.tokens_WT.shape
        of = f" of {text.label}" if len(texts) > 1 else ""
        show.stage(f"evaluating {count} windows of {length} tokens{of}")
        with explained(model.stack, model.source.name, workers.dtype):
            losses = evaluation.losses(workers, model.stack, windows.tokens_WT)
            loss = losses.mean
        named = (model.source.name, text, windows.protocol, fingerprint(windows.tokens_WT))
        found.append(Measured(*named, losses, loss))
    return found


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One for each measurement, text by text, each beside that of the first model on its text."""
    by_text: dict[Evaluation, list[Measured]] = {}
    for found in measured:
        by_text.setdefault(found.text, []).append(found)
    return [found.row(group[0]) for group in by_text.values() for found in group]


def _windows(workers: Workers, model: OpenedModel, text: Evaluation, several: bool) -> Windows:
    bos = text.bos or (None if text.published else "auto")
    with naming(text.label if several else ""):
        leading = bos and calibration.leading_token(bos, model.tokenizer, f"{KEY}.bos")
        return evaluation_windows(workers, text, _length(text), leading, f"{KEY}.data")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Says of which of several models or texts a mistake is, where its message does not.

    Raises:
        UserError: the block raised it.
    """
    try:
        yield
    except UserError as error:
        if not what or what in str(error):
            raise
        problem = f"{error.problem} ({what})"
        raise UserError(error.key, error.value, problem, error.fix) from error
