"""What a published model is worth: the proof that it is the stack, and its perplexity beside
others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusegpt_ray import evaluation
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.report import Display
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers


@dataclass
class Judge:
    """Proves a published model, and measures it beside the dense and the dropped one on the
    held-out texts.
    """

    workers: Workers
    dense: Stack
    held_out: Mapping[str, Windows]
    windows_WT: np.ndarray
    """Of the calibration text, for a proof without held-out texts."""
    show: Display

    def __post_init__(self) -> None:
        self._dense = {}
        for name, windows in self.held_out.items():
            self._dense[name] = evaluation.perplexity(self.workers, self.dense, windows.tokens_WT)

    def measure(self, folder: str, stack: Stack, published: Stack) -> dict[str, Any]:
        """The proof that the model in `folder` is the stack, and perplexities; `published` is the
        folder's own stack.
        """
        windows_WT = next((item.tokens_WT for item in self.held_out.values()), self.windows_WT)
        proof = evaluation.prove(self.workers, published, folder, stack, windows_WT)
        return {"perplexity": self._perplexities(stack, published), "proof": asdict(proof)}

    def _perplexities(self, stack: Stack, published: Stack) -> dict[str, dict[str, Any]]:
        """Each with its protocol. `fused` is that of the published weights, in their dtype, not of
        the float32 blocks they were rounded from.
        """
        dropped = self.dense
        for dense in set(self.dense.kept) - set(stack.kept):
            dropped = dropped.drop(dense)
        found = {}
        for name, windows in self.held_out.items():
            windows_WT = windows.tokens_WT
            fused = evaluation.perplexity(self.workers, published, windows_WT)
            plain = (
                fused
                if stack == dropped
                else evaluation.perplexity(self.workers, dropped, windows_WT)
            )
            values = {"dense": self._dense[name], "dropped": plain, "fused": fused}
            found[name] = values | windows.protocol
        return found
