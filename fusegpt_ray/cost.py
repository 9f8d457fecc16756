"""What a run will compute, hold and write, known before it begins: from the headers of the model's
files and the recipe alone.

Work is counted in block-forwards: one window passing one block. Where it depends on what will be
measured (scoring stops candidates early; the group of a block near the end needs a longer walk),
the count is the most that it can be. `benchmarks/memory.py` checks the memory against real runs.

Shapes: W windows, T tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from fusegpt_ray.importance.search import block_forwards
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.runner import state_bytes
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.preflight import Target
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import byte_count
from fusegpt_ray.sections import Evaluation

ADAM = 4
"""Values for each that learns: itself, its gradient and Adam's two moments."""


@dataclass(frozen=True)
class Stage:
    """One kind of work, in all rounds together."""

    name: str
    block_forwards: int
    """Of one window each; a backward pass counts as two."""
    flops: int
    """Of matrix products, a multiplication and an addition counted as two (as torch's
    `FlopCounterMode` does)."""


@dataclass(frozen=True)
class Cost:
    """The cost of a whole compression."""

    parameters: int
    """Of the dense model."""
    stages: tuple[Stage, ...]
    source_bytes: int
    """Of the dense model's tensors, as they are stored."""
    published_bytes: Mapping[str, int]
    """Of each model's tensors, by its name; exact where all blocks are of one size."""

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    def in_words(self) -> str:
        """One line for a person."""
        shares = [f"{stage.name} {stage.flops / self.flops:.0%}" for stage in self.stages]
        sizes = ", ".join(map(byte_count, self.published_bytes.values()))
        work = f"at most {flop_count(self.flops)} ({', '.join(shares)})"
        return f"{work}; {byte_count(self.source_bytes)} become {sizes}"


def cost(recipe: Recipe, dense: Stack, targets: Sequence[Target]) -> Cost:
    """The cost of publishing these targets."""
    rounds, length = targets[-1].remove, recipe.calibration.length
    depths = [len(dense) - done for done in range(rounds)]
    flops = block_flops(dense, length)
    # Of a window: the full table and, where candidates are stopped, the model itself up to twice
    # more (see `search.py`).
    again = 0 if recipe.importance.all else 2
    walks = [block_forwards(depth, range(depth)) + again * depth for depth in depths]
    scored = recipe.importance.windows * sum(walks)
    stages = [Stage("scoring", scored, scored * flops)]
    if recipe.trains:
        windows = recipe.calibration.windows
        walked = windows * sum(_states_forwards(recipe, len(dense), depth) for depth in depths)
        stages.append(Stage("states", walked, walked * flops))
        stages.append(_training(recipe, dense, depths, flops))
    if held_out := [text for text in recipe.evaluation.values() if text.windows]:
        stages.append(_evaluation(recipe, dense, targets, held_out))
    blocks = [_bytes(block.weights) for block in dense.blocks]
    source = _bytes(dense.trunk) + sum(blocks)
    published = {t.name: source - t.remove * sum(blocks) // len(blocks) for t in targets}
    elements = sum(_elements(block.weights) for block in dense.blocks) + _elements(dense.trunk)
    return Cost(elements, tuple(stages), source, published)


def block_flops(dense: Stack, length: int) -> int:
    """Of the average block, for one window of `length` tokens: its matrices, and the attention of
    all tokens to all.
    """
    config = read_config(dense.config).get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    matrices = [ref.shape for block in dense.blocks for ref in block.weights.values()]
    elements = sum(prod(shape) for shape in matrices if len(shape) == 2) // len(dense)
    return 2 * elements * length + 4 * width * length**2


def replica_bytes(dense: Stack, dtype: torch.dtype, windows: int, length: int) -> int:
    """What a replica may hold while it scores streamed blocks, activations aside: its trunk, two
    blocks as they are read and as they are used, and the states of the model and all candidates.

    While it evaluates, the states are one set of its windows, on the device, in the host's memory
    or in a file (see `model/placement.py`).
    """
    states = (len(dense) + 1) * windows * state_bytes(dense, length, dtype)
    return _in(dtype, dense.trunk) + 4 * _largest_block(dense, dtype) + states


def worker_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype, rounds: int = 1) -> int:
    """What a training worker may hold in the last of so many rounds, activations aside: the trunk,
    each neighbour's own and effective weights and the latter's gradients (in float32, where
    micro-batches add up), the donors, what is in passing, all that learns with its optimizer state,
    and the states of its windows at both ends of the group. These lie with the rest only if they
    are few: else in the host's memory, or in a file.

    ZeRO's partitioning saves some of it where there are several workers.
    """
    settings, text = recipe.fusion, recipe.calibration
    block = _largest_block(dense, dtype)
    donors = rounds if settings.fold == "at_end" else 1
    trained = 4 if settings.trained_dtype == "float32" else dtype.itemsize
    learns = trained * _trained_elements(recipe, dense, donors)
    states = 2 * text.windows // recipe.cluster.workers * state_bytes(dense, text.length, dtype)
    share = settings.batch // recipe.cluster.workers
    adds_up = (recipe.cluster.micro_batch or share) < share
    gradients = 4 / dtype.itemsize if adds_up else 1
    blocks = int((2 + gradients) * settings.group_size) + donors + 2
    return _in(dtype, dense.trunk) + blocks * block + ADAM * learns + states


def _trained_elements(recipe: Recipe, dense: Stack, donors: int) -> int:
    """Of a group: the two factors of each neighbour's own update, and of each donor's."""
    settings = recipe.fusion
    ranks = settings.lora_rank + donors * settings.rank * recipe.fuses
    return settings.group_size * ranks * sum(map(sum, _matrices(dense)))


def _matrices(dense: Stack) -> list[tuple[int, ...]]:
    """The shapes of the first block's matrices, which are its linear layers'."""
    return [ref.shape for ref in dense.blocks[0].weights.values() if len(ref.shape) == 2]


def _states_forwards(recipe: Recipe, depth: int, left: int) -> int:
    """Of a window: the teacher to the end of the group, and the model to its beginning."""
    return left if recipe.fusion.teacher == "current" or left == depth else depth + left


def _training(recipe: Recipe, dense: Stack, depths: Sequence[int], flops: int) -> Stage:
    settings, cluster = recipe.fusion, recipe.cluster
    share = settings.batch // cluster.workers
    passes = 3 + cluster.recompute_activations  # forward and, for two, backward
    if settings.loss == "batch_kl" and (cluster.micro_batch or share) < share:
        passes += 1  # see `microbatch.py`
    windows = recipe.calibration.windows * settings.epochs
    done, products = 0, 0
    for number, depth in enumerate(depths, start=1):
        done += windows * min(settings.group_size, depth - 1) * passes
        # Every worker forms the effective weights once for each loss batch, by products of two
        # factors, and their gradients take two products more.
        donors = number if settings.fold == "at_end" else 1
        formed = 3 * windows // share * min(settings.group_size, depth - 1)
        ranks = settings.lora_rank + donors * settings.rank * recipe.fuses
        products += formed * 2 * ranks * sum(map(prod, _matrices(dense)))
    return Stage("fine-tuning", done, done * flops + products)


def _evaluation(
    recipe: Recipe, dense: Stack, targets: Sequence[Target], texts: Sequence[Evaluation]
) -> Stage:
    """Of the texts whose number of windows the recipe gives: the dense model, and each target as it
    is published and with its blocks dropped only.
    """
    blocks = len(dense) + sum(2 * (len(dense) - target.remove) for target in targets)
    done = flops = 0
    for text in texts:
        assert text.windows, "its number is given"
        windows, length = text.windows * blocks, text.length or recipe.calibration.length
        done, flops = done + windows, flops + windows * block_flops(dense, length)
    return Stage("evaluation", done, flops)


def _largest_block(dense: Stack, dtype: torch.dtype) -> int:
    return max(_in(dtype, block.weights) for block in dense.blocks)


def _elements(refs: Refs) -> int:
    return sum(prod(ref.shape) for ref in refs.values())


def _in(dtype: torch.dtype, refs: Refs) -> int:
    """Bytes of these tensors in another dtype."""
    return dtype.itemsize * _elements(refs)


def _bytes(refs: Refs) -> int:
    return sum(ref.end - ref.begin for ref in refs.values())


def flop_count(flops: float) -> str:
    """With three digits at most: "12.3 TFLOP"."""
    units = ["MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]
    value = flops / 1e6
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
