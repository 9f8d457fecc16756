"""`shortgpt`: the blocks of the lowest Block Influence in the dense model are dropped, all chosen
at once (ShortGPT, Men et al., arXiv 2403.03853).

With h_i,t the state of token t that enters block i,

    BI_i = 1 − E over t of  cos(h_i,t, h_i+1,t),

which is `importance.metric: bi`. It costs one walk of the dense model, for all rounds together.
"""

from __future__ import annotations

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import all_by_metric, drop, once

METHOD = Method("shortgpt", once(all_by_metric), drop)
