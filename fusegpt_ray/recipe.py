"""What the user asks for: one YAML file, checked key by key, without importing torch.

Notable:
- an unknown key is an error that names the nearest valid key;
- `fusion.preset` fills in only the keys that the recipe leaves out;
- what depends on the model (its depth, its positions) is checked later, in `preflight.py`, but
  still before weights are read.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from fusegpt_ray.errors import UserError
from fusegpt_ray.sections import (
    METHOD_SPECS,
    PRESETS,
    Calibration,
    Cluster,
    Evaluation,
    Fusion,
    Heal,
    Importance,
    Method,
    Model,
    Output,
    Seed,
)
from fusegpt_ray.text_sections import Section
from fusegpt_ray.uris import shown

HEAL_TIMES = 8
"""So many times the calibration's tokens are what a model is healed on, unless the recipe says."""
MAX_BYTES = 1_000_000
"""The largest file that is read as a recipe."""
S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses two things more: a key that is given twice in one mapping, of which
    PyYAML would silently keep the last, and aliases, by which a few lines can expand to more than
    fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) is not taken here: write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Recipe(Section):
    """One compression run."""

    model: Model
    sparsity: Annotated[tuple[float, ...], BeforeValidator(_one_or_many)] = (0.25,)
    """Fraction of the blocks to remove, in (0, 1); several publish one model each from a single
    run."""
    method: Method = "fusegpt"
    """`mi`: drop blocks only. `mi+linear`: drop, and repair the block before in closed form
    (`fusion.start`). `mi+ft`: drop and fine-tune the group. `fusegpt`: fuse and fine-tune."""
    seed: Seed = 0
    """Initial values of everything that learns."""
    calibration: Calibration
    evaluation: dict[str, Evaluation] = Field(default_factory=dict)
    """Held-out texts by name; each gets a perplexity of the dense, the dropped and the fused model.
    """
    importance: Importance = Importance()
    fusion: Fusion = Fusion()
    heal: Heal | None = None
    """Whole-model training after the last round; left out: none."""
    cluster: Cluster = Cluster()
    output: Output

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("fusion") or {}, Mapping):
            fusion = dict(data.get("fusion") or {})
            preset = PRESETS.get(str(fusion.get("preset", "default")), {})
            spec = METHOD_SPECS.get(str(data.get("method")))
            if spec is not None and spec.repairs:
                preset = {"start": "linear", **preset}
            return {**data, "fusion": {**preset, **fusion}}
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for value in self.sparsity:
            if not (math.isfinite(value) and 0 < value < 1):
                raise UserError(
                    "sparsity",
                    value,
                    "not between 0 and 1",
                    "give the fraction to remove, such as 0.25",
                )
        percents = [percent(value) for value in self.sparsity]
        if not percents or len(set(percents)) < len(percents):
            raise UserError(
                "sparsity",
                list(self.sparsity),
                "two of them have the same name, or there is none",
                "list each one once",
            )
        if self.calibration.windows < self.importance.windows:
            raise UserError(
                "importance.windows",
                self.importance.windows,
                f"scoring uses the first of the {self.calibration.windows} calibration windows",
                "lower it, or raise calibration.windows",
            )
        if self.importance.all and self.importance.racing is not None:
            raise UserError(
                "importance.racing",
                self.importance.racing,
                "importance.all scores every block",
                "leave one of them out",
            )
        if self.trains_groups:
            _check_whole_batches("calibration.windows", self.calibration.windows, self.fusion.batch)
        _check_shares(self.cluster, "fusion.batch", self.fusion.batch)
        if self.heal:
            batch = self.heal.batch
            _check_whole_batches("heal.held_out", self.heal.held_out, batch, "heal.batch")
            _check_shares(self.cluster, "heal.batch", batch)
            if not self.healing_windows:
                problem = f"less than one loss batch of {batch} windows"
                least = batch * self.calibration.length
                raise UserError("heal.tokens", self.heal.tokens, problem, f"use at least {least}")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        start, spec = self.fusion.start, METHOD_SPECS[self.method]
        if spec.repairs == (start == "none") and not spec.trains:
            does, other = ("repair", "mi") if spec.repairs else ("drop blocks", "mi+linear")
            problem = f"all that method {self.method} does is {does}"
            raise UserError("fusion.start", start, problem, f"leave it out, or use method: {other}")
        return self

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.trains_groups or self.heal is not None

    @property
    def trains_groups(self) -> bool:
        """Whether the method trains the blocks around a removed one."""
        return METHOD_SPECS[self.method].trains

    @property
    def fuses(self) -> bool:
        """Whether the method fuses the removed blocks into their neighbours."""
        return METHOD_SPECS[self.method].fuses

    @property
    def healing_windows(self) -> int:
        """How many windows a model is healed on, in whole loss batches, if the text has as many."""
        assert self.heal
        length = self.calibration.length
        tokens = self.heal.tokens or HEAL_TIMES * self.calibration.windows * length
        return tokens // length // self.heal.batch * self.heal.batch

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
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
            text = raw.decode()
        except (OSError, ValueError) as error:
            # ValueError: not UTF-8, or a path that no file can have.
            raise UserError(
                "recipe", str(path), f"cannot be read ({error})", "give the path of a YAML recipe"
            ) from error
        if len(raw) > MAX_BYTES:
            raise UserError(
                "recipe",
                str(path),
                f"longer than {MAX_BYTES} bytes",
                "give the path of a YAML recipe",
            )
        try:
            data = _yaml(text)
        except ValueError as error:
            raise UserError(
                "recipe", str(path), f"not valid YAML ({error})", "see examples/quickstart.yaml"
            ) from error
        if not isinstance(data, dict):
            raise UserError(
                "recipe",
                str(path),
                "not a mapping of keys to values",
                "see examples/quickstart.yaml",
            )
        for override in overrides:
            _override(data, override)
        return cls.parse(data)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """The recipe in `data`.

        Raises:
            UserError: a key is unknown or missing, or a value is wrong.
        """
        return cls.check(cls, data, "recipe")

    @staticmethod
    def check(section: type[S], data: Any, name: str) -> S:
        """One section of a recipe given by other means, such as command-line arguments. `name` is
        what an error message calls it.
        """
        try:
            return section.model_validate(data)
        except ValidationError as error:
            raise _explain(section, error, name) from error


def _check_whole_batches(
    key: str, windows: int, batch: int, batch_key: str = "fusion.batch"
) -> None:
    if windows % batch:
        raise UserError(
            key,
            windows,
            f"not a multiple of {batch_key} = {batch}, which is a dimension of the loss",
            f"use {math.ceil(windows / batch) * batch}",
        )


def _check_shares(cluster: Cluster, batch_key: str, batch: int) -> None:
    """A loss batch is shared evenly by the workers, and a worker's share by its micro-batches."""
    workers, micro_batch = cluster.workers, cluster.micro_batch
    if batch % workers:
        problem = f"does not divide {batch_key} = {batch}"
        raise UserError(
            "cluster.workers",
            workers,
            f"{problem}, so workers would hold unequal parts of a loss batch",
            f"use one of {_divisors(batch)}",
        )
    share = batch // workers
    if micro_batch and share % micro_batch:
        problem = f"does not divide the {share} windows of a loss batch that each worker takes"
        raise UserError(
            "cluster.micro_batch", micro_batch, problem, f"use one of {_divisors(share)}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def percent(sparsity: float) -> str:
    """The sparsity in a model's name: 0.25 → "25", 0.125 → "12.5"."""
    return f"{sparsity * 100:.6f}".rstrip("0").rstrip(".")


def blocks_to_remove(dense_blocks: int, sparsity: float) -> int:
    """ceil(N × sparsity) (paper, section 3); the tolerance keeps 20 × 0.15 at 3, not 4, where
    floats overshoot.
    """
    return math.ceil(dense_blocks * sparsity - 1e-9)


def _yaml(text: str) -> Any:
    """
    Raises:
        ValueError: says what is wrong and in which line, without quoting it, for it may hold a
            secret.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"line {mark.line + 1 if mark else '?'}: {error.problem or error.context}"
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        raise ValueError(str(error).partition("\n")[0]) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML raises these for `!!int {}` and the like.
        raise ValueError(f"a value that is none ({type(error).__name__})") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            "--set",
            shown(override),
            "not of the form key=value",
            "write for example --set fusion.epochs=5",
        )
    try:
        value = _yaml(text)
    except ValueError as error:
        raise UserError(
            "--set", shown(override), f"the value is not YAML ({error})", "quote it"
        ) from error
    *parents, last = key.split(".")
    section: Any = data
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(
                "--set",
                shown(override),
                f"{parent} is not a section",
                "see docs/recipe.md for all keys",
            )
    section[last] = value


def _explain(root: type[BaseModel], error: ValidationError, name: str) -> UserError:
    """Pydantic's first complaint as one message with key, value and fix."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    path = [str(part)[:99] for part in first["loc"]]
    key = ".".join(path if root is Recipe else [name, *path]) or name
    if isinstance(cause, UserError):
        return cause if cause.key else UserError(key, cause.value, cause.problem, cause.fix)
    if first["type"] == "extra_forbidden":
        known = _keys_at(root, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        prefix = "".join(f"{part}." for part in path[:-1])
        fix = (
            f"did you mean {prefix}{near[0]}?"
            if near
            else f"the keys here are {', '.join(sorted(known))}"
        )
        return UserError(
            key, shown(first["input"]), "unknown key", fix.rstrip("?") if near else fix
        )
    if first["type"] == "missing":
        return UserError(key, None, "missing", f"add {key} to the recipe")
    return UserError(
        key, shown(first["input"]), first["msg"][0].lower() + first["msg"][1:], f"change {key}"
    )


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    model = root
    for part in path:  # a name of a text, or a number in a list of them, leads to no other section
        if part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, be it in a mapping or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
