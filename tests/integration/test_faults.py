"""A store that fails, read and written: what passes is waited for, with the same bytes in the end;
what does not is one clear error.

The faults are injected between the package and a real S3 server (see `faults.py`). Whole runs on
such a store are in test_faults_in_a_run.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from failing_store import BUSY, EXPIRED, _proxy  # noqa: F401 - fixtures
from faults import FOREVER, Fault, Proxy, answers, lost, reset, reset_halfway, stalled, truncated
from s3fs import S3FileSystem

from fusegpt_ray.errors import StorageError
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import FileRecord, read_tensors
from fusegpt_ray.store.writer import Entry, write_safetensors

pytestmark = pytest.mark.integration

PASSING = {"500": BUSY[500], "503": BUSY[503], "429": BUSY[429], "reset": reset}
BROKEN = {"reset-halfway": reset_halfway, "truncated": truncated, "stalled": stalled}
DATA = bytes(range(256)) * 300


def each(kinds: dict[str, Callable]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("happens", kinds.values(), ids=kinds)


@pytest.fixture
def stored(s3, bucket: str, proxy: Proxy) -> str:
    """The URI of an object."""
    s3.client.put_object(Bucket=bucket, Key="folder/there", Body=DATA)
    return f"s3://{bucket}/folder/there"


# --- reading ---


@each(PASSING | BROKEN)
def test_reading_survives(happens: Callable, stored: str, proxy: Proxy) -> None:
    times = 1 if happens is stalled else 3
    ranges = [(0, 4096), (5, 3000), (70_000, len(DATA))]
    for read, expected in [
        (partial(storage.read, stored), DATA),
        (partial(storage.read_ranges, stored, ranges), [DATA[begin:end] for begin, end in ranges]),
    ]:
        fault = Fault(happens, "GET", "/folder/there", times=times)
        proxy.inject(fault)
        assert read() == expected
        assert fault.hit == times


@each(PASSING)
def test_looking_survives(happens: Callable, stored: str, proxy: Proxy) -> None:
    looks = [
        ("HEAD", partial(storage.exists, stored), True),
        ("HEAD", partial(storage.size, stored), len(DATA)),
        ("HEAD", partial(storage.sha256, stored), FileRecord.of(DATA).sha256),
        ("GET", partial(storage.names, stored.rsplit("/", 1)[0]), ["there"]),
    ]
    for method, look, expected in looks:
        fault = Fault(happens, method, "folder", times=3)
        proxy.inject(fault)
        assert look() == expected
        assert fault.hit == 3, look


def test_a_stream_goes_on_where_it_broke(
    s3, bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.put_object(
        Bucket=bucket, Key="lines.txt", Body="\n".join(map(str, range(20_000))).encode()
    )
    monkeypatch.setattr(storage, "STEP", 1 << 15)
    fault = Fault(truncated, "GET", "lines.txt", times=2, skip=1)
    proxy.inject(fault)
    with storage.reading(f"s3://{bucket}/lines.txt") as file:
        assert [int(line) for line in file] == list(range(20_000))
    assert fault.hit == 2


# --- writing ---


@each(PASSING | {"lost": lost})
def test_writing_survives(happens: Callable, s3, bucket: str, proxy: Proxy) -> None:
    for name, write in {"written": storage.write, "created": storage.create}.items():
        fault = Fault(happens, "PUT", name, times=3)
        proxy.inject(fault)
        write(f"s3://{bucket}/{name}", DATA)
        assert fault.hit >= 3 - (
            name == "created" and happens is lost
        )  # there the second try may find what the first one did
        assert s3.objects(bucket)[name] == DATA


def large() -> list[Entry]:
    """Tensors that are uploaded in three parts."""
    tensors = {
        name: torch.full((1_400_000,), value)
        for name, value in {"a": 1.0, "b": 2.0, "c": 3.0}.items()
    }
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), tensor.clone)
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize(
    ("happens", "method"),
    [
        *zip(PASSING.values(), itertools.cycle(["PUT", "POST"]), strict=False),
        (lost, "POST"),
        (lost, "PUT"),
    ],
)
def test_a_large_upload_survives(
    happens: Callable, method: str, s3, bucket: str, proxy: Proxy
) -> None:
    """POST: where it begins and where it ends; PUT: its parts."""
    entries = large()
    file = f"s3://{bucket}/model.safetensors"
    for skip in (0, 1):
        fault = Fault(happens, method, "model.safetensors", times=3, skip=skip)
        proxy.inject(fault)
        record, refs = write_safetensors(file, entries)
        assert fault.hit == 3
        assert FileRecord.of(s3.objects(bucket)["model.safetensors"]) == record
        for entry in entries:
            assert torch.equal(read_tensors(refs)[entry.name], entry.load())


def test_an_upload_that_fails_for_good_leaves_nothing(s3, bucket: str, proxy: Proxy) -> None:
    proxy.inject(Fault(EXPIRED, "PUT", "partNumber=2", times=FOREVER))
    with pytest.raises(StorageError, match="ExpiredToken"):
        write_safetensors(f"s3://{bucket}/model.safetensors", large())
    assert s3.objects(bucket) == {}
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket)


@pytest.mark.parametrize(
    ("happens", "tries"),
    [(lost, "1"), (lost, "3"), (reset, "1"), (BUSY[503], "3")],
    ids=["lost-ours", "lost-botocores", "reset-ours", "503-botocores"],
)
def test_a_create_tried_again_is_still_exact(
    happens: Callable, tries: str, s3, bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", tries)
    uri = f"s3://{bucket}/manifest"
    proxy.inject(Fault(happens, "PUT", "manifest"))
    storage.create(uri, b"mine")
    proxy.inject(Fault(happens, "PUT", "manifest"))
    with pytest.raises(FileExistsError):
        storage.create(uri, b"another's")
    proxy.inject()
    storage.create(uri, b"mine")  # is that very file
    assert s3.objects(bucket) == {"manifest": b"mine"}


# --- errors for good ---

REFUSED = {
    "expired": (EXPIRED, "ExpiredToken", "renew the credentials"),
    "wrong-key": (
        answers(403, "InvalidAccessKeyId"),
        "InvalidAccessKeyId",
        "check AWS_ACCESS_KEY_ID",
    ),
    "denied": (answers(403, "AccessDenied"), "AccessDenied", "their rights"),
    "no-bucket": (answers(404, "NoSuchBucket"), "NoSuchBucket", "create the bucket"),
}


@pytest.mark.parametrize(("happens", "code", "fix"), REFUSED.values(), ids=REFUSED)
def test_what_no_retry_mends_is_said_at_once(
    happens: Callable, code: str, fix: str, stored: str, s3, proxy: Proxy
) -> None:
    verbs = {
        "GET": partial(storage.read_ranges, stored, [(0, 9)]),
        "PUT": partial(storage.write, stored, b"new"),
    }
    for method, verb in verbs.items():
        fault = Fault(happens, method, "there", times=FOREVER)
        proxy.inject(fault)
        with pytest.raises(StorageError) as failed:
            verb()
        assert str(failed.value).startswith(f"{stored}: ")
        assert code in failed.value.problem and fix in failed.value.fix
        assert fault.hit == 1, "tried again in vain"


def test_a_missing_file_is_still_a_missing_file(stored: str) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        storage.read(f"{stored}-not")
    assert not isinstance(missing.value, StorageError)


def test_a_store_that_stays_away_is_given_up_on(
    stored: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "0.5")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    fault = Fault(BUSY[503], "GET", "there", times=FOREVER)
    proxy.inject(fault)
    with pytest.raises(StorageError, match=r"503 SlowDown .*given up after \d+ tries") as failed:
        storage.read_ranges(stored, [(0, 9)])
    assert failed.value.fix == ""
    assert 2 < fault.hit <= 10, "the retries of two layers multiply"


def test_without_credentials(stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [
        name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="NoCredentialsError") as failed:
        storage.read(stored)
    assert "AWS_ACCESS_KEY_ID" in failed.value.fix


def test_no_secret_is_quoted(stored: str, s3, proxy: Proxy) -> None:
    place = "https://user:hunter2@host/x?X-Amz-Signature=5ec2e7"
    leaky = f"key {s3.keys[0]} secret {s3.keys[1]} at {place}"
    proxy.inject(Fault(answers(403, "SignatureDoesNotMatch", leaky), "GET", "there", times=FOREVER))
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as failed:
        storage.read_ranges(stored, [(0, 9)])
    for secret in (*s3.keys, "hunter2", "5ec2e7"):
        assert secret not in str(failed.value)
