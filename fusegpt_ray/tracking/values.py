"""What the events of a run come to in numbers, for whoever draws curves of them: the trackers and
Ray's own metrics. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusegpt_ray.text.protocol import STAGES


@dataclass(frozen=True)
class Metric:
    """One quantity."""

    kind: Literal["gauge", "counter"]
    """A counter's values are added up."""
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    "round": Metric("gauge", "Rounds that are finished"),
    "removed_block": Metric("gauge", "The block removed last, by its number in the dense model"),
    "lowest_score": Metric("gauge", "Score of the block that this round removes"),
    "block_forwards": Metric("counter", "Blocks applied to a window, by scoring"),
    "loss": Metric("gauge", "Training loss of the last epoch or part", ("of",)),
    "held_out_loss": Metric("gauge", "Loss of healing on held-out windows", ("of",)),
    "tokens_per_second": Metric("gauge", "Tokens that training passes in a second", ("of",)),
    "perplexity": Metric("gauge", "On a held-out text, at a stage of the model", ("text", "stage")),
    "stage_seconds": Metric("counter", "Seconds of work, by stage", ("stage",)),
    "bytes_read": Metric("counter", "Bytes of weights read by workers", ("stage",)),
    "bytes_written": Metric("counter", "Bytes of blocks and models written", ("stage",)),
    "retries": Metric("counter", "Calls of a store that the driver repeated", ("stage",)),
    "spent_hours": Metric("gauge", "Hours for which the run has had workers, in all its processes"),
    "spent_gpu_hours": Metric("gauge", "GPU hours that these have held"),
    "spent_money": Metric("gauge", "What these cost, where cluster.gpu_hour_price tells it"),
}


@dataclass(frozen=True)
class Value:
    """One number of a metric."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """The name of its curve: perplexity/wiki/dense."""
        return "/".join((self.name, *self.labels.values()))


def step(event: str, values: Mapping[str, Any]) -> int:
    """Where on its curve the event lies: epochs and parts are counted through, other things by
    blocks removed, or added.
    """
    if event == "epoch":
        return int((values["round"] - 1) * values["epochs"] + values["epoch"])
    keys = {"part": "part", "scores": "round", "round": "round"}
    return abs(int(values.get(keys.get(event, "removed"), 0)))


def measured(event: str, values: Mapping[str, Any]) -> list[Value]:
    """The finite ones of the numbers that an event tells; of most events none."""
    return [found for found in _measured(event, values) if math.isfinite(found.value)]


def _measured(event: str, values: Mapping[str, Any]) -> Iterator[Value]:
    match event:
        case "scores":
            yield Value("lowest_score", values["scores"][str(values["lowest"])])
            yield Value("block_forwards", values["block_forwards"]["done"])
            yield Value("bytes_read", values["bytes_read"], {"stage": "score"})
        case "epoch" | "part":
            of = {"of": values.get("model", "group")}
            yield Value("loss", values["loss"], of)
            yield Value("tokens_per_second", values["tokens_per_second"], of)
            if "held_out" in values:
                yield Value("held_out_loss", values["held_out"], of)
        case "round":
            yield Value("round", values["round"])
            if values["removed"] is not None:
                yield Value("removed_block", values["removed"])
            for stage, seconds in values["seconds"].items():
                yield Value("stage_seconds", seconds, {"stage": stage})
            yield from _moved("round", values["states_bytes_read"], values["bytes_written"])
            yield Value("retries", values["retries"], {"stage": "round"})
        case "healed":
            seconds = sum(values["seconds"].values())
            yield Value("stage_seconds", seconds, {"stage": "heal"})
            yield from _moved("heal", values["states_bytes_read"], values["bytes_written"])
        case "published":
            yield Value("stage_seconds", values["seconds"], {"stage": "publish"})
            yield from _moved("publish", values["bytes"], values["bytes"])
            yield Value("retries", values["retries"], {"stage": "publish"})
        case "spent":
            for what, amount in values.items():
                yield Value(f"spent_{what}", amount)
        case "perplexity":
            for text, row in values["perplexity"].items():
                for stage in row.keys() & STAGES.keys():
                    yield Value("perplexity", row[stage], {"text": text, "stage": stage})


def _moved(stage: str, read: int, written: int) -> Iterator[Value]:
    yield Value("bytes_read", read, {"stage": stage})
    yield Value("bytes_written", written, {"stage": stage})
