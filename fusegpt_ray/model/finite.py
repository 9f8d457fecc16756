"""NaN and Inf in a dense model: what to tell its user. No weight is looked at before a result was
not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.checkpoint import TensorRef, read_tensors


def finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf.

    By the smallest and the largest value, both NaN if any is: a single pass without memory of its
    own, some ten times as fast as asking each value.
    """
    if not values.is_floating_point() or not values.numel():
        return True
    ends = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
    return bool(ends.min.isfinite() & ends.max.isfinite())


@contextmanager
def explained(
    dense: Stack, source: str, dtype: torch.dtype, trained: bool = False
) -> Iterator[None]:
    """Makes a result that is not finite, computed in `dtype` from the dense model, a mistake in
    `model.source`.

    `trained`: from more than the dense model, so that it is only this mistake if a stored weight is
    not finite.

    Raises:
        UserError: it names the first tensor with NaN or Inf; or, if the stored weights are fine,
        the arithmetic that overflowed.
    """
    try:
        yield
    except FloatingPointError as error:
        bad = _unfit(dense)
        if bad is not None:
            problem = f"its tensor {bad.name} holds NaN or Inf ({bad.file})"
            raise UserError(
                "model.source", source, problem, "download the checkpoint again, or use another"
            ) from error
        if trained:
            raise
        name = str(dtype).removeprefix("torch.")
        problem = f"its stored weights are finite, but its arithmetic in {name} overflows"
        fix = "use another checkpoint" if dtype == torch.float32 else "set model.dtype to float32"
        raise UserError("model.source", source, problem, fix) from error


def _unfit(stack: Stack) -> TensorRef | None:
    """The first stored tensor with NaN or Inf; one is held at a time."""
    return next(
        (
            ref
            for ref in sorted(stack.refs, key=lambda ref: (ref.file, ref.begin))
            if not finite(read_tensors({"": ref})[""])
        ),
        None,
    )
