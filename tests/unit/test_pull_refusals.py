"""Downloads that are meant to write where they must not, and other pulls that must be refused."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import failing
from pulling import (  # noqa: F401 - fixtures
    FILES,
    TWO,
    _at_once,
    _small_and_fast,
    _source,
    _target,
    assert_pulled,
    manifest,
    part_of,
    write_model,
)

from fusegpt_ray import pull
from fusegpt_ray.cli import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses."""
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1, stderr
    return stderr


ALONE = [
    *("../escaped", "sub/../../file", "..", "sub//file", "", "..\\escaped", "C:escaped"),
    *("a\0b", "a\nb", "a\x1b[2Jb", "\ud800", "ü" * 128, "/".join("deep" * 9)),
    *("fusegpt.json", "FuseGPT.json", ".fusegpt-pull"),
]
TOGETHER = [
    *(["sub", "sub/file"], ["sub/file", "SUB"], ["readme.md", "README.md"]),
    ["stra\N{LATIN SMALL LETTER SHARP S}e", "strasse"],
    ["\N{LATIN SMALL LETTER U WITH DIAERESIS}", "u\N{COMBINING DIAERESIS}"],
]


@pytest.mark.parametrize("names", [*([name] for name in ALONE), *TOGETHER], ids=ascii)
def test_names_that_would_lie_elsewhere_are_refused(
    names: list[str], source: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (tmp_path / "source/fusegpt.json").write_bytes(
        manifest({}, files=dict.fromkeys(["config.json", *names], record))
    )
    before = sorted(tmp_path.rglob("*"))
    with failing() as asked:
        message = refused(["pull", source, str(target)], capsys)
    assert "fusegpt.json lists the file" in message
    assert asked == [("fusegpt.json", 0)] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "uri", ["nosuchprotocol://bucket/model", "no/such/folder", "memory://no/such/model"]
)
def test_a_source_that_is_none_is_refused(
    uri: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uri in refused(["pull", uri, str(target)], capsys)
    assert not target.parent.exists()


def a_folder(at: Path) -> None:
    at.mkdir(parents=True)
    (at / "thesis.tex").write_text("five years")


def another_model(at: Path) -> None:
    write_model(at, {"config.json": b"another"})


def a_damaged_copy(at: Path) -> None:
    write_model(at)
    (at / TWO).write_bytes(FILES[TWO][:-1])


def a_file(at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text("here")


def a_dangling_link(at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to("nowhere")


def a_link(at: Path) -> None:
    a_folder(at.parent / "theirs")
    at.symlink_to("theirs")


def a_link_to_a_file(at: Path) -> None:
    a_file(at.parent.parent / "precious")
    at.symlink_to("../precious")


def a_hard_link(at: Path) -> None:
    a_file(at.parent.parent / "precious")
    os.link(at.parent.parent / "precious", at)


@pytest.mark.parametrize(
    ("place", "obstacle"),
    [
        *(("model", make) for make in (a_folder, another_model, a_damaged_copy)),
        *(("model", make) for make in (a_file, a_dangling_link, a_link)),
        *(("model.part", make) for make in (a_folder, a_file, a_dangling_link, a_link)),
        *(
            (f"model.part/{TWO}", make)
            for make in (a_folder, a_dangling_link, a_link_to_a_file, a_hard_link)
        ),
        ("model.part/theirs", Path.mkdir),
        ("model.part/fusegpt.json", a_link_to_a_file),
        ("model.part/.fusegpt-pull", a_link_to_a_file),
    ],
)
def test_what_is_in_the_way_is_named_and_stays_as_it_is(
    place: str,
    obstacle: Callable[[Path], None],
    source: str,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if place.startswith("model.part/"):
        part_of(target).mkdir(parents=True)
        if not place.endswith(".fusegpt-pull"):
            (part_of(target) / ".fusegpt-pull").touch()
    obstacle(target.parent / place)

    def picture() -> dict[str, Any]:
        paths = sorted(target.parent.rglob("*"))
        return {
            str(path): path.read_bytes() if path.is_file() else path.lstat().st_ino
            for path in paths
        }

    before = picture()
    message = refused(["pull", source, str(target)], capsys)
    assert message.startswith("error: DIR = ") and str(target) in message
    assert picture() == before


def test_a_uri_is_no_place_to_pull_to(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a local path" in refused(["pull", source, "s3://bucket/model"], capsys)


def test_the_lock_of_a_live_pull_is_respected(
    source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part_of(target).mkdir(parents=True)
    directory = os.open(part_of(target), os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        assert "another pull is filling it" in refused(["pull", source, str(target)], capsys)
    finally:
        os.close(directory)
    pull(source, target)
    assert_pulled(target)
