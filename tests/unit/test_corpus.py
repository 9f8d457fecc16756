"""Texts in files and datasets of every kind: their rows, in pieces, and a user's mistakes."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import re
from pathlib import Path

import datasets
import fsspec
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from texts import KEY, LARGE, write_jsonl

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.corpus import Source, pieces, sources


def text_source(path: Path | str) -> Source:
    return Source(str(path), "text", Text(data=str(path)), KEY)


def joined(text: Text, key: str = KEY) -> list[str]:
    return ["".join(pieces(source, LARGE)) for source in sources(text, key)]


def user_error(text: Text, key: str = KEY) -> UserError:
    with pytest.raises(UserError) as caught:
        joined(text, key)
    assert caught.value.fix
    return caught.value


# --- pieces ---

ROWS = st.lists(st.text(st.sampled_from("ab \n\r\té漢🙂"), max_size=40), max_size=8)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, piece_bytes=st.integers(4, 60))
def test_pieces_of_a_table_concatenate_to_the_join_and_end_at_rows_or_lines(
    rows, piece_bytes, tmp_path_factory
):
    assume(not rows or "".join(rows).strip())  # white space alone is refused
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    got = list(pieces(Source(str(path), "jsonl", Text(data=str(path)), KEY), piece_bytes))
    whole = "\n\n".join(rows)
    assert "".join(got) == whole
    assert all(0 < len(piece.encode()) <= piece_bytes for piece in got)
    if all(len(row.encode()) + 2 <= piece_bytes for row in rows):
        row_ends = {"\n\n".join(rows[:n]) for n in range(len(rows) + 1)}
        assert {"".join(got[:n]) for n in range(len(got) + 1)} <= row_ends


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.sampled_from("ab \n\r\té漢🙂"), max_size=200), piece_bytes=st.integers(4, 60)
)
def test_pieces_of_a_file_concatenate_to_the_file_and_end_at_lines(
    text, piece_bytes, tmp_path_factory
):
    assume(not text or text.strip())
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(text.encode())
    got = list(pieces(text_source(path), piece_bytes))
    assert "".join(got) == text
    assert all(0 < len(piece.encode()) <= piece_bytes for piece in got)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    if all(len(line.encode()) <= piece_bytes for line in lines):
        assert all(piece.endswith("\n") for piece in got[:-1])


def test_characters_split_across_read_chunks_survive(tmp_path):
    # The reader decodes chunks of some kilobytes; three- and four-byte characters fall across every
    # chunk's end.
    text = ("漢🙂" * 7 + "é\r\n") * 3000
    path = tmp_path / "wide.txt"
    path.write_bytes(text.encode())
    got = list(pieces(text_source(path), 10_000))
    assert "".join(got) == text
    assert len(got) > 10


def test_a_text_of_exactly_one_piece_stays_whole(tmp_path):
    path = tmp_path / "whole.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert list(pieces(text_source(path), 10)) == ["one\r\ntwo\r\n"]
    assert list(pieces(text_source(path), 9)) == ["one\r\n", "two\r\n"]


def test_empty_rows_are_rows(tmp_path):
    write_jsonl(tmp_path / "wikitext.jsonl", ["", " = Title = \n", ""])
    assert joined(Text(data=str(tmp_path / "wikitext.jsonl"))) == ["\n\n = Title = \n\n\n"]


def test_pieces_stream(tmp_path):
    # The damage at the end of the file is met only by who reads that far.
    path = tmp_path / "long.txt"
    path.write_bytes(b"a line of text\n" * 100_000 + b"\xff")
    reader = pieces(text_source(path), 1000)
    assert next(reader) == "a line of text\n" * 66
    with pytest.raises(UserError, match="not UTF-8"):
        list(reader)


# --- formats and places ---


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "a"])
def test_a_text_file_is_one_row_exactly_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"\r\n one\n\n\ntwo \r")
    assert joined(Text(data=str(tmp_path / name))) == ["\r\n one\n\n\ntwo \r"]


def test_tables_give_their_column(tmp_path):
    rows = ["one\n", "", "漢 two", "three"]
    write_jsonl(tmp_path / "a.jsonl", rows, column="body")
    (tmp_path / "b.json").write_text(
        "\n".join(json.dumps({"body": row, "id": 1}) for row in rows) + "\n\n"
    )
    pq.write_table(
        pa.table({"id": [1, 2, 3, 4], "body": rows}), tmp_path / "c.parquet", row_group_size=2
    )
    assert joined(Text(data=str(tmp_path / "*"), column="body")) == ["\n\n".join(rows)] * 3


def test_compressed_files(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert joined(Text(data=str(tmp_path / "*.gz"))) == ["one\r\ntwo", "one\n\ntwo"]


def test_any_fsspec_uri():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/b.txt": b"bee", "/corpus/a.txt": b"ay", "/corpus/deeper/c.txt": b"sea"})
    assert [source.uri for source in sources(Text(data="memory://corpus/*"), KEY)] == [
        "memory:///corpus/a.txt",
        "memory:///corpus/b.txt",
    ]
    assert joined(Text(data="memory://corpus/**/*.txt")) == ["ay", "bee", "sea"]
    assert user_error(Text(data="memory://corpus")).problem == "is a folder"
    assert user_error(Text(data="memory://nothing/*.txt")).problem == "no such file"


def test_a_glob_is_sorted_and_a_name_with_brackets_is_not_a_glob(tmp_path, monkeypatch):
    for name in ("c", "a", "b", "[a]"):
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    assert joined(Text(data="[abc].txt")) == ["a", "b", "c"]
    assert joined(Text(data="[a].txt")) == ["[a]"]


def test_sources_travel(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    found = pickle.loads(pickle.dumps(sources(Text(data="a.txt"), KEY)))
    monkeypatch.chdir("/")  # a worker's folder is another one
    assert list(pieces(found[0], LARGE)) == ["here"]


# --- a user's mistakes ---


@pytest.mark.parametrize(
    "name", ["missing.txt", "folder/missing.jsonl.gz", "*.parquet", "/no/such/place", "./corpus"]
)
def test_missing_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    error = user_error(Text(data=name))
    assert (error.key, error.value, error.problem) == (KEY, name, "no such file")


def test_binary_text_is_found_by_sources_and_named(tmp_path):
    path = tmp_path / "model.txt"
    path.write_bytes(b"\x80\x02binary")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        sources(Text(data=str(path)), KEY)
    assert caught.value.key == KEY
    assert str(path) in caught.value.value


def test_text_that_utf8_cannot_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half a pair: \\ud83d"}')
    assert "not UTF-8" in user_error(Text(data=str(tmp_path / "a.jsonl"))).problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_unknown_column(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"body": ["one"]}), path)
    else:
        write_jsonl(path, ["one"], column="body")
    with pytest.raises(UserError) as caught:
        sources(Text(data=str(path)), KEY)
    error = caught.value
    assert (error.key, error.value, error.fix) == (
        "calibration.column",
        "text",
        "use one of ['body']",
    )
    assert str(path) in error.problem


def test_rows_without_text(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "three"]}), tmp_path / "a.parquet")
    error = user_error(Text(data=str(tmp_path / "a.parquet")), key="evaluation.wiki.data")
    assert (error.key, error.value) == ("evaluation.wiki.column", "text")
    assert "row 2 of" in error.problem
    assert "None" in error.problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [('{"text": ', "line 3 is not JSON"), ("[1]", "line 3 is not a JSON object")],
)
def test_malformed_json_lines_are_numbered(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + "\n")
    error = user_error(Text(data=str(path)))
    assert error.key == KEY
    assert str(path) in error.value
    assert problem in error.problem


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(
        gzip.compress(random.Random(0).randbytes(99))[:-20]
        if name.endswith("gz")
        else b"PAR1 or not"
    )
    error = user_error(Text(data=str(path)))
    assert error.key == KEY
    assert str(path) in error.value


def test_unknown_protocol():
    error = user_error(Text(data="s33://bucket/a.txt"))
    assert (error.key, error.value) == (KEY, "s33://bucket/a.txt")
    assert "s33" in error.problem


# --- datasets ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets` as on a machine without network, with a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpus(tmp_path, hub) -> Path:
    """A folder as a dataset's repository looks when cloned: two configurations, two splits, one
    with two files.
    """
    folder = tmp_path / "corpus"
    (folder / "small").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path:"
        " small/train-*.parquet\n  - split: test\n    path: small/test.parquet\n- config_name:"
        " other\n  data_files: small/test.parquet\n---\n"
    )
    for name, rows in (("train-0", ["one", ""]), ("train-1", ["three\n"]), ("test", ["held out"])):
        pq.write_table(
            pa.table({"page": rows, "n": list(range(len(rows)))}),
            folder / "small" / f"{name}.parquet",
        )
    return folder


def test_a_local_folder_is_a_dataset(corpus):
    text = Text(data=str(corpus), config="small", column="page")
    assert [source.format for source in sources(text, KEY)] == ["datasets"]
    assert joined(text) == ["one\n\n\n\nthree\n"]
    assert joined(text.model_copy(update={"split": "test"})) == ["held out"]
    assert joined(text.model_copy(update={"split": "train[:1]+test"})) == ["one\n\nheld out"]


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"config": "large"}, "evaluation.wiki.data", None),
        ({"split": "validation"}, "evaluation.wiki.split", "validation"),
        ({"column": "text"}, "evaluation.wiki.column", "text"),
    ],
)
def test_a_datasets_unknown_names(corpus, change, key, value):
    text = Text(data=str(corpus), config="small", column="page").model_copy(update=change)
    error = user_error(text, key="evaluation.wiki.data")
    assert (error.key, error.value) == (key, value or str(corpus))


def test_a_folder_of_plain_text_is_not_a_dataset(tmp_path, hub):
    (tmp_path / "book.txt").write_text("one\ntwo\n")
    error = user_error(Text(data=str(tmp_path)))
    assert error.problem == "a folder of plain text"
    assert joined(Text(data=error.fix.split()[-1])) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["wikitext", "someone/some-corpus"])
def test_an_unreachable_dataset(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    error = user_error(Text(data=name))
    assert (error.key, error.value) == (KEY, name)
    assert "neither a file here nor a dataset" in error.problem
