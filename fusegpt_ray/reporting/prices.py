"""What a run has cost, as a manifest or a heartbeat tells it. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, FiniteFloat, ValidationError

from fusegpt_ray.recipe.gpu_prices import Prices


class Spent(BaseModel):
    """By a run until it published the model, or until now; see `run.budget`."""

    seconds: FiniteFloat
    gpu_seconds: FiniteFloat = 0.0
    by_gpu: dict[str, FiniteFloat] = {}
    """These by the name of the GPU; earlier versions tell of none."""
    money: FiniteFloat | None = None

    @classmethod
    def told(cls, told: Any) -> Self | None:
        """As far as a heartbeat tells: anything may stand in a file."""
        try:
            return cls.model_validate(told)
        except ValidationError:
            return None


class _Cluster(BaseModel):
    gpu_hour_price: FiniteFloat | dict[str, FiniteFloat] | None = None


def gpu_hour_price(recipe: Mapping[str, Any]) -> Prices | None:
    """As far as a recipe in a manifest tells: it is said nowhere else what one looks like."""
    try:
        return _Cluster.model_validate(recipe.get("cluster")).gpu_hour_price
    except ValidationError:
        return None
