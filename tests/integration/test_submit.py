"""`ray job submit` to a Ray head of its own, as a cluster's user does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from planted import MARK, in_objects, leaks, plant
from ray.job_submission import JobSubmissionClient
from safetensors.torch import load_file
from submitting import Head, running_head, status, submit, users_folder, write_recipe

from fusegpt_ray import Recipe, compress

pytestmark = pytest.mark.integration


BAD = ("--set", "output.name=bad", "--set", "fusion.learning_rate=1.0e+30")


@pytest.fixture(scope="module")
def head(s3, free_port: Callable[[], int]) -> Iterator[Head]:
    """A Ray head whose environment, like its users', holds secrets."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, s3.keys)
        with running_head(free_port) as running:
            yield running


def who_tells_secrets(head: Head, job: str) -> list[str]:
    """What Ray tells of a job, its log, and Ray's own logs, as far as they hold a planted
    secret.
    """
    client = JobSubmissionClient(head.address)
    told = [str(client.get_job_info(job)), client.get_job_logs(job)]
    assert "jobs/compress.py" in told[0] and list(head.temp.rglob("raylet.out"))
    return [text for text in told if MARK in text] + leaks(head.temp)


@pytest.fixture(scope="module")
def folder(material, tmp_path_factory) -> Path:
    return users_folder(material, tmp_path_factory.mktemp("project"))


def test_a_job_compresses_from_its_folder_to_s3(
    head, s3, bucket, material, folder, tmp_path
) -> None:
    recipe = write_recipe(material, folder, f"s3://{bucket}/jobs")
    changed = ("--set", "fusion.epochs=2", "--set", "output.name=submitted")
    done = submit(
        head.address, folder, "compress", "python", "jobs/compress.py", "recipe.yaml", *changed
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in status(head.address, "compress")

    objects = s3.objects(bucket)
    assert "jobs/submitted-p12.5/fusegpt.json" in objects
    assert who_tells_secrets(head, "compress") == in_objects(objects) == []
    assert MARK not in done.stdout + done.stderr
    published = tmp_path / "published"
    published.mkdir()
    for key, data in objects.items():
        if key.startswith("jobs/submitted-p12.5/"):
            (published / key.rsplit("/", 1)[-1]).write_bytes(data)
    assert tf.AutoModelForCausalLM.from_pretrained(published).config.num_hidden_layers == 7

    # The same recipe here, in one process, gives the same bytes.
    local = {
        "model": {"source": str(material.model)},
        "output": {"uri": str(tmp_path), "name": "here"},
        "cluster": {"engine": "local"},
    }
    texts = {
        "calibration": recipe["calibration"] | {"data": str(material.calibration)},
        "evaluation": {},
    }
    (here,) = compress(
        Recipe.parse(recipe | local | texts | {"fusion": recipe["fusion"] | {"epochs": 2}})
    )
    ours, theirs = (load_file(Path(path) / "model.safetensors") for path in (here.uri, published))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours.keys() == theirs.keys()


def test_a_typo_fails_the_job_with_our_message(head, s3, bucket, material, folder) -> None:
    write_recipe(material, folder, f"s3://{bucket}/jobs")
    done = submit(
        head.address,
        folder,
        "typo",
        "python",
        "jobs/compress.py",
        "recipe.yaml",
        "--set",
        "fusion.epoch=2",
    )
    assert done.returncode != 0
    assert "error: fusion.epoch = 2: unknown key. Fix: did you mean fusion.epochs." in done.stdout
    assert "Traceback" not in done.stdout
    assert "failed" in status(head.address, "typo")
    assert s3.objects(bucket) == {}


def test_a_job_that_fails_with_a_trace_tells_no_secret(head, s3, bucket, material, folder) -> None:
    write_recipe(material, folder, f"s3://{bucket}/jobs", fusion={"epochs": 1})
    done = submit(head.address, folder, "bad", "python", "jobs/compress.py", "recipe.yaml", *BAD)
    assert done.returncode == 1 and "failed: FloatingPointError" in done.stdout
    assert any("heartbeat.json" in key for key in s3.objects(bucket))
    assert who_tells_secrets(head, "bad") == in_objects(s3.objects(bucket)) == []
    assert MARK not in done.stdout + done.stderr


def test_a_job_compresses_a_family(head, s3, bucket, material, folder) -> None:
    recipe = write_recipe(material, folder, f"s3://{bucket}/jobs", method="mi")
    recipe["cluster"]["replicas"] = 1
    members = [{"name": "one"}, {"name": "two", "method": "last"}]
    family = recipe | {"family": {"members": members}}
    (folder / "family.yaml").write_text(yaml.safe_dump(family))
    command = ("python", "jobs/compress_family.py", "family.yaml")
    done = submit(head.address, folder, "family", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = s3.objects(bucket)
    board = json.loads(objects["jobs/family/tiny/family.json"])
    assert [row["status"] for row in board["rows"]] == ["done"] * 2 and board["state"] == "done"
    for row in board["rows"]:
        assert f"jobs/{row['folder']}/fusegpt.json" in objects
        assert f"{row['member']}, {row['method']}: {row['folder']} done" in done.stdout
    left = {name.split("/")[1] for name in objects}
    assert left == {"family", *(row["folder"] for row in board["rows"])}, "nothing else is there"
    assert in_objects(objects) == []
