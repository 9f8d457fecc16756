"""Bytes of weights that a run will read and write, by stage, known before it begins.

All is the most that it can be, as far as states of all windows fit into a process at once: blocks
are read once for each walk of each process where weights are streamed, and once by each replica
where it keeps them; those of a published model are read for each walk. Training workers stream
them. What learns is written in float32. The headers of files are not counted. Of text that the
dense model writes, the most is not known, since it may end early: it is counted as if it did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusegpt_ray.cost.cost import Cost
from fusegpt_ray.cost.footprint import elements
from fusegpt_ray.cost.matrices import largest_block, matrices
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.sampling import ROWS
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.weights import stored_bytes
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.targets import Target
from fusegpt_ray.workers.room import Allocation

WAVES = 4
"""In which scoring asks replicas for walks, at most; see `importance/search.py`."""
QUESTIONS = 2
"""About images, that a run finds by itself; see `preparing/sample_prompts.py`."""
FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one stage, of all processes and rounds together."""

    stage: str
    read: int = 0
    written: int = 0


def traffic(
    recipe: Recipe,
    dense: Stack,
    targets: Sequence[Target],
    cost: Cost,
    held: Allocation,
    streams: bool,
) -> list[Traffic]:
    """
    Args:
        cost: of these targets.
        streams: whether replicas read the weights for every walk.
    """
    whole = stored_bytes(dense.blocks)
    found = [
        Traffic("generating", read=_generating(dense, cost, held, streams)),
        Traffic("search", read=_search(recipe, dense, targets, held, streams)),
        Traffic("scoring", read=_scoring(recipe, dense, targets, cost, held, streams)),
        Traffic("states", read=_states(recipe, dense, cost, held)),
        Traffic("fine-tuning", written=_rounds(recipe, dense, targets, cost)),
    ]
    if heal := recipe.heal:
        read = len(targets) * (heal.looks + 1) * held.workers * whole if heal.loss == "kl" else 0
        written = sum(len(dense) - target.fewer for target in targets) * _learned(dense)
        found.append(Traffic("healing", read, written))
    found += [
        Traffic("evaluation", read=_evaluation(recipe, dense, targets, held, streams)),
        Traffic("samples", read=_samples(recipe, dense, targets)),
    ]
    published = sum(cost.published_bytes.values())
    found.append(Traffic("publishing", published, published))
    return [row for row in found if row.read or row.written]


def _learned(dense: Stack) -> int:
    """Of the largest block in which something learned."""
    return FLOAT32 * elements(largest_block(dense).weights)


def _scoring(
    recipe: Recipe,
    dense: Stack,
    targets: Sequence[Target],
    cost: Cost,
    held: Allocation,
    streams: bool,
) -> int:
    choice, settings, whole = recipe.spec.choice, recipe.importance, stored_bytes(dense.blocks)
    if recipe.search or choice in ("unseen", "none"):
        return 0
    if not streams:
        return held.replicas * (whole + _changed(recipe, dense, targets[-1].rounds - 1))
    if choice == "gates":  # one replica walks there and back
        return _walked(dense, cost, "scoring", settings.windows)
    if choice == "run":
        return _run(recipe, dense)
    rounds = 1 if choice == "once" else targets[-1].rounds
    by_metric = METHOD_SPECS[recipe.method].by_metric
    return held.replicas * _scored(settings, dense, rounds, by_metric and not settings.all)


def _run(recipe: Recipe, dense: Stack) -> int:
    """For the distances across runs of blocks; each batch of windows is a walk of its own."""
    return -(-recipe.importance.windows // recipe.importance.batch) * stored_bytes(dense.blocks)


def _scored(settings: Importance, dense: Stack, rounds: int, in_waves: bool) -> int:
    """By each replica, for the scores of so many rounds."""
    whole = stored_bytes(dense.blocks)
    waves = WAVES if in_waves and settings.spec.walks_on else 1
    beside = whole if settings.spec.against == "dense" else 0
    walked = sum(
        whole * (len(dense) - done) // len(dense) + beside * bool(done) for done in range(rounds)
    )
    return waves * walked


def _search(
    recipe: Recipe, dense: Stack, targets: Sequence[Target], held: Allocation, streams: bool
) -> int:
    """Every replica looks for each set; one of them heals it, and walks through the dense model for
    what it is to learn from.
    """
    if recipe.search is None:
        return 0
    whole, fewer = stored_bytes(dense.blocks), targets[-1].fewer
    if not streams:
        return held.replicas * whole
    found = 0
    for way in recipe.search.candidates:
        if way == "run":
            found += _run(recipe, dense)
        else:
            change = {"all": True} if way == "spaced" else {"metric": way}
            settings = recipe.importance.model_copy(update=change)
            found += held.replicas * _scored(settings, dense, fewer, not settings.all)
        found += 3 * whole
    return found


def _generating(dense: Stack, cost: Cost, held: Allocation, streams: bool) -> int:
    """Each part of the text is written by a walk of its own."""
    walked = sum(stage.block_forwards for stage in cost.stages if stage.name == "generating")
    windows = walked // len(dense)
    # A prompt may take half of a window, so that a part has as many windows twice.
    walks = -(-2 * windows // ROWS) if streams else min(held.replicas, windows)
    return walks * stored_bytes(dense.blocks)


def _evaluation(
    recipe: Recipe, dense: Stack, targets: Sequence[Target], held: Allocation, streams: bool
) -> int:
    """Also for the checks that the source is read as it is, and each published model. What a
    replica keeps of the dense model, it may read here for the first time; of a published model it
    keeps nothing, and each replica reads it once for each text.
    """
    whole, texts = stored_bytes(dense.blocks), len(recipe.evaluation)
    found = 2 * whole + held.replicas * whole * (max(texts, 1) if streams else 1)
    for target in targets:
        kept = _kept(dense, target)
        *others, last = _stages(recipe, dense, target)
        walks = texts * held.replicas * (kept + sum(others) + kept * streams)
        found += walks + 3 * kept + last
    return found


def _kept(dense: Stack, target: Target) -> int:
    """Of a published model's blocks."""
    return stored_bytes(dense.blocks) * (len(dense) - target.fewer) // len(dense)


def _stages(recipe: Recipe, dense: Stack, target: Target) -> list[int]:
    """Bytes of the stacks that a published model was on its way, the last of which it is."""
    kept, rounds = _kept(dense, target), target.rounds
    light = _learned(dense) if recipe.spec.light else 0
    trained = kept + _changed(recipe, dense, rounds) + _terms(recipe, dense, rounds) + light
    healed = (len(dense) - target.fewer) * _learned(dense)
    repaired = recipe.trains_groups and recipe.repairs and recipe.evaluation
    return [
        *([kept + rounds * _learned(dense)] if repaired else []),
        trained,
        *([healed] if recipe.heal else []),
    ]


def _samples(recipe: Recipe, dense: Stack, targets: Sequence[Target]) -> int:
    """Each prompt is continued by a walk of its own, by the dense model once. Where a run has
    images, it may ask about some of them.
    """
    prompts = len(recipe.output.samples)
    if prompts and recipe.keys_of_images:
        prompts += QUESTIONS
    models = stored_bytes(dense.blocks) + sum(_kept(dense, target) for target in targets)
    return prompts * models


def _changed(recipe: Recipe, dense: Stack, rounds: int) -> int:
    """Of the blocks that so many rounds change, as they are stored then."""
    if recipe.trains_groups:
        return rounds * min(recipe.fusion.group_size, len(dense)) * _learned(dense)
    return rounds * _learned(dense) if recipe.repairs else 0


def _terms(recipe: Recipe, dense: Stack, rounds: int) -> int:
    """Of the low-rank terms that are kept beside the blocks of so many rounds, where they are
    folded at the end: of each block's own, and of each donor so far.
    """
    settings = recipe.fusion
    if not recipe.trains_groups or settings.fold != "at_end":
        return 0
    donors = sum(range(1, rounds + 1)) * recipe.fuses
    ranks = rounds * settings.lora_rank + donors * settings.rank
    largest = largest_block(dense)
    sides = matrices(dense, [largest]).sides
    others = elements(largest.weights) - matrices(dense, [largest]).elements
    return min(settings.group_size, len(dense)) * FLOAT32 * (ranks * sides + rounds * others)


def _states(recipe: Recipe, dense: Stack, cost: Cost, held: Allocation) -> int:
    """Every process walks what a window does."""
    each = _walked(dense, cost, "states", recipe.calibration.windows)
    return max(held.replicas, held.workers) * each


def _walked(dense: Stack, cost: Cost, name: str, windows: int) -> int:
    """Bytes of the blocks that each of so many windows passes in a stage."""
    forwards = sum(stage.block_forwards for stage in cost.stages if stage.name == name)
    return -(-forwards // windows) * (stored_bytes(dense.blocks) // len(dense))


def _rounds(recipe: Recipe, dense: Stack, targets: Sequence[Target], cost: Cost) -> int:
    if METHOD_SPECS[recipe.method].narrows:
        return max(cost.published_bytes.values())
    if recipe.spec.light:
        return _learned(dense)
    if targets[-1].add:
        return targets[-1].add * max(stored_bytes([block]) for block in dense.blocks)
    rounds = targets[-1].rounds
    trained = _changed(recipe, dense, rounds) if recipe.trains_groups else 0
    return trained + _terms(recipe, dense, rounds) + rounds * _repaired(recipe, dense)


def _repaired(recipe: Recipe, dense: Stack) -> int:
    """Of the layer that a round repairs: nothing else of its block is written. Where low-rank terms
    are kept, also of that without them. It has as many inputs as `cost.py` takes it to have.
    """
    files = 2 if recipe.trains_groups and recipe.fusion.fold == "at_end" else 1
    outputs = int(read_config(dense.config).get_text_config().hidden_size)
    inputs = matrices(dense, dense.blocks).longest
    return recipe.repairs * files * FLOAT32 * outputs * (inputs + 1)  # and a bias
