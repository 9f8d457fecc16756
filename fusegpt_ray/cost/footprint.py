"""What workers will hold, known before the work from the headers of the model's files and the
recipe alone. `benchmarks/memory.py` checks it against real runs.

Shapes: W windows, T tokens, N blocks.
"""

from __future__ import annotations

from math import ceil, prod

import torch

from fusegpt_ray.cost.matrices import Matrices, attention_heads, largest_block, matrices
from fusegpt_ray.fusion.compensation import PIECES
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.runner import state_bytes
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Heal
from fusegpt_ray.terminal.display import byte_count
from fusegpt_ray.training.deepspeed_stepper import BUCKET
from fusegpt_ray.training.distillation import CHUNK

ADAM = 4
"""Values for each that learns: itself, its gradient and Adam's two moments."""
ADAM_KEPT = 3
"""Of these, a training checkpoint keeps all but the gradient."""
GATHERED = 10**9
"""Values that ZeRO 3 keeps gathered, at most: its `stage3_max_live_parameters`."""
FLOAT64 = 8
"""Bytes."""
LOGITS = 6
"""Float32 copies of a chunk's logits that exist at once: of both models, as they come, as
distributions, and as a gradient."""
KEPT = 1.7
"""Bytes that a block keeps for its backward pass, by those that its linear layers take and give:
measured for LLaMA-2-7B on an H200, not compiled."""


def replica_bytes(dense: Stack, dtype: torch.dtype, windows: int, length: int) -> int:
    """What a replica may hold while it scores streamed blocks, activations aside: its trunk, two
    blocks as they are read and as they are used, and the states of the model and all candidates
    (`bi` keeps none of candidates; `kl` keeps the dense model's as well).

    While it evaluates, the states are one set of its windows, on the device, in the host's memory
    or in a file (see `model/placement.py`).
    """
    states = (len(dense) + 1) * windows * state_bytes(dense, length, dtype)
    return _in(dtype, dense.trunk) + 4 * _largest_block(dense, dtype) + states


def values_held(cluster: Cluster, learns: int) -> int:
    """Values that a training worker holds of what learns, at most: each itself, its gradient and
    Adam's two moments; and what DeepSpeed holds beside these. That is a bucket, in which gradients
    are reduced; and with ZeRO the masters that it updates, also of what is float32 itself. Of these
    and of the moments a worker holds its part. ZeRO 3 holds its part also of values and gradients,
    and gathers others on the way.

    `tests/integration/test_held_by_deepspeed.py` measures it.
    """
    if cluster.engine == "local":
        return ADAM * learns
    bucket, part = min(learns, BUCKET), ceil(learns / cluster.workers)
    shared = 2 * learns + 3 * part
    gathered = 5 * part + 2 * min(learns, GATHERED)
    held = {0: ADAM * learns, 1: shared, 2: shared, 3: gathered}
    return held[cluster.zero_stage] + bucket


def training_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype, rounds: int = 1) -> int:
    """What a training worker holds on its device in the last of so many rounds, activations and
    states aside: each neighbour's own and effective weights and the latter's gradients (in
    float32, where micro-batches add up), the donors, what is in passing, and all that learns with
    its optimizer state. On a GPU, the trunk is away meanwhile.

    Of a light block: its weights and their gradients, and what its masters take (`values_held`).
    """
    settings = recipe.fusion
    if recipe.spec.light:
        added_up = _micro_batch(recipe) < settings.batch // recipe.cluster.workers
        weights = dtype.itemsize + (4 if added_up else dtype.itemsize)
        learns = max(elements(block.weights) for block in dense.blocks)
        return weights * learns + 4 * values_held(recipe.cluster, learns)
    donors = rounds if settings.fold == "at_end" else 1
    trained = 4 if settings.trained_dtype == "float32" else dtype.itemsize
    learns = values_held(recipe.cluster, trained_elements(recipe, dense, donors))
    share = settings.batch // recipe.cluster.workers
    gradients = 4 / dtype.itemsize if _micro_batch(recipe) < share else 1
    blocks = int((2 + gradients) * settings.group_size) + donors + 2
    return blocks * _largest_block(dense, dtype) + trained * learns


def activation_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype) -> int:
    """What a training worker keeps of a micro-batch for the backward pass, about: of all blocks of
    the group, or of one and the states between them, if the others are computed again.
    """
    group = 1 if recipe.spec.light else recipe.fusion.group_size
    tokens = _micro_batch(recipe) * recipe.calibration.length
    kept = int(KEPT * tokens * dtype.itemsize * _largest_matrices(dense).active_sides)
    if recipe.cluster.recompute_activations:
        return kept + group * state_bytes(dense, tokens, dtype)
    return kept * group


def healing_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype, kept: int) -> int:
    """What a training worker holds on its device while a model of `kept` blocks is healed, its
    states aside: the trunk, and that of a narrower model beside it; the blocks' weights; all that
    learns, once in the arithmetic's dtype with the gradients of a loss batch, once as masters with
    gradients and optimizer state; activations; and the logits of a chunk of tokens.

    What several workers share of what learns: see `values_held`. ZeRO 3 shares the frozen weights,
    too; some blocks' worth is whole at a time.
    """
    heal, cluster = recipe.heal, recipe.cluster
    assert heal is not None
    micro_batch = cluster.micro_batch or heal.batch // cluster.workers
    tokens = micro_batch * recipe.calibration.length
    weights = kept * sum(elements(block.weights) for block in dense.blocks) // len(dense)
    low_rank = heal.train == "lora"
    formed = _formed(recipe, dense, kept)  # each block has its own of these; …
    learns = ceil(formed / (heal.share or 1))  # … a group learns them once
    frozen = weights if low_rank else weights - formed
    part = 1 / cluster.workers if cluster.zero_stage == 3 else 1.0
    state = 4 * values_held(cluster, learns)
    gradients = dtype.itemsize if micro_batch * cluster.workers == heal.batch else 4
    held = frozen * dtype.itemsize * part + formed * (dtype.itemsize + gradients) + state
    if part < 1:
        # What a backward pass needs of the gathered weights is held until then.
        again = cluster.recompute_activations
        held += 2 * _largest_block(dense, dtype) if again else frozen * dtype.itemsize
    largest = _largest_matrices(dense)
    block = int(KEPT * tokens * dtype.itemsize * largest.active_sides)
    # Experts with their updates are formed anew for each call (see `low_rank.py`).
    block += low_rank * largest.expert_elements * dtype.itemsize
    passing = kept * block
    if cluster.recompute_activations:
        passing = block + kept * state_bytes(dense, tokens, dtype)
    # The gradient by what was formed.
    passing += low_rank * largest.expert_elements * dtype.itemsize
    vocabulary = read_config(dense.config).get_text_config().vocab_size
    logits = LOGITS * 4 * min(CHUNK, tokens) * vocabulary
    trunks = 1 + recipe.spec.narrows  # a narrower model has one of its own
    return int(held) + passing + logits + trunks * _in(dtype, dense.trunk)


def _formed(recipe: Recipe, dense: Stack, kept: int) -> int:
    """Numbers that change when a model of `kept` blocks is healed, of all its blocks."""
    heal = recipe.heal
    assert heal is not None
    if heal.train == "lora":
        return kept * heal.rank * matrices(dense, dense.blocks).sides // len(dense)
    weights = kept * sum(elements(block.weights) for block in dense.blocks) // len(dense)
    return weights * (kept - len(dense)) // kept if heal.train == "new" else weights


def checkpoint_bytes(recipe: Recipe, dense: Stack, rounds: int, kept: int) -> int:
    """Of two training checkpoints of all workers, the last and the one that takes its place, of
    that training of which they are largest: what learns and Adam's two moments, in float32; in
    healing also what learned at the best look so far.
    """
    learned = [0]
    if recipe.trains_groups:
        donors = rounds if recipe.fusion.fold == "at_end" else 1
        learned.append(ADAM_KEPT * trained_elements(recipe, dense, donors))
    if recipe.spec.light:
        learned.append(ADAM_KEPT * max(elements(block.weights) for block in dense.blocks))
    if recipe.heal:
        formed = ceil(_formed(recipe, dense, kept) / (recipe.heal.share or 1))
        learned.append((ADAM_KEPT + 1) * formed)
    return 2 * 4 * max(learned)


def sums_bytes(recipe: Recipe, dense: Stack) -> int:
    """What replicas send to be solved in closed form, of all pieces of the windows at once: of a
    repair, or of a smaller hidden size. See `fusion.least_squares.Moments`.
    """
    hidden = int(read_config(dense.config).get_text_config().hidden_size)
    windows, batch = recipe.calibration.windows, recipe.importance.batch
    pieces = min(PIECES, ceil(windows / batch))
    if recipe.spec.narrows:
        return pieces * FLOAT64 * hidden**2
    if not recipe.repairs:
        return 0
    longest = matrices(dense, dense.blocks).longest
    x, y = {"linear": (longest, hidden), "matrix": (hidden, hidden)}.get(
        recipe.fusion.start, (1, 1)
    )
    return pieces * FLOAT64 * x * (x + y)


def waiting_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype) -> int:
    """States that wait on each training worker's node while its windows pass block after block: two
    sets of a group's windows, or of those of one part of healing and what is held out. They lie in
    the host's memory, or in temporary files where that is short.
    """
    workers, one = recipe.cluster.workers, state_bytes(dense, recipe.calibration.length, dtype)
    windows = recipe.calibration.windows if recipe.spec.trains else 0
    if heal := recipe.heal:
        windows = max(windows, ceil(recipe.healing_windows / heal.looks) + heal.held_out)
    return 2 * ceil(windows / workers) * one


def trial_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype, kept: int) -> int:
    """What a replica holds that heals a set of the tournament alone, with a single window at once;
    see `healing_bytes`.
    """
    changes = {"engine": "local", "workers": 1, "zero_stage": 0, "micro_batch": 1}
    alone = recipe.cluster.model_copy(update=changes)
    return healing_bytes(recipe.model_copy(update={"cluster": alone}), dense, dtype, kept)


def gating_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype) -> int:
    """What a replica holds that trains the gates of all blocks, with a single window at once: no
    more than to heal the dense model by updates of rank 1.
    """
    healing = recipe.model_copy(update={"heal": Heal(rank=1)})
    return trial_bytes(healing, dense, dtype, len(dense))


def worker_bytes(recipe: Recipe, dense: Stack, dtype: torch.dtype, rounds: int = 1) -> int:
    """All that a training worker holds, activations aside, wherever it lies: see `training_bytes`,
    the trunk, and the states of its windows at both ends of the group. These lie on the device
    only if they are few: else in the host's memory, or in a file.
    """
    windows = recipe.calibration.windows // recipe.cluster.workers
    states = 2 * windows * state_bytes(dense, recipe.calibration.length, dtype)
    return training_bytes(recipe, dense, dtype, rounds) + _in(dtype, dense.trunk) + states


def generating_bytes(dense: Stack, dtype: torch.dtype, length: int) -> int:
    """What a replica holds while the model writes one text of `length` tokens: all of its weights,
    and the keys and values of all blocks.
    """
    config = read_config(dense.config).get_text_config()
    heads, width = attention_heads(dense)
    kept = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width * length
    weights = _in(dtype, dense.trunk) + sum(_in(dtype, block.weights) for block in dense.blocks)
    return weights + len(dense) * kept * dtype.itemsize


def shortage(recipe: Recipe, dense: Stack, dtype: torch.dtype, rounds: int, room: int) -> str:
    """What to tell of a training worker whose device has `room` bytes, if that is not enough for
    the last of so many rounds; else nothing.
    """
    needed = training_bytes(recipe, dense, dtype, rounds) + activation_bytes(recipe, dense, dtype)
    if not recipe.spec.trains or needed <= room:
        return ""
    keys = [] if recipe.spec.light else ["a smaller fusion.group_size"]
    if not recipe.cluster.recompute_activations:
        keys.insert(0, "cluster.recompute_activations")
    if _micro_batch(recipe) > 1:
        keys.insert(0, "cluster.micro_batch")
    if recipe.fusion.fold == "at_end" and rounds > 1 and not recipe.spec.light:
        keys.insert(0, "fusion.fold: each_round")
    needs = f"fine-tuning needs about {byte_count(needed)} on each worker in its last round"
    less = f"; less is needed with {' or '.join(keys)}" if keys else ""
    return f"{needs}, which has {byte_count(room)}{less}"


def healing_shortage(recipe: Recipe, dense: Stack, dtype: torch.dtype, kept: int, room: int) -> str:
    """As `shortage`, for healing a model of `kept` blocks."""
    if recipe.heal is None or (needed := healing_bytes(recipe, dense, dtype, kept)) <= room:
        return ""
    fewer = {"lora": ["a lower heal.rank"], "all": ["heal.train: lora"]}
    keys = fewer.get(recipe.heal.train, [])
    if recipe.cluster.workers > 1 and recipe.cluster.zero_stage < 3:
        keys.insert(0, "cluster.zero_stage: 3")
    if not recipe.cluster.recompute_activations:
        keys.insert(0, "cluster.recompute_activations")
    if (recipe.cluster.micro_batch or recipe.heal.batch // recipe.cluster.workers) > 1:
        keys.insert(0, "cluster.micro_batch: 1")
    return (
        f"healing needs about {byte_count(needed)} on each worker, which has {byte_count(room)}; "
        f"less is needed with {' or '.join(keys or ['fewer new blocks'])}"
    )


def search_shortage(recipe: Recipe, dense: Stack, dtype: torch.dtype, kept: int, room: int) -> str:
    """As `healing_shortage`, for a trial of the tournament, which one replica heals alone."""
    if recipe.search is None or (needed := trial_bytes(recipe, dense, dtype, kept)) <= room:
        return ""
    return (
        f"search heals each set of blocks on one replica, which needs about {byte_count(needed)} "
        f"of {byte_count(room)} even with a single window at once; leave out search, or use "
        "heal.train: lora and cluster.recompute_activations"
    )


def trained_elements(recipe: Recipe, dense: Stack, donors: int) -> int:
    """Of a group: the two factors of each neighbour's own update, and of each donor's."""
    settings = recipe.fusion
    ranks = settings.lora_rank + donors * settings.rank * recipe.fuses
    return settings.group_size * ranks * _largest_matrices(dense).sides


def elements(refs: Refs) -> int:
    return sum(prod(ref.shape) for ref in refs.values())


def _largest_matrices(dense: Stack) -> Matrices:
    return matrices(dense, [largest_block(dense)])


def _micro_batch(recipe: Recipe) -> int:
    """Windows that pass a worker's group at once."""
    return recipe.cluster.micro_batch or recipe.fusion.batch // recipe.cluster.workers


def _largest_block(dense: Stack, dtype: torch.dtype) -> int:
    return max(_in(dtype, block.weights) for block in dense.blocks)


def _in(dtype: torch.dtype, refs: Refs) -> int:
    """Bytes of these tensors in another dtype."""
    return dtype.itemsize * elements(refs)
