"""`mi+linear`: the block is dropped, and the block before it repaired in closed form.

The block is chosen as by `mi`. With Δ what it added to the residual stream, and H the inputs of the
last linear layer of the block before it, that layer becomes

    W' = W + Aᵀ  with  A = argmin Σ ‖Δ − H·A‖² + λ ‖A‖²,

λ being chosen on windows that are held out. `fusion.start` has two more ways, of which `matrix` is
ReplaceMe's (arXiv 2505.02819), and `fusion/compensation.py` their formulas and what is ours. Beside
the scores of `mi` a round costs one walk of all windows up to the removed block, with 2 I (I + D)
FLOP a token in float64 for I inputs of the layer and hidden size D, and the solution of a system of
I unknowns for each λ.
"""

from __future__ import annotations

from fusegpt_ray.methods.base import Change, Method, Round
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.repairing import repaired


def _repair(round: Round) -> Change:
    found = repaired(round)
    stack, block = round.stack.drop(round.donor), found.block
    return Change(
        stack if block is None else stack.swap({block.dense: block}),
        found.files,
        repair=found.to_record(),
        states_batch_size=found.batch_size,
        states_bytes_read=found.bytes_read,
        states_seconds=found.seconds,
    )


METHOD = Method("mi+linear", by_metric, _repair)
