"""`angular`: the run of consecutive blocks across which states turn least is dropped (Gromov et
al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887).

With h_l the state of a window's last token that enters block l, and n blocks to remove, they are
the blocks l … l + n − 1 of

    argmin over l of  E over windows of  1/π · arccos cos(h_l, h_l+n).

A block's score is the least distance of a run that it belongs to. The n lowest scores, of which
equal ones go by number, are then those of the best run, of equally good ones the first. It costs
one walk of the dense model, for all rounds together. Another n is another run.

Shapes: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.removals import run_distances
from fusegpt_ray.methods.base import Method, Question
from fusegpt_ray.methods.choosing import drop, once
from fusegpt_ray.samples import lengths


def angular_distance(
    entering_BTD: torch.Tensor, leaving_BTD: torch.Tensor, counted_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """1/π · arccos cos of the states of each window's last token that counts: [B] float64, between
    0 and 1; 0 for a window of which none counts.
    """
    rows, length = torch.arange(len(entering_BTD)), entering_BTD.shape[1]
    last_B, counts_B = torch.full_like(rows, length - 1), torch.ones_like(rows, dtype=torch.bool)
    if counted_BT is not None:
        counts_B = counted_BT.cpu().any(dim=1)
        last_B = (counted_BT.cpu() * torch.arange(length)).argmax(dim=1)
    entering_BD = entering_BTD[rows, last_B].double()
    leaving_BD = leaving_BTD[rows, last_B].double()
    cosine_B = cosine_similarity(entering_BD, leaving_BD, dim=-1).clamp(-1, 1)
    return cosine_B.arccos() / torch.pi * counts_B.to(cosine_B.device)


def _best_run(asked: Question) -> Ranking:
    count, kept, windows = asked.left, asked.stack.kept, asked.windows
    distances = run_distances(
        asked.workers, asked.stack, windows, asked.settings, count, angular_distance
    )
    windows_that_count = sum(map(bool, lengths(windows, asked.settings.tokens, 0)))
    if not windows_that_count:
        problem = "the calibration has no such tokens"
        raise UserError("importance.tokens", asked.settings.tokens, problem, "use all")
    runs = (distances / windows_that_count).tolist()
    # The runs that a block belongs to begin at most count − 1 places before it.
    scores = {n: min(runs[max(0, p - count + 1) : p + 1]) for p, n in enumerate(kept)}
    return Ranking.without_work(scores)


METHOD = Method("angular", once(_best_run), drop)
