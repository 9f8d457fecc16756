"""From a checkpoint's tensors to the model's, by transformers' own rules: those that
`from_pretrained` uses. It renames tensors, and makes others of some: one of all experts' of a
block, say.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Destination:
    """Where a tensor of a checkpoint belongs in the model."""

    inside: str
    """The tensor that it is, or that is made of it; the first one, if it is several."""
    pattern: str | None = None
    """Of the converter that makes it; None where it stays what it is."""


@dataclass(frozen=True)
class Names:
    """From a checkpoint's tensors to the model's, as transformers itself goes."""

    expected: dict[str, torch.Tensor]
    """The model's tensors, empty, by name."""
    renamings: list[Any]
    converters: list[WeightConverter]
    base: str
    config: transformers.PretrainedConfig
    _known: dict[tuple[str, bool], Destination] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Those that were found, by name and whether it was still to be renamed: dozens of patterns
    are tried for each, and a mixture of experts has ten thousands of names."""

    @classmethod
    def of(cls, model: transformers.PreTrainedModel) -> Names:
        """`model` has its blocks."""
        steps = get_model_conversion_mapping(model)
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        renamings = [step for step in steps if not isinstance(step, WeightConverter)]
        expected = dict(model.state_dict(keep_vars=True))
        return cls(expected, renamings, converters, model.base_model_prefix, model.config)

    def destination(self, name: str) -> Destination:
        """Of a tensor that a checkpoint calls so."""
        return self._find(name, True)

    def renamed_destination(self, name: str) -> Destination:
        """Of a tensor that is called so once it is renamed, and not yet converted."""
        return self._find(name, False)

    def inside(self, name: str) -> str:
        """See `Destination`."""
        return self.destination(name).inside

    def _find(self, name: str, rename: bool) -> Destination:
        if (name, rename) not in self._known:
            steps = self.renamings if rename else []
            found = rename_source_key(name, steps, self.converters, self.base, self.expected)
            if found[0] not in self.expected and name in self.expected:
                found = rename_source_key(name, [], [], self.base, self.expected)
            self._known[name, rename] = Destination(*found)
        return self._known[name, rename]

    def renamed(self, name: str) -> str:
        """What a tensor is called before it is converted."""
        renamed: str = rename_source_key(name, self.renamings, [])[0]
        return name if self.inside(name) == name else renamed

    def convert(
        self, tensors: Tensors, destination: Callable[[str], Destination] | None = None
    ) -> Tensors:
        """The model's tensors of a checkpoint's, by transformers' own operations: nothing is
        computed with their values. What is only renamed is not copied.

        Args:
            destination: of each by its name; `Names.destination`, if not given.
        """
        made: dict[str, torch.Tensor] = {}
        steps: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):  # so experts are in order
            where = (destination or self.destination)(name)
            if where.pattern is None:
                made[where.inside] = tensors[name]
                continue
            if where.inside not in steps:
                steps[where.inside] = copy.deepcopy(self.converter(where.pattern))
            steps[where.inside].add_tensor(where.inside, name, where.pattern, tensors[name])
        for inside, step in steps.items():
            made |= self._run(step, inside)
        return made

    def revert(self, pattern: str, made: Tensors) -> Tensors:
        """The tensors of which a converter has made these; named as they are once renamed."""
        step = self.converter(pattern).reverse_transform()
        inside = ""
        for name in sorted(made, key=dot_natural_key):
            inside, matched = step.rename_source_key(name)
            assert matched is not None, (name, step)
            step.add_tensor(inside, name, matched, made[name])
        return self._run(step, inside)

    def converter(self, pattern: str) -> WeightConverter:
        """The last one that has it, as in transformers."""
        return next(step for step in self.converters[::-1] if pattern in step.source_patterns)

    def _run(self, step: WeightConverter, inside: str) -> dict[str, torch.Tensor]:
        made = step.convert(inside, model=self, config=self.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def get_parameter(self, name: str) -> torch.Tensor:
        """For operations, which take these names for the model."""
        return self.expected[name]

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
        problem = f"it is {inside} in the model, but its own name does not tell the block by this"
        problem += " number, so that it cannot be given another"
        fix = "re-save the checkpoint with save_pretrained, unless that has written it"
        raise UserError(KEY, name, problem, fix)
