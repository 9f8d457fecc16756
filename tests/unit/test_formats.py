"""Each kind of file is read as `datasets` reads it, whole, or refused: never its syntax or a
part.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules import _EXTENSION_TO_MODULE
from desk import Desk, add_tokenizer, random_text
from texts import KEY, LARGE
from transformers import AutoTokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.text.calibration import token_stream
from fusegpt_ray.text.corpus import items, pieces, sources
from fusegpt_ray.text.formats import FORMATS, PLAIN, Source, named_format

ROWS = ['one, "two"', "", "  three\nfour ", "漢 NA", "NA", "5", "null\ttab"]
MODULES = {"jsonl": "json", "tsv": "csv"}
MODULES |= {name: name for name in ("text", "json", "csv", "parquet", "arrow")}


def json_lines(rows: list[str], column: str) -> bytes:
    return "\n".join(json.dumps({"id": n, column: row}) for n, row in enumerate(rows)).encode()


def json_array(rows: list[str], column: str, indent: int | None = None) -> bytes:
    return json.dumps(
        [{"id": n, column: row} for n, row in enumerate(rows)], indent=indent
    ).encode()


def separated(rows: list[str], column: str, separator: str = ",") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows([["id", column], *enumerate(rows)])
    return text.getvalue().encode()


def arrow(rows: list[str], column: str, kind: str) -> bytes:
    table, sink = pa.table({"id": list(range(len(rows))), column: rows}), pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        new = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


TABLES = {
    "a.jsonl": json_lines,
    "a.NDJSON": json_lines,
    "a.jsonlines": json_lines,
    "lines.json": json_lines,
    "array.json": json_array,
    "tall.json": lambda rows, column: b"\n\n" + json_array(rows, column, indent=1) + b"\n",
    "a.csv": separated,
    "a.tsv": lambda rows, column: separated(rows, column, "\t"),
    "a.parquet": lambda rows, column: arrow(rows, column, "parquet"),
    "stream.arrow": lambda rows, column: arrow(rows, column, "stream"),
    "file.arrow": lambda rows, column: arrow(rows, column, "file"),
}
CODECS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def read(file: str, **keys: str) -> str:
    (source,) = sources(Text(data=file, **keys), KEY)
    return "".join(pieces(source, LARGE))


def refusal(file: str, **keys: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(file, **keys)
    return caught.value


# --- names ---


def test_suffixes_mean_what_datasets_takes_them_for() -> None:
    theirs = {suffix[1:]: module for suffix, (module, _) in _EXTENSION_TO_MODULE.items()}
    ours = PLAIN - {"txt"}
    theirs = {suffix: module for suffix, module in theirs.items() if suffix.lower() not in ours}
    known = {suffix: module for suffix, module in theirs.items() if module in MODULES.values()}
    assert {suffix: MODULES[named_format(f"a.{suffix}") or ""] for suffix in known} == known
    assert [
        suffix for suffix in theirs if suffix not in known and named_format(f"a.{suffix}")
    ] == []
    assert set(FORMATS) - set(theirs) == {"jsonlines"}


OTHERS = "a.xml a.html a.yaml a.h5 a.pkl a.xlsx a.csv.bak a.jsonl.1 a.csv.lz4"


@pytest.mark.parametrize("name", OTHERS.split())
def test_a_name_that_says_nothing_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(write(tmp_path / name, b"text that could be read as such\n"))
    assert (error.key, error.value) == (KEY, f"file://{tmp_path / name}")
    assert "no text is read from files of the kind ." in error.problem
    assert ".txt" in error.fix


# --- tables ---


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("codec", ["", *CODECS])
def test_a_table_gives_its_column_whatever_its_format(
    tmp_path: Path, name: str, codec: str
) -> None:
    data = TABLES[name](ROWS, "body")
    path = tmp_path / f"{name}.{codec}".rstrip(".")
    file = write(path, CODECS[codec](data) if codec else data)
    if codec == "zst" and name in (
        "a.parquet",
        "file.arrow",
    ):  # of which the end must be read first
        assert refusal(file, column="body").key == KEY
        return
    assert read(file, column="body") == "\n\n".join(ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_datasets_reads_it(tmp_path: Path, name: str) -> None:
    # In a CSV file, `datasets` takes the others for missing, or for numbers.
    rows = [row for row in ROWS if row not in ("", "NA", "5")]
    file = write(tmp_path / name, TABLES[name](rows, "text"))
    options = {"sep": "\t"} if name == "a.tsv" else {}
    module = MODULES[named_format(file) or ""]
    options |= {"split": "train", "cache_dir": str(tmp_path / "cache")}
    theirs = datasets.load_dataset(module, data_files=file, **options)
    assert read(file) == "\n\n".join(theirs["text"])


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path, name: str) -> None:
    error = refusal(write(tmp_path / name, TABLES[name](ROWS, "body")))
    assert (error.key, error.value, error.fix) == (
        "calibration.column",
        "text",
        "use one of ['id', 'body']",
    )


@pytest.mark.parametrize("name", TABLES)
def test_rows_that_are_all_empty_are_refused(tmp_path: Path, name: str) -> None:
    error = refusal(write(tmp_path / name, TABLES[name](["", " \n", ""] * 200, "text")))
    assert (error.key, error.value, error.fix) == (
        "calibration.column",
        "text",
        "use one of ['id']",
    )
    assert "every row" in error.problem


def test_a_file_of_white_space_is_refused(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "a.txt", b"\n \r\n" * 500))
    assert error.problem == "holds nothing but white space"


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"id,text\n1,one\n2,two,three\n", "line 3 has 3 fields, the header 2"),
        ("a.csv", b"id,text\n1,one\n2\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", b'id,text\n1,"one\n2,two\n', "line 3 is not CSV (unexpected end of data)"),
        ("a.tsv", b'id\ttext\n1\t"one" he said\n', "line 2 is not TSV"),
        ("a.tsv", b"id\ttext\n1\tone\ttwo\n", "line 2 has 3 fields, the header 2"),
        ("a.json", b'[{"text": "one"}, "two"]', "item 2 is not a JSON object"),
        ("a.json", b'[{"text": "one"},\n', "the array is not JSON"),
        ("a.json", b'{\n "text": "one"\n}', "line 1 is not JSON"),
        ("a.arrow", b"ARROW1 or not", "cannot be read"),
        ("a.arrow", TABLES["stream.arrow"](ROWS, "text")[:200], "cannot be read"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    error = refusal(write(tmp_path / name, data))
    assert error.key == KEY
    assert problem in error.problem


def test_an_item_of_a_json_array_is_held_only_so_far(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b'[\n{"text": "one"},\n{"text": "')
        file.write(b"a" * (storage.SMALL + 100))
        file.write(b'"}]')
    with pytest.raises(UserError) as caught:
        list(items(Source(str(tmp_path / "a.json"), "json", Text(data="a.json"), KEY)))
    error = caught.value
    assert f"item 2 is not JSON, or has more than {storage.SMALL} characters" in error.problem
    assert "JSON Lines" in error.fix


# --- archives, compressed and binary files ---


def archive(path: Path) -> Path:
    if path.suffix in (".zip", ".7z", ".rar"):
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("readme.txt", "This archive holds a corpus. " * 40)
            zipped.writestr("corpus/text.txt", "the text " * 400)
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
            for number in range(2):
                member = tarfile.TarInfo(f"corpus/part{number}.txt")
                member.size = 900
                tar.addfile(member, io.BytesIO(b"the text " * 100))
    return path


PACKED = ["a.zip", "a.txt.zip", "a.tar", "a.tar.gz", "a.TGZ", "a.7z", "a.rar"]


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(str(archive(tmp_path / name)))
    assert (error.key, error.value) == (KEY, f"file://{tmp_path / name}")
    assert "an archive" in error.problem
    assert "unpack it" in error.fix


@pytest.mark.parametrize("name", ["corpus.txt", "corpus", "corpus.gz", "corpus.csv"])
def test_an_archive_of_another_name_is_no_text(tmp_path: Path, name: str) -> None:
    error = refusal(str(archive(tmp_path / name)))
    assert error.key == KEY
    assert "NUL bytes" in error.problem


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_file_is_read_to_its_end(tmp_path: Path, codec: str) -> None:
    # Programs that compress in parallel, and `cat`, leave several compressed files in one.
    pack = CODECS[codec]
    file = write(tmp_path / f"a.txt.{codec}", pack(b"one\r\n") + pack("漢\n".encode()))
    assert read(file) == "one\r\n漢\n"
    assert refusal(write(tmp_path / f"b.txt.{codec}", pack(b"one two " * 999)[:-6])).key == KEY


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "array.json", "a.csv", "a.tsv"])
def test_the_mark_before_utf8_is_no_text(tmp_path: Path, name: str) -> None:
    data = b"one\r\ntwo" if name == "a.txt" else TABLES[name](ROWS, "text")
    expected = "one\r\ntwo" if name == "a.txt" else "\n\n".join(ROWS)
    assert read(write(tmp_path / name, b"\xef\xbb\xbf" + data)) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_other_encodings_are_refused(tmp_path: Path, name: str, encoding: str) -> None:
    text = "plain words\n" if name == "a.txt" else TABLES[name](ROWS, "text").decode()
    problem = refusal(write(tmp_path / name, text.encode(encoding))).problem
    assert "not UTF-8" in problem or "NUL bytes" in problem


# --- the tokens ---


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_tokens_are_those_of_a_plain_reading(tmp_path: Path, name: str) -> None:
    """As before there were other formats: `open`, `json`, `pyarrow`, and one tokenizer call."""
    add_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = random_text(500, seed=3).splitlines(keepends=True)
    if name == "a.txt":
        file = write(tmp_path / name, "".join(rows).encode())
        with open(file, encoding="utf-8", newline="") as plain:
            text = plain.read()
    elif name == "a.jsonl":
        file = write(tmp_path / name, TABLES[name](rows, "text"))
        with open(file, encoding="utf-8") as plain:
            text = "\n\n".join(json.loads(line)["text"] for line in plain)
    else:
        file = write(tmp_path / name, TABLES[name](rows, "text"))
        text = "\n\n".join(pq.read_table(file)["text"].to_pylist())
    expected = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    found = np.concatenate(list(token_stream(Text(data=file), LARGE, tokenizer, KEY)()))
    assert found.tobytes() == expected.tobytes()


def test_one_text_has_one_perplexity(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    rows = desk.heldout.read_text().splitlines()
    found = {}
    for name, make in {"a.txt": lambda rows, _: "\n\n".join(rows).encode(), **TABLES}.items():
        file = write(desk.folder / name, make(rows, "body"))
        options = ["--data", file, "--length", "9", "--column", "body", "--json"]
        assert main(["evaluate", str(desk.model), *options]) == 0
        found[name] = json.loads(capsys.readouterr().out)["perplexity"]
    assert len(set(found.values())) == 1, found
