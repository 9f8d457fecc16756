"""Texts in object storage are read as those on a disk are, whatever their format."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pyarrow
import pytest

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.corpus import pieces, sources

pytestmark = pytest.mark.integration

KEY = "calibration.data"
ROWS = ["one, two", "", "漢\nthree"]
JSON = "\n".join(json.dumps({"text": row}) for row in ROWS).encode()


def arrow() -> bytes:
    table, sink = pyarrow.table({"text": ROWS}), io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES = {
    "a.txt.gz": gzip.compress(b"one, two\n\n\n\n") + gzip.compress("漢\nthree".encode()),
    "a.ndjson": JSON,
    "a.jsonl.zst": pyarrow.compress(JSON, "zstd", asbytes=True),
    "a.json": json.dumps([{"text": row} for row in ROWS]).encode(),
    "a.csv": 'n,text\n1,"one, two"\n2,\n3,"漢\nthree"\n'.encode(),
    "a.arrow": arrow(),
}


def read(uri: str) -> list[str]:
    return ["".join(pieces(source, 1 << 20)) for source in sources(Text(data=uri), KEY)]


def test_texts_in_an_object_store(s3, bucket: str) -> None:
    for name, data in FILES.items():
        s3.client.put_object(Bucket=bucket, Key=f"texts/{name}", Body=data)
    assert read(f"s3://{bucket}/texts/*") == ["\n\n".join(ROWS)] * len(FILES)


def test_an_archive_in_an_object_store_is_refused(s3, bucket: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("empty.txt"))
    s3.client.put_object(Bucket=bucket, Key="texts/a.tar.gz", Body=packed.getvalue())
    with pytest.raises(UserError, match="an archive") as caught:
        read(f"s3://{bucket}/texts/*")
    assert (caught.value.key, caught.value.value) == (KEY, f"s3://{bucket}/texts/a.tar.gz")
