"""Text that the dense model has written is kept: for this run and for others, until `clean`."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
from desk import LENGTH, Desk
from scribe import TOKENS, _desk, asked, draw, parts, written  # noqa: F401 - a fixture
from stopped_runs import Watching, contents

from fusegpt_ray.cli import main
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.pipeline import compress
from fusegpt_ray.preparing import generation
from fusegpt_ray.preparing.generation import ROWS
from fusegpt_ray.reporting.facts import facts
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import opened, sealed

# --- how it is kept ---


def test_what_was_written_is_not_written_again(desk: Desk) -> None:
    first = draw(asked(desk))
    (begin, *_), show = parts(desk), Watching()
    assert draw(asked(desk), show).tokens_WT.tobytes() == first.tokens_WT.tobytes()
    assert not [said for said in show.said if "the dense model writes" in said]
    tokens = opened(begin.read_bytes())["tokens"]
    begin.write_bytes(sealed({"tokens": [7] * len(tokens)}))
    again = draw(asked(desk))
    assert (again.tokens_WT == 7).all(axis=1).any()  # taken as it is


def test_a_damaged_part_is_written_again(desk: Desk) -> None:
    first = draw(asked(desk))
    before, show = contents(desk.out), Watching()
    part = parts(desk)[1]
    part.write_bytes(part.read_bytes()[:-9])
    assert draw(asked(desk), show).tokens_WT.tobytes() == first.tokens_WT.tobytes()
    assert contents(desk.out) == before
    assert [said for said in show.said if f"WARNING: {part} is damaged" in said]


class Stopping(Watching):
    """The user presses Ctrl-C after the first part."""

    def part(self, number: int, parts: int) -> None:
        raise KeyboardInterrupt


def test_a_killed_run_goes_on_with_the_same_text(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(asked(desk), Stopping())
    (part,) = parts(desk)
    kept = part.read_bytes(), part.stat().st_mtime_ns
    (published,) = compress(asked(desk), Watching())
    assert (part.read_bytes(), part.stat().st_mtime_ns) == kept
    place = {"uri": str(desk.folder / "elsewhere"), "name": "demo", "report": False, "samples": []}
    compress(asked(desk, {"output": place}), Watching())
    ours, theirs = (contents(folder) for folder in (desk.out, desk.folder / "elsewhere"))
    assert ours.keys() == theirs.keys()
    told = ("fusegpt.json", "README.md", "metrics.jsonl")  # times and places are in them
    for name in ours:
        assert ours[name] == theirs[name] or name.endswith(told), name
    assert published.manifest["calibration"]["generated"]["tokens"] == TOKENS


def test_how_long_it_took_is_told_also_of_a_run_that_was_stopped(desk: Desk) -> None:
    """The second attempt finds the text, and what the first has noted of its writing."""
    with pytest.raises(KeyboardInterrupt):
        compress(asked(desk), Watching(2))
    note = opened((desk.out / "demo.run" / "plan-000.json").read_bytes())["note"]
    (published,) = compress(asked(desk), Watching())
    told = published.manifest["stage_seconds"]["generating"]
    assert 0 < told == note["stage_seconds"]["generating"]
    rows = {row.stage: seconds for row, seconds in facts(published.uri).worked}
    assert rows["generating"] == told


def test_fewer_rows_at_once_where_memory_runs_out(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, rows = generation.continuations, list[int]()

    def cramped(runner: Runner, *arguments: Any) -> list[np.ndarray]:
        rows.append(runner.batch_size)
        if runner.batch_size > ROWS // 4:
            raise MemoryError
        return whole(runner, *arguments)

    monkeypatch.setattr(generation, "continuations", cramped)
    assert draw(asked(desk)).protocol["text_tokens"] == TOKENS
    assert rows[:2] == [ROWS, ROWS // 2] and set(rows[2:]) == {ROWS // 4}


# --- a whole run ---


def test_a_whole_run_on_a_mixture_with_it(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        {"data": str(desk.folder / "calibration.txt"), "weight": 3},
        {"generate": str(desk.folder / "prompts.txt"), "tokens": 100, "top_p": 0.9},
    ]
    section = desk.recipe()["calibration"] | {"data": texts}
    file = desk.write(calibration=section)
    assert main(["compress", file]) == 0
    said, folder = capsys.readouterr().err, desk.out / "demo-p40"
    prompts = texts[1]["generate"]
    assert (
        "(generating " in said and f"the dense model writes text generated from {prompts}" in said
    )
    read = f"{texts[0]['data']} (licence: not stated)"
    line = f"8 windows of {LENGTH} tokens (6 of {read}; 2 of text generated from"
    assert f"calibration: {line} {prompts})" in said
    manifest = json.loads((folder / "fusegpt.json").read_text())
    part = manifest["calibration"]["parts"][1]
    how = {"prompts": prompts, "tokens": 100, "temperature": 1.0, "top_p": 0.9}
    assert part["generated"] == how and part["text_tokens"] == 100
    told = f"{line} {prompts})".replace(f"{desk.folder}/", "")
    assert told in (folder / "README.md").read_text()

    assert main(["compress", file]) == 0  # the text is still there, so it is the same run
    again = capsys.readouterr().err
    assert "has published everything" in again and "the dense model writes" not in again
    assert main(["score", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"][1]["generated"] == how


def test_each_file_of_the_model_is_hashed_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though two texts and the run itself are named by the model's bytes."""
    whole, hashed = storage.fingerprint, Counter[str]()

    def counting(uri: str) -> str:
        hashed[uri] += 1
        return whole(uri)

    monkeypatch.setattr(storage, "fingerprint", counting)
    colder = {"generate": str(desk.folder / "prompts.txt"), "temperature": 0.5}
    heal = {"batch": 4, "held_out": 4, "tokens": 12 * LENGTH, "data": [colder]}
    compress(asked(desk, {"heal": heal}), Watching())
    assert len([*desk.out.glob("generated-*")]) == 2
    assert hashed == {str(file): 1 for file in desk.model.glob("*.safetensors")}


def test_clean_removes_it_where_no_run_needs_it(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(asked(desk), Watching(stop=2))
    (folder,) = desk.out.glob("generated-*")

    def cleaned(*options: str) -> str:
        for path in desk.out.rglob("*"):
            os.utime(path, (1e9, 1e9))
        assert main(["clean", str(desk.out), "--yes", *options]) == 0
        return capsys.readouterr().out

    assert "perhaps for the run demo" in cleaned() and folder.exists()
    compress(asked(desk), Watching())
    (folder / "notes.txt").touch()
    cleaned()
    assert folder.exists()  # not only ours
    (folder / "notes.txt").unlink()
    assert "a text that a dense model wrote" in cleaned()
    assert not folder.exists() and (desk.out / "demo-p40" / "fusegpt.json").exists()
