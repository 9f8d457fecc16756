"""From S3 to S3, against a real server of the protocol: what is written, where, in which order,
and what never is.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import transformers as tf
from s3fs import S3FileSystem
from safetensors.torch import load_file

from fusegpt_ray import Recipe, UserError, compress
from fusegpt_ray.store import storage

pytestmark = pytest.mark.integration

MODEL = "tiny-p12.5"
READING = {"GET", "HEAD"}


@dataclass(frozen=True)
class Done:
    """One run from S3 to S3."""

    recipe: dict[str, Any]
    bucket: str
    prefix: str
    objects: dict[str, bytes]
    """All that is in the bucket afterwards."""
    writes: list[str]
    """Paths of the run's writing requests, deletions included, in order."""
    folder: Path
    """The published model, downloaded after the run."""

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "fusegpt.json").read_text())


class Runs(dict[str, Done]):
    """Engine → its run, made when it is first asked for; both read and write the same bucket."""

    def __init__(self, s3, material, folders) -> None:
        super().__init__()
        self.s3, self.material, self.folders = s3, material, folders
        self.bucket = "from-s3-to-s3"
        s3.client.create_bucket(Bucket=self.bucket)
        S3FileSystem.clear_instance_cache()
        s3.upload(material.model.iterdir(), self.bucket, "models/dense")
        s3.upload([material.calibration, material.heldout], self.bucket, "texts")

    def __missing__(self, engine: str) -> Done:
        s3, material, bucket = self.s3, self.material, self.bucket
        recipe = material.recipe(
            f"s3://{bucket}/results/{engine}",
            model={"source": f"s3://{bucket}/models/dense"},
            sparsity=0.125,
            calibration={"data": f"s3://{bucket}/texts/{material.calibration.name}"},
            evaluation={"heldout": {"data": f"s3://{bucket}/texts/{material.heldout.name}"}},
            cluster={"engine": engine},
        )
        before = len(s3.requests())
        compress(Recipe.parse(recipe))
        writes = [path for method, path in s3.requests()[before:] if method not in READING]
        objects, prefix = s3.objects(bucket), f"results/{engine}"
        folder = self.folders.mktemp(engine)
        for key in objects:
            if key.startswith(f"{prefix}/{MODEL}/"):
                s3.client.download_file(bucket, key, str(folder / key.rsplit("/", 1)[-1]))
        self[engine] = Done(recipe, bucket, prefix, objects, writes, folder)
        return self[engine]


@pytest.fixture(scope="module")
def runs(s3, ray_session, material, tmp_path_factory) -> Runs:
    return Runs(s3, material, tmp_path_factory)


ENGINES = pytest.mark.parametrize("engine", ["ray", "local"])


@ENGINES
def test_the_result_loads_once_downloaded(runs: Runs, engine: str) -> None:
    done = runs[engine]
    model, report = tf.AutoModelForCausalLM.from_pretrained(
        done.folder, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.num_hidden_layers == len(done.manifest["kept"]) == 7
    assert done.manifest["source"]["name"] == f"s3://{done.bucket}/models/dense"
    assert done.manifest["files"].keys() | {"fusegpt.json"} == {
        file.name for file in done.folder.iterdir()
    }
    assert tf.AutoTokenizer.from_pretrained(done.folder)("deba figo").input_ids


def test_both_engines_wrote_the_same_model(runs: Runs) -> None:
    ours, theirs = (
        load_file(runs[engine].folder / "model.safetensors") for engine in ("ray", "local")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, other = (runs[engine].manifest for engine in ("ray", "local"))
    assert one["rounds"][0]["scores"] == other["rounds"][0]["scores"]
    assert one["perplexity"] == other["perplexity"]


@ENGINES
def test_the_manifest_comes_last(s3, runs: Runs, engine: str) -> None:
    done = runs[engine]
    folder = f"{done.prefix}/{MODEL}/"
    published = [path for path in done.writes if path.startswith(f"/{done.bucket}/{folder}")]
    assert published[-1] == f"/{done.bucket}/{folder}fusegpt.json"
    assert sum("fusegpt.json" in path for path in published) == 1
    times = {
        entry["Key"]: entry["LastModified"]
        for entry in s3.client.list_objects_v2(Bucket=done.bucket, Prefix=folder)["Contents"]
    }
    assert max(times.values()) == times[f"{folder}fusegpt.json"]


@ENGINES
def test_nothing_is_written_elsewhere_and_nothing_temporary_stays(runs: Runs, engine: str) -> None:
    done = runs[engine]
    # `POST /bucket?delete` names its keys in the body: what it deleted is seen in what is left.
    elsewhere = [
        path
        for path in done.writes
        if not path.startswith((f"/{done.bucket}/{done.prefix}/", f"/{done.bucket}?delete"))
    ]
    assert elsewhere == []
    inputs = {key for key in done.objects if not key.startswith("results/")}
    assert {key.split("/")[0] for key in inputs} == {"models", "texts"}
    there = {
        key.removeprefix(f"{done.prefix}/")
        for key in done.objects
        if key.startswith(f"{done.prefix}/")
    }
    assert there == {f"{MODEL}/{file.name}" for file in done.folder.iterdir()}


@ENGINES
def test_no_credentials_are_written(s3, runs: Runs, engine: str) -> None:
    done = runs[engine]
    assert f"{done.prefix}/{MODEL}/fusegpt.json" in done.objects and len(s3.keys) == 2
    for key, data in done.objects.items():
        for secret in s3.keys:
            assert secret.encode() not in data, key


@ENGINES
def test_a_finished_name_is_refused(s3, runs: Runs, engine: str) -> None:
    done = runs[engine]
    before = len(s3.requests())
    with pytest.raises(UserError, match="a finished model is already at") as caught:
        compress(Recipe.parse(done.recipe | {"seed": 1}))
    assert caught.value.key == "output.name"
    assert {method for method, _ in s3.requests()[before:]} <= READING


def test_the_same_command_again_finds_the_model_and_writes_nothing(s3, runs: Runs) -> None:
    done = runs["local"]
    before = len(s3.requests())
    (again,) = compress(Recipe.parse(done.recipe))
    assert again.manifest == done.manifest
    assert {method for method, _ in s3.requests()[before:]} <= READING


# --- one creator ---


def creator(uri: str) -> Callable[[int], bool]:
    """A function that creates the object and says whether its writer was the one who did.
    (Nested, it travels to Ray by value.)
    """

    def create(writer: int) -> bool:
        try:
            storage.create(uri, f"writer {writer}".encode())
        except FileExistsError:
            return False
        return True

    return create


def all_at_once(create: Callable[[int], bool]) -> list[bool]:
    """Eight threads."""
    gate = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda writer: (gate.wait(), create(writer))[1], range(8)))


def on_the_cluster(create: Callable[[int], bool]) -> list[bool]:
    """Eight tasks, in as many processes as Ray has CPUs."""
    task = ray.remote(num_cpus=1)(create)
    return ray.get([task.remote(writer) for writer in range(8)])


@pytest.mark.parametrize("race", [all_at_once, on_the_cluster])
def test_of_racing_writers_exactly_one_creates_an_object(ray_session, bucket: str, race) -> None:
    for attempt in range(5):
        uri = f"s3://{bucket}/{attempt}"
        won = race(creator(uri))
        assert won.count(True) == 1
        assert storage.read(uri) == f"writer {won.index(True)}".encode()
