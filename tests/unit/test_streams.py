"""Files read and written from end to end, by several threads: the same bytes, whatever happens."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusegpt_ray.store import storage
from fusegpt_ray.store.local import UNFINISHED
from fusegpt_ray.store.threads import at_once, one_ahead

STEP = 1000


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STEP", STEP)


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("size", [0, 1, STEP - 1, STEP, STEP + 1, 2 * STEP, 7 * STEP + 3])
def test_a_stream_is_the_file(where: str, size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    uri = str(tmp_path / "file") if where == "local" else f"memory://{tmp_path.name}/file"
    storage.write(uri, data)
    parts = [bytes(part) for part in storage.stream(uri)]
    assert b"".join(parts) == data
    assert all(len(part) == STEP for part in parts[:-1])
    assert storage.sha256(uri) == hashlib.sha256(data).hexdigest()
    storage.download(uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data


def test_a_step_stays_while_the_next_one_is_read(tmp_path: Path) -> None:
    data = os.urandom(5 * STEP)
    (tmp_path / "file").write_bytes(data)
    for number, part in enumerate(storage.stream(str(tmp_path / "file"))):
        time.sleep(0.02)  # the other thread has read the next one by now
        assert part == data[number * STEP : (number + 1) * STEP]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(9 * STEP))
    with pytest.raises(OSError, match=r"ended early: \d+ of 9000 bytes"):  # noqa: PT012
        for _ in storage.stream(str(tmp_path / "file")):
            os.truncate(tmp_path / "file", 3 * STEP + 7)


# --- writing ---


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder/file"
    for data in (b"first", b"second, longer"):
        before = path.read_bytes() if path.exists() else None
        with storage.writing(str(path)) as file:
            file.write(data)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == data
    assert [*path.parent.iterdir()] == [path]


def test_what_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"there")
    with pytest.raises(ZeroDivisionError), storage.writing(str(path)) as file:  # noqa: PT012
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"there" and [*tmp_path.iterdir()] == [path]


def test_readers_find_a_whole_file_while_many_write_the_same(tmp_path: Path) -> None:
    """As where a lost replica was not dead after all."""
    path, data = tmp_path / "file", os.urandom(20 * STEP)
    path.write_bytes(data)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with storage.writing(str(path)) as file:
                for begin in range(0, len(data), STEP):
                    file.write(data[begin : begin + STEP])

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    expected = hashlib.sha256(data).hexdigest()
    found = {storage.sha256(str(path)) for _ in range(100)}
    stop.set()
    for writer in writers:
        writer.join()
    assert found == {expected} and [*tmp_path.iterdir()] == [path]


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom fusegpt_ray.store import storage\n"
        "with storage.writing(sys.argv[1]) as file:\n"
        "    file.write(bytes(100)); file.flush(); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert UNFINISHED.fullmatch(left.name) and left.stat().st_size == 100


# --- threads ---


def test_one_is_loaded_while_another_is_used() -> None:
    loading = threading.Event()

    def load(number: int) -> int:
        if number == 1:
            loading.set()
        return 10 * number

    for number, loaded in enumerate(one_ahead(load, range(3))):
        assert loaded == 10 * number
        assert loading.wait(timeout=60), "1 is loaded before 0 was given back"


def test_only_one_is_loaded_ahead_and_none_after_a_failure() -> None:
    asked: list[int] = []

    def load(number: int) -> int:
        asked.append(number)
        return 1 // (2 - number)

    loaded: Iterator[int] = one_ahead(load, range(9))
    assert [next(loaded), next(loaded)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(loaded)
    assert asked == [0, 1, 2]


def test_several_at_once_in_order() -> None:
    together = threading.Barrier(3, timeout=60)

    def work(number: int) -> int:
        together.wait()
        return -number

    assert list(at_once(work, range(6), threads=3)) == [0, -1, -2, -3, -4, -5]
