"""What a published model is worth: the proof that it is the stack, its perplexity beside others,
and what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fusegpt_ray.measuring import evaluation
from fusegpt_ray.measuring.before_after import before_and_after
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.preparing.sample_prompts import Prompt
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.known import Known
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.samples import Batch, fingerprint
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers


@dataclass
class Judge:
    """Proves a published model, and measures it beside the dense and the dropped one on the
    held-out texts.

    The perplexities of the last two, and what the dense one writes, are kept in the journal of the
    run, so that it measures them once, however often it is stopped.
    """

    workers: Workers
    dense: Stack
    held_out: Mapping[str, Windows]
    windows: Batch
    """Of the calibration text, for a proof without held-out texts."""
    show: Display
    journal: Journal
    run: str
    """See `Known`, as of the next two."""
    shared: Shared = field(default_factory=Shared)
    measuring: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Prompt] = ()
    """Which the dense and the published model continue, for people."""
    seconds: float = field(default=0.0, init=False)
    """That perplexities have taken so far, as far as they were measured here."""

    def __post_init__(self) -> None:
        about = (self.run, self.shared, self.measuring, self.show.say)
        self._known = Known(self.journal, "perplexities", *about)
        self._written = Known(self.journal, "samples", *about)
        self._dense = {
            name: self._of_dense_blocks(self.dense, windows.tokens_WT, "evaluating the dense model")
            for name, windows in self.held_out.items()
        }
        found = {name: {"dense": value} for name, value in self._dense.items()}
        self.show.tell("perplexity", model="dense", removed=0, perplexity=found)

    @property
    def of_dense(self) -> dict[str, dict[str, Any]]:
        """The dense model's perplexity on each text, with its protocol."""
        texts = self.held_out.items()
        return {name: {"dense": self._dense[name], **text.protocol} for name, text in texts}

    def measure(self, folder: str, stages: Mapping[str, Stack], published: Stack) -> dict[str, Any]:
        """The proof that the model in `folder` is the stack of the last stage, perplexities, and
        samples of text.

        Args:
            stages: the model after each of them, in order; see `text.protocol.STAGES`.
            published: the folder's own stack.
        """
        stack = [*stages.values()][-1]
        windows = next((item.tokens_WT for item in self.held_out.values()), self.windows)
        proof = evaluation.prove(self.workers, published, folder, stack, windows)
        found = {name: self._perplexities(name, stages, published) for name in self.held_out}
        told = {"model": folder.rsplit("/", 1)[-1], "removed": len(self.dense) - len(stack)}
        self.show.tell("perplexity", **told, perplexity=found)
        how = (self.workers, self.prompts, published, self._written, self.show)
        samples = before_and_after(*how)
        written = {"samples": samples} if samples else {}
        return {"perplexity": found, "proof": asdict(proof), **written}

    def _perplexities(
        self, name: str, stages: Mapping[str, Stack], published: Stack
    ) -> dict[str, Any]:
        """On one text, with its protocol. The last stage is that of the published weights, in their
        dtype, not of the float32 blocks they were rounded from.
        """
        *before, last = stages
        windows = self.held_out[name]
        this = self._of(published, windows.tokens_WT)
        gone = set(self.dense.kept) - set(stages[last].kept)
        if not gone:  # it is narrower instead
            row = {stage: self._of(stages[stage], windows.tokens_WT) for stage in before}
            return {"dense": self._dense[name], **row, last: this, **windows.protocol}
        dropped = self.dense.drop(*gone)
        plain = this
        if stages[last] != dropped != self.dense:
            plain = self._of_dense_blocks(dropped, windows.tokens_WT)
        row = {"dense": self._dense[name]}
        if dropped != self.dense:
            row["dropped"] = plain
        for stage in before:
            as_dropped = stages[stage] == dropped
            row[stage] = plain if as_dropped else self._of(stages[stage], windows.tokens_WT)
        return {**row, last: this, **windows.protocol}

    def _of(self, stack: Stack, given: Batch) -> float:
        began = time.monotonic()
        found = evaluation.perplexity(self.workers, stack, given)
        self.seconds += time.monotonic() - began
        return found

    def _of_dense_blocks(self, stack: Stack, given: Batch, stage: str = "") -> float:
        """The perplexity of a model of unchanged blocks, measured unless the journal has it.

        `stage`: shown while it is measured, unless it is part of what is shown already.
        """

        def measure() -> float:
            if stage:
                self.show.stage(stage)
            return self._of(stack, given)

        shape = list(given.shape)
        what = {"kept": list(stack.kept), "windows": fingerprint(given), "shape": shape}
        found: float = self._known.measured("perplexity", what, measure)
        return found


def stages_of(recipe: Recipe, last: Stack, healed: Stack | None) -> dict[str, Stack]:
    """A model on its way, by what `text.protocol.STAGES` calls it, as far as a run makes it.

    Args:
        last: after the last round.
    """
    if not healed:
        return {recipe.spec.stage: last}
    if recipe.spec.stage == "dropped":  # which is measured beside all others
        return {"healed": healed}
    return {recipe.spec.stage: last, "healed": healed}
