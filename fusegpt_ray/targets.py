"""The models that a recipe publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.width import Width, check_width
from fusegpt_ray.recipe.recipe import Recipe, blocks_to_remove, percent
from fusegpt_ray.store import storage


@dataclass(frozen=True)
class Target:
    """One model to publish."""

    sparsity: float | None
    """None: it is made deeper."""
    remove: int
    """Blocks removed in it."""
    folder: str
    add: int = 0
    """Blocks inserted in it."""
    width: Width | None = None
    """Its hidden size, where that is what becomes smaller."""

    @property
    def name(self) -> str:
        return self.folder.rsplit("/", 1)[-1]

    @property
    def fewer(self) -> int:
        """How many blocks it has fewer than the dense model; negative, if it has more."""
        return self.remove - self.add

    @property
    def rounds(self) -> int:
        """After how many it is there: one for each block that goes, or one that changes all."""
        return self.remove or 1


def plan_targets(recipe: Recipe, depth: int, raw: Mapping[str, Any]) -> list[Target]:
    """The models this recipe publishes, the lightest compression first.

    Args:
        raw: the dense model's config.json.

    Raises:
        UserError: a sparsity leaves fewer than two blocks; no block would be inserted; or the
            model, which is to become narrower, cannot.
    """
    if recipe.inserts:
        return [_deeper(recipe, depth)]
    if recipe.spec.narrows:
        widths = {share: check_width(raw, share) for share in recipe.sparsity}
        return [
            Target(share, 0, _folder(recipe, f"p{percent(share)}"), width=width)
            for share, width in widths.items()
        ]
    targets = []
    for sparsity in sorted(recipe.sparsity):
        remove = blocks_to_remove(depth, sparsity)
        if depth - remove < 2:
            problem = f"leaves {depth - remove} of {depth} blocks"
            raise UserError(
                "sparsity",
                sparsity,
                problem,
                f"use at most {(depth - 2) / depth:.2f}: two blocks must stay",
            )
        targets.append(Target(sparsity, remove, _folder(recipe, f"p{percent(sparsity)}")))
    return targets


def _deeper(recipe: Recipe, depth: int) -> Target:
    add = recipe.blocks_to_add(depth)
    if not add:  # a share always comes to one
        problem = f"the model has {depth} blocks, so none would be inserted"
        raise UserError("every", recipe.every, problem, f"use at most {depth}")
    return Target(None, 0, _folder(recipe, f"d{depth + add}"), add)


def _folder(recipe: Recipe, last: str) -> str:
    return storage.join(storage.absolute(recipe.output.uri), f"{recipe.output.name}-{last}")
