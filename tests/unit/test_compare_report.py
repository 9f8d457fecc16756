"""The page of a comparison: its numbers are those of the manifests, whatever the names are."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, charts_drawn
from desk import Desk
from mistakes import MESSAGE, tree
from stopped_runs import Watching
from test_compare import asked, fails
from test_report import KNOWN, Page, drawn

from fusegpt_ray.cli import main
from fusegpt_ray.comparison import page as pages
from fusegpt_ray.comparison import plot, tables
from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.terminal.display import byte_count

HOSTILE = "</script><script>console.error('in')</script>"


@pytest.fixture(scope="module")
def compared(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Desk, dict[str, Any]]:
    desk = Desk.make(tmp_path_factory.mktemp("compared"), checkpoint("llama"))
    paper = {"name": "as in the paper", "method": "fusegpt", "preset": "paper"}
    paper["fusion"] = {"group_size": 3, "rank": 2, "lora_rank": 2, "epochs": 1, "batch": 4}
    data = asked(desk, ["mi", paper, fails(desk)])
    output = {**data["output"], "report": True}
    return desk, compare(Comparison.parse(data | {"output": output}), Watching())


def test_its_numbers_are_those_of_the_manifests(compared: tuple[Desk, dict[str, Any]]) -> None:
    desk, result = compared
    page = (desk.out / "compare/demo/report.html").read_text()
    (chart,) = drawn(page)
    values = chart["data"]["values"]
    text = Page(page).text
    for row in result["rows"]:
        manifest = json.loads((Path(row["uri"]) / "fusegpt.json").read_text())
        told = manifest["perplexity"]["heldout"]
        last = told.get("fused", told["dropped"])
        point = {"method": row["method"], "sparsity": row["sparsity"], "perplexity": last}
        assert point | {"dense": told["dense"]} in values
        for shown in (f"{last:.2f}", f"{last / told['dense']:.3g}"):
            assert shown in text
        assert byte_count(manifest["publishing"]["bytes"]) in text
        assert ", ".join(map(str, manifest["removed"])) in text
        assert manifest["versions"]["torch"] in text
    starts = [value for value in values if value["sparsity"] == 0]
    assert {value["method"] for value in starts} == {"mi", "as in the paper"}
    assert all(value["perplexity"] == value["dense"] for value in starts)
    (failed,) = {item["problem"] for item in result["failed"]}
    assert failed in text and "too fast" in text
    assert result["paper"] == ["as in the paper"]
    assert "The thick line is the paper's recipe (as in the paper)" in text


def test_a_model_that_became_narrower_tells_its_hidden_size(
    compared: tuple[Desk, dict[str, Any]],
) -> None:
    result = compared[1]
    width, told = {"dense": 128, "kept": 112}, "hidden size 128 → 112"
    narrow = {**result, "rows": [{**row, "width": width} for row in result["rows"]]}
    assert told in Page(pages.html(narrow)).text
    assert told not in Page(pages.html(result)).text
    for some, kept in ((narrow, "112"), (result, "")):
        table = csv.DictReader(io.StringIO(tables.files(some)["table.csv"]))
        assert {row["width"] for row in table} == {kept}


def test_more_methods_than_usual_colours_have_each_its_own() -> None:
    def scheme(methods: int) -> Any:
        about = {"model": "m", "sparsity": 0.25, "text": "t", "dense": 10.0, "perplexity": 11.0}
        rows = [{**about, "method": f"method {number}"} for number in range(methods)]
        (chart,) = plot.charts({"rows": rows, "paper": []})
        (color,) = {
            json.dumps(layer["encoding"]["color"]["scale"])
            for layer in chart.spec["layer"]
            if "color" in layer["encoding"]
        }
        return json.loads(color).get("scheme")

    assert scheme(10) is None and scheme(11) == "tableau20"


def test_it_needs_no_network(compared: tuple[Desk, dict[str, Any]]) -> None:
    page = (compared[0].out / "compare/demo/report.html").read_text()
    addresses = re.findall(r"https?://[^\s\"'`<>)\\]+", page)
    assert [address for address in addresses if not KNOWN.fullmatch(address)] == []
    loading = [attrs for _, attrs in Page(page).tags if attrs.keys() & {"src", "href"}]
    assert loading == [] and "default-src 'none'" in page


def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """With names that an enemy chose, in two models."""
    rows = [{**row, "model": HOSTILE, "method": HOSTILE + row["method"]} for row in result["rows"]]
    failed = [{**row, "problem": HOSTILE} for row in result["failed"]]
    told = {HOSTILE: HOSTILE}
    names = {"name": HOSTILE, "paper": [HOSTILE + "mi"], "settings": told, "versions": told}
    return {**result, "rows": rows, "failed": failed, **names}


def test_names_are_only_text(compared: tuple[Desk, dict[str, Any]]) -> None:
    page = pages.html(hostile(compared[1]))
    assert HOSTILE not in page and HOSTILE in Page(page).text


def test_where_all_failed_there_is_still_a_page(compared: tuple[Desk, dict[str, Any]]) -> None:
    page = pages.html({**compared[1], "rows": []})
    assert drawn(page) == [] and "too fast" in Page(page).text


def test_it_is_made_again_from_its_folder_alone(
    compared: tuple[Desk, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = compared[0].out / "compare/demo", tmp_path / "again.html"
    assert json.loads((folder / "table.json").read_text()) == compared[1]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "table.json", alone)
    assert main(["report", str(alone), "--output", str(again)]) == 0
    assert again.read_text() == (folder / "report.html").read_text()
    assert main(["report", str(compared[0].out), "--output", str(again)]) == 2
    assert "one of them, or compare/demo" in capsys.readouterr().err, "it tells of the comparison"


def test_one_that_is_under_way_tells_what_is_done_and_what_is_to_come(
    desk: Desk, tmp_path: Path
) -> None:
    class Stopped(Watching):
        def say(self, text: str) -> None:
            super().say(text)
            if text.startswith("— ") and "last" in text:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Comparison.parse(asked(desk, ["mi", "last"])), Stopped())
    folder, file = desk.out / "compare/demo", tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(file)]) == 0
    page = file.read_text()
    text = Page(page).text
    assert "Not finished when this was told" in text and "2 done, 2 to come" in text
    (chart,) = drawn(page)
    assert {value["method"] for value in chart["data"]["values"]} == {"mi"}
    told = json.loads((folder / "table.json").read_text())
    assert [(row["method"], row["sparsity"]) for row in told["unfinished"]] == [
        ("last", 0.2),
        ("last", 0.4),
    ]


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda told: {name: value for name, value in told.items() if name != key}


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "cut": (lambda told: json.dumps(told)[:-9], "is not JSON"),
    "a list": (lambda told: [told], "has the format None"),
    "another format": (lambda told: told | {"format": 2}, "has the format 2"),
    "no rows": (_without("rows"), "nonsense: rows"),
    "no state": (_without("state"), "nonsense: state"),
    "settings in words": (lambda told: told | {"settings": "none"}, "nonsense: settings"),
    "a time that never comes": (lambda told: told | {"time": 1e300}, "nonsense: time"),
    "a perplexity of zero": (
        lambda told: told | {"rows": [{**told["rows"][0], "dense": 0.0}]},
        "nonsense: rows.0.dense",
    ),
    "a sparsity of all": (
        lambda told: told | {"rows": [{**told["rows"][0], "sparsity": 1.0}]},
        "nonsense: rows.0.sparsity",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused(
    name: str,
    compared: tuple[Desk, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, problem = DAMAGED[name]
    told = damage(json.loads(json.dumps(compared[1])))
    file = tmp_path / "table.json"
    file.write_text(told if isinstance(told, str) else json.dumps(told))
    before = tree(tmp_path)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.fullmatch(stderr.rstrip("\n"))
    assert (
        stdout == ""
        and message
        and f"table.json {problem}" in message["problem"].replace("says ", "")
    )
    assert tree(tmp_path) == before


@pytest.mark.skipif(CHROMIUM is None, reason="it draws in a real browser: install Chromium")
@pytest.mark.parametrize("names", ["usual", "hostile"])
def test_a_browser_draws_all_charts(
    names: str, compared: tuple[Desk, dict[str, Any]], tmp_path: Path
) -> None:
    page = compared[0].out / "compare/demo/report.html"
    if names == "hostile":
        page = tmp_path / "report.html"
        page.write_text(pages.html(hostile(compared[1])))
    assert charts_drawn(page, tmp_path / "profile") == 1
