"""`fusegpt clean` on what real runs leave: finished, stopped, killed, and still at work."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from desk import Desk
from left_behind import Capture, _out, _stopped_desk, aged, alive, half_model, names  # noqa: F401 - fixtures
from pulling import write_model
from stopped_runs import Watching, contents, recipe, run_folder, stopped

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run import housekeeping
from fusegpt_ray.run.status import status
from fusegpt_ray.store import storage


def verdicts(uri: str | Path, *options: str, capsys: Capture) -> dict[str, str]:
    """Name → what the command says it does with it, and what it is."""
    assert main(["clean", str(uri), *options]) == 0
    rows = re.findall(
        r"^(would remove|removed|kept) +(\S+)  (.*)$", capsys.readouterr().out, re.MULTILINE
    )
    return {name.rsplit("/", 1)[-1]: f"{verb} {what}" for verb, name, what in rows}


@pytest.fixture(autouse=True)
def _a_finished_model_stays_as_it_is(request: pytest.FixtureRequest) -> Iterator[None]:
    """The one beside what is removed, to the byte, in every test of these outputs."""
    model = request.getfixturevalue("out") / "other-p20" if "out" in request.fixturenames else None
    before = contents(model) if model else None
    yield
    assert not model or contents(model) == before


# --- clean ---


def test_nothing_is_removed_unless_told(out: Path, capsys: Capture) -> None:
    half_model(out, "demo-p20")
    (out / "demo.write-test").touch()
    aged(out)
    before = contents(out)
    said = verdicts(out, capsys=capsys)
    assert said["demo-p20"] == "would remove 1.5 kB  a model that was never finished"
    assert said["demo.run"].endswith("an unfinished run, can be resumed (rounds done: 1)") and said[
        "demo.run"
    ].startswith("kept")
    assert said["demo.write-test"] == "would remove 0 bytes  a probe of the output"
    assert set(said) == {"demo-p20", "demo.run", "demo.write-test"}
    assert contents(out) == before

    assert main(["clean", str(out)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "1.5 kB could go; nothing was removed: that takes --yes"
    )


def test_a_model_whose_writer_was_killed_in_its_first_file_goes(out: Path, capsys: Capture) -> None:
    for file in half_model(out, "demo-p20").iterdir():
        file.unlink()
    (out / "demo-p20/.model-00001-of-00002.safetensors.0123abcd").write_bytes(bytes(700))
    aged(out)
    assert verdicts(out, "--yes", capsys=capsys)["demo-p20"].startswith("removed 700 bytes")
    assert not (out / "demo-p20").exists()


def test_what_a_stopped_run_can_go_on_with_stays(out: Path, capsys: Capture) -> None:
    journal, model = contents(out / "demo.run"), contents(out / "other-p20")
    half_model(out, "demo-p20")
    (out / "demo.write-test").touch()
    aged(out)
    journal["heartbeat.json"] = (out / "demo.run/heartbeat.json").read_bytes()
    assert {
        name: what.split()[0] for name, what in verdicts(out, "--yes", capsys=capsys).items()
    } == {
        "demo-p20": "removed",
        "demo.write-test": "removed",
        "demo.run": "kept",
    }
    assert names(out) == {"demo.run", "other-p20"}
    assert (contents(out / "demo.run"), contents(out / "other-p20")) == (journal, model)
    assert verdicts(out, "--yes", "--unfinished", capsys=capsys)["demo.run"].startswith("removed")
    assert names(out) == {"other-p20"} and contents(out / "other-p20") == model
    assert main(["clean", str(out)]) == 0
    assert capsys.readouterr().out == f"nothing to remove in {out}\n"


def test_a_run_goes_on_after_a_cleaning(desk: Desk, capsys: Capture) -> None:
    stopped(desk, 3)
    half_model(desk.out, "demo-p20")
    assert verdicts(desk.out, "--yes", capsys=capsys)["demo-p20"].startswith("removed")
    show = Watching()
    compress(recipe(desk), show)
    assert show.rounds == [3]
    assert names(desk.out) == {"demo-p20", "demo-p60"}


ALL = ("--yes", "--unfinished")


def alive_by_its_files(out: Path) -> None:
    """A clock that is wrong, or a heartbeat that cannot be read: something else was written one and
    a half minutes ago.
    """
    aged(out)
    (out / "demo.run/heartbeat.json").write_text('{"time": 12')
    os.utime(out / "demo.run/heartbeat.json", (time.time() - 90,) * 2)


def just_begun(out: Path) -> None:
    aged(out)
    for file in [*(out / "demo.run").glob("round-*"), out / "demo.run/heartbeat.json"]:
        file.unlink()
    shutil.rmtree(out / "demo.run/blocks")
    os.utime(out / "demo.run/identity.json", (time.time() - 65,) * 2)


@pytest.mark.parametrize("state", [alive, alive_by_its_files, just_begun])
def test_a_live_run_and_its_models_are_never_touched(
    state: Callable[[Path], None], out: Path, capsys: Capture
) -> None:
    half_model(out, "demo-p20")
    state(out)
    before = contents(out)
    said = verdicts(out, *ALL, capsys=capsys)
    assert said["demo.run"].partition("  ")[2].startswith("a live run (")
    assert said["demo-p20"].endswith("a model that is being written")
    assert contents(out) == before
    assert status(str(out))["runs"][0]["state"] == "alive"

    said = verdicts(out, *ALL, "--age", "1", capsys=capsys)
    assert {what.split()[0] for what in said.values()} == {"removed"}
    assert names(out) == {"other-p20"}


def test_a_run_with_a_later_heartbeat_than_the_first_look_is_left(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on with the run between the look and the removal."""
    half_model(out, "demo-p20")
    aged(out)
    remove = storage.remove

    def resumed(uri: str, recursive: bool = False) -> None:
        remove(uri, recursive)
        alive(out)

    monkeypatch.setattr(storage, "remove", resumed)
    assert [Path(item.uri).name for item in housekeeping.clean(str(out), unfinished=True)] == [
        "demo-p20"
    ]
    assert (out / "demo.run/identity.json").exists()


def test_a_run_whose_models_are_all_published_goes(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last manifest and before it removed its folder."""
    monkeypatch.setattr("fusegpt_ray.run.journal.Journal.remove", lambda self: None)
    compress(recipe(desk, method="mi"))
    assert (
        status(str(desk.out))["runs"][0]["state"] == "alive"
    )  # as far as anyone can tell: it has just been heard of
    aged(desk.out)
    assert status(str(desk.out))["runs"][0]["state"] == "published"
    shutil.copytree(desk.out, desk.folder / "one-missing")
    shutil.rmtree(desk.folder / "one-missing/demo-p60")

    assert verdicts(desk.out, "--yes", capsys=capsys)["demo.run"].endswith(
        "a run whose models are all published"
    )
    assert names(desk.out) == {"demo-p20", "demo-p60"}

    assert "kept" in verdicts(desk.folder / "one-missing", "--yes", capsys=capsys)["demo.run"]
    shutil.copytree(desk.out / "demo-p20", desk.folder / "one-missing/demo-p60")
    manifest = desk.folder / "one-missing/demo-p60/fusegpt.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run": "another"}))
    assert "kept" in verdicts(desk.folder / "one-missing", "--yes", capsys=capsys)["demo.run"]


def test_what_is_left_of_a_removal_goes(out: Path, capsys: Capture) -> None:
    (out / "demo.run/identity.json").unlink()
    aged(out)
    assert verdicts(out, "--yes", capsys=capsys)["demo.run"].endswith(
        "what is left of a run that was being removed"
    )
    assert names(out) == {"other-p20"}


def test_the_identity_outlives_the_records(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed while it removes its folder must not leave records that a run of another
    recipe would take for its own.
    """
    removed: list[str] = []
    remove = storage.remove
    monkeypatch.setattr(
        storage,
        "remove",
        lambda uri, recursive=False: (removed.append(uri), remove(uri, recursive))[1],
    )
    compress(recipe(desk, method="mi", sparsity=0.4))
    folder = str(run_folder(desk))
    notes = ["scores-002.json", "scores-001.json"]
    records = ["round-002.json", "round-001.json", "plan-000.json", "metrics-000001.jsonl"]
    files = ["blocks", *notes, *records, "identity.json", "heartbeat.json", "lease-000001.json"]
    assert removed[-10:] == [f"{folder}/{name}" for name in files]
    assert not run_folder(desk).exists()


FOREIGN: dict[str, dict[str, str]] = {
    "mine-p25": {"model.safetensors": "a model by another tool", "config.json": "{}"},
    "demo-p25": {"model.safetensors": "beside a run of this name", "config.json": "{}"},
    "other-p25": {"model.safetensors": "beside a model of this name", "config.json": "{}"},
    "other-p20.old": {"model.safetensors": "a copy by hand"},
    "texts-p5": {"thesis.tex": "no model at all"},
    "notes.run": {"round-001.json": "{}", "my notes.txt": "run along"},
    "empty.run": {},
    "spare.part": {"wheel.txt": "no pull made this"},
    "plain": {"model.safetensors": "?"},
}


def test_what_is_not_ours_is_never_touched(out: Path, capsys: Capture) -> None:
    for folder, files in FOREIGN.items():
        (out / folder).mkdir()
        for name, text in files.items():
            (out / folder / name).write_text(text)
    (out / "full.write-test").write_text("not empty, so no probe")
    outside = out.parent / "elsewhere"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (out / "demo-p99").symlink_to(outside)
    (out / "demo-p98").mkdir()
    (out / "demo-p98/model.safetensors").symlink_to(outside / "config.json")
    aged(out)
    aged(outside)
    before = {**contents(outside)}
    said = verdicts(out, *ALL, capsys=capsys)
    foreign = ("mine-p25", "demo-p25", "other-p25", "demo-p98")
    expected = {"demo.run": "removed"} | dict.fromkeys(foreign, "kept")
    assert {name: what.split()[0] for name, what in said.items()} == expected
    assert names(out) == {*FOREIGN, "other-p20", "full.write-test", "demo-p98", "demo-p99"}
    assert contents(outside) == before


@pytest.mark.parametrize("uri", ["", "other-p20", "demo.run", "nowhere"])
def test_clean_wants_the_folder_of_models_and_runs(uri: str, out: Path, capsys: Capture) -> None:
    aged(out)
    before = contents(out)
    code = main(["clean", str(out / uri), *ALL[:1]])
    assert code == (2 if uri else 0) and contents(out) == before
    assert ("Fix:" in capsys.readouterr().err) == bool(uri)


def test_clean_by_uri(out: Path, capsys: Capture) -> None:
    half_model(out, "demo-p20")
    fsspec.filesystem("memory").put(f"{out}/", "/clean/", recursive=True)
    uri = "memory://clean"
    assert verdicts(uri, *ALL, capsys=capsys)["demo.run"].startswith(
        "removed"
    )  # the user stopped it, so it needs no age
    assert storage.exists(f"{uri}/other-p20/fusegpt.json") and not storage.exists(f"{uri}/demo.run")
    fsspec.filesystem("memory").rm("/clean", recursive=True)


def test_a_pull_that_stopped_goes_one_at_work_stays(tmp_path: Path, capsys: Capture) -> None:
    write_model(tmp_path / "whole")
    for name in ("dead.part", "locked.part", "fresh.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".fusegpt-pull").touch()
        if name != "fresh.part":
            aged(tmp_path / name)
    directory = os.open(tmp_path / "locked.part", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        said = verdicts(tmp_path, "--yes", capsys=capsys)
    finally:
        os.close(directory)
    assert said["dead.part"].endswith("a pull that stopped")
    assert said["locked.part"].endswith("being pulled") and said["fresh.part"].endswith(
        "being pulled"
    )
    assert names(tmp_path) == {"whole", "locked.part", "fresh.part"}
