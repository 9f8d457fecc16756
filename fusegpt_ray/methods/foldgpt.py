"""`foldgpt`: the blocks go whose gates are lowest, once all gates are trained together with the
weights frozen (after FoldGPT, arXiv 2407.00928: its gated block removal).

With gate g_l on what block l adds to its states, s_l its share of all blocks' parameters, and k
what may stay of them, the gates are

    argmin over g of  KL(dense ‖ gated) + P · mean over l of g_l (1 − g_l)
    where  0 ≤ g_l ≤ 1  and  Σ_l s_l · g_l = k;

`healing/gates.py` tells how they are found, and which of this is ours. It costs at least 64 steps
of 4 windows there and back through all blocks, with logits, and one walk of the dense model. One
replica trains the gates, in the first round, for all rounds together; the number of blocks to go is
in the budget, so another number has other gates. What FoldGPT does after that is the recipe's
`heal`: `heal.share` for weights shared among the blocks that stay (`healing/sharing.py`), and its
fine-tuning by "tail-layer distillation". The abstract does not say what is compared there; ours are
the next-token distributions of the dense model and, with `heal.hidden`, the squared error of the
last states, each divided by its root mean square.
"""

from __future__ import annotations

from fusegpt_ray.healing.gates import GatedModel, batch_of, train_gates
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.methods.base import Method, Question
from fusegpt_ray.methods.choosing import drop, once
from fusegpt_ray.model.memory import find_batch_size


def _by_gates(asked: Question) -> Ranking:
    free, model = asked.free, GatedModel(asked.stack, asked.left)
    if len(free) == 1:
        return Ranking.without_work({free[0]: 1.0})

    def attempt(micro_batch: int) -> list[float]:
        ((_, gates),) = asked.workers.map(train_gates, [(model, asked.windows)], micro_batch)
        return gates

    size = batch_of(len(asked.windows))
    gates, _ = find_batch_size(attempt, size, size, "training the gates")
    trained = dict(zip(asked.stack.kept, gates, strict=True))
    return Ranking.without_work({number: trained[number] for number in free})


METHOD = Method("foldgpt", once(_by_gates), drop)
