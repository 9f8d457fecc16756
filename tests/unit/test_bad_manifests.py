"""Manifests that are malformed or hostile: `pull`, `verify`, `report` and `status` say so.

Nothing is written, and nothing is read beyond them.

Names of files that would lie elsewhere are in test_pull_refusals.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistakes import MESSAGE, tree, unprivileged

from fusegpt_ray.cli import main
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import MANIFEST

DIGEST = "0" * 64
GOOD: dict[str, Any] = {
    "format": 1,
    "kept": [0, 1],
    "files": {"model.safetensors": {"bytes": 4, "sha256": DIGEST}},
}


def files(**entry: Any) -> dict[str, Any]:
    return GOOD | {"files": {"model.safetensors": {"bytes": 4, "sha256": DIGEST} | entry}}


def written(data: Any) -> Callable[[Path], object]:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda path: path.write_bytes(raw)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (written(b""), "is not JSON"),
    "binary": (written(bytes(range(256))), "is not JSON"),
    "deep": (written(b"[" * 100_000), "is not JSON"),
    "many-digits": (written(json.dumps(GOOD).replace("4", "9" * 5000).encode()), "is not JSON"),
    "a-list": (written([GOOD]), "lists no files"),
    "no-files": (written(GOOD | {"files": {}}), "lists no files"),
    "files-in-a-list": (written(GOOD | {"files": ["model.safetensors"]}), "lists no files"),
    "a-file-without-facts": (written(GOOD | {"files": {"a": None}}), "does not give size"),
    "another-format": (written(GOOD | {"format": 2}), "format 2"),
    "no-format": (
        written({key: value for key, value in GOOD.items() if key != "format"}),
        "format None",
    ),
    "a-long-format": (written(GOOD | {"format": "x" * 9999}), "format '…'"),
    "nothing-kept": (written(GOOD | {"kept": None}), "which blocks were kept"),
    "kept-in-words": (written(GOOD | {"kept": ["0"]}), "which blocks were kept"),
    "bytes-below-zero": (written(files(bytes=-1)), "size and sha256"),
    "bytes-beyond-all": (written(files(bytes=10**1000)), "size and sha256"),
    "bytes-in-fractions": (written(files(bytes=4.0)), "size and sha256"),
    "bytes-are-yes": (written(files(bytes=True)), "size and sha256"),
    "bytes-not-a-number": (written(files(bytes=math.nan)), "size and sha256"),
    "short-digest": (written(files(sha256="0")), "size and sha256"),
    "loud-digest": (written(files(sha256="A" * 64)), "size and sha256"),
    "digest-with-a-line-end": (written(files(sha256="0" * 64 + "\n")), "size and sha256"),
    "up": (
        written(GOOD | {"files": {"../a": GOOD["files"]["model.safetensors"]}}),
        "outside its folder",
    ),
    "away": (
        written(GOOD | {"files": {"/etc/passwd": GOOD["files"]["model.safetensors"]}}),
        "outside its folder",
    ),
    "a-long-name": (
        written(GOOD | {"files": {"x" * 99_999: GOOD["files"]["model.safetensors"]}}),
        "no file can have",
    ),
    "twice": (
        written(GOOD | {"files": dict.fromkeys(["a", "A"], GOOD["files"]["model.safetensors"])}),
        "twice",
    ),
    "a-folder": (Path.mkdir, "cannot be read|holds no"),
    "its-own-link": (lambda path: path.symlink_to(path), "cannot be read"),
    "a-link-to-nothing": (lambda path: path.symlink_to("nothing"), "holds no"),
    "a-device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read"),
    "unreadable": (lambda path: path.touch(0), "may not be read"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one file that is no model."""
    folder = tmp_path / "there/demo-p25"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"data")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read besides manifests."""
    found: list[str] = []
    read_ranges, fill = storage.read_ranges, storage.fill_local

    def watched(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        found.append(uri)
        return read_ranges(uri, ranges)

    def watched_local(path: str, begin: int, memory: memoryview) -> int:
        found.append(path)
        return fill(path, begin, memory)

    monkeypatch.setattr(storage, "read_ranges", watched)
    monkeypatch.setattr(storage, "fill_local", watched_local)
    return found


@pytest.mark.parametrize("verb", ["pull", "verify", "report"])
@pytest.mark.parametrize("name", CASES)
def test_manifests(
    name: str,
    verb: str,
    model: Path,
    reads: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    make, problem = CASES[name]
    make(model / MANIFEST)
    before, here = tree(tmp_path), str(tmp_path / "here")
    where = {"pull": [here], "verify": [], "report": ["--output", here]}
    with unprivileged():
        code = main([verb, str(model), *where[verb]])
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.fullmatch(stderr.rstrip("\n"))
    assert code == 2 and stdout == "" and message, stderr
    assert message["key"] == "URI" and "demo-p25" in message["value"]
    assert re.search(problem, message["problem"])
    assert len(stderr) < 2000
    assert tree(tmp_path) == before and reads == []


def test_the_good_one_is_read(
    model: Path, reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    written(GOOD)(model / MANIFEST)
    assert main(["verify", str(model)]) == 1
    assert (
        capsys.readouterr().out == "model.safetensors has another checksum than was written\n"
        and reads
    )


def test_a_size_that_no_disk_has(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written(files(bytes=2**62))(model / MANIFEST)
    assert main(["verify", str(model)]) == 1
    assert "has 4 bytes" in capsys.readouterr().out
    assert main(["pull", str(model), str(tmp_path / "here")]) == 2
    assert "the model has" in capsys.readouterr().err and not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ("a-folder", "its-own-link", "a-link-to-nothing")],
)
def test_status_shows_the_problem_and_the_other_models(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES[name][0](model / MANIFEST)
    other = model.with_name("good-p25")
    other.mkdir()
    written(GOOD | {"perplexity": {}, "dense_blocks": 3, "sparsity": 0.25})(other / MANIFEST)
    with unprivileged():
        assert main(["status", str(model.parent), "--json"]) == 0
    shown = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert shown["good-p25"]["blocks"] == 2
    assert "demo-p25" not in shown or re.search(CASES[name][1], shown["demo-p25"]["problem"])


@pytest.mark.parametrize(
    "facts",
    [{"perplexity": 5}, {"perplexity": {"a": 5}}, {"sparsity": "a quarter"}, {"dense_blocks": [5]}],
)
def test_status_of_facts_that_are_none(
    facts: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no part of what makes a model whole; a person still gets a table."""
    written(GOOD | facts)(model / MANIFEST)
    assert main(["status", str(model.parent)]) == 0
    assert "demo-p25" in capsys.readouterr().out
