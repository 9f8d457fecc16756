"""A name is a name: on S3, no run, removal or download touches a neighbour whose name matches,
begins alike, or decodes to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fusegpt_ray import Recipe, compress, pull, verify
from fusegpt_ray.cli import main
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.store import storage

pytestmark = pytest.mark.integration

NAMES = [
    "exp",
    "exp*",
    "ex?",
    "e[wx]p",
    "exp b",
    "exp%20b",
    "exp+b",
    "exp#b",
    "exp&a=b",
    "éxp – ß",
    "e\u0301xp – ß",
]
"""Of folders; the last two look alike."""
NEIGHBOURS = [
    *NAMES,
    "expA",
    "exx",
    "ewp",
    "exp ",
    "exp.run",
    "EXP",
    "exp%2520b",
    "exp/m.run2",
    "exp/xm.run",
]
FILES = ["identity.json", "blocks/round-001/b [1]*?.safetensors"]
READING = {"GET", "HEAD"}


def populate(s3, bucket: str, *more: str) -> dict[str, str]:
    """Every name holds a run's folder; what is in the bucket then, by ETags."""
    keys = [f"{name}/m.run/{file}" for name in NEIGHBOURS for file in FILES]
    for number, key in enumerate([*keys, *more]):
        s3.client.put_object(Bucket=bucket, Key=key, Body=f"{number} {key}".encode())
    return s3.listed(bucket)


def test_a_removal_takes_what_it_names_and_nothing_else(s3, bucket: str) -> None:
    """What is left is told by boto3, which knows no patterns. An object may be called like the
    folder, or mark it."""
    left = populate(s3, bucket, *(f"{name}/m.run{end}" for name in NAMES for end in ("", "/")))
    for name in NAMES:
        uri = f"s3://{bucket}/{name}"
        storage.remove(f"{uri}/m.run/{FILES[0]}")
        del left[f"{name}/m.run/{FILES[0]}"]
        assert s3.listed(bucket) == left
        for _ in range(2):
            storage.remove(f"{uri}/m.run", recursive=True)
            left.pop(f"{name}/m.run/{FILES[1]}", None)
            assert s3.listed(bucket) == left
        storage.remove(f"{uri}/m.run")
        del left[f"{name}/m.run"]
        storage.remove(f"{uri}/m.ru")
        storage.remove(f"{uri}/m.ru", recursive=True)
        assert s3.listed(bucket) == left


def test_what_is_looked_at_is_what_is_named(s3, bucket: str) -> None:
    populate(s3, bucket)
    for name in NAMES:
        uri = f"s3://{bucket}/{name}"
        assert storage.names(f"{uri}/m.run") == FILES[:1]
        assert sorted(storage.below(f"{uri}/m.run")) == sorted(FILES)
        assert (
            storage.read(f"{uri}/m.run/{FILES[0]}").split(b" ", 1)[1].decode()
            == f"{name}/m.run/{FILES[0]}"
        )
        assert storage.exists(f"{uri}/m.run/{FILES[1]}")
        for missing in ("m.run/ident", "m.run", "m.run/blocks", "m.run/identity.jso?"):
            assert not storage.exists(f"{uri}/{missing}"), "a pattern, or a prefix"
        assert storage.names(f"{uri}/m.ru") == storage.names(f"{uri}/m.run/identity.json") == []
        assert storage.below(f"{uri}/m.ru") == storage.below(f"{uri}/m.run/identity.json") == {}
        with pytest.raises(FileNotFoundError):
            storage.size(f"{uri}/m.run")


PLACE = "exp b%20+c#d – é/ü"


@pytest.fixture
def recipe(material) -> Callable[..., dict]:
    def make(bucket: str, place: str, **changes: object) -> dict:
        made = material.recipe(
            f"s3://{bucket}/{place}", sparsity=0.125, method="mi", cluster={"engine": "local"}
        )
        return made | {"output": {"uri": f"s3://{bucket}/{place}", "name": "m"}} | changes

    return make


def test_a_run_and_a_cleaning_leave_every_neighbour(
    s3, bucket: str, recipe, tmp_path: Path, capsys
) -> None:
    around = [
        f"{PLACE}{end}"
        for end in (
            "x/m.run/identity.json",
            " /a",
            "/m.run2/identity.json",
            "/m.runs",
            "/m-p12.5x/a",
        )
    ]
    before = populate(
        s3,
        bucket,
        *around,
        PLACE.replace("%20", " ") + "/m.run/identity.json",
        PLACE.replace("+", " ") + "/m.run/a",
    )
    uri = f"s3://{bucket}/{PLACE}"
    compress(Recipe.parse(recipe(bucket, PLACE)))
    after = s3.objects(bucket)
    listed = s3.listed(bucket)
    assert {key: listed[key] for key in before} == before
    assert {key.rpartition("/")[0] for key in set(after) - set(before)} == {f"{PLACE}/m-p12.5"}
    assert verify(f"{uri}/m-p12.5")["good"]

    target = pull(f"{uri}/m-p12.5", tmp_path / "a [1]*?:: %20é")
    pulled = {f"{PLACE}/m-p12.5/{file.name}": file.read_bytes() for file in target.iterdir()}
    assert pulled == {key: data for key, data in after.items() if key not in before}
    assert pull(f"{uri}/m-p12.5", target) == target  # compared with what is there

    half = {
        f"{PLACE}/half.run/blocks/a": {},
        f"{PLACE}/half.run/begun-p50.json": {},
        f"{PLACE}/half.run/heartbeat.json": {"time": 0.0, "host": "a", "pid": 1, "ended": "Error"},
        f"{PLACE}/half-p50/model.safetensors": {},
    }
    for key, body in half.items():
        s3.client.put_object(Bucket=bucket, Key=key, Body=json.dumps(body).encode())
    capsys.readouterr()
    assert main(["clean", uri, "--yes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "removed",
        "removed",
    ]
    assert s3.objects(bucket) == after


REFUSED = [
    "exp*",
    "ex?",
    "exp[ab]",
    "[!x]xp",
    "**",
    "exp/../expA",
    "./exp",
    "exp//a",
    "exp\n",
    "a\x00b",
    "exp?versionId=1",
    "a::b",
]


def test_what_could_mean_others_is_refused_before_anything_is_written(
    s3, bucket, recipe, tmp_path, capsys
) -> None:
    before, asked = populate(s3, bucket), len(s3.requests())
    path = tmp_path / "recipe.yaml"
    for place in REFUSED:
        uri = f"s3://{bucket}/{place}"
        path.write_text(json.dumps(recipe(bucket, place)))
        assert main(["compress", str(path)]) == 2
        assert (
            capsys.readouterr().err.startswith(f"error: output.uri = {uri!r}: has ")
            or "::" in place
        )
        assert main(["clean", uri, "--yes", "--unfinished"]) == 2
        assert capsys.readouterr().err.startswith(f"error: URI = {uri!r}: ")
    assert {method for method, _ in s3.requests()[asked:]} <= READING
    assert s3.listed(bucket) == before


def test_a_journal_of_such_a_name_removes_its_own(s3, bucket: str, recipe) -> None:
    """Should a name get through, no removal expands it."""
    before = populate(s3, bucket)
    for name in ("exp*", "ex?", "e[wx]p"):
        Journal(f"s3://{bucket}/{name}/m.run").remove()
        before = {key: etag for key, etag in before.items() if not key.startswith(f"{name}/m.run/")}
        assert s3.listed(bucket) == before


@pytest.mark.parametrize("name", ["run[1]?", "all* b%20 #+é"])
def test_a_source_is_read_literally(s3, bucket: str, recipe, material, name: str) -> None:
    s3.upload(material.model.iterdir(), bucket, f"{name}/model")
    for other in ("run1x", "all b%20 #+é", "all* b  #+é", "all*%20b%2520%20%23%2B%C3%A9"):
        s3.client.put_object(Bucket=bucket, Key=f"{other}/model/config.json", Body=b"{}")
        s3.client.put_object(
            Bucket=bucket, Key=f"{other}/model/model.safetensors", Body=b"not the one"
        )
    folder = f"s3://{bucket}/{name}/model"
    (done,) = compress(Recipe.parse(recipe(bucket, "out", model={"source": folder})))
    assert done.manifest["source"]["name"] == folder
    assert verify(done.uri)["good"]
