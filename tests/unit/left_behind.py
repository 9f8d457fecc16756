"""What real runs leave: finished, stopped, half written, as old as a test wants it, or still at
work.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from stopped_runs import recipe, stopped

from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.begun import being_published
from fusegpt_ray.store.fence import nobody_else

Capture = pytest.CaptureFixture[str]
OLD = 24 * 3600.0


@pytest.fixture(name="stopped_desk", scope="module")
def _stopped_desk(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Desk:
    """A run that the user stopped in its second round of three, with one model of another run
    beside it.
    """
    desk = Desk.make(tmp_path_factory.mktemp("stopped"), checkpoint("llama"))
    stopped(desk, 2)
    compress(
        recipe(desk, sparsity=0.2, method="mi", output={"uri": str(desk.out), "name": "other"})
    )
    return desk


@pytest.fixture(name="out")
def _out(stopped_desk: Desk, tmp_path: Path) -> Path:
    """A copy of what that run left, as old as it is."""
    return Path(shutil.copytree(stopped_desk.out, tmp_path / "outputs"))


def aged(folder: Path, seconds: float = OLD) -> None:
    """Nobody has written here for so long."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)
    for file in folder.rglob("heartbeat.json"):
        change_heartbeat(file, time=time.time() - seconds)
        os.utime(file, (time.time() - seconds,) * 2)


def change_heartbeat(file: Path, **changes: Any) -> None:
    told = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@contextmanager
def killed_in_publishing(model: str) -> Iterator[None]:
    """The run of this model ends with the block, which writes what it had written by then."""
    with suppress(KeyboardInterrupt), being_published(model, nobody_else):
        yield
        raise KeyboardInterrupt


def half_model(out: Path, name: str) -> Path:
    with killed_in_publishing(str(out / name)):
        (out / name).mkdir()
        (out / name / "model-00001-of-00002.safetensors").write_bytes(bytes(1500))
        (out / name / "config.json").write_text("{}")
    return out / name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def alive(out: Path) -> None:
    """A heartbeat of a minute and a half ago in files that are old."""
    aged(out)
    file = out / "demo.run/heartbeat.json"
    change_heartbeat(file, time=time.time() - 90, ended=None, doing="round 2/3: scoring 4 blocks")
    os.utime(file, (time.time() - OLD,) * 2)
