"""Files and datasets of text, read as a stream of pieces; a user's mistakes in them explained.

Notable:
- a text file is one row; the rows of a file are joined by a blank line, as the paper's code joins
  WikiText-2;
- pieces depend on the text and `piece_bytes` only, so one process and a cluster
  (`distributed/text.py`) agree;
- `key` is everywhere the recipe key of the data, such as `calibration.data`, for the messages.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from fsspec.implementations.local import LocalFileSystem

from fusegpt_ray.errors import StorageError, UserError, reading_users_file
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.store.retry import Trouble, cleaned, trouble, with_retries
from fusegpt_ray.text.formats import Source, beside, check_column, file_format, names_a_file
from fusegpt_ray.text.rows import check_is_text, lines, loading, opened, rows

_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def sources(
    text: Text,
    key: str,
    cut: Callable[[Source, int], Iterator[str]] | None = None,
    column: bool = True,
) -> list[Source]:
    """The files, in the order of their names, or the dataset that `text.data` means.

    A file, a glob or a local folder wins over a dataset of that name; a local folder is read as
    `load_dataset(folder)` reads it. Of files only the beginning of the first is read that is not
    empty, of a dataset only its description.

    Args:
        cut: how it will be read, if not as `pieces`.
        column: whether the recipe's column is what is read.

    Raises:
        UserError: nothing is there, or what is there is empty, cannot be read or has no such
        column, configuration or split.
    """
    data = text.data
    with explained(key, data):
        fs, path = storage.filesystem(data)
        if with_retries(data, lambda: fs.isdir(path)):
            if not isinstance(fs, LocalFileSystem):
                raise UserError(
                    key,
                    data,
                    "is a folder",
                    f"give its files, such as {data.rstrip('/')}/*.parquet",
                )
            if glob.escape(path) != path:
                problem = "a folder whose name `datasets` would take for a pattern, and read others"
                raise UserError(key, data, problem, "rename the folder, or give one of its files")
            return [_dataset(path, text, key, column)]
        # A name with brackets is a glob only if there is no file of that name.
        entries = with_retries(
            data, lambda: {path: fs.info(path)} if fs.isfile(path) else fs.glob(path, detail=True)
        )
    paths = sorted(name for name, entry in entries.items() if entry["type"] == "file")
    if not paths and names_a_dataset(data):
        return [_dataset(data, text, key, column)]
    if not paths:
        raise UserError(
            key, data, "no such file", "give the path or glob of your text files, or a dataset's id"
        )
    uris = [fs.unstrip_protocol(name) for name in paths]
    found = [Source(uri, file_format(uri, key), text, key) for uri in uris]
    if not any(True for source in found for _ in islice((cut or pieces)(source, 1 << 16), 1)):
        raise UserError(key, data, "empty", "give a file with text in it")
    return found


def names_a_dataset(data: str) -> bool:
    """Whether it may be the id of a dataset and is no folder here; a file without a suffix may be
    called like that, too."""
    named = _DATASET_ID.fullmatch(data) is not None and not names_a_file(data)
    return named and not os.path.exists(os.path.expanduser(data))


def pieces(source: Source, piece_bytes: int) -> Iterator[str]:
    """The source's rows joined by blank lines, in pieces of at most `piece_bytes` (of UTF-8) that
    concatenate to it.

    Pieces end where rows end; in a row larger than `piece_bytes` (a text file is one) where lines
    end; in a line larger than that between any two characters. Only the present piece and row are
    held.

    Raises:
        UserError: the source is missing, damaged or not UTF-8, or a row has no text in the column.
    """
    held: list[str] = []
    size = 0
    with explained(source.key, source.uri):
        for atom in _atoms(source, piece_bytes):
            atom_size = len(atom.encode())
            if size and size + atom_size > piece_bytes:
                yield "".join(held)
                held, size = [], 0
            held.append(atom)
            size += atom_size
        if size:
            yield "".join(held)


def items(source: Source) -> Iterator[str]:
    """The source's texts one by one: each row of a table, each line of plain text, but blank ones.

    Raises:
        UserError: as `pieces`.
    """
    with explained(source.key, source.uri):
        if source.format != "text":
            yield from (row for row in rows(source) if row.strip())
            return
        with opened(source) as file:
            for _, line in lines(file, source):
                if line.strip():
                    yield line.rstrip("\r\n")


def _atoms(source: Source, limit: int) -> Iterator[str]:
    """The joined text in strings that a piece must not cut: whole rows or lines, of at most `limit`
    bytes each.
    """
    if source.format != "text":
        for number, row in enumerate(rows(source)):
            yield from _fitting("\n\n" + row if number else row, limit)
        return
    line, blank = "", True
    with opened(source) as file:
        while part := file.readline(limit):  # `limit`: a file need not have line ends
            line = part
            check_is_text(line, source)
            blank = blank and line.isspace()
            yield from _fitting(line, limit)
    if line and blank:
        problem = "holds nothing but white space"
        raise UserError(source.key, source.uri, problem, "give a file with text in it")


def _fitting(text: str, limit: int) -> Iterator[str]:
    if len(text.encode()) <= limit:
        yield text
        return
    for line in io.StringIO(text, newline="\n"):
        # A character takes at most four bytes.
        step = len(line) if len(line.encode()) <= limit else max(1, limit // 4)
        yield from (line[start : start + step] for start in range(0, len(line), step))


def _dataset(uri: str, text: Text, key: str, column: bool) -> Source:
    """The source for `load_dataset`, checked against what the dataset says of itself; its data are
    not read yet.
    """
    import datasets

    source = Source(uri, "datasets", text, key)
    with loading(source):
        builder = datasets.load_dataset_builder(uri, text.config, revision=text.revision)
    if builder.name == "text":
        # load_dataset makes every line a row, and joining rows would double the line ends.
        raise UserError(
            key, uri, "a folder of plain text", f"give the files, such as {uri.rstrip('/')}/*.txt"
        )
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
    wanted = {
        part.partition("[")[0].strip() for part in text.split.split("+")
    }  # "train[:10%]+test" is a split, too
    if splits and not wanted <= {*splits, "all"}:
        raise UserError(
            beside(key, "split"), text.split, f"{uri} has no such split", f"use one of {splits}"
        )
    if column and builder.info.features:
        check_column(source, uri, builder.info.features)
    return source


@contextmanager
def explained(key: str, value: str) -> Iterator[None]:
    """Makes what a reader says of a bad file a UserError."""
    fix = "check the path, the permissions and the file"
    with reading_users_file(key, value, "cannot be read", fix):
        try:
            yield
        except UserError:
            raise
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            problem = f"not UTF-8 text ({error.reason})"
            raise UserError(
                key, value, problem, "convert it to UTF-8, or to JSONL or Parquet"
            ) from error
        except Exception as error:
            found = error if isinstance(error, StorageError) else trouble(error)
            if found and found.fix:
                raise UserError(
                    key, value, f"cannot be read ({found.problem})", found.fix
                ) from error
            if isinstance(found, Trouble):
                raise StorageError(cleaned(value), found.problem) from error
            raise
