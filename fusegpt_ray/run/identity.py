"""A run's identity: what must stay the same for a stopped run to be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fusegpt_ray.model.source import hub_sha256
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.store.threads import at_once

METHOD_VERSION = 5
"""Raised whenever the same recipe would give another model than before."""


def identity(
    recipe: Recipe,
    windows_sha256: str,
    model: Mapping[str, Any],
    dtype: torch.dtype,
    hardware: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that shapes the result: parts of the recipe, the data and the model.

    `model`: see `model_identity`. `hardware`: see `Workers.hardware`.
    """
    return {
        **settings(recipe),
        "arithmetic": str(dtype).removeprefix("torch."),
        "hardware": dict(hardware),
        "windows_sha256": windows_sha256,
        "model": dict(model),
    }


def model_identity(dense: Stack) -> dict[str, Any]:
    """What changes with a model: {"config", "files": what changes with each one's bytes, by name}.

    Reads all of a local model's weights once, several files at a time, for their checksums. An
    object store is asked for its own, and the hub's cache tells those of what it downloaded.
    """
    uris = sorted({ref.file for ref in dense.refs})
    files = dict(
        zip((uri.rsplit("/", 1)[-1] for uri in uris), at_once(file_mark, uris), strict=True)
    )
    return {"config": dict(dense.config), "files": files}


def healing_identity(recipe: Recipe, *windows_sha256: str) -> dict[str, Any]:
    """What shapes the healing of a model, beside the rounds before it.

    It is no part of the run's identity: with another `heal` the same rounds are gone on from.
    """
    assert recipe.heal
    settings = _shaping(recipe.heal.model_dump(mode="json"))
    return {"heal": settings, "seed": recipe.seed, "windows_sha256": list(windows_sha256)}


def run_id(identity: Mapping[str, Any], healing: Mapping[str, Any] | None) -> str:
    """Names a run in what it publishes. What is finished stays its own on other hardware."""
    named = {key: value for key, value in identity.items() if key != "hardware"}
    return checksum({**named, "healing": healing} if healing else named)


def file_mark(uri: str) -> str:
    """What changes with a file's bytes; a local file is read for it, unless the hub has told."""
    known = hub_sha256(uri)
    return f"sha256 {known}" if known else storage.fingerprint(uri)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The part of the identity that needs neither data nor model."""
    outside = {"cluster", "output", "evaluation"}
    if METHOD_SPECS[recipe.method].nested:
        outside.add("sparsity")
    if recipe.search is None:
        outside.add("heal")  # it comes after the rounds
    shaping = _shaping(recipe.model_dump(mode="json", exclude=outside))
    return {"method_version": METHOD_VERSION, "recipe": shaping}


def same_way(recipe: Recipe, made_by: Mapping[str, Any]) -> bool:
    """Whether a recipe, as a manifest tells it, makes the same models: at whatever sparsities, if a
    run passes the lower ones on its way.
    """
    free = {"cluster", "output", "evaluation"}
    if METHOD_SPECS[recipe.method].nested:
        free.add("sparsity")
    shaping = _shaping(recipe.model_dump(mode="json", exclude=free))
    return all(_shaping(made_by.get(key)) == value for key, value in shaping.items())


def _shaping(dumped: Any) -> Any:
    """Without what is only told of texts."""
    if isinstance(dumped, dict):
        return {key: _shaping(value) for key, value in dumped.items() if key != "licence"}
    return [_shaping(value) for value in dumped] if isinstance(dumped, list) else dumped


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path of the key, the old and the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield path, old, new
