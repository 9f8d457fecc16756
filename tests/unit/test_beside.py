"""What a run puts beside its model for people: the report, and the pictures of the card."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from desk import Desk
from stopped_runs import Watching, recipe
from test_healed_runs import HEAL
from test_report import drawn

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.reporting import page
from fusegpt_ray.run.outputs import beside

PICTURES = {"scores.png", "groups.png", "healing.png"}


def drawing(desk: Desk, **changes: object) -> dict[str, object]:
    return {"output": {"uri": str(desk.out), "name": "demo"}, "heal": HEAL, **changes}


@pytest.fixture
def model(desk: Desk) -> Path:
    text = {"heldout": {"data": str(desk.heldout)}}
    compress(recipe(desk, sparsity=0.4, evaluation=text, **drawing(desk)), Watching())
    return desk.out / "demo-p40"


def test_a_model_comes_with_its_report_and_pictures(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest knows them, so `verify` has nothing to say, and `pull` brings them."""
    files = json.loads((model / "fusegpt.json").read_text())["files"]
    assert files.keys() >= PICTURES | {"report.html"}
    assert main(["verify", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == []

    written = (model / "report.html").read_text()
    assert main(["report", str(model), "--output", str(tmp_path / "again.html")]) == 0
    assert written == (tmp_path / "again.html").read_text() and len(drawn(written)) == 5
    colours = [spec.get("encoding", {}).get("color", {}) for spec in drawn(written)]
    (rounds,) = [colour for colour in colours if colour.get("field") == "round"]
    assert rounds["legend"]["values"] == [1, 2]

    shown = re.findall(r"!\[(.+)\]\((.+)\)", (model / "README.md").read_text())
    assert {file for _, file in shown} == PICTURES
    assert shown[0] == ("Macro Influence of each block, round by round", "scores.png")
    for file in PICTURES:
        data = (model / file).read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # as a PNG's first chunk has them
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and width > 720 and height > 100


def test_they_are_no_part_of_the_next_model(model: Path, desk: Desk) -> None:
    source = {"source": str(model)}
    (made,) = compress(recipe(desk, sparsity=0.33, model=source), Watching())
    assert made.manifest["left_out"] == []
    assert not {*made.manifest["files"]} & (PICTURES | {"report.html"})


def test_a_report_that_cannot_be_drawn_costs_no_model(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise ValueError("no fonts here")

    monkeypatch.setattr(page, "html", broken)
    show = Watching()
    (made,) = compress(recipe(desk, sparsity=0.4, **drawing(desk, heal=None)), show)
    told = "no report of demo-p40: it cannot be drawn here (no fonts here)"
    assert told in show.said and "report.html" not in made.manifest["files"]
    assert main(["verify", made.uri]) == 0


def points(page: str) -> list[tuple[str, float, float]]:
    """Of the charts of perplexity over sparsity, without the dense model's."""
    return [
        (row["method"], row["sparsity"], row["perplexity"])
        for spec in drawn(page)
        if "sparsity" in (rows := spec["data"]["values"])[0]
        for row in rows
        if row["sparsity"] and row["dense"]
    ]


def test_the_last_of_several_shows_perplexity_over_sparsity(desk: Desk, tmp_path: Path) -> None:
    """As the manifests of the same run have it; another run's or a damaged one is not shown."""
    texts = {
        "heldout": {"data": str(desk.heldout)},
        "again": {"data": str(desk.folder / "calibration.txt")},
    }
    asked = drawing(desk, heal=None, evaluation=texts)
    made = compress(recipe(desk, sparsity=[0.2, 0.4, 0.6], method="mi", **asked), Watching())
    folders = [Path(model.uri) for model in made]
    wanted = [
        ("mi", model.manifest["sparsity"], model.manifest["perplexity"][text]["dropped"])
        for text in texts
        for model in made
    ]
    assert points((folders[-1] / "report.html").read_text()) == wanted
    assert points((folders[0] / "report.html").read_text()) == []
    assert (folders[-1] / "sparsities.png").read_bytes().startswith(b"\x89PNG")
    titles = "; ".join(f"Perplexity on {text} over sparsity" for text in texts)
    assert f"![{titles}](sparsities.png)" in (folders[-1] / "README.md").read_text()

    def again(model: Path) -> list[tuple[str, float, float]]:
        assert main(["report", str(model), "--output", str(tmp_path / "again.html")]) == 0
        return points((tmp_path / "again.html").read_text())

    assert again(folders[0]) == wanted
    other = json.loads((folders[1] / "fusegpt.json").read_text()) | {"run": "another"}
    (folders[1] / "fusegpt.json").write_text(json.dumps(other))
    assert again(folders[0]) == [point for point in wanted if point[1] != 0.4]
    (folders[2] / "fusegpt.json").write_text("{")
    assert again(folders[0]) == []


def test_nothing_is_known_beside_a_repository_of_the_hub() -> None:
    assert beside("hf://somebody/demo-p40", "this run") == []
