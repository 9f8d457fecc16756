"""The whole way from a model to a shallower or deeper one on empty tensors: what would fail at its
end fails now.

Blocks are left out or copied, the config.json is written, the class is built from it, and what it
builds is held against what would be published: the names and shapes of all tensors, and that every
block, at its new place, is still the same function, as is what follows the last one. A function is
known by the operations that run, with their numbers (those of a block on the meta device), and by
the plain values and buffers that a block's modules hold.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.model.config import KEY, read_config
from fusegpt_ray.model.operations import Operations, is_plain
from fusegpt_ray.model.recorder import Context, empty_call
from fusegpt_ray.model.removable import Removable
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import LOOKS_AT_VALUES, Structure, observe, running, same
from fusegpt_ray.publishing.shrink import shrink_config

_FIX = "use an architecture whose blocks are the same at every depth"


def rehearse(dense: Stack, structure: Structure, removals: Collection[int]) -> Removable:
    """Try models with so many blocks removed; `structure` is the dense model's.

    Where any blocks can go, some sets of many are all that is tried. Otherwise each candidate is
    taken out alone, then sets of those that can go, and at last blocks from the end on.

    Raises:
        UserError: what would be published is not what the class of its config.json builds,
            whatever goes.
    """
    what = "what its blocks compute cannot be seen without values"
    with reading_users_file(KEY, structure.name, what, _FIX):
        attempt = _Attempt(dense, structure)
        telling = _tell_the_length(dense)
    fewest, most, depth = min(removals), max(removals), len(dense)
    stay = telling if most >= len(telling) else ()
    rule, every = Removable(one_stays=stay), range(depth)
    if not (why := attempt.first_problem(_sets(every, fewest, most, rule))):
        return rule
    can_go = [number for number in every if not attempt.problem([number])]
    # Blocks that can go alone need not be able to go together.
    able = len(can_go) - (not rule.allows(can_go, every))
    if able >= most and not attempt.first_problem(_sets(can_go, fewest, most, rule)):
        return Removable(tuple(can_go), why=why, one_stays=stay)
    ends = [every[-count:] for count in sorted({1, fewest, most})]
    if all(rule.allows(end, every) for end in ends) and not attempt.first_problem(ends):
        return Removable(from_the_end=True, why=why)
    if can_go:
        why += f" (alone, {len(can_go)} of its blocks can go; together, {most} cannot)"
    raise UserError(KEY, structure.name, why, _FIX)


def rehearse_deeper(dense: Stack, structure: Structure, deeper: Stack) -> None:
    """Try a model with copies of blocks; `structure` is the dense model's.

    Raises:
        UserError: what would be published is not what the class of its config.json builds.
    """
    what = "what its blocks compute cannot be seen without values"
    with reading_users_file(KEY, structure.name, what, _FIX):
        attempt = _Attempt(dense, structure)
    if why := attempt.problem_of(deeper, f"with {len(deeper)} blocks it cannot be built"):
        raise UserError(KEY, structure.name, why, _FIX)


def _tell_the_length(dense: Stack) -> tuple[int, ...]:
    """Of a model of several kinds of blocks, those whose part of the cache knows how many tokens
    it holds; nothing if all blocks or none do.

    transformers asks the first of them for the length before every step of generation, and raises
    where a configuration has none left.
    """
    layers = DynamicCache(config=read_config(dense.config)).layers
    numbers = tuple(n for n, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin))
    return numbers if len(numbers) < len(layers) else ()


def _sets(numbers: Sequence[int], fewest: int, most: int, rule: Removable) -> list[list[int]]:
    """Blocks to leave out together: the first ones, so that many others move; some spread over all,
    so that others move by different numbers of places; and the last ones, which may be of a kind of
    their own. Where the rule does not allow a set, it is one of the other blocks.
    """

    def first(able: Sequence[int]) -> list[int]:
        return [*able[:fewest]]

    def spread(able: Sequence[int]) -> list[int]:
        begin = int(len(able) > most)  # the first block stays, unless all of these go
        return [able[begin + index * (len(able) - begin) // most] for index in range(most)]

    def last(able: Sequence[int]) -> list[int]:
        return [*able[-fewest:]]

    others = [number for number in numbers if number not in rule.one_stays[:1]]
    return [
        found if rule.allows(found := pick(numbers), numbers) else pick(others)
        for pick in (first, spread, last)
    ]


class _Attempt:
    """Makes other models of the blocks of the empty one and looks at what its class builds then."""

    def __init__(self, dense: Stack, structure: Structure) -> None:
        self.dense, self.structure = dense, _Observed(structure)
        self._others: dict[str, _Other] = {}
        """By config.json, which is often the same whichever of several blocks is gone."""
        self._alone: dict[_Move, str] = {}
        """What blocks compute where one other is gone. Of all candidates, each block keeps its
        number or has the one before, and as it has and is called with the same, it is watched once
        at each. The sets that follow are watched in full.
        """

    def first_problem(self, sets: Iterable[Sequence[int]]) -> str:
        """Of the first set that has one, or nothing."""
        return next((problem for dropped in sets if (problem := self.problem(dropped))), "")

    def problem(self, dropped: Sequence[int]) -> str:
        """What is not as it would be published without these blocks, or nothing."""
        what = f"without the blocks {', '.join(map(str, dropped))} it cannot be built"
        return self.problem_of(self.dense.drop(*dropped), what)

    def problem_of(self, other: Stack, what: str) -> str:
        """What is not as this stack would be published, or nothing."""
        name, known = self.structure.found.name, self._others
        try:
            with reading_users_file(KEY, name, what, _FIX):
                config = shrink_config(other)
                key = json.dumps(config, sort_keys=True, default=str)
                if key not in known:
                    alone = len(other) == len(self.dense) - 1
                    computed = self._alone if alone else {}
                    known[key] = _Other(self.structure, _Observed(observe(config)), computed)
                return known[key].difference(other.kinds)
        except UserError as error:
            said = error.problem
            if said == LOOKS_AT_VALUES:  # whichever blocks go
                raise
            return said if said.startswith(what) else f"{what} ({said})"


class _Observed:
    """A structure, and what its blocks compute."""

    def __init__(self, found: Structure) -> None:
        self.found = found
        self._operations: dict[int, list[Any]] = {}

    def operations(self, number: int) -> list[Any]:
        """Of a block. To watch them is nearly all that a rehearsal costs."""
        if number not in self._operations:
            with running(self.found.name):
                self._operations[number] = _operations(*self.found.calls[number])
        return self._operations[number]


_Move = tuple[int, int]
"""A block's number in the dense model, and in the shallower one."""


class _Other:
    """What the class of another model's config.json builds, beside the dense model."""

    def __init__(self, dense: _Observed, other: _Observed, computed: dict[_Move, str]) -> None:
        self.dense, self.other = dense, other
        self._built: dict[_Move, str] = {}
        self._computed = computed

    def difference(self, kept: Sequence[int]) -> str:
        """What is not as it would be published with the blocks `kept`, by what they were in the
        dense model, or nothing."""
        dense, other = self.dense.found, self.other.found
        if len(other.blocks) != len(kept):
            return f"its class builds {len(other.blocks)} blocks where {len(kept)} are asked for"
        for name in sorted(dense.trunk.keys() | other.trunk.keys()):
            old, new = dense.trunk.get(name), other.trunk.get(name)
            if old != new:
                return (
                    f"the size of {name} depends on the number of blocks ({_shown(old)}, and"
                    f" {_shown(new)} with another one): what it holds for all blocks together"
                    " cannot be cut"
                )
        if dense.after != other.after:
            return "what it computes after its last block depends on the number of blocks"
        # What is quick to see comes first, of all blocks.
        for known, compare in (
            (self._built, self._built_otherwise),
            (self._computed, self._computes_otherwise),
        ):
            for move in zip(kept, range(len(kept)), strict=True):
                if move not in known:
                    known[move] = compare(*move)
                if problem := known[move]:
                    return problem
        return ""

    def _built_otherwise(self, number: int, position: int) -> str:
        """What the block has or is called with at its new place that it was not, or nothing."""
        dense, other = self.dense.found, self.other.found
        if problem := _other_block(dense.blocks[number], other.blocks[position], number, position):
            return f"block {number} would become block {position}, where it {problem}"
        if not same(dense.contexts[number], other.contexts[position]):
            return (
                f"block {number} would become block {position}, and be called with other masks"
                " there"
            )
        return ""

    def _computes_otherwise(self, number: int, position: int) -> str:
        """Of a block that has and is called with the same: whether it computes the same."""
        if self.dense.operations(number) != self.other.operations(position):
            return (
                f"what block {number} computes depends on its number; it would become block"
                f" {position}"
            )
        return ""


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _other_block(old: nn.Module, new: nn.Module, number: int, position: int) -> str:
    """How an empty block differs from the one it should be, but for knowing its own number."""
    ours, theirs = _shapes(old), _shapes(new)
    if ours != theirs:
        name = min(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        )
        return (
            f"has other tensors ({name} is {_shown(ours.get(name))}, {_shown(theirs.get(name))}"
            " there)"
        )
    for (name, mine), (_, other) in zip(old.named_buffers(), new.named_buffers(), strict=True):
        if not same(mine, other):
            return f"has other values in {name}"
    for (name, mine), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        if type(mine) is not type(other):
            return f"is of another kind ({name or 'it'} is a {type(other).__name__} there)"
        for key, value in vars(mine).items():
            there = vars(other).get(key)
            its_number = (value, there) == (number, position)
            # A list may be a table of all blocks; what is done with it shows in the operations.
            if key.startswith("_") or isinstance(value, list | tuple) or not is_plain(value):
                continue
            if value != there and not its_number:
                return f"has another {f'{name}.{key}'.lstrip('.')} ({there!r} instead of {value!r})"
    return ""


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return {name: tuple(value.shape) for name, value in tensors}


def _operations(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> list[Any]:
    """What a block computes of such states, as a list of operations."""
    call = empty_call(block, h_BTD, context)
    with torch.no_grad(), Operations() as operations:
        call()
    return operations.seen
