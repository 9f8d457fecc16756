"""The parts of a manifest that a report shows, whoever wrote it. Light: no torch."""

from __future__ import annotations

from pydantic import FiniteFloat, NonNegativeInt

from fusegpt_ray.store.foreign import Part
from fusegpt_ray.text.protocol import stages, undone


class Protocol(Part):
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


class Estimate(Part):
    """The score of a block that was not walked to the end."""

    mean: float


class Repair(Part):
    block: int | None = None
    """None: nothing was repaired."""


class Copy(Part):
    """A block that was inserted."""

    after: int
    like: int


class Scoring(Part):
    """See `importance.ranking.Cost`."""

    done: NonNegativeInt


class Round(Part):
    removed: int | None = None
    """None: the round is under way, or inserts blocks."""
    replaced: list[int] = []
    """Consecutive blocks of which the first now stands for all."""
    inserted: list[Copy] = []
    scores: dict[int, float] = {}
    stopped: dict[int, Estimate] = {}
    block_forwards: Scoring | None = None
    group: list[int] = []
    repair: Repair | None = None
    losses: list[float] = []
    seconds: dict[str, FiniteFloat] = {}

    @property
    def into(self) -> list[int]:
        """The blocks that took over from the removed one."""
        changed = {*self.group, self.repair.block if self.repair else None}
        return sorted(block for block in changed - {self.removed} if block is not None)


class Width(Part):
    """A hidden size, before and after."""

    dense: int
    kept: int


class Healing(Part):
    losses: list[float]
    held_out: list[float] = []
    groups: list[list[int]] = []
    """Of blocks that share weights."""
    tokens: int | None = None
    seconds: dict[str, FiniteFloat] = {}
    data: Protocol | None = None


class Tried(Part):
    """A set of blocks in a tournament."""

    ways: list[str]
    removed: list[int]
    held_out: list[float] = []


class Search(Part):
    tokens: int | None = None
    seconds: FiniteFloat = 0.0
    tried: list[Tried]


class Publishing(Part):
    seconds: FiniteFloat
    bytes: NonNegativeInt | None = None
    """That were written, and read back."""


class PlannedStage(Part):
    """A stage as it was counted before the run."""

    stage: str
    flops: NonNegativeInt
    block_forwards: NonNegativeInt = 0
    seconds: FiniteFloat | None = None
    """None: no rates were known."""


class Moved(Part):
    """Bytes of weights."""

    read: NonNegativeInt = 0
    written: NonNegativeInt = 0


class PlannedBytes(Moved):
    """The most that a stage was to move."""

    stage: str


class Source(Part):
    name: str
    revision: str | None = None


class Other(Part):
    """Another model that the same run published."""

    name: str = ""
    """Only told of a run that is under way."""
    sparsity: FiniteFloat | None = None
    """None: it was made deeper."""
    perplexity: dict[str, Perplexity] = {}
