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
    ONE,
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
from fusegpt_ray.publishing import download


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses."""
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1, stderr
    return stderr


@pytest.mark.parametrize(
    "names",
    [
        ["../escaped"],
        ["/tmp/escaped"],
        ["sub/../../file"],
        ["sub//file"],
        ["sub/./file"],
        ["sub/"],
        ["sub", "sub/file"],
        ["sub/file", "SUB"],
        ["fusegpt.json/file"],
        ["/".join("deep" * 9)],
        ["..\\escaped"],
        ["C:escaped"],
        ["C:\\escaped"],
        [".."],
        ["."],
        [""],
        ["a\0b"],
        ["a\nb"],
        ["a\x1b[2Jb"],
        ["a\x7fb"],
        ["\ud800"],
        ["ü" * 128],
        ["fusegpt.json"],
        ["FuseGPT.json"],
        [".fusegpt-pull"],
        ["readme.md", "README.md"],
        ["stra\N{LATIN SMALL LETTER SHARP S}e", "strasse"],
        ["\N{LATIN SMALL LETTER U WITH DIAERESIS}", "u\N{COMBINING DIAERESIS}"],
    ],
    ids=ascii,
)
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
    ("raw", "named"),
    [
        (b"", "is not JSON"),
        (b'{"format": 1, "files": {"config', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "lists no files"),
        (manifest({}), "lists no files"),
        (manifest(FILES, files=["config.json"]), "lists no files"),
        (manifest(FILES, format=2), "has the format 2, this version knows 1"),
        (manifest(FILES, kept=None), "which blocks were kept"),
        (manifest(FILES, kept=["0"]), "which blocks were kept"),
        (manifest({}, files={"a": {"bytes": 1}}), "size and sha256 of 'a'"),
        (manifest({}, files={"a": {"bytes": -1, "sha256": "0" * 64}}), "size and sha256 of 'a'"),
        (manifest({}, files={"a": {"bytes": True, "sha256": "0" * 64}}), "size and sha256 of 'a'"),
        (manifest({}, files={"a": {"bytes": 1, "sha256": "0" * 63}}), "size and sha256 of 'a'"),
        (manifest({}, files={"a": 5}), "size and sha256 of 'a'"),
        (None, "holds no fusegpt.json"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    raw: bytes | None,
    named: str,
    source: str,
    target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "source/fusegpt.json"
    file.unlink() if raw is None else file.write_bytes(raw)
    assert named in refused(["pull", source, str(target)], capsys)
    assert not target.parent.exists()


@pytest.mark.parametrize(
    "uri", ["nosuchprotocol://bucket/model", "no/such/folder", "memory://no/such/model"]
)
def test_a_source_that_is_none_is_refused(
    uri: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uri in refused(["pull", uri, str(target)], capsys)
    assert not target.parent.exists()


def test_a_model_larger_than_the_disk_is_refused(
    source: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {"config.json": {"bytes": 10**18, "sha256": "0" * 64}}
    (tmp_path / "source/fusegpt.json").write_bytes(manifest({}, files=records))
    with failing() as asked:
        assert "the model has 1000000000.0 GB" in refused(["pull", source, str(target)], capsys)
    assert asked == [("fusegpt.json", 0)] and not target.exists()


def another_model(target: Path) -> None:
    write_model(target, {"config.json": b"another"})


def someones_files(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("five years")


def a_damaged_copy(target: Path) -> None:
    write_model(target)
    (target / TWO).write_bytes(FILES[TWO][:-1])


def a_file(target: Path) -> None:
    target.parent.mkdir()
    target.write_text("here")


def a_dangling_link(target: Path) -> None:
    target.parent.mkdir()
    target.symlink_to("nowhere")


def a_link_to_an_empty_folder(target: Path) -> None:
    (target.parent / "elsewhere").mkdir(parents=True)
    target.symlink_to("elsewhere")


def someones_part(target: Path) -> None:
    someones_files(part_of(target))


def a_file_as_part(target: Path) -> None:
    a_file(part_of(target))


def a_link_as_part(target: Path) -> None:
    a_link_to_an_empty_folder(part_of(target))


def a_dangling_link_as_part(target: Path) -> None:
    a_dangling_link(part_of(target))


def _begun(target: Path) -> Path:
    part_of(target).mkdir(parents=True)
    (part_of(target) / ".fusegpt-pull").touch()
    (target.parent / "precious").write_bytes(b"precious")
    return part_of(target)


def a_link_planted(target: Path) -> None:
    (_begun(target) / TWO).symlink_to(target.parent / "precious")


def a_dangling_link_planted(target: Path) -> None:
    (_begun(target) / TWO).symlink_to(target.parent / "new")


def a_link_planted_as_the_manifest(target: Path) -> None:
    (_begun(target) / "fusegpt.json").symlink_to(target.parent / "precious")


def a_link_planted_as_the_mark(target: Path) -> None:
    (_begun(target) / ".fusegpt-pull").unlink()
    (part_of(target) / ".fusegpt-pull").symlink_to(target.parent / "precious")


def a_hard_link_planted(target: Path) -> None:
    os.link(_begun(target).parent / "precious", part_of(target) / TWO)


def a_folder_planted(target: Path) -> None:
    (_begun(target) / TWO).mkdir()


@pytest.mark.parametrize(
    "obstacle",
    [
        another_model,
        someones_files,
        a_damaged_copy,
        a_file,
        a_dangling_link,
        a_link_to_an_empty_folder,
        someones_part,
        a_file_as_part,
        a_link_as_part,
        a_dangling_link_as_part,
        a_link_planted,
        a_dangling_link_planted,
        a_link_planted_as_the_manifest,
        a_link_planted_as_the_mark,
        a_hard_link_planted,
        a_folder_planted,
    ],
)
def test_what_is_in_the_way_is_named_and_stays_as_it_is(
    obstacle: Callable[[Path], None], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obstacle(target)

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


def test_a_link_planted_while_files_arrive_is_not_followed(
    source: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "WORKERS", 1)
    precious = target.parent / "precious"

    def plant(name: str, begin: int, data: bytes) -> bytes:
        if name == ONE and begin == 0:
            precious.write_bytes(b"precious")
            (part_of(target) / TWO).symlink_to(precious)
        return data

    with failing(plant), pytest.raises(OSError, match=TWO):
        pull(source, target)
    assert precious.read_bytes() == b"precious" and not target.exists()


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
