"""A table of mistakes: each gets one clear message, exit code 2, before any weights are read and
before anything is written."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from fusegpt_ray.cli import main

MESSAGE = re.compile(
    r"error: (?P<key>[^=]+?) = (?P<value>.+?): (?P<problem>.+)\. Fix: (?P<fix>.+)\.", re.DOTALL
)
STAGES = r"starting the local engine|one process on cpu, \w+|tokenising|checking the model's files"
STAGES += r"|calibration: \d+ windows of [^\n]*|at most \S+ .FLOP \([^\n]*\); [^\n]*"
PROGRESS = re.compile(rf"[^\n]*: \d+ blocks, \d+ to (?:remove|add) \([^\n]*\)|{STAGES}")
"""What may stand before the message: a text is read with the model's tokenizer, after its
configuration has been found good."""


def header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder: what each file holds (of one too large to read, when it was
    written), where each link points."""

    def held(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        if path.is_dir():
            return None
        info = path.lstat()
        return (
            path.read_bytes()
            if info.st_size < 100_000_000 and info.st_mode & 0o400
            else (info.st_size, info.st_mtime_ns)
        )

    return {str(path.relative_to(folder)): held(path) for path in folder.rglob("*")}


@dataclass(frozen=True)
class Bad:
    """A mistake, and what the message must say of it: the key, part of the value, patterns of the
    problem and the fix."""

    name: str
    make: Callable[[Desk], Sequence[str] | None]
    """Make the mistake; returns what follows `fusegpt` on the command line, or None for `compress`
    and the desk's recipe."""
    key: str
    value: str
    problem: str
    fix: str


@contextmanager
def unprivileged() -> Iterator[None]:
    """This thread may do no more than the files' own permissions allow, not even as root."""

    class Capabilities(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (Capabilities * 2)()
    assert libc.capget(header, held) == 0
    before = held[0].effective
    held[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, held) == 0
    try:
        yield
    finally:
        held[0].effective = before
        assert libc.capset(header, held) == 0


def check(bad: Bad, desk: Desk, reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = bad.make(desk) or ["compress", desk.write()]
    before = tree(desk.folder)
    reads.clear()
    capsys.readouterr()
    with unprivileged():
        code = main(arguments)
    stdout, stderr = capsys.readouterr()

    lines = stderr.splitlines()
    first = next((n for n, line in enumerate(lines) if not PROGRESS.fullmatch(line)), len(lines))
    message = MESSAGE.fullmatch("\n".join(lines[first:]))
    assert code == 2 and message, stderr
    assert message["key"] == bad.key, stderr
    assert bad.value in message["value"]
    assert re.search(bad.problem, message["problem"])
    assert re.search(bad.fix, message["fix"])
    assert stdout == "" and "Traceback" not in stderr and stderr.count("error: ") == 1
    assert tree(desk.folder) == before
    assert reads == []


def table(cases: Sequence[Bad]) -> pytest.MarkDecorator:
    assert len({bad.name for bad in cases}) == len(cases)
    return pytest.mark.parametrize("bad", cases, ids=[bad.name for bad in cases])


def edit(desk: Desk, file: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of the model."""
    path = desk.model / file
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))
