"""A desk whose model writes the text itself: recipes for it, and what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import LENGTH, Desk, random_text
from stopped_runs import Watching

from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.generation import ROWS
from fusegpt_ray.preparing.windows import calibration_windows
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.outputs import Folder
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store.records import opened
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.local import LocalWorkers

TOKENS = 2 * ROWS * LENGTH
"""That are asked for: in texts of less than a window, some of which end early, three parts."""


@pytest.fixture(name="desk")
def _desk(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Desk:
    desk = Desk.make(tmp_path, checkpoint("llama"))
    (tmp_path / "prompts.txt").write_text("\n" + random_text(70, seed=3) + "\n\r\nw5\r\n")
    return desk


def asked(desk: Desk, more: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    """A recipe whose only text is one that the model writes."""
    section = desk.recipe()["calibration"] | {
        "data": [{"generate": str(desk.folder / "prompts.txt"), "tokens": TOKENS, **keys}]
    }
    return Recipe.parse(desk.recipe(calibration=section, **(more or {})))


def draw(
    asked: Recipe, show: Watching | None = None, kind: type[LocalWorkers] = LocalWorkers
) -> Windows:
    planned = plan(asked, Watching())
    with kind(planned.setup) as workers:
        leading = planned.leading["calibration"]
        return calibration_windows(workers, asked, leading, show or Watching(), Shared())


def parts(desk: Desk) -> list[Path]:
    """The files of the only text that was generated."""
    (folder,) = desk.out.glob("generated-*")
    assert Folder.look(str(folder)).generated
    return sorted(folder.iterdir())


def written(desk: Desk) -> list[int]:
    return [token for part in parts(desk) for token in opened(part.read_bytes())["tokens"]]
