"""Make GPT-style models shallower by fusing blocks, on one machine or a Ray cluster.

    from fusegpt_ray import Recipe, compress, score, evaluate, pull, verify

Names are imported when first used: reading a recipe or showing help needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusegpt_ray.errors import StorageError, UserError
    from fusegpt_ray.pipeline import compress, evaluate, score
    from fusegpt_ray.publishing.download import pull
    from fusegpt_ray.publishing.verification import verify
    from fusegpt_ray.recipe.recipe import Recipe
    from fusegpt_ray.recipe.sections import Evaluation

__all__ = [
    "Evaluation",
    "Recipe",
    "StorageError",
    "UserError",
    "compress",
    "evaluate",
    "pull",
    "score",
    "verify",
]

_HOMES = {
    "Recipe": "recipe.recipe",
    "Evaluation": "recipe.sections",
    "StorageError": "errors",
    "UserError": "errors",
    "compress": "pipeline",
    "evaluate": "pipeline",
    "score": "pipeline",
    "pull": "publishing.download",
    "verify": "publishing.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
