"""The plan of a run: everything that is known, and every mistake of the user that can be found,
before weights are read and before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from fusegpt_ray.cost.cost import Cost, cost
from fusegpt_ray.cost.rates import RATES, known_gpu
from fusegpt_ray.cost.traffic import Traffic, traffic
from fusegpt_ray.errors import UserError
from fusegpt_ray.healing.sharing import check_groups
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.inserting import deeper
from fusegpt_ray.model.removable import ANY, Removable
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import Structure
from fusegpt_ray.preparing.generation import check_beginning
from fusegpt_ray.preparing.opening import OpenedModel, fetched, find_model, look_at
from fusegpt_ray.preparing.preflight import (
    check_copies,
    check_images,
    check_light,
    check_method,
    check_output,
    with_start,
)
from fusegpt_ray.preparing.sample_prompts import named
from fusegpt_ray.publishing.in_vllm import maybe_wrong_in_vllm
from fusegpt_ray.publishing.rehearsal import rehearse, rehearse_deeper
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation, Heal
from fusegpt_ray.recipe.text_sections import GeneratedText, WeightedText
from fusegpt_ray.targets import Target, plan_targets
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.calibration import leading_token
from fusegpt_ray.text.conversations import conversation_sources
from fusegpt_ray.text.corpus import names_a_dataset, sources
from fusegpt_ray.text.mixture import data_keys, shares
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.tracking.trackers import check_trackers
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Allocation

P = ParamSpec("P")
R = TypeVar("R")
WINDOWS = "calibration.windows"
_REHEARSED: dict[tuple[str, tuple[int, ...]], Removable] = {}
"""By config.json and numbers of blocks to remove: what a comparison or a family asks for each of
its runs."""


@dataclass(frozen=True)
class Plan:
    """A run that can begin."""

    recipe: Recipe
    model: OpenedModel
    targets: tuple[Target, ...]
    """The models to publish, the lightest compression first."""
    leading: Mapping[str, int | None]
    """The token that each window begins with, if any, by the recipe key of its text."""
    removable: Removable = ANY
    """The blocks that may go."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """The windows of each text on which models are evaluated, once these have been drawn."""

    def counting(self, held_out: Mapping[str, Windows]) -> Plan:
        """With the number of windows of these texts, by name."""
        return replace(self, counted={key: len(text.tokens_WT) for key, text in held_out.items()})

    def seeing(self, first: int, say: Callable[[str], object]) -> Plan:
        """With images, where the model adds what it sees to the states behind blocks before this
        one: it does so behind as many of the blocks that are left, so that these stay.

        Raises:
            UserError: too few others can go, or a copy would come between these.
        """
        depth, count, name = len(self.model.stack), self.rounds, self.model.source.name
        if not first:
            return self
        if growth := METHODS[self.recipe.method].growth:
            copies = growth.place(self.recipe, depth)
            if any(copy.after < first - 1 or copy.like < first for copy in copies):
                problem = f"{name} adds what it sees behind its first {first} blocks, and copies of"
                problem += " these or between them would get it, too, or in their place"
                fix = "use texts without images, or fewer new blocks"
                raise UserError("method", self.recipe.method, problem, fix)
            return self
        why = f"what it sees would be added behind other blocks than the first {first}"
        removable = self.removable.from_block(first, depth, why)
        order = range(depth - 1, -1, -1) if removable.from_the_end else removable.blocks or ()
        gone = [*order][: count + len(removable.one_stays)]
        able = [number for number in gone if number not in removable.one_stays[:1]]
        # One more stays: what is added behind the last block would never reach another.
        enough = len(able) >= count and depth - count > first
        if not enough or not removable.allows(able[:count], range(depth)):
            problem = f"{count} blocks are to go and one more is to stay; {removable.in_words()}"
            fix = "ask for less sparsity, or use texts without images"
            raise UserError("sparsity", list(self.recipe.sparsity), f"{name}: {problem}", fix)
        _check_search(self.recipe, removable)
        say(removable.in_words())
        return replace(self, removable=removable)

    @property
    def setup(self) -> Setup:
        """For the workers."""
        return Setup.of(self.recipe, self.model.source, self.model.stack)

    @property
    def cost(self) -> Cost:
        """What it will compute and write."""
        return self._cost(self.targets)

    def _cost(self, targets: Sequence[Target]) -> Cost:
        texts = dict(self.recipe.evaluation)
        for name, windows in self.counted.items():
            texts[name] = texts[name].model_copy(update={"windows": windows})
        recipe = self.recipe.model_copy(update={"evaluation": texts})
        return cost(recipe, self.model.stack, targets)

    def stages_of(self, target: Target, gpu: str, held: Allocation) -> list[dict[str, Any]]:
        """The work of one model alone, to hold beside what it took; see `Cost.rows`.

        Args:
            gpu: what torch calls the one that it runs on; its rates need not be known.
        """
        name = known_gpu(gpu)
        rates = RATES[name] if name else None
        return self._cost([target]).rows(rates, held)

    def traffic_of(
        self, targets: Sequence[Target], held: Allocation, streams: bool
    ) -> list[Traffic]:
        """Bytes of weights that these models take to be read and written; see `traffic.py`."""
        recipe, dense = self.recipe, self.model.stack
        return traffic(recipe, dense, targets, self._cost(targets), held, streams)

    @property
    def rounds(self) -> int:
        """After how many the last model is there: one for each block that goes, else one."""
        return self.targets[-1].rounds


def plan(
    recipe: Recipe,
    show: Display,
    restart: bool = False,
    looks: bool = False,
    extends: bool = False,
) -> Plan:
    """The plan for a recipe.

    Cheap and local mistakes are looked for first; the files of a hub model are fetched last.

    Args:
        restart: an unfinished run of this name will be forgotten.
        looks: nothing is written, not even for a moment, and of a hub model's weights only the
            headers are read.
        extends: see `check_output`.

    Raises:
        UserError: the recipe cannot be carried out.
    """
    found = _planned(recipe, show, Checks(stops=True), restart, looks, extends)
    assert found is not None, "the first mistake ends it"
    return found


def mistakes(recipe: Recipe, show: Display, extends: bool = False) -> list[UserError]:
    """All mistakes that `plan` finds and that do not follow from one another. Nothing is written.
    Also whether files of text are there, of which the beginnings are read; datasets are not asked
    for (see `not_looked_up`). `extends`: see `check_output`.
    """
    checks = Checks()
    for text, key in named_texts(recipe):
        if names_a_dataset(text.data):
            continue
        if recipe.sees(text):
            checks(conversation_sources, text, key)
        elif recipe.calibration.pack:  # else rows are no plain text
            checks(sources, text, key)
    _planned(recipe, show, checks, looks=True, extends=extends)
    return checks.found


def not_looked_up(recipe: Recipe) -> list[str]:
    """What `mistakes` leaves out, in words: datasets, which may lie on the hub. An id may be the
    mistyped path of a folder, too; nothing but the hub can tell.
    """
    datasets = [(text.data, key) for text, key in named_texts(recipe) if names_a_dataset(text.data)]
    datasets += [
        (text.data, f"evaluation.{name}.data")
        for name, text in recipe.evaluation.items()
        if text.published and not text.copy_of_published
    ]
    return [f"{key}: dataset {data!r} (no file or folder here)" for data, key in datasets]


@dataclass
class Checks:
    """Makes checks one after another."""

    stops: bool = False
    """Whether the first mistake ends them."""
    found: list[UserError] = field(default_factory=list)

    def __call__(self, check: Callable[P, R], *args: P.args, **options: P.kwargs) -> R | None:
        """What the check returns, or None if it finds a mistake."""
        try:
            return check(*args, **options)
        except UserError as error:
            if self.stops:
                raise
            self.found.append(error)
            return None


def _planned(
    recipe: Recipe,
    show: Display,
    check: Checks,
    restart: bool = False,
    looks: bool = False,
    extends: bool = False,
) -> Plan | None:
    """None if there is a mistake; the checks that need what another one found are left out then."""
    check(check_trackers, recipe.output.track)
    check(shares, recipe.calibration, recipe.calibration.windows, "calibration", WINDOWS)
    there = check(find_model, recipe.model, window_lengths(recipe))
    if there is None:
        return None
    source, structure = there
    check(check_images, source, recipe.keys_of_images)
    check(named, recipe, source)
    targets = check(plan_targets, recipe, len(structure.blocks), source.config())
    decided = check(with_start, recipe, structure, show.say)
    recipe = decided or recipe
    if (heal := recipe.heal) and heal.train != "lora" and heal.rank != Heal().rank:
        show.say(f"heal.rank plays no part: heal.train: {heal.train} has no low-rank updates")
    if targets:
        check(check_output, recipe, targets, restart, not looks, extends)
    check(check_method, recipe, structure)
    check(check_light, recipe, structure)
    if targets:
        check(check_copies, recipe, structure)
    model = check(look_at, source)
    if model is None:
        return None
    leading = check(leading_tokens, recipe, model.tokenizer)
    if not targets:
        return None
    if recipe.heal:
        dense = model.stack
        depths = [len(dense) - target.fewer for target in targets]
        check(check_groups, recipe.heal.share, dense, depths)
    removable = check(_rehearsed, recipe, model.stack, structure, targets)
    if removable is not None:
        check(_check_search, recipe, removable)
    if check.found or leading is None or removable is None:
        return None
    if not recipe.spec.narrows and (doubt := maybe_wrong_in_vllm(model.stack)):
        show.warn(doubt)
    if not looks:
        model = fetched(model, show)
    return Plan(recipe, model, tuple(targets), leading, removable)


def _rehearsed(
    recipe: Recipe, dense: Stack, structure: Structure, targets: Sequence[Target]
) -> Removable:
    """The blocks that may go, of which there is no question where blocks are added."""
    if growth := METHODS[recipe.method].growth:
        copies = growth.place(recipe, len(dense))
        rehearse_deeper(dense, structure, deeper(dense, copies))
        return ANY
    if recipe.spec.narrows:  # `check_width` has built what comes of it
        return ANY
    counts = tuple(sorted({target.remove for target in targets}))
    known = json.dumps(dense.config, sort_keys=True, default=str), counts
    if known not in _REHEARSED:
        _REHEARSED[known] = rehearse(dense, structure, counts)
    return _REHEARSED[known]


def _check_search(recipe: Recipe, removable: Removable) -> None:
    if recipe.search and removable.from_the_end:
        problem = f"there is nothing to choose; {removable.in_words()}"
        raise UserError("search", list(recipe.search.candidates), problem, "leave search out")
    if recipe.spec.choice == "run" and removable != ANY:
        problem = f"a run of blocks needs a model of which any can go; {removable.in_words()}"
        raise UserError("method", recipe.method, problem, "use method: mi")


def named_texts(recipe: Recipe) -> Iterator[tuple[WeightedText | Evaluation, str]]:
    """Every text that the recipe says where to read, with its recipe key; of a held-out text with
    what `calibration` decides for it."""
    for section, texts in (("calibration", recipe.calibration), ("heal", recipe.heal)):
        if texts and texts.data:
            for part, key in zip(texts.parts, data_keys(texts, section), strict=True):
                if not isinstance(part, GeneratedText):
                    yield part, key
    for name, text in recipe.evaluation.items():
        if copy := text.copy_of_published:
            yield Evaluation(data=copy, images=False), f"evaluation.{name}.data"
        elif not text.published:
            yield text, f"evaluation.{name}.data"


def window_lengths(recipe: Recipe) -> dict[str, int]:
    """Tokens of each text's windows, by recipe key."""
    lengths = {"calibration.length": recipe.calibration.length}
    for name, text in recipe.evaluation.items():
        lengths[f"evaluation.{name}.length"] = text.length_or(recipe.calibration.length)
    return lengths


def leading_tokens(recipe: Recipe, tokenizer: Any) -> dict[str, int | None]:
    """The token that windows begin with, by the recipe key of their text. A held-out text that says
    nothing has the calibration text's, and a published one none.

    Raises:
        UserError: see `calibration.leading_token`, `check_beginning`.
    """
    for section, texts in (("calibration", recipe.calibration), ("heal", recipe.heal)):
        if texts and texts.data:
            for part, key in zip(texts.parts, data_keys(texts, section), strict=True):
                if isinstance(part, GeneratedText):
                    check_beginning(part, tokenizer, key)
    calibration = leading_token(recipe.calibration.bos, tokenizer, "calibration.bos")
    leading = {"calibration": calibration}
    for name, text in recipe.evaluation.items():
        key = f"evaluation.{name}"
        default = None if text.published else calibration
        leading[key] = leading_token(text.bos, tokenizer, f"{key}.bos") if text.bos else default
    return leading
