"""`random`: blocks drawn at random are dropped, a control.

Each block of the dense model gets a number from Python's generator, seeded with the recipe's
`seed`, and the lowest go. So a higher sparsity drops those of a lower one and more.
"""

from __future__ import annotations

import random

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.methods.base import Method, Question
from fusegpt_ray.methods.choosing import drop, once


def _drawn(asked: Question) -> Ranking:
    draw = random.Random(asked.seed)
    numbers = {number: draw.random() for number in range(len(asked.workers.setup.dense))}
    return Ranking.without_work({number: numbers[number] for number in asked.free})


METHOD = Method("random", once(_drawn), drop)
