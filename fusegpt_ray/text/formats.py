"""What a file of text is, by its name: suffixes that `datasets` reads as text or tables of it only.

A name that says nothing is refused, as is an archive: read as plain text, either would be a corpus
of syntax, headers or numbers, and no error. What the suffixes mean is what `datasets` takes them
for (a test compares the two), except that more files count as plain text, Markdown among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "datasets"]
FORMATS: dict[str, Format] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "jsonlines": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "geoparquet": "parquet",
    "gpq": "parquet",
    "arrow": "arrow",
}
"""By suffix, in lower case; `json`: JSON Lines, or one array of objects."""
PROSE = {"", "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "log", "raw", "tokens"}
CODE = {"py", "c", "h", "cc", "cpp", "hpp", "java", "js", "ts", "go", "rs", "rb", "php", "cs", "sh"}
PLAIN = PROSE | CODE
"""Suffixes of plain text; a language model of code is calibrated on code."""
CODECS = {"gz", "bz2", "xz", "lzma", "zst"}
"""Of one compressed file; what is left of its name says what it is."""
ARCHIVES = {"zip", "tar", "tgz", "tbz", "tbz2", "txz", "tzst", "7z", "rar"}


@dataclass(frozen=True)
class Source:
    """One file, or one `datasets` split: what one reader reads from its beginning to its end."""

    uri: str
    """fsspec URI of a file; or the id or local folder that `datasets.load_dataset` takes."""
    format: Format
    text: Text
    """The recipe's section: column, and for `datasets` config, split and revision."""
    key: str


def codec(path: str) -> str | None:
    """How the file is compressed, by its name."""
    suffix = _suffix(path)
    return suffix if suffix in CODECS else None


def named_format(path: str) -> Format | None:
    """What the file's name says that it holds; None where it says nothing, or an archive."""
    suffix = _suffix(_inner(path))
    return "text" if suffix in PLAIN else FORMATS.get(suffix)


def names_a_file(path: str) -> bool:
    """Whether the name ends as a file's does, not as that of a dataset."""
    return _suffix(path) in (FORMATS.keys() | PLAIN | CODECS | ARCHIVES) - {""}


def file_format(uri: str, key: str) -> Format:
    """
    Raises:
        UserError: an archive, or a name that says nothing of what the file holds.
    """
    if found := named_format(uri):
        return found
    suffix = _suffix(_inner(uri))
    if suffix in ARCHIVES:
        problem = "an archive, which may hold several files and other things than text"
        raise UserError(
            key, uri, problem, "unpack it and give its files of text, such as corpus/*.txt"
        )
    fix = (
        "convert it to text, JSON Lines, CSV, Parquet or Arrow, or name it .txt if it is plain text"
    )
    raise UserError(key, uri, f"no text is read from files of the kind .{suffix}", fix)


def check_column(source: Source, where: str, columns: Iterable[str]) -> None:
    """
    Raises:
        UserError: the recipe's column is not among them.
    """
    if source.text.column not in (columns := list(columns)):
        key = beside(source.key, "column")
        raise UserError(key, source.text.column, f"{where} has no such column", one_of(columns))


def one_of(columns: Iterable[str]) -> str:
    """The fix that names the columns there are, cut short: a file without a header has text
    there.
    """
    return f"use one of {[str(name)[:60] for name in columns][:20]}"


def beside(key: str, name: str) -> str:
    """Another key of the same section: ("calibration.data", "column") → "calibration.column". A
    text in a list is a section of its own: "calibration.data.1" → "calibration.data.1.column".
    """
    return f"{key if of_all(key) != key else key.rpartition('.')[0]}.{name}"


def of_all(key: str) -> str:
    """The key of the whole list that a text stands in: "calibration.data.1" → "calibration.data".
    That of a text in no list is its own.
    """
    return re.sub(r"(?<=\.data)\.\d+$", "", key)


def _suffix(path: str) -> str:
    _, dot, suffix = path.rsplit("/", 1)[-1].rpartition(".")
    return suffix.lower() if dot else ""


def _inner(path: str) -> str:
    return path.rpartition(".")[0] if codec(path) else path
