"""How often racing chooses another block than the full table: over resampled and made-up tables of
scores, without a model.

Shapes: W windows, N blocks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.recipe.sections import Importance

WAYS: dict[str, dict[str, Any]] = {
    "full table": {"all": True},
    "exact": {},
    "racing": {"racing": 0.05},
}


def resampled(table_WN: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda generator: table_WN[generator.integers(0, len(table_WN), len(table_WN))]


def flat(table_WN: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    """Models whose blocks differ by no more than the model's nearest two: the hardest case.
    Noise is the table's own, shuffled.
    """
    means_N = table_WN.mean(axis=0)
    near = np.argsort(means_N)[: max(2, len(means_N) * 3 // 4)]
    ratios_WN = table_WN[:, near] / means_N[near]
    gap = (means_N[near[1]] - means_N[near[0]]) / means_N[near[0]]

    def draw(generator: np.random.Generator) -> np.ndarray:
        rows = generator.integers(0, len(table_WN), len(table_WN))
        columns = generator.permutation(len(near))
        return ratios_WN[rows][:, columns] * means_N.min() * (1 + gap * generator.random(len(near)))

    return draw


def race(
    draw: Callable[[np.random.Generator], np.ndarray], arguments: argparse.Namespace
) -> dict[str, Any]:
    """How often racing chooses another block than the full table, by how much worse a one, and
    the work of both searches.
    """
    differ, excess, work = 0, [0.0], {"racing": [], "exact": []}  # type: ignore[var-annotated]
    for seed in range(arguments.seeds):
        table_WN = draw(np.random.default_rng(seed))
        batches = np.split(table_WN, range(arguments.batch, len(table_WN), arguments.batch))

        def measure(jobs: list[Job], batches: list[np.ndarray] = batches) -> list[np.ndarray]:
            return [batches[batch][:, list(positions)] for batch, positions in jobs]

        found = {}
        for name in work:
            settings = Importance(**WAYS[name])
            found[name] = search(
                measure,
                range(table_WN.shape[1]),
                list(map(len, batches)),
                [arguments.length] * len(table_WN),
                settings,
            )
            work[name].append(found[name].cost.done / found[name].cost.brute_force)
        sums_N = table_WN.sum(axis=0)
        assert found["exact"].lowest == sums_N.argmin()
        if found["racing"].lowest != found["exact"].lowest:
            differ += 1
            excess.append(float(sums_N[found["racing"].lowest] / sums_N.min() - 1))
    means = {name: statistics.mean(shares) for name, shares in work.items()}
    return {"seeds": arguments.seeds, "differ": differ, "excess": max(excess), **means}
