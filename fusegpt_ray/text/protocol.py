"""How a text was measured, in words. Light: commands that only look at what is published say it,
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

STAGES = {
    "dense": "the model as it was given",
    "dropped": "the same blocks removed, and nothing else done",
    "repaired": "the gaps repaired in closed form, nothing trained",
    "trained": "the blocks around each gap trained, nothing fused",
    "fused": "the removed blocks' weights fused into their neighbours, and these trained",
    "replaced": "one trained block in place of the run",
    "sliced": "its hidden size made smaller in closed form, nothing trained",
    "inserted": "the new blocks put in, nothing trained",
    "healed": "after whole-model training",
}
"""Of a model on its way, each with a perplexity of its own. The last one there is the published."""


def stages(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those that any of these rows of perplexities has, in order."""
    keys = {key for row in rows for key in row}
    return [stage for stage in STAGES if stage in keys]


def undone(row: Mapping[str, Any]) -> float | None:
    """Of what the first step did to a perplexity, the share that later ones undid; None where it
    did no damage that can be told, or was the only one, or there is none so far.

    Args:
        row: perplexities by stage, and whatever else.
    """
    steps = [row[stage] for stage in stages([row]) if stage != "dense"]
    if len(steps) < 2 or not row["dense"] < steps[0] < math.inf:
        return None
    return float((steps[0] - steps[-1]) / (steps[0] - row["dense"]))


def described(protocol: Mapping[str, Any]) -> str:
    """A protocol in words. Older manifests lack parts; then no window began with the token."""
    windows, data = protocol.get("windows"), protocol.get("data")
    count = "windows" if windows is None else "1 window" if windows == 1 else f"{windows} windows"
    of = f" of {data}{_repeated(protocol)}{_licence(protocol)}" if data else ""
    if parts := protocol.get("parts"):
        of = "; ".join(
            f"{part['windows']} of {part['data']}{_repeated(part)}{_licence(part)}"
            for part in parts
        )
        of = f" ({of})"
    token = "with" if protocol.get("bos") or protocol.get("bos_once") else "without"
    told = f"{count} of {protocol['length']} tokens{of}, {token} a beginning-of-sequence token"
    return f"{told} before the whole text alone" if protocol.get("bos_once") else told


def warnings(protocol: Mapping[str, Any]) -> list[str]:
    """What is to be said of a text that is too short, or of each of several."""
    of_parts = [
        f"{part['data']}: {part['warning']}"
        for part in protocol.get("parts", ())
        if "warning" in part
    ]
    return [protocol["warning"]] if "warning" in protocol else of_parts


def _repeated(protocol: Mapping[str, Any]) -> str:
    longer = f", {left} longer left out" if (left := protocol.get("left_out")) else ""
    return longer + (f", each {protocol['repeated']:g} times" if "repeated" in protocol else "")


def _licence(protocol: Mapping[str, Any]) -> str:
    """Older manifests do not tell, and nor does a text that the dense model wrote."""
    said = protocol.get("licence")
    return "" if said is None else f" (licence: {said})"
