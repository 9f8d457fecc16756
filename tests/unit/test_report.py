"""`fusegpt report`: one page, made from a manifest or a journal alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, charts_drawn
from desk import LENGTH, Desk
from mistakes import MESSAGE, tree
from stopped_runs import Watching, recipe
from test_healed_runs import HEAL

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.reporting.facts import facts
from fusegpt_ray.terminal.display import flop_count

Capture = pytest.CaptureFixture[str]
HOSTILE = "</script><script>console.error('in')</script><b onclick=\"x\">'&"
KNOWN = re.compile(
    r"http://www\.w3\.org/(2000/(svg|xmlns/)|1999/xlink)"
    r"|https://(vega\.github\.io|github\.com/vega/vega-lite/issues)/.*"
)
"""Names of XML's, and what is in Vega's messages and in its menu, which is not shown."""


def changes(desk: Desk) -> dict[str, Any]:
    return {
        "heal": HEAL,
        "search": {"tokens": 4 * LENGTH, "candidates": ["mi", "run", "spaced"]},
        "evaluation": {"heldout": {"data": str(desk.heldout), "windows": 5}},
    }


@pytest.fixture(scope="module")
def finished(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model of which nothing but the manifest is left."""
    desk = Desk.make(tmp_path_factory.mktemp("scored"), checkpoint("llama"))
    asked = changes(desk)
    del asked["search"]
    compress(recipe(desk, sparsity=0.4, **asked), Watching())
    folder = desk.out / "demo-p40"
    for file in folder.iterdir():
        if file.name != "fusegpt.json":
            file.unlink()
    return folder


def made(uri: Path, output: Path) -> str:
    assert main(["report", str(uri), "--output", str(output)]) == 0
    return output.read_text()


def drawn(page: str) -> list[dict[str, Any]]:
    """The charts' specifications."""
    found = re.search(r"^const specs = (.*);$", page, re.MULTILINE)
    assert found
    return json.loads(found[1])


def values(page: str, *columns: str) -> list[tuple[Any, ...]]:
    """What the one chart draws whose data has these columns."""
    data = [spec["data"]["values"] for spec in drawn(page)]
    (rows,) = [rows for rows in data if rows[0].keys() - {"dense"} == {*columns}]
    return [tuple(row[column] for column in columns) for row in rows]


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def test_a_finished_model(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = json.loads((finished / "fusegpt.json").read_text())
    page = made(finished, tmp_path / "report.html")
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"

    scores = values(page, "round", "block", "score", "known", "outcome")
    for number, round in enumerate(manifest["rounds"], 1):
        estimates = {block: found["mean"] for block, found in round["stopped"].items()}
        expected = {int(block): score for block, score in (round["scores"] | estimates).items()}
        row = {block: score for at, block, score, _, _ in scores if at == number}
        assert row == expected and len(row) == 6 - number
        known = {block for at, block, _, how, _ in scores if (at, how) == (number, "exactly")}
        assert known == {*map(int, round["scores"])}
    removed = [(at, block) for at, block, _, _, outcome in scores if outcome == "removed"]
    assert removed == [*enumerate(manifest["removed"], 1)]

    assert values(page, "round", "epoch", "loss") == [
        (number, epoch, loss)
        for number, round in enumerate(manifest["rounds"], 1)
        for epoch, loss in enumerate(round["losses"], 1)
    ]
    healing = values(page, "part", "windows", "loss")
    assert [loss for _, kind, loss in healing if kind == "training"] == manifest["healing"][
        "losses"
    ]
    held_out = [(part, loss) for part, kind, loss in healing if kind == "held-out"]
    assert held_out == [*enumerate(manifest["healing"]["held_out"])]
    row = manifest["perplexity"]["heldout"]
    stages = ("dense", "dropped", "fused", "healed")
    assert values(page, "stage", "perplexity") == [(stage, row[stage]) for stage in stages]
    seconds = dict(values(page, "stage", "seconds"))
    assert seconds["scoring"] == sum(round["seconds"]["score"] for round in manifest["rounds"])
    assert seconds["healing"] == manifest["healing"]["seconds"]["heal"]

    text = Page(page).text
    undone = (row["dropped"] - row["healed"]) / (row["dropped"] - row["dense"])
    for told in (f"{undone:.0%}", "5 → 3", "fusegpt", manifest["versions"]["torch"], "Seed 0"):
        assert told in text
    group = sorted({*manifest["rounds"][0]["group"]} - {manifest["removed"][0]})
    assert ", ".join(map(str, group)) in text
    planned = {stage["stage"]: stage["flops"] for stage in manifest["planned"]}
    assert planned.keys() == {"scoring", "states", "fine-tuning", "healing", "evaluation"}
    assert [row.stage for row, taken in facts(str(finished)).worked if taken > 0] == [*planned]
    assert manifest["stage_seconds"].keys() == {"evaluation"}
    assert seconds["evaluation"] == manifest["stage_seconds"]["evaluation"]
    assert "time of measuring it" in text and "time of the run so far" not in text
    # The speed is that of what was done, which scoring alone has counted.
    (walks,) = [row["block_forwards"] for row in manifest["planned"] if row["stage"] == "scoring"]
    done = sum(round["block_forwards"]["done"] for round in manifest["rounds"])
    assert done < walks
    rate = planned["scoring"] * done / walks / seconds["scoring"]
    assert flop_count(planned["scoring"]) in text and f"{flop_count(rate)}/s" in text
    assert text.count("FLOP/s") == 1


@pytest.mark.parametrize(("method", "what"), [("mi+linear", "repair"), ("slicegpt", "slicing")])
def test_what_replicas_do_on_the_same_walk_is_one_row(method: str, what: str, desk: Desk) -> None:
    """The sums of a repair, or of the axes, are made while the states are walked."""
    (model,) = compress(recipe(desk, sparsity=0.4, method=method), Watching())
    found = facts(model.uri)
    planned = {row.stage: row.flops for row in found.planned}
    rows = {row.stage: (row.flops, taken) for row, taken in found.worked}
    taken = sum(round["seconds"]["states"] for round in model.manifest["rounds"])
    assert rows[f"states and {what}"] == (planned["states"] + planned[what], taken)


def test_what_is_repaired_to_compare_with_counts_as_well(desk: Desk) -> None:
    fusion = desk.recipe()["fusion"] | {"start": "scale"}
    asked = recipe(desk, sparsity=0.4, fusion=fusion, evaluation=changes(desk)["evaluation"])
    (model,) = compress(asked, Watching())
    rows = {row.stage: taken for row, taken in facts(model.uri).worked}
    repair = model.manifest["stage_seconds"]["repair"]
    of_rounds = sum(round["seconds"]["states"] for round in model.manifest["rounds"])
    assert repair > 0 and rows["states and repair"] == pytest.approx(of_rounds + repair)


def test_every_chart_has_a_name_and_its_numbers(finished: Path, tmp_path: Path) -> None:
    parsed = Page(made(finished, tmp_path / "report.html"))
    charts = [attrs for tag, attrs in parsed.tags if attrs.get("class") == "chart"]
    names = {attrs["aria-label"] for attrs in charts}
    assert len(names) == len(charts) == 5 and {attrs["role"] for attrs in charts} == {"img"}
    assert sum(tag == "details" for tag, _ in parsed.tags) == len(charts) + 1  # and the recipe


def test_it_needs_no_network(finished: Path, tmp_path: Path) -> None:
    page = made(finished, tmp_path / "report.html")
    addresses = re.findall(r"https?://[^\s\"'`<>)\\]+", page)
    assert [address for address in addresses if not KNOWN.fullmatch(address)] == []
    loading = [attrs for _, attrs in Page(page).tags if attrs.keys() & {"src", "href"}]
    assert loading == [] and "default-src 'none'" in page and "@import" not in page


def hostile(finished: Path, tmp_path: Path) -> Path:
    """The manifest of a model whose names were chosen by an enemy."""
    manifest = json.loads((finished / "fusegpt.json").read_text())
    manifest["source"] = {"name": HOSTILE, "revision": HOSTILE}
    manifest["perplexity"] = {HOSTILE: manifest["perplexity"]["heldout"] | {"data": HOSTILE}}
    manifest["method"] = manifest["arithmetic"] = manifest["fewer_at_once"] = HOSTILE
    manifest["recipe"] |= {"seed": HOSTILE, HOSTILE: HOSTILE}
    manifest["versions"] = {HOSTILE: HOSTILE}
    manifest["rounds"][0]["losses"][0] = math.inf
    folder = tmp_path / "bad-p40"
    folder.mkdir()
    (folder / "fusegpt.json").write_text(json.dumps(manifest))
    return folder


def test_names_are_only_text(finished: Path, tmp_path: Path) -> None:
    good = Page(made(finished, tmp_path / "good.html"))
    page = made(hostile(finished, tmp_path), tmp_path / "bad.html")
    bad = Page(page)
    tags = [[tag for tag, _ in page.tags if tag != "p"] for page in (bad, good)]  # a remark more
    assert tags[0] == tags[1]
    assert HOSTILE in bad.text and HOSTILE not in page and "</script><script>c" not in page
    assert len(drawn(page)) == 5


def broken(key: str, value: Any) -> Callable[[Path, Path], object]:
    def breaks(folder: Path, finished: Path) -> None:
        manifest = json.loads((finished / "fusegpt.json").read_text()) | {key: value}
        (folder / "fusegpt.json").write_text(json.dumps(manifest))

    return breaks


def two(folder: Path, finished: Path) -> None:
    for name in ("one-p20", "two-p20"):
        shutil.copytree(finished, folder / name)


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty": (lambda folder, finished: None, "holds no fusegpt.json"),
    "gone": (lambda folder, finished: folder.rmdir(), "no such folder"),
    "several": (two, "several models or runs: one-p20, two-p20"),
    "not-json": (lambda folder, _: (folder / "fusegpt.json").write_text("{"), "is not JSON"),
    "rounds-in-words": (broken("rounds", "three"), "says nonsense: rounds"),
    "a-loss-in-words": (broken("rounds", [{"losses": ["low"]}]), "rounds.0.losses.0"),
    "no-perplexity": (broken("perplexity", {"a": {"length": 4}}), "perplexity.a.dense"),
    "endless": (broken("rounds", [{"seconds": {"score": math.inf}}]), "seconds.score"),
    "no-recipe": (broken("recipe", None), "says nonsense: recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, finished: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    make, problem = BAD[name]
    make(folder, finished)
    before = tree(tmp_path)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.fullmatch(stderr.rstrip("\n"))
    assert stdout == "" and message and problem in message["problem"], stderr
    assert tree(tmp_path) == before


def test_only_a_report_is_replaced(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["report", str(finished), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"report": f"{tmp_path}/report.html"}
    (tmp_path / "mine.html").write_text("<p>mine")
    (tmp_path / "folder").mkdir()
    secret = "https://me:s3cret@host/report.html"
    for name in ("mine.html", "folder", "mine.html/report.html", "no://where/report.html", secret):
        assert main(["report", str(finished), "--output", name]) == 2
        told = capsys.readouterr().err
        assert "error: --output = " in told and "s3cret" not in told
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "mine.html",
        "report.html",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="it draws in a real browser: install Chromium")
@pytest.mark.parametrize("names", ["usual", "hostile"])
def test_a_browser_draws_all_charts(names: str, finished: Path, tmp_path: Path) -> None:
    folder = finished if names == "usual" else hostile(finished, tmp_path)
    made(folder, tmp_path / "report.html")
    assert charts_drawn(tmp_path / "report.html", tmp_path / "profile") == 5
