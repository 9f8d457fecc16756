"""Scoring, evaluation and the proof on model replicas.

Shapes: W windows, N blocks, T tokens.

Windows are split over replicas in whole batches, so that every window meets the same arithmetic on any number of replicas; where that
leaves replicas with less to do than others, the candidates of a batch are split, too (`shares.py`). Sums come back per window. What is
walked is decided here (`importance/search.py`), wave by wave, and does not depend on the number of replicas either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.importance.shares import cost, cut, in_turn, joined
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.perplexity import perplexity, window_losses
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain, compare_plain
from fusegpt_ray.publishing.proof import WINDOWS, Proof
from fusegpt_ray.publishing.proof import prove as prove_here
from fusegpt_ray.sections import Importance


def score(
    stack: Stack,
    windows_WT: np.ndarray,
    settings: Importance,
    replicas: Replicas,
    rows: int,
    last: Ranking | None,
    sums: Sums,
) -> Ranking:
    """See `Engine.score`."""
    batches = np.split(windows_WT, range(settings.batch, len(windows_WT), settings.batch))
    sizes, depth = list(map(len, batches)), len(stack)

    def measure(jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
        shares = cut(jobs, sizes, depth, replicas.replica.count)
        if not replicas.streams:  # then a share may as well be each part by itself
            shares = [[part] for part in in_turn(shares, sizes, depth)]
        arguments = [
            (stack, [(batches[batch], positions) for batch, positions in share]) for share in shares
        ]
        costs = [sum(cost(part, sizes, depth) for part in share) for share in shares]

        def parts() -> Iterator[tuple[Job, np.ndarray]]:
            for number, found in replicas.map(_sweep, arguments, rows, costs):
                yield from zip(shares[number], found, strict=True)

        return joined(jobs, parts())

    return search(
        sums.recalled(rows, measure), stack.kept, sizes, windows_WT.shape[1], settings, last
    )


def evaluate(stack: Stack, windows_WT: np.ndarray, replicas: Replicas, rows: int) -> float:
    """Perplexity."""
    shares = [(stack, share) for share in _shares(windows_WT, rows, replicas.pieces)]
    losses = dict(replicas.map(_losses, shares, rows))
    return perplexity(
        torch.from_numpy(np.concatenate([losses[number] for number in range(len(shares))]))
    )


def prove(
    published: Stack,
    folder: str,
    stack: Stack,
    windows_WT: np.ndarray,
    replicas: Replicas,
    rows: int,
) -> Proof:
    """See `proof.prove`; on one replica."""
    ((_, proof),) = replicas.map(_prove, [(published, folder, stack, windows_WT[:WINDOWS])], rows)
    return proof


def compare_source(
    folder: str, dense: Stack, windows_WT: np.ndarray, replicas: Replicas, rows: int
) -> Plain:
    """See `plain.compare_plain`; on one replica."""
    ((_, found),) = replicas.map(_compare_source, [(folder, dense, windows_WT[:1])], rows)
    return found


def contexts(rows: int, length: int, replicas: Replicas) -> list[Context]:
    """See `Trunk.contexts`; on the CPU. Asked of a replica, so that only replicas ever hold the trunk."""
    ((_, found),) = replicas.map(_contexts, [(length,)], rows)
    return found


def _contexts(runner: Runner, length: int) -> list[Context]:
    return [context.to("cpu") for context in runner.trunk.contexts(runner.rows, length)]


def _sweep(
    runner: Runner, stack: Stack, parts: list[tuple[np.ndarray, tuple[int, ...]]]
) -> list[np.ndarray]:
    walked = sweep(
        runner,
        stack,
        [Part(torch.tensor(windows_WT), positions) for windows_WT, positions in parts],
    )
    return [sums_WC.numpy() for sums_WC in walked]


def _prove(
    runner: Runner, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray
) -> Proof:
    return prove_here(
        published, folder, stack, runner, runner.for_trunk_of(published), torch.tensor(windows_WT)
    )


def _compare_source(runner: Runner, folder: str, dense: Stack, windows_WT: np.ndarray) -> Plain:
    return compare_plain(folder, dense, runner, torch.tensor(windows_WT))


def _losses(runner: Runner, stack: Stack, windows_WT: np.ndarray) -> np.ndarray:
    return window_losses(runner.for_trunk_of(stack), stack, torch.tensor(windows_WT)).numpy()


def _shares(windows_WT: np.ndarray, batch: int, pieces: int) -> list[np.ndarray]:
    """About so many pieces of consecutive windows, in whole batches, as even as those allow."""
    batches = -(-len(windows_WT) // batch)
    cuts = [batch * (batches * i // pieces) for i in range(1, pieces)]
    return [share for share in np.split(windows_WT, cuts) if len(share)]
