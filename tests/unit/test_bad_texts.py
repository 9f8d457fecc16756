"""Texts that are malformed, hostile, or too short."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pyarrow.parquet
import pytest
from desk import LENGTH, Desk
from mistakes import Bad, check, table

# --- texts ---


def text(
    file: str, data: bytes | None, key: str, problem: str, fix: str, value: str = ""
) -> list[Bad]:
    """A file as the text of calibration, and as the held-out text."""

    def make(section: str) -> Callable[[Desk], list[str]]:
        def spoil(desk: Desk) -> list[str]:
            if data is not None:
                (desk.folder / file).write_bytes(data)
            calibration = desk.recipe()["calibration"]
            if section == "calibration":
                return ["compress", desk.write(calibration=calibration | {"data": file})]
            return ["compress", desk.write(evaluation={"a": {"data": file}})]

        return spoil

    return [
        Bad(f"{section}-{file}", make(section), f"{section}.{key}", value or file, problem, fix)
        for section in ("calibration", "evaluation.a")
    ]


def parquet(values: list[object]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), sink)
    return sink.getvalue().to_pybytes()


PARQUET, NUMBERS = parquet(["w5 w6 w7"] * 99), parquet([5])
SHORT = {"problem": "the text has . tokens", "fix": "more text", "value": str(LENGTH)}
TEXTS = [
    *text("no.txt", None, "data", "no such file", "path or glob"),
    *text("empty.txt", b"", "length", **SHORT),
    *text("short.txt", b"w5 w6 w7", "length", **SHORT),
    *text("binary.txt", bytes(range(256)) * 9, "data", "not UTF-8", "convert it to UTF-8"),
    *text("latin.txt", "w5 é ".encode("latin-1") * 99, "data", "not UTF-8", "convert it to UTF-8"),
    *text(
        "broken.jsonl",
        b'{"text": "w5 w6"}\n{"text": "w7\n',
        "data",
        "line 2 is not JSON",
        "one JSON object a line",
    ),
    *text(
        "array.jsonl",
        b'["w5 w6"]\n',
        "data",
        "line 1 is not a JSON object",
        "one JSON object a line",
    ),
    *text(
        "body.jsonl",
        b'{"body": "w5 w6"}\n',
        "column",
        "line 1 of .* no such column",
        r"\['body'\]",
        "'text'",
    ),
    *text(
        "number.jsonl",
        b'{"text": 5}\n',
        "column",
        "line 1 of .* no text there but 5",
        "column of text",
        "'text'",
    ),
    *text("deep.jsonl", b"[" * 100_000, "data", "line 1 is not JSON", "one JSON object a line"),
    *text(
        "digits.jsonl",
        b'{"text": ' + b"9" * 5000 + b"}",
        "data",
        "line 1 is not JSON",
        "one JSON object a line",
    ),
    *text("characters.jsonl", b'{"text": "\\ud800"}\n', "data", "not UTF-8", "convert it to UTF-8"),
    *text("no.txt.gz", b"no gzip", "data", "cannot be read .*gzip", "the file"),
    *text("cut.txt.gz", gzip.compress(b"w5 w6 " * 9999)[:50], "data", "cannot be read", "the file"),
    *text("no.txt.xz", b"no xz", "data", "cannot be read .*not supported by decoder", "the file"),
    *text("no.txt.bz2", b"no bzip2", "data", "cannot be read .*nvalid data", "the file"),
    *text("no.txt.zip", b"no zip", "data", "an archive", "unpack it"),
    *text("cut.parquet", PARQUET[:-9], "data", "cannot be read", "the file"),
    *text(
        "broken.parquet",
        PARQUET[:40] + b"\xff" * 40 + PARQUET[80:],
        "data",
        "cannot be read|not UTF-8",
        "",
    ),
    *text(
        "numbers.parquet",
        NUMBERS,
        "column",
        "row 1 of .* no text there but 5",
        "column of text",
        "'text'",
    ),
    *text("loop.txt", None, "data", "no such file|cannot be read", ""),
    *text("device.txt", None, "data", "no such file", "path or glob"),
    *text("closed.txt", None, "data", "cannot be read .*ermission", "permissions"),
    *text("~nobody-here/a.txt", None, "data", "no such file", "path or glob"),
    *text("long" * 2000 + ".txt", None, "data", "cannot be read|no such file", "", "longlong"),
    *text("garbage.parquet", b"PAR1garbagePAR1", "data", "cannot be read", "the file"),
    *text("some-lab/no-such-text", None, "data", "neither a file here nor a dataset", "network"),
]


@table(TEXTS)
def test_texts(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "loop.txt").symlink_to("loop.txt")
    (desk.folder / "device.txt").symlink_to("/dev/zero")
    (desk.folder / "closed.txt").touch(mode=0)
    check(bad, desk, weight_reads, capsys)
