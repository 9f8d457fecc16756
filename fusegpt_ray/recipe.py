"""What the user asks for: one YAML file, checked key by key, without importing torch.

Notable:
- an unknown key is an error that names the nearest valid key;
- `fusion.preset` fills in only what the recipe leaves unsaid;
- what depends on the model (its depth, its positions) is checked later, in `preflight.py`, still before weights are read.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fusegpt_ray.errors import UserError
from fusegpt_ray.uris import refuse_secret, shown

Method = Literal["mi", "mi+ft", "fusegpt"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
MOST = 10_000_000
"""Of anything that is counted: a number beyond is a slip, and would be found out by the memory."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MAX_BYTES = 1_000_000
"""Of a recipe's file."""


def _without_secret(uri: str) -> str:
    refuse_secret("", uri)  # `_explain` knows the key
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_without_secret)]

PRESETS: dict[str, dict[str, Any]] = {
    # method.md, the paper's public code, row by row.
    "paper": {
        "loss": "batch_kl",
        "teacher": "current",
        "learning_rate": 1e-3,
        "lora_learning_rate": 9.65e-6,
        "trained_dtype": "model",
        "fold": "at_end",
    },
    # Where the paper's recipe leaks (benchmarks/quality.py measures each): a teacher that degrades with the model, a loss
    # blind to shifts common to the batch, a LoRA rate that moves nothing, bf16 masters.
    "default": {
        "loss": "normalized_mse",
        "teacher": "dense",
        "learning_rate": 1e-3,
        "lora_learning_rate": 3e-4,
        "trained_dtype": "float32",
        "fold": "at_end",
    },
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key said twice in one mapping, instead of keeping the last in silence; and aliases, by which a few
    lines can stand for more than a memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not taken here: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Section(BaseModel):
    """One section of the recipe: immutable, every key known."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


class Model(Section):
    """The dense model."""

    source: Uri
    """Local folder, Hugging Face hub id, or any fsspec URI (s3://…, gs://…) of a safetensors checkpoint."""
    revision: str | None = None
    """Hub only: branch, tag or commit."""
    dtype: Dtype = "auto"
    """Arithmetic of scoring and fine-tuning, never the output's dtype; `auto`: float32 on a CPU, bfloat16 on a GPU for a 16-bit
    checkpoint. float16 is not offered: gradients underflow in it."""


class Text(Section):
    """Where text comes from."""

    data: Uri
    """Text, JSONL or Parquet file(s): a path, glob or fsspec URI; or a `datasets` id such as `wikitext`."""
    config: str | None = None
    """`datasets` only: the configuration, such as `wikitext-2-raw-v1`."""
    split: str = "train"
    """`datasets` only: the split."""
    revision: str | None = None
    """`datasets` only: branch, tag or commit."""
    column: str = "text"
    """The column that holds the text (JSONL, Parquet, `datasets`)."""


class Calibration(Text):
    """Windows of text that scoring and fine-tuning see."""

    windows: int = Field(1024, ge=1, le=MOST)
    """How many windows fine-tuning uses; scoring uses the first `importance.windows` of them."""
    length: int = Field(2048, ge=2, le=MOST)
    """Tokens a window."""
    seed: Seed = 0
    """Where the windows start: random.Random(seed), as in the paper's code."""
    piece_mb: int = Field(16, ge=1, le=MOST)
    """Rows are joined and tokenised in pieces of at most this many megabytes; a tokenizer takes some 165 bytes for each."""


class Evaluation(Text):
    """Held-out text for the perplexities of the report."""

    split: str = "test"
    """`datasets` only: the split."""
    length: int | None = Field(None, ge=2, le=MOST)
    """Tokens a window; left out: `calibration.length`."""
    windows: int | None = Field(None, ge=1, le=MOST)
    """Only the first so many windows; left out: the whole text."""


class Importance(Section):
    """How the block to remove is chosen (Macro Influence)."""

    windows: int = Field(32, ge=1, le=MOST)
    """How many windows score the blocks: the first ones of the calibration."""
    batch: int = Field(4, ge=1, le=MOST)
    """Windows that pass a block in one call, and the steps in which scoring stops a block that cannot be the lowest: small saves work
    as long as batch × `calibration.length` tokens keep the device busy. Fixed by the recipe, never by the cluster: sums are the same
    on any. Bounds the memory of activations in scoring, evaluation and the states for fine-tuning."""
    all: bool = False
    """Score every block on all windows, though the choice is the same: for tables of all scores (`fusegpt score` always does)."""
    racing: float | None = Field(None, gt=0, lt=1)
    """Probability with which another block than that of the full table may be chosen, to give up most blocks after a few windows by
    paired tests (assumptions: `importance/racing.py`), such as 0.05; left out: the choice is exact."""


class Fusion(Section):
    """How the chosen block is fused into its neighbours, and how the group is fine-tuned (method.md)."""

    preset: Literal["default", "paper"] = "default"
    """Fills in the keys of this section that the recipe leaves out: `paper` as published, `default` as measured best here."""
    group_size: int = Field(7, ge=1, le=MOST)
    """Neighbours that take the donor in; with the donor, one block more."""
    rank: int = Field(128, ge=1, le=MOST)
    """Rank r of the fusion coefficients C·D."""
    lora_rank: int = Field(128, ge=1, le=MOST)
    """Rank of the low-rank update B·A on the neighbours' own weights."""
    epochs: int = Field(20, ge=1, le=MOST)
    """Passes over the calibration windows for each removed block."""
    batch: int = Field(8, ge=2, le=MOST)
    """Windows a loss batch (a dimension of the loss, whatever the number of workers)."""
    loss: Literal["batch_kl", "normalized_mse"] = "normalized_mse"
    """`batch_kl`: the paper's KL of softmaxes over the batch. `normalized_mse`: squared error between RMS-normalised states."""
    teacher: Literal["current", "dense"] = "dense"
    """`current`: the group as it was before this round (paper). `dense`: the dense model at the same depth; errors do not pile up."""
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Adam's rate for the fusion coefficients C, D and c."""
    lora_learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Adam's rate for everything else that learns: LoRA and norm weights."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's betas."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Adam's epsilon."""
    trained_dtype: Literal["float32", "model"] = "float32"
    """`float32`: masters and optimizer state in float32. `model`: in the arithmetic's dtype, bf16 on GPUs (paper)."""
    fold: Literal["at_end", "each_round"] = "at_end"
    """`at_end`: a neighbour keeps training the terms of earlier rounds (paper). `each_round`: they are folded; less memory."""


class Cluster(Section):
    """Where the work runs. Nothing here changes the result beyond floating-point reordering."""

    engine: Literal["ray", "local"] = "ray"
    """`ray`: a Ray cluster, or a local Ray if none runs. `local`: one process, neither Ray nor DeepSpeed imported."""
    address: Uri | None = None
    """Ray address; left out: the cluster this job runs in (RAY_ADDRESS), else a local Ray."""
    replicas: int = Field(1, ge=1, le=MOST)
    """Model replicas that score blocks and compute states in parallel."""
    gpus_per_replica: float | None = Field(None, ge=0, allow_inf_nan=False)
    """GPUs a replica and a training worker each take; left out: 1 if the cluster has GPUs, else 0."""
    workers: int = Field(1, ge=1, le=MOST)
    """Data-parallel training workers of a group; divides `fusion.batch`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage of the training workers."""
    micro_batch: int | None = Field(None, ge=1, le=MOST)
    """Windows that pass a worker's group at once: fewer take less memory; left out: its whole share of the loss batch.
    Divides that share, `fusion.batch` / `workers`."""
    recompute_activations: bool = False
    """Each block's activations are computed again in the backward pass: less memory, a third more work."""
    savepoint_minutes: float = Field(5, ge=0, allow_inf_nan=False)
    """Fine-tuning keeps what it has learned after the first epoch that ends so many minutes after the last savepoint; 0: after every
    epoch. A killed run goes on from there."""
    weights: Literal["auto", "resident", "streamed"] = "auto"
    """What a replica does with the blocks' weights. `resident`: keep them on its device between walks and rounds. `streamed`: read
    them for every walk, one block ahead. `auto`: keep them if they take at most 40 % of the memory that is free when it starts."""
    object_store_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Size of a local Ray's object store; left out: Ray's own choice, 30 % of the memory. A cluster's is set where it is started."""
    cache_gb: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Disk that a node may use for blocks fetched from object storage, in `$FUSEGPT_CACHE` or the temporary folder; left out: half of
    what is free; 0: none."""


class Output(Section):
    """Where finished models go."""

    uri: Uri
    """Folder or fsspec URI; models appear as `<uri>/<name>-p<percent>/`."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the published folders' names."""
    shard_gb: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Largest safetensors file."""


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Recipe(Section):
    """One compression run."""

    model: Model
    sparsity: Annotated[tuple[float, ...], BeforeValidator(_one_or_many)] = (0.25,)
    """Fraction of the blocks to remove, in (0, 1); several publish one model each from a single run."""
    method: Method = "fusegpt"
    """`mi`: drop blocks only. `mi+ft`: drop and fine-tune the group. `fusegpt`: fuse and fine-tune."""
    seed: Seed = 0
    """Initial values of everything that learns."""
    calibration: Calibration
    evaluation: dict[str, Evaluation] = {}
    """Held-out texts by name; each gets a perplexity of the dense, the dropped and the fused model."""
    importance: Importance = Importance()
    fusion: Fusion = Fusion()
    cluster: Cluster = Cluster()
    output: Output

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("fusion") or {}, Mapping):
            fusion = dict(data.get("fusion") or {})
            preset = PRESETS.get(str(fusion.get("preset", "default")), {})
            return {**data, "fusion": {**preset, **fusion}}
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for value in self.sparsity:
            if not (math.isfinite(value) and 0 < value < 1):
                raise UserError("sparsity", value, "not between 0 and 1", "give the fraction to remove, such as 0.25")
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
            raise UserError("importance.racing", self.importance.racing, "importance.all scores every block", "leave one of them out")
        if self.method != "mi" and self.calibration.windows % self.fusion.batch:
            raise UserError(
                "calibration.windows",
                self.calibration.windows,
                f"not a multiple of fusion.batch = {self.fusion.batch}, and the batch is a dimension of the loss",
                f"use {math.ceil(self.calibration.windows / self.fusion.batch) * self.fusion.batch}",
            )
        if self.fusion.batch % self.cluster.workers:
            raise UserError(
                "cluster.workers",
                self.cluster.workers,
                f"does not divide fusion.batch = {self.fusion.batch}, so workers would hold unequal parts of a loss batch",
                f"use one of {_divisors(self.fusion.batch)}",
            )
        share, micro_batch = self.fusion.batch // self.cluster.workers, self.cluster.micro_batch
        if micro_batch and share % micro_batch:
            problem = f"does not divide the {share} windows of a loss batch that each worker takes"
            raise UserError("cluster.micro_batch", micro_batch, problem, f"use one of {_divisors(share)}")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML recipe; `overrides` are `key=value` with dotted keys and YAML values, as given to `--set`.

        Raises:
            UserError: the file is missing or not YAML, or a key or value in it is wrong.
        """
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
            text = raw.decode()
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
            raise UserError("recipe", str(path), f"cannot be read ({error})", "give the path of a YAML recipe") from error
        if len(raw) > MAX_BYTES:
            raise UserError("recipe", str(path), f"longer than {MAX_BYTES} bytes", "give the path of a YAML recipe")
        try:
            data = _yaml(text)
        except ValueError as error:
            raise UserError("recipe", str(path), f"not valid YAML ({error})", "see examples/quickstart.yaml") from error
        if not isinstance(data, dict):
            raise UserError("recipe", str(path), "not a mapping of keys to values", "see examples/quickstart.yaml")
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
        """One section of a recipe given by other means, such as command-line arguments; `name` is for the message."""
        try:
            return section.model_validate(data)
        except ValidationError as error:
            raise _explain(section, error, name) from error


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def percent(sparsity: float) -> str:
    """The sparsity in a model's name: 0.25 → "25", 0.125 → "12.5"."""
    return f"{sparsity * 100:.6f}".rstrip("0").rstrip(".")


def blocks_to_remove(dense_blocks: int, sparsity: float) -> int:
    """ceil(N × sparsity) (paper, section 3); the tolerance keeps 20 × 0.15 at 3, not 4, where floats overshoot."""
    return math.ceil(dense_blocks * sparsity - 1e-9)


def _yaml(text: str) -> Any:
    """
    Raises:
        ValueError: what is wrong, and in which line; it quotes nothing, for a line may hold a secret.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        raise ValueError(str(error).partition("\n")[0]) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # what PyYAML makes of `!!int {}`, and the like
        raise ValueError(f"a value that is none ({type(error).__name__})") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError("--set", shown(override), "not of the form key=value", "write for example --set fusion.epochs=5")
    try:
        value = _yaml(text)
    except ValueError as error:
        raise UserError("--set", shown(override), f"the value is not YAML ({error})", "quote it") from error
    *parents, last = key.split(".")
    section: Any = data
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError("--set", shown(override), f"{parent} is not a section", "see the recipe's keys in the README")
    section[last] = value


def _explain(root: type[BaseModel], error: ValidationError, name: str) -> UserError:
    """The first of pydantic's complaints as one message with key, value and fix."""
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
        fix = f"did you mean {prefix}{near[0]}?" if near else f"the keys here are {', '.join(sorted(known))}"
        return UserError(key, shown(first["input"]), "unknown key", fix.rstrip("?") if near else fix)
    if first["type"] == "missing":
        return UserError(key, None, "missing", f"add {key} to the recipe")
    return UserError(key, shown(first["input"]), first["msg"][0].lower() + first["msg"][1:], f"change {key}")


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    model: type[BaseModel] = root
    for part in path:
        if model is Recipe and part == "evaluation":
            model = Evaluation
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
