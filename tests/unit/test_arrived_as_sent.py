"""A store that does not keep what it is given is found out before the manifest is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from desk import Desk
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from fusegpt_ray.cli import main
from fusegpt_ray.store.checkpoint import SINGLE


class Mischief(DirFileSystem):
    """A folder of this machine in which some files arrive otherwise than they were sent."""

    protocol = "mischief"
    cachable = False
    spoil: ClassVar[dict[str, Callable[[Path], None]]] = {}
    """By what a file's path ends with: what happens to it when it is written for the first time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super().open(path, mode, **options)
        return _Spoiling(file, Path("/" + path.lstrip("/"))) if "w" in mode else file

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        with self.open(path, "wb") as file:
            file.write(value)


class _Spoiling:
    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Spoiling:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        for end, spoil in list(Mischief.spoil.items()):
            if str(self.path).endswith(end):
                del Mischief.spoil[end]
                spoil(self.path)


@pytest.fixture
def mischief() -> Iterator[dict[str, Callable[[Path], None]]]:
    fsspec.register_implementation("mischief", Mischief, clobber=True)
    Mischief.spoil.clear()
    yield Mischief.spoil
    Mischief.spoil.clear()


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def lose_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


SPOILED = {
    "a-flipped-bit": (SINGLE, flip_last_bit, "another checksum"),
    "a-lost-end": (SINGLE, lose_the_end, "bytes in the store"),
    "half-a-file": (SINGLE, lose_half, "bytes in the store"),
    "an-empty-file": ("config.json", empty, "0 bytes in the store"),
    "a-flipped-bit-in-json": ("config.json", flip_last_bit, "another checksum"),
    "a-flipped-bit-in-the-tokenizer": ("tokenizer.json", flip_last_bit, "another checksum"),
    "a-flipped-bit-in-the-card": ("README.md", flip_last_bit, "another checksum"),
    "a-lost-file": (SINGLE, Path.unlink, SINGLE),
}


@pytest.mark.parametrize(("name", "spoil", "problem"), SPOILED.values(), ids=SPOILED)
def test_what_did_not_arrive_as_sent_fails_the_run(
    name: str,
    spoil: Callable[[Path], None],
    problem: str,
    mischief: dict[str, Callable[[Path], None]],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk.make(tmp_path, checkpoint("llama"))
    command = [
        "compress",
        desk.write(method="mi", output={"uri": f"mischief://{desk.out}", "name": "demo"}),
    ]
    mischief[f"demo-p40/{name}"] = spoil
    assert main(command) == 1
    assert mischief == {}, "nothing was spoiled"
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and f"demo-p40/{name}" in failed[0] and problem in failed[0]
    assert not list(desk.out.glob("*/fusegpt.json"))

    assert main(command) == 0
    assert len(list(desk.out.glob("*/fusegpt.json"))) == 1
