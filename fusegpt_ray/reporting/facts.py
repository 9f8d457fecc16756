"""What a manifest, or the journal of a run that is under way, tells. Light: no torch.

Anybody may have written a manifest, so it is not believed to have the right shape. The records of a
journal bear checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.reporting.prices import Prices, Spent
from fusegpt_ray.reporting.under_way import under_way
from fusegpt_ray.reporting.written import Sample
from fusegpt_ray.run.outputs import Folder, Outputs, beside
from fusegpt_ray.specs import METHOD_SPECS, METRIC_SPECS
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.text.protocol import stages, undone

WEIGHTS = ".safetensors"


class _Part(BaseModel):
    """Keys that a report does not show may be anything."""

    model_config = ConfigDict(extra="ignore")


class Protocol(_Part):
    """How a text was cut; see `text.protocol.described`."""

    data: str | None = None
    windows: int | None = None
    length: int
    bos: bool = False
    bos_once: bool | None = None
    left_out: int | None = None
    repeated: float | None = None
    licence: str | None = None
    warning: str | None = None
    parts: list[Protocol] | None = None


class Perplexity(Protocol):
    """On one text, at each stage; see `text.protocol.STAGES`."""

    dense: float
    dropped: float | None = None
    repaired: float | None = None
    trained: float | None = None
    fused: float | None = None
    replaced: float | None = None
    sliced: float | None = None
    inserted: float | None = None
    healed: float | None = None

    @property
    def by_stage(self) -> dict[str, float]:
        """In order; the last stage is the published model's."""
        values = self.model_dump(exclude_none=True)
        return {stage: values[stage] for stage in stages([values])}

    @property
    def undone(self) -> float | None:
        """See `text.protocol.undone`."""
        return undone(self.by_stage)


class Estimate(_Part):
    """The score of a block that was not walked to the end."""

    mean: float


class Repair(_Part):
    block: int


class Copy(_Part):
    """A block that was inserted."""

    after: int
    like: int


class Round(_Part):
    removed: int | None = None
    """None: the round is under way, or inserts blocks."""
    replaced: list[int] = []
    """Consecutive blocks of which the first now stands for all."""
    inserted: list[Copy] = []
    scores: dict[int, float] = {}
    stopped: dict[int, Estimate] = {}
    group: list[int] = []
    repair: Repair | None = None
    losses: list[float] = []
    seconds: dict[str, FiniteFloat] = {}

    @property
    def into(self) -> list[int]:
        """The blocks that took over from the removed one."""
        changed = [*self.group, *([self.repair.block] if self.repair else [])]
        return sorted({*changed} - {self.removed})


class Width(_Part):
    """A hidden size, before and after."""

    dense: int
    kept: int


class Healing(_Part):
    losses: list[float]
    held_out: list[float] = []
    groups: list[list[int]] = []
    """Of blocks that share weights."""
    tokens: int | None = None
    seconds: dict[str, FiniteFloat] = {}
    data: Protocol | None = None


class Tried(_Part):
    """A set of blocks in a tournament."""

    ways: list[str]
    removed: list[int]
    held_out: list[float] = []


class Search(_Part):
    tokens: int | None = None
    tried: list[Tried]


class Publishing(_Part):
    seconds: FiniteFloat


class Planned(_Part):
    """A stage as it was counted before the run."""

    stage: str
    flops: NonNegativeInt
    seconds: FiniteFloat | None = None
    """None: no rates were known."""


class Source(_Part):
    name: str
    revision: str | None = None


class Other(_Part):
    """Another model that the same run published."""

    sparsity: FiniteFloat
    perplexity: dict[str, Perplexity] = {}


class Facts(_Part):
    """What a report shows."""

    name: str
    state: str
    source: Source
    method: str
    arithmetic: str = ""
    gpu: str = ""
    """What torch calls the one that it ran on; empty: none, or nobody has told."""
    recipe: dict[str, Any]
    dense_blocks: NonNegativeInt | None = None
    width: Width | None = None
    """Of a model that became narrower."""
    bytes: int | None = None
    """Of the published model's weights."""
    planned: list[Planned] = []
    spent: Spent | None = None
    samples: list[Sample] = []
    sparsity: FiniteFloat | None = None
    """None: it was made deeper, or nothing is published yet."""
    others: list[Other] = []
    rounds: list[Round]
    perplexity: dict[str, Perplexity] = {}
    healing: Healing | None = None
    search: Search | None = None
    calibration: Protocol | None = None
    publishing: Publishing | None = None
    fewer_at_once: str = ""
    versions: dict[str, str] = {}

    @property
    def removed(self) -> list[int]:
        return [round.removed for round in self.rounds if round.removed is not None]

    @property
    def inserted(self) -> list[Copy]:
        return [copy for round in self.rounds for copy in round.inserted]

    @property
    def replaced(self) -> list[int]:
        """The run in whose place its first block stands."""
        return [block for round in self.rounds for block in round.replaced]

    @property
    def changed(self) -> str:
        """What happened to how many blocks, or to the width."""
        if self.width:
            return f"hidden size {self.width.dense} → {self.width.kept}"
        what, count = "removed", len(self.removed)
        if self.inserted:
            what, count = "added", len(self.inserted)
        return f"{count} block{'' if count == 1 else 's'} {what}"

    @property
    def chosen_by(self) -> str:
        """What is lowest of a block that goes."""
        method, importance = METHOD_SPECS.get(self.method), self.recipe.get("importance")
        if method and method.chosen_by:
            return method.chosen_by
        name = importance.get("metric") if isinstance(importance, dict) else None
        metric = METRIC_SPECS.get(name) if isinstance(name, str) else None
        return metric.title if metric else "score"

    @property
    def price_per_second(self) -> float | None:
        """See `Prices.per_second`."""
        return Prices.of(self.recipe).per_second if self.gpu else None

    @property
    def healing_loss(self) -> str:
        """`heal.loss`; manifests that do not tell are of times when there was only one."""
        heal = self.recipe.get("heal")
        return "tokens" if isinstance(heal, dict) and heal.get("loss") == "tokens" else "kl"

    @property
    def worked(self) -> list[tuple[Planned, float]]:
        """The planned stages whose time was taken, with the seconds that each took."""
        healing = self.healing.seconds if self.healing else {}
        taken = {
            stage: sum(round.seconds.get(key, 0.0) for round in self.rounds)
            for stage, key in (
                ("scoring", "score"),
                ("states", "states"),
                ("fine-tuning", "finetune"),
            )
        } | {"healing": sum(healing.values())}
        return [(row, taken[row.stage]) for row in self.planned if taken.get(row.stage)]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, those of all rounds together; nothing where no time was taken."""
        healing = self.healing.seconds if self.healing else {}
        publishing = self.publishing.seconds if self.publishing else 0.0
        of_rounds = {
            key: sum(round.seconds.get(key, 0.0) for round in self.rounds)
            for key in ("score", "states", "finetune")
        }
        spec = METHOD_SPECS.get(self.method)
        trained = "the light block" if spec and spec.light else "groups"
        states = "states" if spec and not spec.trains_groups else "states of groups"
        found = {
            "scoring": of_rounds["score"],
            states: of_rounds["states"],
            f"training of {trained}": of_rounds["finetune"],
            "states for healing": healing.get("states", 0.0),
            "healing": healing.get("heal", 0.0),
            "writing": publishing,
        }
        return {stage: seconds for stage, seconds in found.items() if seconds > 0}


def facts(uri: str) -> Facts:
    """Of a published model or of a run: its own folder, or the output URI if nothing else is there.

    Raises:
        UserError: there is none, there are several, or it is damaged.
    """
    there = Outputs.look(uri)
    if MANIFEST in there.files or there.uri.endswith(".run"):
        found = [Folder.look(there.uri)]
    else:
        found = [*there.folders]
    found = [folder for folder in found if folder.finished or folder.run]
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        problem = f"holds several models or runs: {names}"
        raise UserError(KEY, there.uri, problem, "give the folder of one of them")
    folder = found[0] if found else Folder(there.uri, there.files)
    name = folder.name.removesuffix(".run")
    try:
        if folder.run and not folder.finished:
            return Facts.model_validate({**under_way(folder.run), "name": name})
        manifest = Manifest.read(folder.uri)  # says what is wrong where there is none
        weights = (file.size for key, file in manifest.files.items() if key.endswith(WEIGHTS))
        return of_manifest(name, manifest.data, sum(weights), others(folder.uri, manifest.data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part)[:99] for part in first["loc"])
        raise UserError(
            KEY,
            folder.uri,
            f"its {MANIFEST if folder.finished else 'journal'} says nonsense: {key}:"
            f" {first['msg'].lower()}",
            "give one that this version of fusegpt wrote",
        ) from error


def of_manifest(
    name: str, manifest: Mapping[str, Any], size: int, others: Sequence[Other] = ()
) -> Facts:
    """Of a published model called `name`, whose weights have `size` bytes.

    Args:
        others: see `others`.

    Raises:
        ValidationError: the manifest has another shape.
    """
    told = {**manifest, "name": name, "state": "published", "bytes": size, "others": others}
    return Facts.model_validate(told)


def others(folder: str, manifest: Mapping[str, Any]) -> list[Other]:
    """What the run that published the model in `folder` has published beside it, as far as that
    can be told: another model's damage is no matter of this one's.
    """
    found = []
    for data in beside(folder, manifest.get("run")):
        with suppress(ValidationError):
            found.append(Other.model_validate(data))
    return found
