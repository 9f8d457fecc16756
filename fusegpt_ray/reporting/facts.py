"""What a manifest, or the journal of a run that is under way, tells. Light: no torch.

Anybody may have written a manifest, so it is not believed to have the right shape. The records of a
journal bear checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import FiniteFloat, NonNegativeInt, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.gpu_prices import cost, price_of
from fusegpt_ray.recipe.specs import METHOD_SPECS, METRIC_SPECS
from fusegpt_ray.reporting.prices import Spent, gpu_hour_price
from fusegpt_ray.reporting.shapes import (
    Copy,
    Healing,
    Moved,
    Other,
    Perplexity,
    PlannedBytes,
    PlannedStage,
    Protocol,
    Publishing,
    Round,
    Search,
    Source,
    Width,
)
from fusegpt_ray.reporting.under_way import under_way
from fusegpt_ray.reporting.written import Sample
from fusegpt_ray.run.outputs import Folder, Outputs, beside
from fusegpt_ray.store.foreign import Part, nonsense
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.store.public import public

WEIGHTS = ".safetensors"
ON_THE_WALK = ("repair", "slicing")
"""Stages whose sums are made while the states are walked."""


class Facts(Part):
    """What a report shows."""

    name: str
    state: str
    source: Source
    method: str
    arithmetic: str = ""
    gpu: str = ""
    """What torch calls the one that it ran on; empty: none, or nobody has told."""
    gpus: FiniteFloat = 0.0
    """That all of its processes held together."""
    recipe: dict[str, Any]
    dense_blocks: NonNegativeInt | None = None
    width: Width | None = None
    """Of a model that became narrower."""
    bytes: int | None = None
    """Of the published model's weights."""
    planned: list[PlannedStage] = []
    planned_bytes: list[PlannedBytes] = []
    moved: dict[str, Moved] = {}
    """By stage, what it was."""
    stage_seconds: dict[str, FiniteFloat] = {}
    """Of planned stages outside of rounds, healing and the tournament."""
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
        """Of all GPUs that the run held, if it had any and the recipe says what one costs. None if
        it went on on others at another price: nobody has told which stages that were.
        """
        prices = gpu_hour_price(self.recipe)
        each = {price_of(prices, gpu) for gpu in self.gpu_seconds or [self.gpu]}
        price = each.pop() if len(each) == 1 else None
        return None if price is None or not self.gpus else price * self.gpus / 3600

    @property
    def gpu_seconds(self) -> Mapping[str, float]:
        """By the name of the GPU, that the run has held until this model was published."""
        if not self.spent or not self.spent.gpu_seconds:
            return {}
        return self.spent.by_gpu or {self.gpu: self.spent.gpu_seconds}

    @property
    def gpu_hours(self) -> float | None:
        """That the run has held GPUs until this model was published; None: it had none."""
        return self.spent.gpu_seconds / 3600 if self.spent and self.spent.gpu_seconds else None

    @property
    def cost(self) -> float | None:
        """Of these, as the run has told, or else if the recipe says what one costs."""
        if self.spent and self.spent.money is not None:
            return self.spent.money
        return cost(gpu_hour_price(self.recipe), self.gpu_seconds)

    @property
    def healing_loss(self) -> str:
        """`heal.loss`; manifests that do not tell are of times when there was only one."""
        heal = self.recipe.get("heal")
        return "tokens" if isinstance(heal, dict) and heal.get("loss") == "tokens" else "kl"

    @property
    def worked(self) -> list[tuple[PlannedStage, float]]:
        """The planned stages whose time was taken, with the seconds that each took."""
        healing = self.healing.seconds if self.healing else {}
        of_rounds = self._of_rounds
        taken = {
            **self.stage_seconds,
            "search": self.search.seconds if self.search else 0.0,
            "scoring": of_rounds["score"],
            "states": of_rounds["states"] + self.stage_seconds.get("repair", 0.0),
            "fine-tuning": of_rounds["finetune"],
            "healing": sum(healing.values()),
        }
        rows = together(self.planned)
        return [(row, taken[of]) for of, row in rows.items() if taken.get(of)]

    def done(self, row: PlannedStage) -> float | None:
        """FLOP of this planned stage that were needed in the end; None: nobody has counted them."""
        scored = (round.block_forwards.done for round in self.rounds if round.block_forwards)
        if row.stage != "scoring" or not row.block_forwards or not (done := sum(scored)):
            return None
        return row.flops * done / row.block_forwards

    @property
    def _of_rounds(self) -> dict[str, float]:
        """Seconds of all rounds together."""
        return {
            key: sum(round.seconds.get(key, 0.0) for round in self.rounds)
            for key in ("score", "states", "finetune")
        }

    @property
    def traffic(self) -> list[tuple[PlannedBytes, Moved]]:
        """The planned bytes of each stage that has ended, beside what they were."""
        moved = dict(self.moved)
        if self.publishing and (size := self.publishing.bytes) is not None:
            moved["publishing"] = Moved(read=size, written=size)
        return [(row, moved[row.stage]) for row in self.planned_bytes if row.stage in moved]

    @property
    def measuring(self) -> dict[str, float]:
        """Seconds by stage of telling how good the model is, which is no part of making it."""
        names = {"repair": "repairs to compare with", "evaluation": "evaluation"}
        found = {name: self.stage_seconds.get(stage, 0.0) for stage, name in names.items()}
        return {name: seconds for name, seconds in found.items() if seconds > 0}

    @property
    def seconds(self) -> dict[str, float]:
        """Of making the model, by stage: those of all rounds together; nothing where no time was
        taken.
        """
        healing = self.healing.seconds if self.healing else {}
        publishing = self.publishing.seconds if self.publishing else 0.0
        of_rounds = self._of_rounds
        spec = METHOD_SPECS.get(self.method)
        trained = "the light block" if spec and spec.light else "groups"
        states = "states" if spec and not spec.trains_groups else "states of groups"
        found = {
            "text of the dense model": self.stage_seconds.get("generating", 0.0),
            "tournament": self.search.seconds if self.search else 0.0,
            "scoring": of_rounds["score"],
            states: of_rounds["states"],
            f"training of {trained}": of_rounds["finetune"],
            "states for healing": healing.get("states", 0.0),
            "healing": healing.get("heal", 0.0),
            "writing": publishing,
        }
        return {stage: seconds for stage, seconds in found.items() if seconds > 0}


def together(planned: Sequence[PlannedStage]) -> dict[str, PlannedStage]:
    """By stage; those whose time is taken as one, because replicas do them on the same walk, are
    one row: "states and repair".
    """
    rows: dict[str, PlannedStage] = {}
    for row in planned:
        if row.stage not in ON_THE_WALK or "states" not in rows:
            rows[row.stage] = row
            continue
        walk = rows["states"]
        known = walk.seconds is not None and row.seconds is not None
        rows["states"] = PlannedStage(
            stage=f"{walk.stage} and {row.stage}",
            flops=walk.flops + row.flops,
            seconds=(walk.seconds or 0.0) + (row.seconds or 0.0) if known else None,
        )
    return rows


def facts(uri: str) -> Facts:
    """Of a published model or of a run: its own folder, or the output URI if nothing else is there.

    Raises:
        UserError: there is none, there are several, or it is damaged.
    """
    return told_by(Outputs.look(uri))


def told_by(there: Outputs) -> Facts:
    """The same, of what has been looked at."""
    if MANIFEST in there.files or there.uri.endswith(".run"):
        found = [Folder.look(there.uri)]
    else:
        found = [*there.folders]
    found = [folder for folder in found if folder.finished or folder.run]
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        problem = f"holds several models or runs: {names}"
        tables = [other.uri.removeprefix(f"{there.uri}/") for other in there.comparisons]
        fix = ", or ".join(["give the folder of one of them", *tables])
        raise UserError(KEY, there.uri, problem, fix)
    folder = found[0] if found else Folder(there.uri, there.files)
    name = folder.name.removesuffix(".run")
    try:
        if folder.run and not folder.finished:
            return Facts.model_validate({**under_way(folder.run), "name": name})
        manifest = Manifest.read(folder.uri)  # says what is wrong where there is none
        weights = (file.size for key, file in manifest.files.items() if key.endswith(WEIGHTS))
        return of_manifest(name, manifest.data, sum(weights), others(folder.uri, manifest.data))
    except ValidationError as error:
        file = MANIFEST if folder.finished else "journal"
        raise UserError(
            KEY,
            folder.uri,
            f"its {file} says {nonsense(error)}",
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
    told = {**public(manifest), "name": name, "state": "published", "bytes": size, "others": others}
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
