"""What a recipe says of a deeper model: `depth` or `every`. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.specs import METHOD_SPECS

_SHARE = re.compile(r"\+?\s*(\d+(?:\.\d+)?)\s*%")
_FIX = "give the share of blocks to add, such as +25%"
DEEPER = ", ".join(name for name, spec in METHOD_SPECS.items() if spec.inserts)


def _share(value: Any) -> Any:
    """ "+25%" → 0.25. A bare number is the share itself."""
    if isinstance(value, str):
        found = _SHARE.fullmatch(value.strip())
        if not found:
            raise UserError("", value, "no share of blocks to add", _FIX)
        value = float(found[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value <= 1:
        problem = "not above 0 and at most 1: a model becomes at most twice as deep"
        raise UserError("", value, problem, _FIX)
    return value


Depth = Annotated[float | None, BeforeValidator(_share)]
Every = Annotated[int | None, Field(ge=1)]


def blocks_to_add(dense_blocks: int, depth: float | None, every: int | None) -> int:
    """⌊N / K⌋, or ⌈N × depth⌉; for the tolerance see `recipe.blocks_to_remove`."""
    if every is not None:
        return dense_blocks // every
    assert depth is not None
    return math.ceil(dense_blocks * depth - 1e-9)


def mistakes(
    method: str, depth: float | None, every: int | None, sparsity: Sequence[float]
) -> Iterator[UserError]:
    """What does not fit together in a recipe of this method."""
    spec = METHOD_SPECS[method]
    given = {key: value for key, value in (("depth", depth), ("every", every)) if value is not None}
    if not spec.inserts:
        for key, value in given.items():
            what = "narrower" if spec.narrows else "shallower"
            problem = f"method {method} makes models {what}, by sparsity"
            yield UserError(key, value, problem, f"leave it out, or use method: {DEEPER}")
        return
    if sparsity:
        problem = f"method {method} removes no blocks"
        yield UserError("sparsity", list(sparsity), problem, "leave it out, and give depth")
    if every is not None and spec.inserts == "a_run":
        problem = f"method {method} adds one run of blocks"
        yield UserError("every", every, problem, "give depth instead")
    elif len(given) == 2:
        yield UserError("every", every, "depth says already how many are added", "leave one out")
    elif not given:
        keys = "depth: +25%, or every: 4" if spec.inserts == "at_intervals" else "depth: +50%"
        yield UserError("depth", None, f"method {method} needs it", f"add {keys}")


def healing_mistakes(method: str, loss: str, train: str, share: int | None) -> Iterator[UserError]:
    """What of `heal` does not fit to this method."""
    spec = METHOD_SPECS[method]
    if spec.stays_itself and loss == "kl":
        problem = f"with method {method} it is 0 from the beginning, and nothing would learn"
        yield UserError("heal.loss", loss, problem, "leave it out, or use tokens")
    if spec.inserts and share is not None:
        problem = f"method {method} puts in copies that are to learn what their originals do not"
        yield UserError("heal.share", share, problem, "leave it out")
    if not spec.inserts and train == "new":
        problem = f"method {method} puts in no new blocks"
        yield UserError("heal.train", train, problem, f"use lora or all, or method: {DEEPER}")
