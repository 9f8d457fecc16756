"""What a recipe leaves out, as its preset and its method fill it in. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusegpt_ray.recipe.specs import METHOD_SPECS, PRESETS


def filled(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe `data`, as read and not yet checked, with what it leaves out. A key that it has
    stays as it is; what is no section comes back unchanged, for the checks to complain of."""
    if not isinstance(data.get("fusion") or {}, Mapping):
        return data
    preset = dict(PRESETS.get(str(data.get("preset", "best")), {}))
    fusion = dict(preset.pop("fusion", {}))
    spec = METHOD_SPECS.get(str(data.get("method", "fusegpt")))
    if spec is not None and not spec.trains_groups:  # a start, then, is all there is
        fusion["start"] = "linear" if spec.repairs else "none"
    if spec is None or not spec.fuses:
        preset = {}
    found = {**preset, **data, "fusion": {**fusion, **(data.get("fusion") or {})}}
    importance = data.get("importance") or {}
    if spec is not None and spec.metric and isinstance(importance, Mapping):
        found["importance"] = {"metric": spec.metric, **importance}
    if spec is not None and spec.inserts:
        found = {"sparsity": (), **found}
        if isinstance(found.get("heal"), Mapping):
            found["heal"] = {"loss": "tokens", **found["heal"]}
    return found
