"""`sleb`: the block without which the model's loss is the lowest is dropped, again and again (SLEB,
Song et al., arXiv 2402.09025).

Before each round, with M the model that is left and x the calibration's tokens, the block to go is

    argmin over i of  − 1/(T − 1) Σ_t log p(x_t | x_<t; M without block i),

which is `importance.metric: loss`. That is exact here; windows that cannot change the choice are
left out (see `importance/search.py`). A round costs as many calls of blocks as one of `mi`, and the
logits of every window that is walked without a block.

Ours considers every block. The authors' code never removes the first nor the last one of those that
are left (its barriers, early and latter, are 1 unless set), so the choices differ where one of
these has the lowest loss.
"""

from __future__ import annotations

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric, drop

METHOD = Method("sleb", by_metric, drop)
