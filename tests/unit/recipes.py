"""The smallest recipe, with more said in some sections, and the error that a wrong one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.recipe import Recipe

SMALLEST: dict[str, Any] = {
    "model": {"source": "some/model"},
    "calibration": {"data": "text.txt"},
    "output": {"uri": "out", "name": "small"},
}


def recipe(**sections: Any) -> Recipe:
    """The smallest recipe with more said in some sections."""
    return Recipe.parse(merged(sections))


def merged(sections: dict[str, Any]) -> dict[str, Any]:
    data = dict(SMALLEST)
    for name, value in sections.items():
        data[name] = {**SMALLEST.get(name, {}), **value} if isinstance(value, dict) else value
    return data


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def mistake(data: Any, overrides: tuple[str, ...] = (), folder: Path | None = None) -> UserError:
    """The error that a recipe gives, from a file if there is a folder for it."""
    if folder is not None:
        file = written(folder, data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(UserError) as caught:
        Recipe.parse(data) if folder is None else Recipe.load(file, overrides)
    error = caught.value
    assert str(error) == f"{error.key} = {error.value!r}: {error.problem}. Fix: {error.fix}."
    return error
