"""Downloads that are damaged, cut short, killed, or meant to write where they must not."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faulty import Fault, failing

from fusegpt_ray import UserError, pull
from fusegpt_ray.cli import main
from fusegpt_ray.publishing import download
from fusegpt_ray.publishing.download import Incomplete

CHUNK = 1000
"""Bytes a request, in these tests."""
FILES = {
    "config.json": b"{}",
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": hashlib.shake_256(b"1").digest(4 * CHUNK + 7),
    "model-00002-of-00002.safetensors": hashlib.shake_256(b"2").digest(2 * CHUNK),
    "with space, ünïcode.txt": b"named so",
}
ONE, TWO = (name for name in FILES if name.endswith(".safetensors"))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage's own patience has its own tests (`tests/integration/test_faults.py`)."""
    monkeypatch.setenv("FUSEGPT_PATIENCE", "0")


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", CHUNK)
    monkeypatch.setattr(download, "PAUSE", 0.0)


def manifest(contents: dict[str, bytes], **changes: Any) -> bytes:
    records = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    return json.dumps({"format": 1, "kept": [0, 2], "files": records} | changes).encode()


def write_model(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, data in {**files, "fusegpt.json": manifest(files)}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The URI of a model in a store that does as it is told."""
    return f"faulty://{write_model(tmp_path / 'source')}"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "here" / "model"


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WHOLE = {**FILES, "fusegpt.json": manifest(FILES)}


def assert_pulled(target: Path) -> None:
    assert contents(target) == WHOLE
    assert [path.name for path in target.parent.iterdir()] == [target.name]


# --- all is well ---


@pytest.mark.parametrize("store", ["local", "file", "memory"])
def test_a_pulled_model_is_the_model(store: str, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "source")
    uri = {"local": str(folder), "file": f"file://{folder}", "memory": "memory://pull/model/"}[store]
    if store == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", "/pull/model/", recursive=True)
    assert main(["pull", uri, str(target)]) == 0
    stdout, stderr = capsys.readouterr()
    assert_pulled(target)
    assert stdout == "" and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stderr)
    for name in FILES:
        assert len(re.findall(rf"\d/5  {re.escape(name)}  is whole", stderr)) == 1


def test_an_empty_folder_is_filled_and_parents_are_made(source: str, target: Path) -> None:
    target.mkdir(parents=True)
    assert pull(source, target) == target
    assert_pulled(target)
    pull(source, target.parent / "a/b/c")
    assert contents(target.parent / "a/b/c") == WHOLE


def test_a_whole_model_is_not_fetched_again(source: str, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull(source, target)
    (target / "notes.txt").write_text("my own, beside it")
    with failing() as asked:
        assert main(["pull", source, str(target)]) == 0
    assert asked == [("fusegpt.json", 0)]
    assert "already, and whole" in capsys.readouterr().err
    assert contents(target) == WHOLE | {"notes.txt": b"my own, beside it"}


# --- the way is bad ---


def times(count: int, name: str, what: Callable[[bytes], bytes]) -> Fault:
    """The first so many reads of the file's second piece arrive so changed."""
    left = [count]

    def fault(asked: str, begin: int, data: bytes) -> bytes:
        if (asked, begin) != (name, CHUNK) or not left[0]:
            return data
        left[0] -= 1
        return what(data)

    return fault


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def cut(data: bytes) -> bytes:
    return data[:10]


def longer(data: bytes) -> bytes:
    return data + b"more"


def broken(data: bytes) -> bytes:
    raise ConnectionResetError("the line went dead")


DAMAGES = pytest.mark.parametrize("damage", [flipped, cut, longer, broken])


@DAMAGES
def test_what_is_damaged_on_the_way_is_fetched_again(
    damage: Callable[[bytes], bytes], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(times(download.TRIES - 1, TWO, damage)):
        assert main(["pull", source, str(target)]) == 0
    assert_pulled(target)
    assert capsys.readouterr().err.count(f"{TWO} ") == download.TRIES  # twice why it is fetched again, once that it is whole


@DAMAGES
def test_what_stays_damaged_is_named_and_the_rest_is_kept(
    damage: Callable[[bytes], bytes], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(times(download.TRIES, TWO, damage)) as asked:
        assert main(["pull", source, str(target)]) == 1
    assert asked.count((TWO, CHUNK)) == download.TRIES
    failure = capsys.readouterr().err.partition("failed: ")[2].splitlines()
    assert len(failure) == 2 and failure[0].startswith(f"{TWO} ") and str(part_of(target)) in failure[1]
    assert not target.exists()

    with failing() as asked:
        assert main(["pull", source, str(target)]) == 0
    assert {name for name, _ in asked} == {"fusegpt.json", TWO}
    assert_pulled(target)


def test_a_file_goes_on_where_it_stopped(source: str, target: Path) -> None:
    with failing(times(download.TRIES, ONE, broken)), pytest.raises(Incomplete) as caught:
        pull(source, target)
    assert list(caught.value.files) == [ONE] and "the line went dead" in caught.value.files[ONE]
    with failing() as asked:
        pull(source, target)
    assert asked == [("fusegpt.json", 0), *((ONE, begin) for begin in range(CHUNK, 4 * CHUNK + 7, CHUNK))]
    assert_pulled(target)


@pytest.mark.parametrize("there", [b"x" * CHUNK, b"x" * 3 * CHUNK, b"x" * 2 * CHUNK, b""], ids=["less", "more", "as-long", "empty"])
def test_a_begun_file_of_other_bytes_is_replaced(there: bytes, source: str, target: Path) -> None:
    part_of(target).mkdir(parents=True)
    (part_of(target) / ".fusegpt-pull").touch()
    (part_of(target) / TWO).write_bytes(there)
    pull(source, target)
    assert_pulled(target)


def test_files_of_another_version_do_not_stay(source: str, target: Path, tmp_path: Path) -> None:
    old = {TWO: b"older", "model-00003-of-00003.safetensors": b"there were three", "unreachable.txt": b"?"}
    other = f"faulty://{write_model(tmp_path / 'older', old)}"
    Path(tmp_path / "older" / "unreachable.txt").unlink()
    with pytest.raises(Incomplete):
        pull(other, target)
    assert (part_of(target) / "model-00003-of-00003.safetensors").exists()
    pull(source, target)
    assert_pulled(target)


def test_a_file_missing_at_the_source_is_named(source: str, target: Path, tmp_path: Path) -> None:
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(Incomplete) as caught:
        pull(source, target)
    assert list(caught.value.files) == ["config.json"] and not target.exists()


KILLED = """
import sys, time
import faulty
from fusegpt_ray.publishing import download
from fusegpt_ray import pull

uri, target, reads = sys.argv[1], sys.argv[2], int(sys.argv[3])
download.CHUNK, download.WORKERS = {chunk}, 1

def stuck(name, begin, data):
    if len(faulty.Faulty.asked) > reads:
        print("stuck", flush=True)
        time.sleep(600)
    return data

with faulty.failing(stuck):
    pull(uri, target)
"""


@pytest.mark.parametrize("reads", [1, 2, 5, 8])
def test_a_killed_pull_goes_on_with_what_it_has(reads: int, source: str, target: Path) -> None:
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])}
    command = [sys.executable, "-c", KILLED.format(chunk=CHUNK), source, str(target), str(reads)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"  # the manifest and `reads - 1` pieces have arrived
        with pytest.raises(UserError, match="another pull is filling it"):
            pull(source, target)
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and part_of(target).exists()

    pieces = [(name, begin) for name, data in FILES.items() for begin in range(0, len(data), CHUNK)]
    with failing() as asked:
        pull(source, target)
    assert sorted(asked[1:]) == sorted(pieces[reads - 1 :])  # not one byte twice
    assert_pulled(target)


# --- what must be refused ---


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
        ["sub/file"],
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
    (tmp_path / "source/fusegpt.json").write_bytes(manifest({}, files=dict.fromkeys(["config.json", *names], record)))
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
    raw: bytes | None, named: str, source: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "source/fusegpt.json"
    file.unlink() if raw is None else file.write_bytes(raw)
    assert named in refused(["pull", source, str(target)], capsys)
    assert not target.parent.exists()


@pytest.mark.parametrize("uri", ["nosuchprotocol://bucket/model", "no/such/folder", "memory://no/such/model"])
def test_a_source_that_is_none_is_refused(uri: str, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        return {str(path): path.read_bytes() if path.is_file() else path.lstat().st_ino for path in paths}

    before = picture()
    message = refused(["pull", source, str(target)], capsys)
    assert message.startswith("error: DIR = ") and str(target) in message
    assert picture() == before


def test_a_link_planted_while_files_arrive_is_not_followed(source: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_lock_of_a_live_pull_is_respected(source: str, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part_of(target).mkdir(parents=True)
    directory = os.open(part_of(target), os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        assert "another pull is filling it" in refused(["pull", source, str(target)], capsys)
    finally:
        os.close(directory)
    pull(source, target)
    assert_pulled(target)


LIGHT = """
import sys
from fusegpt_ray.cli import main
source, target = sys.argv[1:]
codes = [main(["pull", source, target]), main(["status", source]), main(["clean", target + "/.."])]
print(codes, {"torch", "transformers", "ray", "numpy", "pandas"} & set(sys.modules))
"""


def test_light_commands_stay_light(tmp_path: Path, target: Path) -> None:
    folder = write_model(tmp_path / "source")
    done = subprocess.run([sys.executable, "-c", LIGHT, folder, target], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] set()", done
