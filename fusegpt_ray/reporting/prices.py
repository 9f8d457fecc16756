"""What a run has cost, and what it was to cost, as a manifest tells it. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, FiniteFloat, NonNegativeInt, ValidationError


class Spent(BaseModel):
    """By a run until it published the model; see `run.budget`."""

    seconds: FiniteFloat
    gpu_seconds: FiniteFloat = 0.0
    bytes_read: NonNegativeInt | None = None
    bytes_written: NonNegativeInt | None = None


class Prices(BaseModel):
    """Of a recipe's `cluster`."""

    gpu_hour_price: FiniteFloat | None = None
    gpus_per_replica: FiniteFloat | None = None
    replicas: NonNegativeInt = 1
    workers: NonNegativeInt = 1

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Self:
        """As far as a recipe in a manifest tells: it is said nowhere else what one looks like."""
        try:
            return cls.model_validate(recipe.get("cluster"))
        except ValidationError:
            return cls()

    @property
    def per_second(self) -> float | None:
        """Of all GPUs that the recipe asks for, if it says what one costs."""
        if self.gpu_hour_price is None:
            return None
        gpus = max(self.replicas, self.workers) * (self.gpus_per_replica or 1)
        return self.gpu_hour_price * gpus / 3600
