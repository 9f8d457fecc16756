"""Files and datasets of text, read as a stream of pieces; a user's mistakes in them explained.

Notable:
- a text file is one row; the rows of a file are joined by a blank line, as the paper's code joins WikiText-2;
- pieces depend on the text and `piece_bytes` only, so one process and a cluster (`distributed/data.py`) agree;
- `key` is everywhere the recipe key of the data, such as `calibration.data`, for the messages.
"""

from __future__ import annotations

import glob
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.store.patience import Trouble, cleaned, patiently, trouble

ROW = 1 << 26
"""Characters of the longest row, and of the longest line of JSON Lines: it is held, and parsed, as one."""
Format = Literal["text", "jsonl", "parquet", "datasets"]

_FORMATS: dict[str, Format] = {"jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}  # any other suffix: text
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_NAME = re.compile(r"\.(txt|md|jsonl?|parquet)(\.\w+)?$")
# Raised when the file is at fault, or its protocol lacks a package; a network that fails is no mistake and passes.
_BAD_FILE = (OSError, ValueError, ImportError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Source:
    """One file, or one `datasets` split: what a single reader reads from its beginning to its end. Picklable."""

    uri: str
    """fsspec URI of a file; or the id or local folder that `datasets.load_dataset` takes."""
    format: Format
    text: Text
    """The recipe's section: column, and for `datasets` config, split and revision."""
    key: str


def sources(text: Text, key: str) -> list[Source]:
    """The files, in the order of their names, or the dataset that `text.data` means.

    A file, a glob or a local folder wins over a dataset of that name; a local folder is read as `load_dataset(folder)`
    reads it. Of files only the beginning of the first is read, of a dataset only its description.

    Raises:
        UserError: nothing is there, or what is there cannot be read or has no such column, configuration or split.
    """
    data = text.data
    with _explained(key, data):
        fs, path = storage.filesystem(data)
        if patiently(data, lambda: fs.isdir(path)):
            if not isinstance(fs, LocalFileSystem):
                raise UserError(key, data, "is a folder", f"give its files, such as {data.rstrip('/')}/*.parquet")
            if glob.escape(path) != path:
                problem = "a folder whose name `datasets` would take for a pattern, and read others"
                raise UserError(key, data, problem, "rename the folder, or give one of its files")
            return [_dataset(path, text, key)]
        # A name with brackets is a glob only if there is no file of that name.
        entries = patiently(data, lambda: {path: fs.info(path)} if fs.isfile(path) else fs.glob(path, detail=True))
    paths = sorted(name for name, entry in entries.items() if entry["type"] == "file")
    if not paths and _DATASET_ID.fullmatch(data) and not _FILE_NAME.search(data):
        return [_dataset(data, text, key)]
    if not paths:
        raise UserError(key, data, "no such file", "give the path or glob of your text files, or a dataset's id")
    found = [Source(fs.unstrip_protocol(name), _format(name), text, key) for name in paths]
    next(pieces(found[0], 1 << 16), None)
    return found


def pieces(source: Source, piece_bytes: int) -> Iterator[str]:
    """The source's rows joined by blank lines, in pieces of at most `piece_bytes` (of UTF-8) that concatenate to it.

    Pieces end where rows end; in a row larger than `piece_bytes` (a text file is one) where lines end; in a line larger
    than that between any two characters. Only the present piece and row are held.

    Raises:
        UserError: the source is missing, damaged or not UTF-8, or a row has no text in the column.
    """
    held: list[str] = []
    size = 0
    with _explained(source.key, source.uri):
        for atom in _atoms(source, piece_bytes):
            atom_size = len(atom.encode())
            if size and size + atom_size > piece_bytes:
                yield "".join(held)
                held, size = [], 0
            held.append(atom)
            size += atom_size
        if size:
            yield "".join(held)


def _atoms(source: Source, limit: int) -> Iterator[str]:
    """The joined text in strings that a piece must not cut: whole rows or lines, of at most `limit` bytes each."""
    if source.format == "text":
        with _opened(source) as file:
            # `limit`: a file need not have line ends.
            while line := file.readline(limit):
                yield from _fitting(line, limit)
    else:
        for number, row in enumerate(_rows(source)):
            yield from _fitting("\n\n" + row if number else row, limit)


def _fitting(text: str, limit: int) -> Iterator[str]:
    if len(text.encode()) <= limit:
        yield text
        return
    for line in io.StringIO(text, newline="\n"):
        # A character takes at most four bytes.
        step = len(line) if len(line.encode()) <= limit else max(1, limit // 4)
        yield from (line[start : start + step] for start in range(0, len(line), step))


def _format(path: str) -> Format:
    name = path.rpartition(".")[0] if infer_compression(path) else path
    return _FORMATS.get(name.rpartition(".")[2].lower(), "text")


@contextmanager
def _opened(source: Source) -> Iterator[io.TextIOWrapper]:
    with storage.reading(source.uri) as file:
        # newline="\n": lines end there only, and "\r\n" stays as it is.
        yield io.TextIOWrapper(file, encoding="utf-8", newline="\n")


def _rows(source: Source) -> Iterator[str]:
    column = source.text.column
    unit = "line" if source.format == "jsonl" else "row"
    for number, record in _records(source):
        where = f"{unit} {number} of {source.uri}"
        _check_column(source, where, record)
        if not isinstance(record[column], str):
            problem = f"{where} has no text there but {record[column]!r:.80}"
            raise UserError(beside(source.key, "column"), column, problem, "name a column of text, or remove the row")
        if len(record[column]) > ROW:
            fix = "divide it into several rows, or give plain text, whose lines may have any length"
            raise UserError(source.key, source.uri, f"{where} has more than {ROW} characters", fix)
        yield record[column]


def _records(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number, from 1: of the line in JSON Lines, else of the row."""
    text = source.text
    if source.format == "jsonl":
        with _opened(source) as file:
            yield from ((n, _json_object(line, n, source)) for n, line in _lines(file, source) if line.strip())
    elif source.format == "parquet":
        import pyarrow.parquet

        with storage.reading(source.uri) as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            _check_column(source, source.uri, parquet.schema_arrow.names)
            # Few rows at once: a page may hold a long text only once, and say that all its rows are this text.
            batches = parquet.iter_batches(batch_size=8, columns=[text.column])
            yield from enumerate(({text.column: value.as_py()} for batch in batches for value in batch.column(0)), 1)
    else:
        import datasets

        with _loading(source):
            dataset = datasets.load_dataset(source.uri, text.config, split=text.split, revision=text.revision)
        _check_column(source, source.uri, dataset.column_names)
        yield from enumerate(dataset.select_columns([text.column]), 1)


def _lines(file: io.TextIOWrapper, source: Source) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(ROW + 1):
        number += 1
        if len(line) > ROW:
            fix = "write one text a line (JSON Lines), or give plain text, whose lines may have any length"
            raise UserError(source.key, source.uri, f"line {number} has more than {ROW} characters", fix)
        yield number, line


def _json_object(line: str, number: int, source: Source) -> dict[str, Any]:
    fix = "write one JSON object a line (JSON Lines)"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"line {number} is not JSON ({str(error)[:200]})"
        raise UserError(source.key, source.uri, problem, fix) from error
    if not isinstance(value, dict):
        raise UserError(source.key, source.uri, f"line {number} is not a JSON object", fix)
    return value


def _dataset(uri: str, text: Text, key: str) -> Source:
    """The source for `load_dataset`, checked against what the dataset says of itself; its data are not read yet."""
    import datasets

    source = Source(uri, "datasets", text, key)
    with _loading(source):
        builder = datasets.load_dataset_builder(uri, text.config, revision=text.revision)
    if builder.name == "text":
        # load_dataset makes every line a row, and joining rows would double the line ends.
        raise UserError(key, uri, "a folder of plain text", f"give the files, such as {uri.rstrip('/')}/*.txt")
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
    wanted = {part.partition("[")[0].strip() for part in text.split.split("+")}  # "train[:10%]+test" is a split, too
    if splits and not wanted <= {*splits, "all"}:
        raise UserError(beside(key, "split"), text.split, f"{uri} has no such split", f"use one of {splits}")
    if builder.info.features:
        _check_column(source, uri, builder.info.features)
    return source


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        problem = f"neither a file here nor a dataset that loads ({reason[:300]})"
        fix = "check the path, or the id, config, split, revision and network"
        raise UserError(source.key, source.uri, problem, fix) from error


@contextmanager
def _explained(key: str, value: str) -> Iterator[None]:
    """Makes what a reader says of a bad file a UserError."""
    try:
        yield
    except UserError:
        raise
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        problem = f"not UTF-8 text ({error.reason})"
        raise UserError(key, value, problem, "convert it to UTF-8, or to JSONL or Parquet") from error
    except Exception as error:
        found = error if isinstance(error, StorageError) else trouble(error)
        if found and found.fix:
            raise UserError(key, value, f"cannot be read ({found.problem})", found.fix) from error
        if isinstance(found, Trouble):
            raise StorageError(cleaned(value), found.problem) from error
        if isinstance(error, StorageError) or not isinstance(error, _BAD_FILE):
            raise
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(key, value, problem, "check the path, the permissions and the file") from error


def _check_column(source: Source, where: str, columns: Iterable[str]) -> None:
    columns, column = list(columns), source.text.column
    if column not in columns:
        fix = f"use one of {columns}"
        raise UserError(beside(source.key, "column"), column, f"{where} has no such column", fix)


def beside(key: str, name: str) -> str:
    """Another key of the same section: ("calibration.data", "column") → "calibration.column"."""
    return f"{key.rpartition('.')[0]}.{name}"
