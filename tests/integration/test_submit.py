"""`ray job submit` to a Ray head of its own, as a cluster's user does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from submitting import running_head, status, submit, users_folder, write_recipe

from fusegpt_ray import Recipe, compress

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def head(s3, free_port: Callable[[], int]) -> Iterator[str]:
    """The address of the jobs server of a Ray head."""
    with running_head(free_port) as running:
        yield running.address


@pytest.fixture(scope="module")
def folder(material, tmp_path_factory) -> Path:
    return users_folder(material, tmp_path_factory.mktemp("project"))


def test_a_job_compresses_from_its_folder_to_s3(head, s3, bucket, material, folder, tmp_path) -> None:
    recipe = write_recipe(material, folder, f"s3://{bucket}/jobs")
    changed = ("--set", "fusion.epochs=2", "--set", "output.name=submitted")
    done = submit(head, folder, "compress", "python", "jobs/compress.py", "recipe.yaml", *changed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in status(head, "compress")

    objects = s3.objects(bucket)
    assert "jobs/submitted-p12.5/fusegpt.json" in objects
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
    texts = {"calibration": recipe["calibration"] | {"data": str(material.calibration)}, "evaluation": {}}
    (here,) = compress(Recipe.parse(recipe | local | texts | {"fusion": recipe["fusion"] | {"epochs": 2}}))
    ours, theirs = (load_file(Path(path) / "model.safetensors") for path in (here.uri, published))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours.keys() == theirs.keys()


def test_a_typo_fails_the_job_with_our_message(head, s3, bucket, material, folder) -> None:
    write_recipe(material, folder, f"s3://{bucket}/jobs")
    done = submit(head, folder, "typo", "python", "jobs/compress.py", "recipe.yaml", "--set", "fusion.epoch=2")
    assert done.returncode != 0
    assert "error: fusion.epoch = 2: unknown key. Fix: did you mean fusion.epochs." in done.stdout
    assert "Traceback" not in done.stdout
    assert "failed" in status(head, "typo")
    assert s3.objects(bucket) == {}
