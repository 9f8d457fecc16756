"""From a checkpoint's tensor names to the model's, by transformers' own rules: those that
`from_pretrained` uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY


@dataclass(frozen=True)
class Names:
    """From a checkpoint's tensor names to the model's, as transformers itself goes."""

    expected: dict[str, torch.Tensor]
    """The model's tensors, empty, by name."""
    renamings: list[Any]
    converters: list[WeightConverter]
    base: str

    @classmethod
    def of(cls, model: transformers.PreTrainedModel) -> Names:
        steps = get_model_conversion_mapping(model)
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        renamings = [step for step in steps if not isinstance(step, WeightConverter)]
        expected = dict(model.state_dict(keep_vars=True))
        return cls(expected, renamings, converters, model.base_model_prefix)

    def inside(self, name: str) -> str:
        """
        Raises:
            UserError: transformers does more than rename the tensor.
        """
        found, converted = rename_source_key(
            name, self.renamings, self.converters, self.base, self.expected
        )
        if converted is not None:
            fix = (
                "use a model whose checkpoint holds its weights as the model uses them (not a"
                " mixture of experts)"
            )
            raise UserError(
                KEY,
                name,
                "transformers rearranges this tensor on loading, which fusing cannot follow yet",
                fix,
            )
        return found

    def prefix(self, name: str, path: str, number: int, tail: str) -> str:
        """What stands on disk before the block's number: with another number there, it is that
        block's tensor.

        Raises:
            UserError: the number on disk is not the block's.
        """
        if name.endswith(f"{number}.{tail}"):
            return name.removesuffix(f"{number}.{tail}")
        for found in re.finditer(
            rf"(?:^|(?<=\.)){number}(?=\.)", name
        ):  # renamed inside the block, too
            other = f"{name[: found.start()]}{number + 1}{name[found.end() :]}"
            if self.inside(other) == f"{path}.{number + 1}.{tail}":
                return name[: found.start()]
        inside = f"{path}.{number}.{tail}"
        raise UserError(
            KEY,
            name,
            f"called {inside} in the model",
            "re-save the checkpoint with save_pretrained",
        )
