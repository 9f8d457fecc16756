"""`fusegpt family`: members are ordinary runs of different models, what fails or is stopped is done
later, and what came of each is told. Members at the same time on Ray: test_family_on_ray.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import CHROMIUM, charts_drawn
from desk import Desk
from left_behind import aged
from mistakes import tree
from rich.console import Console
from stopped_runs import Watching, published
from test_compare import fails
from test_report import Page, drawn

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.family import board, page
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.housekeeping import clean, leftovers
from fusegpt_ray.scheduling import slots
from fusegpt_ray.store.family import FamilyBoard
from fusegpt_ray.workers.room import Need, ResourcePool, Room

FIRST, SECOND = "demo-first-mi-p20", "demo-second-mi-p20"


def asked(desk: Desk, **section: Any) -> dict[str, Any]:
    """Two members of different models."""
    base = desk.recipe(evaluation={"heldout": {"data": str(desk.heldout)}}, method="mi")
    second = {"name": "second", "model": {"source": str(desk.folder / "second/model")}}
    members = [{"name": "first", "sparsities": [0.2, 0.4]}, second | {"priority": 1}]
    return base | {
        "family": {"members": members, "methods": ["mi"], "sparsities": [0.2], **section}
    }


@pytest.fixture
def two(desk: Desk, checkpoint: Callable[[str], Path]) -> Desk:
    """A desk with a second model."""
    Desk.make(desk.folder / "second", checkpoint("llama-tied"))
    return desk


@pytest.fixture(scope="module")
def done(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Desk, dict[str, Any], Watching]:
    """A family that nothing disturbed."""
    desk = Desk.make(tmp_path_factory.mktemp("done"), checkpoint("llama"))
    Desk.make(desk.folder / "second", checkpoint("llama-tied"))
    show = Watching()
    asks = asked(desk)
    asks["output"] = asks["output"] | {"report": True}
    return desk, compress_family(Members.parse(asks), show), show


def test_members_are_the_runs_that_they_stand_for(
    done: tuple[Desk, dict[str, Any], Watching], tmp_path: Path
) -> None:
    desk, result, show = done
    assert result["state"] == "done"
    assert [row["folder"] for row in result["rows"]] == [FIRST, FIRST.replace("20", "40"), SECOND]
    begun = [line for line in show.said if line.startswith("—")]
    assert begun == ["— second: mi —", "— first: mi —"], "by priority"
    weights = published(desk)
    assert len(weights) == 6
    for member in Members.parse(asked(desk)).members:
        (run,) = member.runs
        alone = run.recipe.output.model_copy(update={"uri": str(tmp_path)})
        compress(run.recipe.model_copy(update={"output": alone}), Watching())
    for name, data in weights.items():
        assert (tmp_path / name).read_bytes() == data


def test_its_rows_are_the_manifests(done: tuple[Desk, dict[str, Any], Watching]) -> None:
    desk, result, _ = done
    assert json.loads((desk.out / "family/demo/family.json").read_text()) == result
    for row in result["rows"]:
        told = json.loads((desk.out / row["folder"] / "fusegpt.json").read_text())
        perplexity = told["perplexity"]["heldout"]
        numbers = {"dense": perplexity["dense"], "published": perplexity["dropped"]}
        assert row["perplexity"] == {"heldout": numbers} and row["run"] == told["run"]
        assert row["status"] == "done" and row["sparsity"] == told["sparsity"]
        assert row["cost"] is None and row["gpu_hours"] is None, "there is no GPU here"
    first, more, second = (row["parameters"] for row in result["rows"])
    assert first["dense"] - first["published"] == (first["dense"] - more["published"]) / 2
    assert second["dense"] < first["dense"], "its head is its embedding"


def test_the_page_shows_them_and_needs_no_network(
    done: tuple[Desk, dict[str, Any], Watching], tmp_path: Path
) -> None:
    desk, result, _ = done
    file = desk.out / "family/demo/index.html"
    html = file.read_text()
    text = Page(html).text
    (chart,) = drawn(html)  # of the member of two sparsities
    rows = [row for row in result["rows"] if row["member"] == "first"]
    numbers = [row["perplexity"]["heldout"] for row in rows]
    assert {value["perplexity"] for value in chart["data"]["values"]} == {
        numbers[0]["dense"], *(one["published"] for one in numbers),
    }  # fmt: skip
    for row in result["rows"]:
        link = f'href="../../{row["folder"]}/report.html"'
        assert link in html and (file.parent / f"../../{row['folder']}/report.html").is_file()
        assert f"{row['parameters']['published']:,}" in text
    markdown = (file.parent / "leaderboard.md").read_text()
    assert all(f"{one['dense']:.2f} → {one['published']:.2f}" in markdown for one in numbers)
    if CHROMIUM:
        assert charts_drawn(file, tmp_path / "profile") == 1


def test_the_page_is_made_again_from_its_folder_alone(
    done: tuple[Desk, dict[str, Any], Watching], tmp_path: Path
) -> None:
    """The same in its place; elsewhere without links, which would lead nowhere."""
    folder = done[0].out / "family/demo"
    before, elsewhere = (folder / "index.html").read_text(), tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(elsewhere)]) == 0
    assert 'href="../../' not in elsewhere.read_text() and FIRST in elsewhere.read_text()
    assert main(["report", str(folder), "--output", str(folder / "index.html")]) == 0
    assert (folder / "index.html").read_text() == before and 'href="../../' in before
    assert done[1]["versions"]["torch"] in before and "The settings" in before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "has the format 2"),
        ({"rows": None}, "says nonsense: rows"),
        ({"state": "asleep"}, "says nonsense: state"),
        ({"versions": ["torch"]}, "says nonsense: versions"),
    ],
)
def test_no_page_is_made_of_a_damaged_file(
    done: tuple[Desk, dict[str, Any], Watching],
    changes: dict[str, Any],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "family.json").write_text(json.dumps(done[1] | changes))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert f"family.json {problem}" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_hostile_names_stay_text(done: tuple[Desk, dict[str, Any], Watching]) -> None:
    hostile = "</script><script>console.error('in')</script>"
    rows = [{**row, "member": hostile, "problem": hostile} for row in done[1]["rows"]]
    rows[0]["status"] = "failed"
    told = {hostile: hostile}
    html = page.html({**done[1], "rows": rows, "settings": told, "versions": told}, linked=True)
    assert "<script>console" not in html and hostile in Page(html).text


def test_a_member_that_fails_leaves_the_others_and_is_tried_again(
    two: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = asked(two)
    bad = fails(two) | {"name": "first"}
    bad["methods"] = [{"name": "mi", "method": bad.pop("method")}]
    asks["family"]["members"][0] = bad
    file = two.folder / "family.yaml"
    file.write_text(yaml.safe_dump(asks))
    assert main(["family", str(file), "--quiet", "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    first, second = result["rows"]
    assert (first["status"], second["status"], result["state"]) == ("failed", "done", "failed")
    assert first["problem"] and first["problem"] in err and FIRST in err
    before = published(two)
    assert len(before) == 2
    asks["family"]["members"][0] = {"name": "first"}
    shutil.rmtree(two.out / "demo-first-mi.run")
    show = Watching()
    assert compress_family(Members.parse(asks), show)["state"] == "done"
    assert "nothing is left to do: this very run has published everything" in show.said
    assert published(two).items() > before.items()


def test_stopped_between_members_it_ends_with_the_same_bytes(
    two: Desk, done: tuple[Desk, dict[str, Any], Watching]
) -> None:
    class Stopped(Watching):
        def say(self, text: str) -> None:
            if text.startswith("— first"):
                followed = json.loads((two.out / "family/demo/family.json").read_text())
                assert followed["state"] == "working"
                uri, file = str(two.out / "family/demo"), two.folder / "page.html"
                assert main(["report", uri, "--output", str(file)]) == 0
                assert "1 done, 2 to come" in Page(file.read_text()).text
                assert [row["status"] for row in followed["rows"]] == ["waiting"] * 2 + ["done"]
                raise KeyboardInterrupt
            super().say(text)

    with pytest.raises(KeyboardInterrupt):
        compress_family(Members.parse(asked(two)), Stopped())
    assert [path.name for path in two.out.glob("demo-*")] == [SECOND]
    folder = two.out / "family/demo"
    aged(two.out)
    found = [(item.uri, item.dead) for item in leftovers(str(two.out))]
    kept = [str(folder / name) for name in ("measured", "family.json")]
    assert found == [(uri, False) for uri in kept], "what it goes on from"
    found = [(item.uri, item.dead) for item in leftovers(str(two.out), unfinished=True)]
    assert found == [(uri, True) for uri in kept]
    assert clean(str(two.out)) == [] and published(two)
    assert compress_family(Members.parse(asked(two)), show := Watching())["state"] == "done"
    assert published(two) == published(done[0])
    assert f"evaluating and publishing {SECOND}" not in show.said
    assert leftovers(str(two.out), unfinished=True) == []
    (folder / "blocks/0-0").mkdir(parents=True)
    (folder / "blocks/0-0/train").write_text("of one that was killed")
    aged(two.out)
    before = tree(two.folder)
    removed = [item.uri for item in clean(str(two.out))]
    assert removed == [str(folder / "blocks")]
    assert before.keys() - tree(two.folder).keys() >= {"out/family/demo/blocks/0-0/train"}
    assert published(two) == published(done[0]) and (folder / "index.html").exists()


def test_what_only_publishes_is_put_off_and_ends_with_the_same_bytes(
    two: Desk,
    done: tuple[Desk, dict[str, Any], Watching],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a room for one set of workers, for whose GPUs the other member waits."""
    whole, publisher = Need(2, 1), Need(1.5, 1)
    room = Room([whole] * 2, 2, Need(2, 9), publishers=[publisher] * 2)
    monkeypatch.setattr(slots, "room_for_sets", lambda *_: nullcontext(ResourcePool(room)))
    opened, opens = list[int](), slots.open_workers

    def opening(setup: Any, show: Any) -> Any:
        opened.append(setup.cluster.replicas)
        return opens(setup, show)

    monkeypatch.setattr(slots, "open_workers", opening)
    asks, show = asked(two), Watching()
    asks["cluster"] = {"engine": "local", "replicas": 2, "workers": 2}
    del asks["family"]["members"][1]["priority"]
    assert compress_family(Members.parse(asks), show)["state"] == "done"
    begun = [line for line in show.said if line.startswith("[") and "—" in line]
    assert [line.split("—")[1] for line in begun] == [
        " first: mi ", " second: mi ", " first: mi ", " second: mi ",
    ]  # fmt: skip
    assert opened == [2, 2, 1, 1]
    assert published(two) == published(done[0])
    told = json.loads((two.out / FIRST / "fusegpt.json").read_text())
    events = [json.loads(line) for line in (two.out / FIRST / "metrics.jsonl").open()]
    assert [event["event"] for event in events].count("run") == 2 and told["spent"]["seconds"] > 0
    assert not list(two.out.glob("demo-*.run"))


def test_a_text_too_short_for_one_member_is_its_own_failure(two: Desk) -> None:
    asks = asked(two)
    short = two.folder / "short.txt"
    short.write_text("w20 w21 w22\n")
    # That of the highest priority, which is begun first.
    asks["family"]["members"][1]["calibration"] = {"data": str(short)}
    result = compress_family(Members.parse(asks), Watching())
    assert [row["status"] for row in result["rows"]] == ["done", "done", "failed"]
    assert "calibration" in result["rows"][2]["problem"]


def test_workers_are_opened_once_for_all_methods_of_a_member(
    two: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, opens = list[str](), slots.open_workers

    def opening(setup: Any, show: Any) -> Any:
        opened.append(Path(setup.source.folder).parent.name)
        return opens(setup, show)

    monkeypatch.setattr(slots, "open_workers", opening)
    compress_family(Members.parse(asked(two, methods=["mi", "last"])), Watching())
    assert opened == ["second", two.folder.name]


# --- what a person sees, and takes away ---


def test_the_table_on_a_terminal_follows(done: tuple[Desk, dict[str, Any], Watching]) -> None:
    console = Console(width=80, record=True)
    console.print(board.on_terminal(done[1]))
    text, names = console.export_text(), [row["member"] for row in done[1]["rows"]]
    assert all(name in text for name in (*names, "20 %", "40 %"))
    working = {**done[1]["rows"][0], "status": "working", "doing": "round 1/2", "perplexity": {}}
    console.print(board.on_terminal({**done[1], "rows": [working]}))
    assert "round 1/2" in console.export_text()


def test_a_family_is_pulled_whole_or_by_member_and_nothing_else_is_written(
    done: tuple[Desk, dict[str, Any], Watching],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk, uri = done[0], f"{done[0].out}/family/demo"
    before = tree(desk.folder)
    target = tmp_path / "deep" / "models"
    pulled = ["pull", "--family", uri, str(target), "--quiet", "--json"]
    assert main([*pulled, "--member", "second"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"folders": [str(target / SECOND)]}
    assert [path.name for path in target.iterdir()] == [SECOND]
    assert main(pulled) == 0, "what is there already stays"
    assert {path.name for path in target.iterdir()} == {row["folder"] for row in done[1]["rows"]}
    for name in (path.relative_to(target) for path in target.rglob("*.safetensors")):
        digests = [hashlib.sha256((place / name).read_bytes()) for place in (target, desk.out)]
        assert digests[0].digest() == digests[1].digest()
    assert tree(desk.folder) == before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["models"]


@pytest.mark.parametrize("folder", ["../above", "a/b", ".hidden", "", "C:x", "\x1b[1m", SECOND])
def test_a_list_that_would_leave_the_folder_is_refused(
    done: tuple[Desk, dict[str, Any], Watching], folder: str
) -> None:
    rows = [{**row} for row in done[1]["rows"]]
    rows[0]["folder"] = folder
    with pytest.raises(UserError, match=r"lists the model"):
        FamilyBoard.parse({**done[1], "rows": rows}, "somewhere")


def test_mistakes_of_a_pull(
    done: tuple[Desk, dict[str, Any], Watching],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, target = f"{done[0].out}/family/demo", str(tmp_path / "there")
    for arguments, said in (
        ([uri, target, "--member", "second"], "--family"),
        (["--family", uri, target, "--member", "third"], "first, second"),
        (["--family", str(done[0].out), target], "holds no family.json"),
    ):
        assert main(["pull", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not Path(target).exists()
