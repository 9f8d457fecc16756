"""What the user asks for: one YAML file, checked key by key, without importing torch.

Notable:
- an unknown key is an error that names the nearest valid key;
- `preset` fills in only what the recipe leaves out (`presets.py`);
- what depends on the model (its depth, its positions) is checked later, but still before weights
  are read: see `preparing/preflight.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import deeper
from fusegpt_ray.recipe.checks import budget, images, shares, whole_batches
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.messages import Several, explained
from fusegpt_ray.recipe.output_section import Output
from fusegpt_ray.recipe.presets import filled
from fusegpt_ray.recipe.sections import (
    Calibration,
    Evaluation,
    Fusion,
    Heal,
    Importance,
    Method,
    Model,
    Preset,
    Search,
    Seed,
    one_or_many,
)
from fusegpt_ray.recipe.specs import METHOD_SPECS, MethodSpec
from fusegpt_ray.recipe.text_sections import GeneratedText, Section, TextPart, Texts
from fusegpt_ray.recipe.yaml_text import read_recipe

S = TypeVar("S", bound=Section)


class Recipe(Section):
    """One compression run."""

    model: Model
    sparsity: Annotated[tuple[float, ...], BeforeValidator(one_or_many)] = (0.25,)
    """Fraction of the blocks to remove, in (0, 1), with method `slicegpt` of the hidden size;
    several publish one model each from a single run."""
    depth: deeper.Depth = None
    """Methods that make models deeper: the share of blocks to add, such as +25%."""
    every: deeper.Every = None
    """Method `tli`: or a new block after every so many, as many as that gives."""
    preset: Preset = "best"
    """Fills in what the recipe leaves out of `fusion`, and with method `fusegpt` also `heal`.
    `best`: short rounds, then healing, the best for as many tokens of healing. `rounds`: longer
    ones, and no healing. `paper`: as published, and no healing."""
    method: Method = "fusegpt"
    """`mi`: drop blocks only. `mi+linear`: drop, and repair the block before in closed form
    (`fusion.start`). `mi+ft`: drop and fine-tune the group. `fusegpt`: fuse and fine-tune. These
    choose by `importance`. `streamline`: one trained block in place of a run of blocks. `slicegpt`:
    a smaller hidden size instead, in closed form. The others are to compare with, choose as
    published, and drop only: `shortgpt`, `sleb`, `angular`, `foldgpt`, and the controls `last` and
    `random`. Two make models deeper, by `depth`, and have no `sparsity`: `tli` inserts copies that
    begin as nothing, `dus` has the first and the last blocks overlap."""
    seed: Seed = 0
    """Initial values of everything that learns, and what method `random` draws."""
    calibration: Calibration
    evaluation: dict[str, Evaluation] = Field(default_factory=dict)
    """Held-out texts by name; each gets a perplexity of the model at every stage."""
    importance: Importance = Importance()
    search: Search | None = None
    """A tournament that chooses the blocks; left out: each round chooses by `importance`."""
    fusion: Fusion = Fusion()
    heal: Heal | None = None
    """Whole-model training after the last round; left out: none."""
    cluster: Cluster = Cluster()
    output: Output

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        return filled(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks = [self._between_keys, self._search_fits, self._start_fits]
        checks += [self._choice_fits, self._width_fits, self._documents_fit, self._depth_fits]
        found = [mistake for check in checks for mistake in check()]
        if found := [*found, *budget(self.cluster)]:
            raise Several(found)
        return self

    def _between_keys(self) -> Iterator[UserError]:
        for value in self.sparsity:
            if not (math.isfinite(value) and 0 < value < 1):
                fix = "give the fraction to remove, such as 0.25"
                yield UserError("sparsity", value, "not between 0 and 1", fix)
        percents = [percent(value) for value in self.sparsity]
        if len(set(percents)) < max(len(percents), not self.spec.inserts):
            problem = "two of them have the same name, or there is none"
            yield UserError("sparsity", list(self.sparsity), problem, "list each one once")
        if self.calibration.windows < self.importance.windows:
            yield UserError(
                "importance.windows",
                self.importance.windows,
                f"scoring uses the first of the {self.calibration.windows} calibration windows",
                "lower it, or raise calibration.windows",
            )
        if self.importance.all and self.importance.racing is not None:
            yield UserError(
                "importance.racing",
                self.importance.racing,
                "importance.all scores every block",
                "leave one of them out",
            )
        if self.spec.trains:
            yield from whole_batches(
                "calibration.windows", self.calibration.windows, self.fusion.batch
            )
            yield from shares(self.cluster, "fusion.batch", self.fusion.batch)
        if self.heal:
            batch = self.heal.batch
            yield from whole_batches("heal.held_out", self.heal.held_out, batch, "heal.batch")
            yield from shares(self.cluster, "heal.batch", batch)
            if not self.healing_windows:
                problem = f"less than one loss batch of {batch} windows"
                least = batch * self.calibration.length
                yield UserError("heal.tokens", self.heal.tokens, problem, f"use at least {least}")

    def _search_fits(self) -> Iterator[UserError]:
        if self.search is None:
            return
        names = list(self.search.candidates)
        if len(set(names)) < max(2, len(names)):
            problem = "a tournament is between at least two different ways"
            yield UserError("search.candidates", names, problem, "list two or more, each once")
        if not self.spec.by_metric or self.spec.choice == "once":
            none = self.spec.choice == "none"
            problem = f"method {self.method} "
            problem += "removes no blocks" if none else "chooses the blocks itself"
            yield UserError("search", "given", problem, "use method: mi, or leave out search")
        if self.heal is None:
            problem = "the sets are compared after a short healing, and the recipe has no heal"
            yield UserError("search", "given", problem, "add heal: {}, or leave out search")

    def _start_fits(self) -> Iterator[UserError]:
        start, spec = self.fusion.start, self.spec
        if start == "auto" and not spec.trains_groups:
            problem, fix = "it may come to none, and this method has no other step", "choose one"
            yield UserError("fusion.start", start, problem, fix)
        if spec.repairs == (start == "none") and not spec.trains_groups:
            does, other = ("repair", "mi") if spec.repairs else (spec.does, "mi+linear")
            problem = f"all that method {self.method} does is {does}"
            fix = "leave it out" + f", or use method: {other}" * (spec.choice != "none")
            yield UserError("fusion.start", start, problem, fix)

    def _choice_fits(self) -> Iterator[UserError]:
        spec, metric = self.spec, self.importance.metric
        if spec.metric not in (None, metric):
            problem = f"method {self.method} goes by {spec.metric}"
            fix = f"leave it out, or use method: mi, which goes by any metric, {metric} too"
            yield UserError("importance.metric", metric, problem, fix)
        if self.fusion.light != "block" and not spec.light:
            problem, fix = f"method {self.method} has no light block", "use method: streamline"
            yield UserError("fusion.light", self.fusion.light, problem, f"leave it out, or {fix}")
        if not spec.nested and len(self.sparsity) > 1 and not spec.inserts:
            what = "makes another model" if spec.narrows else "chooses other blocks"
            problem = f"method {self.method} {what} for each of them"
            yield UserError("sparsity", list(self.sparsity), problem, "give one in each recipe")

    def _width_fits(self) -> Iterator[UserError]:
        if self.spec.narrows and self.heal and self.heal.hidden:
            problem = f"method {self.method} makes it narrower: its states have another size"
            yield UserError("heal.hidden", self.heal.hidden, problem, "leave it out")

    def _depth_fits(self) -> Iterator[UserError]:
        yield from deeper.mistakes(self.method, self.depth, self.every, self.sparsity)
        if self.heal:
            heal = self.heal
            yield from deeper.healing_mistakes(self.method, heal.loss, heal.train, heal.share)
            if heal.share is None and heal.share_by != "place":
                problem = "without heal.share there are no groups"
                yield UserError(
                    "heal.share_by", heal.share_by, problem, "give heal.share, such as 2"
                )
        if self.heal and self.heal.loss == "tokens" and self.heal.hidden:
            problem = "with heal.loss: tokens no dense model is run whose states there could be"
            yield UserError("heal.hidden", self.heal.hidden, problem, "leave one of them out")

    def _documents_fit(self) -> Iterator[UserError]:
        healing = self.heal.parts if self.heal and self.heal.data else ()
        texts = (*self.calibration.parts, *healing)
        if not self.calibration.pack and any(isinstance(text, GeneratedText) for text in texts):
            problem = "text that the dense model writes has no documents"
            yield UserError("calibration.pack", False, problem, "leave one of the two out")
        for where, text in self._texts():
            if not isinstance(text, GeneratedText):
                yield from images(where, text, self.sees(text))
        if self.importance.tokens == "image" and not any(map(self.sees, self.calibration.parts)):
            fix = "use all, or calibrate on conversations with images"
            yield UserError("importance.tokens", "image", "the calibration has no images", fix)

    @property
    def keys_of_images(self) -> list[str]:
        """The keys that ask for images, those of `calibration` first."""
        keys = [
            "calibration.images" if text.images is None else f"{where}.images"
            for where, text in self._texts()
            if not isinstance(text, GeneratedText) and self.sees(text)
        ]
        return list(dict.fromkeys(keys))

    def _texts(self) -> Iterator[tuple[str, TextPart | Evaluation]]:
        """All texts, each with the key under which it stands, those of `calibration` first."""
        for name, section in (("calibration", self.calibration), ("heal", self.heal)):
            if section and section.data:
                several = isinstance(section.data, tuple)
                for number, part in enumerate(section.parts):
                    yield f"{name}.data.{number}" if several else name, part
        for name, text in self.evaluation.items():
            yield f"evaluation.{name}", text

    def sees(self, text: TextPart | Evaluation) -> bool:
        """Whether it is one of conversations with images."""
        if isinstance(text, GeneratedText) or (isinstance(text, Evaluation) and text.published):
            return False
        return self.calibration.images if text.images is None else text.images

    @property
    def spec(self) -> MethodSpec:
        """What is known of the method."""
        return METHOD_SPECS[self.method]

    @property
    def chosen_by(self) -> str:
        """What is lowest of the block that goes, for people."""
        return self.spec.chosen_by or self.importance.spec.title

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.spec.trains or self.heal is not None

    @property
    def trains_groups(self) -> bool:
        """Whether the method trains the blocks around a removed one."""
        return self.spec.trains_groups

    @property
    def fuses(self) -> bool:
        """Whether the method fuses the removed blocks into their neighbours."""
        return self.spec.fuses

    @property
    def inserts(self) -> bool:
        """Whether the method makes the model deeper."""
        return bool(METHOD_SPECS[self.method].inserts)

    def blocks_to_add(self, dense_blocks: int) -> int:
        """How many blocks a model of so many gets; 0 where the method removes some."""
        if not self.inserts:
            return 0
        return deeper.blocks_to_add(dense_blocks, self.depth, self.every)

    @property
    def healing_windows(self) -> int:
        """How many windows a model is healed on, in whole loss batches, if the text has as many."""
        assert self.heal
        length = self.calibration.length
        tokens = self.heal.tokens or self.calibration.windows * length
        return tokens // length // self.heal.batch * self.heal.batch

    @property
    def healing_texts(self) -> tuple[Texts, str]:
        """The texts that healing draws from, and their section."""
        assert self.heal
        return (self.heal, "heal") if self.heal.data else (self.calibration, "calibration")

    @property
    def trial_windows(self) -> int:
        """How many windows each set of blocks is healed on in the tournament, in whole loss
        batches: at least one, and no more than a model is.
        """
        assert self.heal and self.search
        batch, healed = self.heal.batch, self.healing_windows
        tokens = self.search.tokens
        windows = tokens // self.calibration.length if tokens else healed // 8
        return min(max(1, windows // batch) * batch, healed)

    @property
    def repairs(self) -> bool:
        """Whether the block before a gap is repaired in closed form."""
        return self.fusion.start != "none"

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML recipe; `overrides` are `key=value` with dotted keys and YAML values, as
        given to `--set`.

        Raises:
            UserError: the file is missing or not YAML, or a key or value in it is wrong.
        """
        return cls.parse(read_recipe(path, overrides))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """The recipe in `data`.

        Raises:
            UserError: a key is unknown or missing, or a value is wrong.
        """
        return cls.check(cls, data, "")

    @classmethod
    def mistakes(cls, data: Mapping[str, Any]) -> list[UserError]:
        """All that `parse` would find wrong in it. What is wrong between keys is looked for once
        each of them is right.
        """
        try:
            cls.model_validate(data)
        except ValidationError as error:
            return explained(cls, error, data)
        return []

    @staticmethod
    def check(section: type[S], data: Any, name: str) -> S:
        """One section of a recipe given by other means, such as command-line arguments. `name` is
        what an error message calls it; nothing for a whole recipe.
        """
        try:
            return section.model_validate(data)
        except ValidationError as error:
            raise explained(section, error, data, name)[0] from error


def percent(sparsity: float) -> str:
    """The sparsity in a model's name: 0.25 → "25", 0.125 → "12.5"."""
    return f"{sparsity * 100:.6f}".rstrip("0").rstrip(".")


def blocks_to_remove(dense_blocks: int, sparsity: float) -> int:
    """ceil(N × sparsity) (paper, section 3); the tolerance keeps 20 × 0.15 at 3, not 4, where
    floats overshoot.
    """
    return math.ceil(dense_blocks * sparsity - 1e-9)
