"""Texts that are malformed, hostile, or too short."""

from __future__ import annotations

import gzip
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import pytest
from desk import LENGTH, Desk
from mistakes import MESSAGE, Bad, check, table, unprivileged

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.corpus import pieces, sources


@dataclass(frozen=True)
class BadText:
    """A file that is no good text, and what is said of it."""

    file: str
    data: bytes | None
    """What to write into it; None where the test's folder has it, or has no such file."""
    key: str
    """The key that the message names, within its section of the recipe."""
    problem: str
    fix: str
    value: str = ""

    def write(self, folder: Path) -> None:
        if self.data is not None:
            (folder / self.file).write_bytes(self.data)

    def in_section(self, section: str) -> Bad:
        """The text of calibration, or the held-out text, of a recipe for the whole command."""

        def make(desk: Desk) -> list[str]:
            self.write(desk.folder)
            if section == "calibration":
                text = desk.recipe()["calibration"] | {"data": self.file}
                return ["compress", desk.write(calibration=text)]
            return ["compress", desk.write(evaluation={"a": {"data": self.file}})]

        key, value = f"{section}.{self.key}", self.value or self.file
        return Bad(f"{section}-{self.file}", make, key, value, self.problem, self.fix)


def parquet(values: list[object]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), sink)
    return sink.getvalue().to_pybytes()


PARQUET, NUMBERS = parquet(["w5 w6 w7"] * 99), parquet([5])
SHORT = {"problem": "the text has . tokens", "fix": "more text", "value": str(LENGTH)}
TEXTS = [
    BadText("no.txt", None, "data", "no such file", "path or glob"),
    BadText("empty.txt", b"", "data", "empty", "text in it"),
    BadText("header.csv", b"text\n", "data", "empty", "text in it"),
    BadText("short.txt", b"w5 w6 w7", "length", **SHORT),
    BadText("binary.txt", bytes(range(256)) * 9, "data", "not UTF-8", "convert it to UTF-8"),
    BadText(
        "latin.txt", "w5 é ".encode("latin-1") * 99, "data", "not UTF-8", "convert it to UTF-8"
    ),
    BadText(
        "broken.jsonl",
        b'{"text": "w5 w6"}\n{"text": "w7\n',
        "data",
        "line 2 is not JSON",
        "one JSON object a line",
    ),
    BadText(
        "array.jsonl",
        b'["w5 w6"]\n',
        "data",
        "line 1 is not a JSON object",
        "one JSON object a line",
    ),
    BadText(
        "body.jsonl",
        b'{"body": "w5 w6"}\n',
        "column",
        "line 1 of .* no such column",
        r"\['body'\]",
        "'text'",
    ),
    BadText(
        "number.jsonl",
        b'{"text": 5}\n',
        "column",
        "line 1 of .* no text there but 5",
        "column of text",
        "'text'",
    ),
    BadText("deep.jsonl", b"[" * 100_000, "data", "line 1 is not JSON", "one JSON object a line"),
    BadText(
        "digits.jsonl",
        b'{"text": ' + b"9" * 5000 + b"}",
        "data",
        "line 1 is not JSON",
        "one JSON object a line",
    ),
    BadText(
        "characters.jsonl", b'{"text": "\\ud800"}\n', "data", "not UTF-8", "convert it to UTF-8"
    ),
    BadText("no.txt.gz", b"no gzip", "data", "cannot be read .*gzip", "the file"),
    BadText(
        "cut.txt.gz", gzip.compress(b"w5 w6 " * 9999)[:50], "data", "cannot be read", "the file"
    ),
    BadText("no.txt.xz", b"no xz", "data", "cannot be read .*not supported by decoder", "the file"),
    BadText("no.txt.bz2", b"no bzip2", "data", "cannot be read .*nvalid data", "the file"),
    BadText("no.txt.zip", b"no zip", "data", "an archive", "unpack it"),
    BadText("cut.parquet", PARQUET[:-9], "data", "cannot be read", "the file"),
    BadText(
        "broken.parquet",
        PARQUET[:40] + b"\xff" * 40 + PARQUET[80:],
        "data",
        "cannot be read|not UTF-8",
        "",
    ),
    BadText(
        "numbers.parquet",
        NUMBERS,
        "column",
        "row 1 of .* no text there but 5",
        "column of text",
        "'text'",
    ),
    BadText("loop.txt", None, "data", "no such file|cannot be read", ""),
    BadText("device.txt", None, "data", "no such file", "path or glob"),
    BadText("closed.txt", None, "data", "cannot be read .*ermission", "permissions"),
    BadText("~nobody-here/a.txt", None, "data", "no such file", "path or glob"),
    BadText("long" * 2000 + ".txt", None, "data", "cannot be read|no such file", "", "longlong"),
    BadText("garbage.parquet", b"PAR1garbagePAR1", "data", "cannot be read", "the file"),
    BadText("some-lab/no-such-text", None, "data", "neither a file here nor a dataset", "network"),
]


WHOLE = {
    "calibration": ["no.txt", "short.txt", "binary.txt", "body.jsonl", "cut.parquet"],
    "evaluation.a": ["empty.txt", "short.txt", "broken.jsonl", "no.txt.gz", "closed.txt"],
}
"""One or two of each kind, through the whole command."""

BY_FILE = {text.file: text for text in TEXTS}
COMMANDS = [BY_FILE[file].in_section(section) for section in WHOLE for file in WHOLE[section]]
UNREADABLE = [text for text in TEXTS if text.key != "length"]
"""Which texts are too short is known only where windows are cut: those go through the command."""


@pytest.fixture
def texts(desk: Desk) -> Path:
    """The working directory, with files that cannot be written as bytes."""
    (desk.folder / "loop.txt").symlink_to("loop.txt")
    (desk.folder / "device.txt").symlink_to("/dev/zero")
    (desk.folder / "closed.txt").touch(mode=0)
    return desk.folder


@table(COMMANDS)
def test_a_bad_text_ends_the_command_with_one_message(
    bad: Bad,
    texts: Path,
    desk: Desk,
    weight_reads: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(bad, desk, weight_reads, capsys)


def read(file: str) -> None:
    for source in sources(Text(data=file), "evaluation.a.data"):
        deque(pieces(source, 1 << 20), maxlen=0)


@pytest.mark.parametrize("bad", UNREADABLE, ids=[text.file for text in UNREADABLE])
def test_what_is_no_text_is_refused_where_it_is_read(bad: BadText, texts: Path) -> None:
    bad.write(texts)
    with unprivileged(), pytest.raises(UserError) as refused:
        read(bad.file)
    said = MESSAGE.fullmatch(f"error: {refused.value}")
    assert said, str(refused.value)
    assert said["key"] == f"evaluation.a.{bad.key}"
    assert (bad.value or bad.file) in said["value"]
    assert re.search(bad.problem, said["problem"])
    assert re.search(bad.fix, said["fix"])
