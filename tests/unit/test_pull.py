"""Downloads that are damaged on the way, cut short, or killed."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from faulty import Fault, Faulty, failing
from pulling import (  # noqa: F401 - fixtures
    CHUNK,
    FILES,
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


@pytest.mark.parametrize("uri", ["{tmp_path}/source", "memory://pull/model/"])
def test_a_pulled_model_is_the_model(
    uri: str, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "source")
    fsspec.filesystem("memory").put(f"{folder}/", "/pull/model/", recursive=True)
    assert main(["pull", uri.format(tmp_path=tmp_path), str(target)]) == 0
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


@pytest.mark.parametrize("damage", [flipped, cut, longer, broken])
def test_what_is_damaged_on_the_way_is_fetched_again(
    damage: Callable[[bytes], bytes], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(times(download.TRIES - 1, TWO, damage)):
        assert main(["pull", source, str(target)]) == 0
    assert_pulled(target)
    said = capsys.readouterr().err
    # Twice why it is fetched again, once that it is whole.
    assert said.count(f"{TWO} ") == download.TRIES
    assert ("ended early" in said) == (damage in (cut, longer))


@pytest.mark.parametrize("damage", [flipped, broken])
def test_what_stays_damaged_is_named_and_the_rest_is_kept(
    damage: Callable[[bytes], bytes], source: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(times(download.TRIES, TWO, damage)) as asked:
        assert main(["pull", source, str(target)]) == 1
    assert asked.count((TWO, CHUNK)) == download.TRIES
    failure = capsys.readouterr().err.partition("failed: ")[2].splitlines()
    assert len(failure) == 2
    assert failure[0].startswith(f"{TWO} ") and str(part_of(target)) in failure[1]
    assert not target.exists()

    with failing() as asked:
        assert main(["pull", source, str(target)]) == 0
    pieces = [(TWO, begin) for begin in range(0, 2 * CHUNK, CHUNK)]
    assert asked == [("fusegpt.json", 0), *pieces[damage is broken :]], "what arrived is kept"
    assert_pulled(target)


@pytest.mark.parametrize("there", [b"x" * CHUNK, b"x" * 3 * CHUNK], ids=["less", "more"])
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
    with pytest.raises(Incomplete) as caught:
        pull(other, target)
    assert list(caught.value.files) == ["unreachable.txt"]
    assert (part_of(target) / "model-00003-of-00003.safetensors").exists()
    pull(source, target)
    assert_pulled(target)


def killed(source: str, target: Path, reads: int) -> None:
    """A pull in a process of its own, killed when the manifest and `reads - 1` pieces have
    arrived.
    """
    ours, theirs = multiprocessing.Pipe()

    def stuck(name: str, begin: int, data: bytes) -> bytes:
        if len(Faulty.asked) > reads:
            theirs.send("stuck")
            time.sleep(600)
        return data

    def run() -> None:
        download.WORKERS = 1
        with failing(stuck):
            pull(source, target)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        assert ours.poll(60)
        with pytest.raises(UserError, match="another pull is filling it"):
            pull(source, target)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("reads", [1, 2, 5, 8])
def test_a_killed_pull_goes_on_with_what_it_has(reads: int, source: str, target: Path) -> None:
    killed(source, target, reads)
    assert not target.exists() and part_of(target).exists()
    pieces = [(name, begin) for name, data in FILES.items() for begin in range(0, len(data), CHUNK)]
    with failing() as asked:
        pull(source, target)
    assert sorted(asked[1:]) == sorted(pieces[reads - 1 :])  # not one byte twice
    assert_pulled(target)
