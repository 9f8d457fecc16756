"""`mi`: the block of the lowest Macro Influence is dropped, again and again (the first step of
FuseGPT, arXiv 2411.14507, section 3.1).

Before each round, with h_t the last state of token t in the model M that is left, and h_t∖i the one
in M without block i, the block to go is

    argmin over i of  MI_i = 1 − E over t of  cos(h_t, h_t∖i).

With `importance.metric` another score takes MI's place. With N blocks left, a window costs at most
N·(N+1)/2 + 2·N calls of a block in a round; windows that cannot change the choice are left out,
which is most of them as a rule (see `importance/search.py`). Nothing is trained.
"""

from __future__ import annotations

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric, drop

METHOD = Method("mi", by_metric, drop)
