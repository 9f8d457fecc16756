"""The models that a recipe publishes."""

from __future__ import annotations

from dataclasses import dataclass

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import Recipe, blocks_to_remove, percent
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

    @property
    def name(self) -> str:
        return self.folder.rsplit("/", 1)[-1]

    @property
    def fewer(self) -> int:
        """How many blocks it has fewer than the dense model; negative, if it has more."""
        return self.remove - self.add

    @property
    def rounds(self) -> int:
        """After which it is there: one for each block that is removed, one for all insertions."""
        return self.remove or 1


def plan_targets(recipe: Recipe, depth: int) -> list[Target]:
    """The models this recipe publishes, the lightest compression first.

    Raises:
        UserError: a sparsity leaves fewer than two blocks, or no block would be inserted.
    """
    if recipe.inserts:
        return [_deeper(recipe, depth)]
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
