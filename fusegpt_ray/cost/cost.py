"""What a run will compute, hold and write, known before it begins: from the headers of the model's
files and the recipe alone.

Work is counted in block-forwards: one window passing one block. Where it depends on what will be
measured (scoring stops candidates early; the group of a block near the end needs a longer walk),
the count is the most that it can be. What is held meanwhile: see `footprint.py`.

Shapes: W windows, T tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from fusegpt_ray.cost.evaluating import evaluation_stage
from fusegpt_ray.cost.flops import attention_flops as attention_flops
from fusegpt_ray.cost.flops import block_flops, gating_flops, head_flops, healing_flops
from fusegpt_ray.cost.flops import matrix_flops as matrix_flops
from fusegpt_ray.cost.footprint import elements
from fusegpt_ray.cost.matrices import matrices, narrowed_bytes, slicing_flops
from fusegpt_ray.cost.stage import Stage
from fusegpt_ray.fusion.least_squares import GRID
from fusegpt_ray.healing.gates import passes_over
from fusegpt_ray.importance.search import block_forwards
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.recipe.text_sections import GeneratedText
from fusegpt_ray.targets import Target
from fusegpt_ray.terminal.display import byte_count, flop_count
from fusegpt_ray.text.mixture import generated_tokens
from fusegpt_ray.workers.room import Allocation


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
    uncounted: tuple[str, ...] = ()
    """The names of texts on which models are evaluated and whose windows nobody has counted yet."""

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    def hours(self, rates: Mapping[str, float], gpus: int = 1) -> float:
        """Of computing alone, on so many GPUs that share all of it evenly."""
        return sum(stage.flops / rates[stage.name] for stage in self.stages) / gpus / 3600

    def seconds(self, rates: Mapping[str, float], held: Allocation) -> dict[str, float]:
        """Of computing alone, by stage, on these processes and GPUs; on a CPU they share it."""
        most = {stage: min(held.gpus or 1, processes(stage, held)) for stage in self.stages}
        return {
            stage.name: stage.flops / rates[stage.name] * stage.longest_part(count)
            for stage, count in most.items()
        }

    def rows(self, rates: Mapping[str, float] | None, held: Allocation) -> list[dict[str, Any]]:
        """[{"stage", "block_forwards", "flops", "seconds"} …]: see `seconds`, which are None where
        the rates are not known.
        """
        seconds = self.seconds(rates, held) if rates else {}
        return [
            {
                "stage": stage.name,
                "block_forwards": stage.block_forwards,
                "flops": stage.flops,
                "seconds": seconds.get(stage.name),
            }
            for stage in self.stages
        ]

    def in_words(self) -> str:
        """One line for a person."""
        shares = [f"{stage.name} {stage.flops / self.flops:.0%}" for stage in self.stages]
        sizes = ", ".join(map(byte_count, self.published_bytes.values()))
        told = [part for part in (", ".join(shares), not_counted(self.uncounted)) if part]
        work = f"at most {flop_count(self.flops)}" + (f" ({'; '.join(told)})" if told else "")
        return f"{work}; {byte_count(self.source_bytes)} become {sizes}"


def not_counted(texts: Sequence[str]) -> str:
    """What is said where `Cost.uncounted` has names."""
    return f"evaluation on {', '.join(texts)} is not counted" if texts else ""


TRAINED = ("states", "fine-tuning", "healing")
"""The stages that training workers compute; replicas compute all others."""


def processes(stage: Stage, held: Allocation) -> int:
    """How many of these compute a stage at the same time."""
    return held.workers if stage.name in TRAINED and held.workers else held.replicas


def cost(recipe: Recipe, dense: Stack, targets: Sequence[Target]) -> Cost:
    """The cost of publishing these targets."""
    rounds, length = targets[-1].remove, recipe.calibration.length
    width = targets[-1].width
    depths = [len(dense) - done for done in range(rounds)]
    flops = block_flops(dense, length)
    stages = []
    if generated := _generated_tokens(recipe):
        stages.append(_generating(generated, length, dense))
    if recipe.search:
        stages.append(_search(recipe, dense, depths))
    elif (choice := recipe.spec.choice) == "run":
        walked = recipe.importance.windows * len(dense)
        stages.append(Stage("scoring", walked, walked * flops))
    elif choice == "gates":
        stages.append(_gates(recipe, dense))
    elif choice not in ("unseen", "none"):
        scored = depths[:1] if choice == "once" else depths
        stages.append(scoring_stage(recipe.importance, dense, scored, length))
    # Where groups are trained, the gaps are repaired once more alone, to compare with.
    repairs = [target.remove for target in targets] if recipe.evaluation else []
    repairs = recipe.repairs * [rounds, *(repairs if recipe.trains_groups else [])]
    if recipe.spec.trains or recipe.repairs:
        walked = recipe.calibration.windows * (
            recipe.spec.light * len(dense)
            + recipe.trains_groups * sum(_states_forwards(recipe, len(dense), n) for n in depths)
            + sum(sum(depths[:count]) for count in repairs)
        )
        stages.append(Stage("states", walked, walked * flops))
    if recipe.repairs:
        stages.append(Stage("repair", 0, sum(repairs) * _repair_flops(recipe, dense)))
    if width:
        walked = recipe.calibration.windows * len(dense)
        stages.append(Stage("states", walked, walked * flops))
        tokens = recipe.calibration.windows * length
        stages.append(Stage("slicing", 0, slicing_flops(dense, tokens, width.kept)))
    if recipe.trains_groups:
        stages.append(_training(recipe, dense, depths, flops))
    if recipe.spec.light:
        done = recipe.calibration.windows * recipe.fusion.epochs * _passes(recipe)
        stages.append(Stage("fine-tuning", done, done * flops))
    if heal := recipe.heal:
        kept = [len(dense) - target.fewer for target in targets]
        share = width.share if width else 1.0
        healing = _healing(recipe, dense, kept, recipe.healing_windows, heal.looks, share)
        walked = recipe.importance.windows * len(dense) * (heal.share_by == "similarity")
        both = healing.block_forwards + walked, healing.flops + walked * flops
        stages.append(Stage(healing.name, *both))
    if held_out := [text for text in recipe.evaluation.values() if text.most_windows]:
        stages.append(evaluation_stage(recipe, dense, targets, held_out))
    blocks = [_bytes(block.weights) for block in dense.blocks]
    source = _bytes(dense.trunk) + sum(blocks)
    published = {
        t.name: narrowed_bytes(dense, t.width.share)
        if t.width
        else source - t.fewer * sum(blocks) // len(blocks)
        for t in targets
    }
    parameters = sum(elements(block.weights) for block in dense.blocks) + elements(dense.trunk)
    return Cost(parameters, tuple(stages), source, published, _uncounted(recipe))


def _uncounted(recipe: Recipe) -> tuple[str, ...]:
    return tuple(name for name, text in recipe.evaluation.items() if not text.most_windows)


def scored_tokens(settings: Importance, left: int, length: int) -> int:
    """Of a window: tokens whose logits are computed, of the candidates and, where they are compared
    with those of the dense model, of that, as often as the window is walked.
    """
    against, tokens = settings.spec.against, length - settings.spec.skipped
    if against == "current":
        return 0
    walks = 1 if settings.all else 3
    return tokens * (left + (walks if against == "dense" else 0))


def _generated_tokens(recipe: Recipe) -> int:
    """Of all texts that the dense model writes. One in two sections is written once."""
    calibration, heal = recipe.calibration, recipe.heal
    wanted = [generated_tokens(calibration, calibration.length, calibration.windows)]
    if heal:
        texts, _ = recipe.healing_texts
        windows = (recipe.healing_windows, heal.held_out)
        wanted.append(generated_tokens(texts, calibration.length, *windows))
    most: dict[GeneratedText, int] = {}
    for part, tokens in ((part, n) for section in wanted for part, n in section.items()):
        same = part.model_copy(update={"weight": 1.0, "tokens": None})
        most[same] = max(tokens, most.get(same, 0))
    return sum(most.values())


def _generating(tokens: int, length: int, dense: Stack) -> Stage:
    """As if the text were walked once in windows."""
    windows = ceil(tokens / length)
    walked = windows * len(dense)
    flops = walked * block_flops(dense, length) + windows * head_flops(dense, length)
    return Stage("generating", walked, flops)


def _scoring_forwards(settings: Importance, depth: int, left: int) -> int:
    """Of a window: the full table and, where candidates are stopped, the model itself up to twice
    more (see `search.py`), each time beside the dense one if that is compared with.
    """
    walks_on = settings.spec.walks_on
    beside = depth if settings.spec.against == "dense" and left < depth else 0
    again = 2 if walks_on and not settings.all else 0
    return block_forwards(left, range(left), walks_on, beside) + again * (left + beside)


def _states_forwards(recipe: Recipe, depth: int, left: int) -> int:
    """Of a window: the teacher to the end of the group, and the model to its beginning."""
    return left if recipe.fusion.teacher == "current" or left == depth else depth + left


def _repair_flops(recipe: Recipe, dense: Stack) -> int:
    """Of the sums and the fits of one round, in float64. The layer's inputs are taken to be as many
    as the longest side of a block's matrices, which is at most too many.
    """
    outputs = int(read_config(dense.config).get_text_config().hidden_size)
    longest = matrices(dense, dense.blocks).longest
    features = {"linear": longest, "matrix": outputs, "scale": 1}[recipe.fusion.start]
    rows = recipe.calibration.windows * recipe.calibration.length
    fits = len(GRID) * (features**3 // 3 + 4 * features**2 * outputs)
    return 2 * rows * features * (features + outputs) + 2 * fits


def _passes(recipe: Recipe) -> int:
    """Of a window through what is trained: forward and, for two, backward."""
    return 3 + recipe.cluster.recompute_activations


def _training(recipe: Recipe, dense: Stack, depths: Sequence[int], flops: int) -> Stage:
    settings, cluster = recipe.fusion, recipe.cluster
    share = settings.batch // cluster.workers
    passes = _passes(recipe)
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
        products += formed * 2 * ranks * matrices(dense, dense.blocks).elements // len(dense)
    return Stage("fine-tuning", done, done * flops + products)


def scoring_stage(
    settings: Importance, dense: Stack, depths: Sequence[int], length: int, name: str = "scoring"
) -> Stage:
    """In a round for each of these depths."""
    walks = [_scoring_forwards(settings, len(dense), depth) for depth in depths]
    scored = settings.windows * sum(walks)
    logits = settings.windows * sum(scored_tokens(settings, depth, length) for depth in depths)
    flops = scored * block_flops(dense, length) + logits * head_flops(dense, 1)
    return Stage(name, scored, flops, ceil(settings.windows / settings.batch))


def _gates(recipe: Recipe, dense: Stack) -> Stage:
    """The dense model once, and in each pass all its blocks there and back."""
    windows, depth, length = recipe.importance.windows, len(dense), recipe.calibration.length
    learned = windows * passes_over(windows)
    flops = windows * depth * block_flops(dense, length) + learned * gating_flops(dense, length)
    return Stage("scoring", (windows + 3 * learned) * depth, flops)


def _search(recipe: Recipe, dense: Stack, depths: Sequence[int]) -> Stage:
    """Every set found by itself, and healed for a while."""
    settings, search, length = recipe.importance, recipe.search, recipe.calibration.length
    assert search is not None
    kept = [len(dense) - len(depths)] * len(search.candidates)
    parts = [_healing(recipe, dense, kept, recipe.trial_windows, looks=1)]
    for way in search.candidates:
        if way == "run":
            walked = settings.windows * len(dense)
            parts.append(Stage(way, walked, walked * block_flops(dense, length)))
            continue
        change = {"all": True} if way == "spaced" else {"metric": way}
        parts.append(scoring_stage(settings.model_copy(update=change), dense, depths, length))
    forwards = sum(part.block_forwards for part in parts)
    return Stage("search", forwards, sum(part.flops for part in parts))


def _healing(
    recipe: Recipe,
    dense: Stack,
    depths: Sequence[int],
    windows: int,
    looks: int,
    width: float = 1.0,
) -> Stage:
    """Of models of so many blocks: the teacher, where there is one, once over all windows; each
    model there and back over those that it is trained on, and there over the held-out ones at each
    look. `width`: see `healing_flops`.
    """
    heal, length = recipe.heal, recipe.calibration.length
    assert heal is not None
    looked = heal.held_out * (looks + 1)
    passes = 3 + recipe.cluster.recompute_activations
    block, head = block_flops(dense, length), head_flops(dense, length)
    student = matrix_flops(dense, length) * width + attention_flops(dense, length)
    done, flops = 0, 0.0
    for kept in depths:
        taught = (windows + heal.held_out) * len(dense) if heal.loss == "kl" else 0
        done += taught + looked * kept + passes * windows * kept
        flops += taught * block + looked * kept * student
        flops += ((heal.loss == "kl") + width) * looked * head
        flops += windows * healing_flops(recipe, dense, kept, width)
    return Stage("healing", done, int(flops))


def _bytes(refs: Refs) -> int:
    return sum(ref.end - ref.begin for ref in refs.values())
