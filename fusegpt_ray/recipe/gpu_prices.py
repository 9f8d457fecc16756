"""What a GPU costs an hour: one price for all GPUs, or a table of prices by their kinds. No torch.

A kind is named as Ray names it (`ray.io/accelerator-type`): H100, A100, L40S. A GPU has the name
that torch gives: "NVIDIA A100-SXM4-80GB". It is of a kind if each word of the kind is a word of its
name: of the kind A100, but not of A10. Words consist of letters and digits, capitals or not; a size
in GB may end in G, as in Ray's A100-80G. Where a GPU is of several kinds, the price is that of the
kind with the most words (A100-80GB comes before A100), and of several such kinds the highest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from fusegpt_ray.errors import UserError

KEY = "cluster.gpu_hour_price"
Prices = float | dict[str, float]
_PRICE = TypeAdapter[float](Annotated[float, Field(gt=0, allow_inf_nan=False)])
_TABLE = TypeAdapter(dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]])


def as_meant(value: Any) -> Any:
    """Validates what was meant, a price or a table: pydantic would complain of both.

    Raises:
        UserError: the table is empty, or a kind in it has no name, or stands there twice.
        ValidationError: a price is none.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _PRICE.validate_python(value)
    if not value:
        fix = "give a price for each kind of GPU, such as {H100: 2.5}, or leave it out"
        raise UserError("", dict(value), "an empty table", fix)
    known = dict[frozenset[str], Any]()
    for kind in value:
        words = _words(str(kind)) if type(kind) in (str, int) else None  # YAML: {4090: 0.5}
        if not words:
            fix = "name it as Ray does, such as H100 or A100"
            raise UserError("", kind, "not the name of a kind of GPU", fix)
        if words in known:
            problem = f"the same kind of GPU as {known[words]}"
            raise UserError("", kind, problem, "leave one of the two out")
        known[words] = kind
    return _TABLE.validate_python({str(kind): price for kind, price in value.items()})


def price_of(prices: Prices | None, gpu: str) -> float | None:
    """Of a GPU and an hour; None: nobody has said it.

    Args:
        gpu: its name, as torch gives it.
    """
    if not isinstance(prices, dict):
        return prices
    kinds, words = {_words(kind): price for kind, price in prices.items()}, _words(gpu)
    found = [(len(kind), price) for kind, price in kinds.items() if kind <= words]
    return max(found)[1] if found else None


def cost(prices: Prices | None, gpu_seconds: Mapping[str, float]) -> float | None:
    """Of GPUs that were held for so long, by their names; None: there were none, or nobody has said
    the price of one.
    """
    hours = [(price_of(prices, gpu), seconds / 3600) for gpu, seconds in gpu_seconds.items()]
    priced = [price * held for price, held in hours if price is not None]
    return sum(priced) if hours and len(priced) == len(hours) else None


def may_have_price(prices: Prices, label: str) -> bool:
    """Whether a GPU that bears this label can have one: its name may say more than the label."""
    words = _words(label)
    return not isinstance(prices, dict) or any(
        kind <= words or words <= kind for kind in map(_words, prices)
    )


def unpriced(prices: Prices | None, gpu: str) -> UserError:
    """Of a run that may cost only so much, and holds this GPU."""
    problem = f"has no price of {gpu}, and cluster.max_cost limits what the run may cost"
    kind = next((word for word in re.findall(r"\w+", gpu) if re.search(r"\d", word)), gpu)
    fix = f"add {KEY}.{kind}, or give cluster.max_hours instead of cluster.max_cost"
    return UserError(KEY, prices, problem, fix)


def _words(name: str) -> frozenset[str]:
    return frozenset(
        re.sub(r"(?<=\d)G$", "GB", word) for word in re.findall(r"[A-Z0-9]+", name.upper())
    )
