"""A comparison on Ray: its cells are those of one process, also where several work at once, each on
workers of its own. What they have in common is done once, and a failure or Ctrl-C reaches every
cell that it should.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.errors import UserError
from fusegpt_ray.scheduling.threads import Threads
from fusegpt_ray.terminal.display import Display

pytestmark = pytest.mark.integration

TUNED = {"name": "tuned", "method": "mi+ft", "fusion": {"epochs": 1}}
METHODS: list[Any] = ["mi", TUNED]
PATIENCE = 300
"""Seconds after which something that should happen at once has not happened at all."""


class Watching(Display):
    """The first two cells meet where each says `where`: they work at once, or the meeting fails."""

    def __init__(self, where: str = "", stop: bool = False) -> None:
        super().__init__()
        self.said, self.where, self.stop = list[str](), where, stop
        self.meeting, self.left = threading.Barrier(2), 2

    def say(self, text: str) -> None:
        self.said.append(text)
        if self.where and self.where in text and self.left:
            self.left -= 1
            self.meeting.wait(PATIENCE)
            if self.stop and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt  # the user presses Ctrl-C


def asked(material: Any, output: Path, methods: list[Any], **section: Any) -> Comparison:
    engine = {"engine": "ray" if section else "local", "wait_minutes": 0}
    recipe = material.recipe(output, sparsity=0.125, cluster=engine)
    recipe["output"]["report"] = False
    return Comparison.parse(recipe | {"compare": {"methods": methods, **section}})


def weights(output: Path) -> dict[str, str]:
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.glob("*/*.safetensors")
    }


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the cells, made in one process."""
    output = tmp_path_factory.mktemp("alone")
    assert compare(asked(material, output, METHODS), Watching())["failed"] == []
    assert len(weights(output)) == len(METHODS)
    return weights(output)


@pytest.mark.parametrize("at_once", [None, 2])
def test_cells_on_ray_are_those_of_one_process(
    material, tmp_path: Path, alone: dict[str, str], at_once: int | None
) -> None:
    """One after another, as a cluster without GPUs has it, and two at once."""
    show = Watching("] — " if at_once else "")
    result = compare(asked(material, tmp_path, METHODS, at_once=at_once), show)
    assert result["failed"] == [] and weights(tmp_path) == alone
    assert not [*(tmp_path / "compare").glob("*/blocks")]  # Ray Train's
    assert ("up to 2 cells at once" in show.said) == (at_once == 2)
    assert sum(line.endswith("evaluating the dense model") for line in show.said) == 1


def test_of_two_at_once_one_fails_and_the_others_go_on(material, tmp_path: Path) -> None:
    fusion = {"learning_rate": 1e30, "lora_learning_rate": 1e30}
    methods = [{"name": "too fast", "method": "mi+ft", "fusion": fusion}, "mi", "last"]
    result = compare(asked(material, tmp_path, methods, at_once=2), Watching("] — "))
    assert [item["method"] for item in result["failed"]] == ["too fast"]
    assert [row["method"] for row in result["rows"]] == ["mi", "last"]


def test_ctrl_c_ends_all_cells_and_the_same_command_goes_on(
    material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [TUNED, {**TUNED, "name": "longer", "fusion": {"epochs": 4}}]
    comparison = asked(material, tmp_path, methods, at_once=2)
    started, starts = list[Threads](), Threads.start

    def start(threads: Threads, *work: Any) -> None:
        started.append(threads)
        starts(threads, *work)

    monkeypatch.setattr(Threads, "start", start)
    with pytest.raises(KeyboardInterrupt):
        compare(comparison, Watching("] round 1/", stop=True))
    assert started and not any(threads.alive for threads in started)
    assert not list(tmp_path.glob("*/fusegpt.json"))
    result = compare(comparison, Watching())
    assert result["failed"] == [] and len(result["rows"]) == 2


def test_more_at_once_than_the_cluster_has_room_for_is_told(
    material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusegpt_ray.distributed.sets.gpus_of", lambda cluster: 1.0)
    with pytest.raises(UserError, match=r"compare\.at_once.*2 GPUs are needed") as caught:
        compare(asked(material, tmp_path, METHODS, at_once=2), Watching())
    assert caught.value.key == "compare.at_once" and not list(tmp_path.iterdir())
