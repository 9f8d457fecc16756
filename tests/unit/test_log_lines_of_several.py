"""`FUSEGPT_LOG=json` of a family or a comparison: each line is of the run that it is about, also
where several runs work at the same time, and also where one fails.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from desk import Desk
from test_compare_at_once import PATIENCE
from test_slots import _room_for_two

from fusegpt_ray.cli import main
from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.pipeline import compress
from fusegpt_ray.scheduling import slots
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.terminal.log_lines import LogLines

Line = dict[str, Any]
FIRST, SECOND = "demo-first-tuned", "demo-second-tuned"
"""What the runs of the two members are called."""


@pytest.fixture(name="asked")
def _asked(desk: Desk, checkpoint: Callable[[str], Any]) -> dict[str, Any]:
    """Two members of different models, each of two rounds."""
    Desk.make(desk.folder / "second", checkpoint("llama-tied"))
    members = [
        {"name": "first"},
        {"name": "second", "model": {"source": str(desk.folder / "second/model")}},
    ]
    base = desk.recipe(evaluation={"heldout": {"data": str(desk.heldout)}})
    methods = [{"name": "tuned", "method": "mi+ft"}]
    return base | {"family": {"members": members, "methods": methods}}


class Stream(io.StringIO):
    """Keeps what is written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)

    @property
    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


def of(lines: list[Line], run: str) -> list[Line]:
    return [line for line in lines if line["run"] == run]


def events(lines: list[Line]) -> list[tuple[Any, ...]]:
    """Which ones, where in the run, and the losses that they tell."""
    keys = ("event", "run_id", "round", "stage", "removed", "loss", "losses", "scores")
    told = [line for line in lines if line["event"] != "said"]
    return [tuple(json.dumps(line.get(key)) for key in keys) for line in told]


def check_all_of_one_run(lines: list[Line]) -> None:
    """From the first line to the last: its name, and its id as soon as it is known."""
    (drawn,) = [number for number, line in enumerate(lines) if line["event"] == "drawn"]
    (run,) = {line["run_id"] for line in lines[drawn:]}
    assert len(run) == 64 and {line["run_id"] for line in lines[:drawn]} == {""}
    assert [line["round"] for line in lines if line["event"] == "epoch"] == [1, 1, 2, 2]
    of_rounds = [
        line
        for line in lines
        if line["event"] == "scores" or str(line.get("message")).startswith("round ")
    ]
    assert {line["round"] for line in of_rounds} == {1, 2}
    for line in of_rounds:
        assert line["stage"].startswith(f"round {line['round']}")


def alone(asked: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """By run, the events of one that works by itself elsewhere."""
    found = {}
    for run in Members.parse(asked).runs:
        output = run.recipe.output.model_copy(update={"uri": f"{run.recipe.output.uri}-alone"})
        stream = Stream()
        compress(run.recipe.model_copy(update={"output": output}), LogLines(stream))
        assert {line["run"] for line in stream.lines} == {output.name}
        check_all_of_one_run(stream.lines)
        found[output.name] = events(stream.lines)
    return found


def test_members_one_after_another(
    asked: dict[str, Any],
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Name, round and stage begin anew with each; what the family says is of no run."""
    monkeypatch.setenv("FUSEGPT_LOG", "json")
    file = desk.folder / "family.yaml"
    file.write_text(yaml.safe_dump(asked))
    assert main(["family", str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["run"] for line in lines} == {"", FIRST, SECOND}
    for name, told in alone(asked).items():
        check_all_of_one_run(of(lines, name))
        assert events(of(lines, name)) == told
    family = of(lines, "")
    assert {(line["event"], line["run_id"], line["round"]) for line in family} == {("said", "", 0)}
    said = [line["message"] for line in family]
    assert said[-1].startswith("the leaderboard is in") and "— first: tuned —" not in said
    assert "— first: tuned —" in [line.get("message") for line in of(lines, FIRST)]
    assert "starting the local engine" in said
    assert of(lines, SECOND)[0]["round"] == 0 and of(lines, FIRST)[-1]["round"] == 2


class Turns:
    """Two sets of workers in threads of one process, where each leaves the other its turn after
    every score and every round. (Models disturb each other there where they really meet.)
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._at_work: list[int] = []
        """Threads; the first one's turn it is."""
        self._changed = threading.Condition()
        publishes, tells = Compression.publish_all, LogLines.tell

        def publish_all(compression: Compression, restart: bool) -> Any:
            with self._changed:
                self._at_work.append(threading.get_ident())
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: len(self._at_work) == 2, PATIENCE)
            self._wait()
            try:
                return publishes(compression, restart)
            finally:
                with self._changed:
                    self._at_work = [*self._at_work[1:], 0]  # so that the other still finds two
                    self._changed.notify_all()

        def tell(show: LogLines, event: str, **values: Any) -> None:
            tells(show, event, **values)
            if event in ("scores", "round"):
                with self._changed:
                    if self._at_work[1]:
                        self._at_work.reverse()
                        self._changed.notify_all()
                self._wait()

        monkeypatch.setattr(slots, "room_for_sets", _room_for_two)
        monkeypatch.setattr(Compression, "publish_all", publish_all)
        monkeypatch.setattr(LogLines, "tell", tell)

    def _wait(self) -> None:
        me = threading.get_ident()
        with self._changed:
            assert self._changed.wait_for(lambda: self._at_work[0] == me, PATIENCE)


def test_members_at_the_same_time(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, stream = alone(asked), Stream()
    Turns(monkeypatch)
    assert compress_family(Members.parse(asked), LogLines(stream))["state"] == "done"
    lines = stream.lines
    assert {line["run"] for line in lines} == {"", FIRST, SECOND}
    rounds = [line["run"] for line in lines if line["event"] == "round"]
    assert len(rounds) == 4 and rounds[0] != rounds[1] == rounds[3], "they took turns"
    for name, told in expected.items():
        check_all_of_one_run(of(lines, name))
        assert events(of(lines, name)) == told
        assert f"— {name.split('-')[1]}: tuned —" in [
            line.get("message") for line in of(lines, name)
        ], "its name is no part of the text"
    said = [line["message"] for line in of(lines, "")]
    assert "up to 2 runs at once" in said and "  2/2" in said
    assert all(text.endswith("}\n") and text.count("\n") == 1 for text in stream.writes)


def test_cells_of_a_comparison(asked: dict[str, Any]) -> None:
    """They share a model, its texts, and its workers."""
    del asked["family"]
    section = {"methods": ["mi", "last"], "sparsities": [0.2]}
    stream = Stream()
    compare(Comparison.parse(asked | {"compare": section}), LogLines(stream))
    for name in ("demo-mi", "demo-last"):
        (began,) = [line for line in of(stream.lines, name) if line["event"] == "run"]
        (ended,) = [line for line in of(stream.lines, name) if line["event"] == "published"]
        assert began["name"] == name and began["run_id"] == ended["run_id"]
        assert (began["round"], ended["round"]) == (0, 1)
    assert of(stream.lines, "")[-1]["message"].startswith("tables are in")


def _no_texts(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    begins = Compression.begin

    def begin(plan: Any, *rest: Any) -> Compression:
        if plan.recipe.output.name == SECOND:
            raise error
        return begins(plan, *rest)

    monkeypatch.setattr(Compression, "begin", begin)


def _no_workers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    opens = slots.open_workers

    def open_workers(setup: Any, show: Display) -> Any:
        if "second" in setup.source.folder:
            raise error
        return opens(setup, show)

    monkeypatch.setattr(slots, "open_workers", open_workers)


def _no_room(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """For what is left at the place where the first one has worked."""
    works = slots.Slots._work

    def work(these: slots.Slots, entry: Any, workers: Any) -> bool:
        if entry.job.plan.recipe.output.name == SECOND:
            raise error
        return works(these, entry, workers)

    monkeypatch.setattr(slots.Slots, "_work", work)


def _lost(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """In its second round."""
    begins = LogLines.round_begins

    def round_begins(show: LogLines, number: int, *rest: Any) -> None:
        begins(show, number, *rest)
        if (number, show._run) == (2, SECOND):
            raise error

    monkeypatch.setattr(LogLines, "round_begins", round_begins)


@pytest.mark.parametrize(
    ("fails", "begun", "round"),
    [(_no_workers, False, 0), (_no_texts, False, 0), (_no_room, True, 0), (_lost, True, 2)],
)
def test_one_that_fails(
    asked: dict[str, Any],
    fails: Callable[[pytest.MonkeyPatch, Exception], None],
    begun: bool,
    round: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its trace, and why it failed, are its own lines, wherever it happens."""
    fails(monkeypatch, RuntimeError("the node was lost"))
    stream = Stream()
    assert compress_family(Members.parse(asked), LogLines(stream))["state"] == "failed"
    told = [line for line in stream.lines if "the node was lost" in str(line.get("message"))]
    trace, failed = told
    assert trace["message"].startswith("Traceback (most recent call last):")
    assert failed["message"].splitlines()[0] == "failed: RuntimeError: the node was lost"
    ids = [line["run_id"] for line in of(stream.lines, SECOND) if line["event"] == "drawn"]
    assert len(ids) == begun
    for line in told:
        assert (line["run"], line["run_id"], line["round"]) == (SECOND, "".join(ids), round)
    assert "published" in [line["event"] for line in of(stream.lines, FIRST)]
