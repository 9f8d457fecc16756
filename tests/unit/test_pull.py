"""Downloads that are damaged on the way, cut short, or killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from faulty import Fault, failing
from pulling import (  # noqa: F401 - fixtures
    CHUNK,
    FILES,
    ONE,
    TWO,
    WHOLE,
    _at_once,
    _small_and_fast,
    _source,
    _target,
    assert_pulled,
    contents,
    part_of,
    write_model,
)

from fusegpt_ray import UserError, pull
from fusegpt_ray.cli import main
from fusegpt_ray.publishing import download
from fusegpt_ray.publishing.download import Incomplete

# --- all is well ---


@pytest.mark.parametrize("store", ["local", "file", "memory"])
def test_a_pulled_model_is_the_model(
    store: str, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "source")
    uri = {"local": str(folder), "file": f"file://{folder}", "memory": "memory://pull/model/"}[
        store
    ]
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


def test_a_whole_model_is_not_fetched_again(
    source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(source, target)
    (target / "notes.txt").write_text("my own, beside it")
    with failing() as asked:
        assert main(["pull", source, str(target)]) == 0
    assert asked == [("fusegpt.json", 0)]
    assert "already, and whole" in capsys.readouterr().err
    assert contents(target) == WHOLE | {"notes.txt": b"my own, beside it"}


LIGHT = """
import sys
from fusegpt_ray.cli import main
source, target = sys.argv[1:]
codes = [main(["pull", source, target]), main(["status", source]), main(["clean", target + "/.."])]
print(codes, {"torch", "transformers", "ray", "numpy", "pandas"} & set(sys.modules))
"""


def test_light_commands_stay_light(tmp_path: Path, target: Path) -> None:
    folder = write_model(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, folder, target], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] set()", done


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
    assert (
        capsys.readouterr().err.count(f"{TWO} ") == download.TRIES
    )  # twice why it is fetched again, once that it is whole


@DAMAGES
def test_what_stays_damaged_is_named_and_the_rest_is_kept(
    damage: Callable[[bytes], bytes], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(times(download.TRIES, TWO, damage)) as asked:
        assert main(["pull", source, str(target)]) == 1
    assert asked.count((TWO, CHUNK)) == download.TRIES
    failure = capsys.readouterr().err.partition("failed: ")[2].splitlines()
    assert (
        len(failure) == 2
        and failure[0].startswith(f"{TWO} ")
        and str(part_of(target)) in failure[1]
    )
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
    assert asked == [
        ("fusegpt.json", 0),
        *((ONE, begin) for begin in range(CHUNK, 4 * CHUNK + 7, CHUNK)),
    ]
    assert_pulled(target)


@pytest.mark.parametrize(
    "there",
    [b"x" * CHUNK, b"x" * 3 * CHUNK, b"x" * 2 * CHUNK, b""],
    ids=["less", "more", "as-long", "empty"],
)
def test_a_begun_file_of_other_bytes_is_replaced(there: bytes, source: str, target: Path) -> None:
    part_of(target).mkdir(parents=True)
    (part_of(target) / ".fusegpt-pull").touch()
    (part_of(target) / TWO).write_bytes(there)
    pull(source, target)
    assert_pulled(target)


def test_files_of_another_version_do_not_stay(source: str, target: Path, tmp_path: Path) -> None:
    old = {
        TWO: b"older",
        "model-00003-of-00003.safetensors": b"there were three",
        "unreachable.txt": b"?",
    }
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
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert (
            process.stdout.readline() == "stuck\n"
        )  # the manifest and `reads - 1` pieces have arrived
        with pytest.raises(UserError, match="another pull is filling it"):
            pull(source, target)
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and part_of(target).exists()

    pieces = [(name, begin) for name, data in FILES.items() for begin in range(0, len(data), CHUNK)]
    with failing() as asked:
        pull(source, target)
    assert sorted(asked[1:]) == sorted(pieces[reads - 1 :])  # not one byte twice
    assert_pulled(target)
