"""The rows of a table of text, one by one, whatever its format; only one is held (of Parquet and
Arrow, a batch of them).

Every row must be text: one without, or with fewer fields than the header, is a mistake and not a
blank line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from fsspec.compression import compr
from fsspec.utils import infer_compression

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.store import hub_client, storage
from fusegpt_ray.text.formats import Source, beside, check_column, codec, one_of
from fusegpt_ray.text.json_array import CHUNK, array_items

ROW = 1 << 26
"""Characters of the longest row, and of the longest line of JSON Lines, which is held as one."""


Object = tuple[str, dict[str, Any]]
"""What to call a row, and all its columns."""


class Row(NamedTuple):
    where: str
    """Such as "line 5"."""
    columns: Sequence[str]
    value: object
    """What the recipe's column holds."""


def values(source: Source) -> Iterator[Row]:
    """The rows of a table, in order.

    Raises:
        UserError: it cannot be read, or the column is missing.
    """
    yield from _READERS[source.format](source)


def rows(source: Source) -> Iterator[str]:
    """The texts of a table, in order.

    Raises:
        UserError: the column is missing, a row has no text in it, or none has any but white space.
    """
    row, blank = None, True
    for row in values(source):
        if not isinstance(row.value, str):
            problem = f"{row.where} of {source.uri} has no text there but {row.value!r:.80}"
            fix = "name a column of text, or remove the row"
            if isinstance(row.value, list):
                fix = "set calibration.pack: false for conversations, or name a column of text"
            raise UserError(beside(source.key, "column"), source.text.column, problem, fix)
        if len(row.value) > ROW:
            fix = "divide it into several rows, or give plain text, whose lines may have any length"
            problem = f"{row.where} has more than {ROW} characters"
            raise UserError(source.key, source.uri, problem, fix)
        blank = blank and not row.value.strip()
        yield row.value
    if row and blank:
        problem = f"every row of {source.uri} is empty there"
        key, others = beside(source.key, "column"), [*row.columns]
        others.remove(source.text.column)
        fix = one_of(others) if others else "give a text with words in it"
        raise UserError(key, source.text.column, problem, fix)


def objects(source: Source) -> Iterator[Object]:
    """Whole rows, in order, each with what to call it; the recipe's column plays no part.

    Raises:
        UserError: it cannot be read, or is of a format whose cells are text alone.
    """
    if source.format not in _OBJECTS:
        problem = "no conversations with images are read from such a file"
        raise UserError(source.key, source.uri, problem, "give JSON Lines, JSON or Parquet")
    yield from _OBJECTS[source.format](source)


@contextmanager
def opened(source: Source) -> Iterator[io.TextIOWrapper]:
    """A file's text, decompressed, without the mark that some programs write before UTF-8."""
    with storage.reading(source.uri) as raw:
        # newline="\n": lines end there only, and "\r\n" stays as it is.
        yield io.TextIOWrapper(_decompressed(raw, source.uri), encoding="utf-8-sig", newline="\n")


def _decompressed(raw: BinaryIO, uri: str) -> Any:
    """All of it, also where a file is several compressed ones in a row; fsspec's own reader of
    Zstandard may end after the first.
    """
    if codec(uri) == "zst":
        import pyarrow

        return pyarrow.CompressedInputStream(raw, "zstd")
    name = infer_compression(uri) if codec(uri) else None
    return compr[name](raw, mode="rb") if name else raw


def _row(source: Source, where: str, record: dict[str, Any]) -> Row:
    check_column(source, f"{where} of {source.uri}", record)
    return Row(where, list(record), record[source.text.column])


def _of_column(objects: Callable[[Source], Iterator[Object]]) -> Callable[[Source], Iterator[Row]]:
    return lambda source: (_row(source, *found) for found in objects(source))


def _json_lines(source: Source) -> Iterator[Object]:
    with opened(source) as file:
        for where, line in lines(file, source):
            if line.strip():
                yield where, _json_object(_parsed(line, where, source), where, source)


def _json(source: Source) -> Iterator[Object]:
    """JSON Lines; or one array of objects."""
    with opened(source) as file:
        begun = ""
        while not begun and (chunk := file.read(CHUNK)):
            begun = chunk.lstrip()
        if not begun.startswith("["):
            yield from _json_lines(source)
            return
        try:
            for number, value in enumerate(array_items(begun, file.read, storage.SMALL), 1):
                where = f"item {number}"
                yield where, _json_object(value, where, source)
        except (UserError, UnicodeDecodeError):
            raise
        except (ValueError, RecursionError) as error:
            problem = f"the array is not JSON ({str(error)[:200]})"
            raise UserError(source.key, source.uri, problem, _JSON) from error


def _parsed(text: str, where: str, source: Source) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"{where} is not JSON ({str(error)[:200]})"
        raise UserError(source.key, source.uri, problem, _JSON) from error


def _json_object(value: Any, where: str, source: Source) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(source.key, source.uri, f"{where} is not a JSON object", _JSON)
    return value


_JSON = "write one JSON object a line (JSON Lines)"


def _separated(source: Source) -> Iterator[Row]:
    """CSV or TSV with a header. A cell is the text that it is, also where it is empty or says NA:
    `datasets` takes these for missing.
    """
    csv.field_size_limit(ROW)
    with opened(source) as file:
        texts = (line for _, line in lines(file, source))
        cells = csv.reader(texts, strict=True, delimiter="\t" if source.format == "tsv" else ",")
        try:
            yield from _under_header(source, ((cells.line_num, row) for row in cells if row))
        except csv.Error as error:
            problem = f"line {cells.line_num} is not {source.format.upper()} ({error})"
            fix = 'close the quotes, and double those inside of quotes, as "a ""b"" c"'
            raise UserError(source.key, source.uri, problem, fix) from error


def _under_header(source: Source, table: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    """The rows below the first, with the number of the line at which each ends."""
    _, header = next(table, (0, None))
    if header is None:
        return
    check_column(source, source.uri, header)
    at = header.index(source.text.column)
    for number, row in table:
        if len(row) != len(header):
            problem = f"line {number} has {len(row)} fields, the header {len(header)}"
            fix = 'quote fields that hold the separator, as "a, b"'
            raise UserError(source.key, source.uri, problem, fix)
        yield Row(f"line {number}", header, row[at])


def lines(file: io.TextIOWrapper, source: Source) -> Iterator[tuple[str, str]]:
    """Each line and what to call it."""
    number = 0
    while line := file.readline(ROW + 1):
        number += 1
        if len(line) > ROW:
            problem = f"line {number} has more than {ROW} characters"
            fix = "write one text a line, or give plain text, whose lines may have any length"
            raise UserError(source.key, source.uri, problem, fix)
        check_is_text(line, source)
        yield f"line {number}", line


def check_is_text(line: str, source: Source) -> None:
    """
    Raises:
        UserError: there is a NUL in it.
    """
    if "\0" in line:
        problem = "not text: it holds NUL bytes, as archives and other binary files do"
        raise UserError(source.key, source.uri, problem, "give files of text, in UTF-8")


def _parquet(source: Source) -> Iterator[Row]:
    import pyarrow.parquet

    with storage.reading(source.uri) as raw:
        table = pyarrow.parquet.ParquetFile(_decompressed(raw, source.uri))
        names = table.schema_arrow.names
        check_column(source, source.uri, names)
        # Few rows at once: a page may hold a long text once, and say that all its rows are this
        # text.
        batches = table.iter_batches(batch_size=8, columns=[source.text.column])
        yield from _numbered(
            (value.as_py() for batch in batches for value in batch.column(0)), names
        )


def _parquet_objects(source: Source) -> Iterator[Object]:
    import pyarrow.parquet

    with storage.reading(source.uri) as raw:
        table = pyarrow.parquet.ParquetFile(_decompressed(raw, source.uri))
        batches = table.iter_batches(batch_size=8)  # as in `_parquet`
        found = (record for batch in batches for record in batch.to_pylist())
        yield from ((f"row {number}", record) for number, record in enumerate(found, 1))


def _arrow(source: Source) -> Iterator[Row]:
    """Of either kind: a stream, as `datasets` writes it, or a file."""
    import pyarrow

    with storage.reading(source.uri) as raw:
        file = _decompressed(raw, source.uri)
        try:
            table = pyarrow.ipc.open_stream(file)
            batches = iter(table)
        except (OSError, pyarrow.ArrowInvalid):
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        check_column(source, source.uri, table.schema.names)

        def values() -> Iterator[object]:
            for batch in batches:
                batch.validate(full=True)
                yield from (value.as_py() for value in batch.column(source.text.column))

        yield from _numbered(values(), table.schema.names)


def _dataset(source: Source) -> Iterator[Row]:
    dataset = _loaded(source)
    names = dataset.column_names
    check_column(source, source.uri, names)
    column = dataset.select_columns([source.text.column])
    yield from _numbered((record[source.text.column] for record in column), names)


def _dataset_objects(source: Source) -> Iterator[Object]:
    # As Arrow has them: `datasets` itself would open the images.
    batches = _loaded(source).with_format("arrow").iter(batch_size=8)
    found = (record for batch in batches for record in batch.to_pylist())
    yield from ((f"row {number}", record) for number, record in enumerate(found, 1))


def _loaded(source: Source) -> Any:
    import datasets

    text = source.text
    with loading(source):
        options = {"split": text.split, "revision": text.revision}
        return datasets.load_dataset(source.uri, text.config, **options)


def _numbered(values: Iterable[object], columns: Sequence[str]) -> Iterator[Row]:
    return (Row(f"row {number}", columns, value) for number, value in enumerate(values, 1))


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """
    Raises:
        UserError: whatever `datasets` says of the files, folder or id.
    """
    import datasets

    hub_client.patient()
    problem = "neither a file here nor a dataset that loads"
    fix = "check the path, or the id, config, split, revision and network"
    with reading_users_file(source.key, source.uri, problem, fix):
        try:
            yield
        except datasets.exceptions.DatasetGenerationError as error:  # its cause says what failed
            raise cast(Exception, error.__cause__ or error) from None


_OBJECTS = {
    "jsonl": _json_lines,
    "json": _json,
    "parquet": _parquet_objects,
    "datasets": _dataset_objects,
}
_READERS = {
    "jsonl": _of_column(_json_lines),
    "json": _of_column(_json),
    "csv": _separated,
    "tsv": _separated,
    "parquet": _parquet,
    "arrow": _arrow,
    "datasets": _dataset,
}
