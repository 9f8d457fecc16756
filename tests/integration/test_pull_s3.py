"""A model published to S3, pulled from it, verified, watched and tidied there, against a real
server of the protocol.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers as tf

from fusegpt_ray import Recipe, compress, pull, verify
from fusegpt_ray.cli import main
from fusegpt_ray.publishing import download
from fusegpt_ray.publishing.download import Incomplete
from fusegpt_ray.run.begun import being_published
from fusegpt_ray.run.status import status
from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import nobody_else
from fusegpt_ray.terminal.display import Display

pytestmark = pytest.mark.integration

READING = {"GET", "HEAD"}


class Stopping(Display):
    """The user presses Ctrl-C where the second round begins."""

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        super().round_begins(number, rounds, blocks)
        if number == 2:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Outputs:
    """What two runs left on S3: a finished model, and a run stopped in its second round."""

    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/results"

    @property
    def model(self) -> str:
        return f"{self.uri}/tiny-p12.5"


@pytest.fixture(scope="module")
def outputs(s3, material) -> Outputs:
    """Each test leaves the model as it was."""
    found = Outputs("outputs-to-pull")
    s3.client.create_bucket(Bucket=found.bucket)
    recipe = material.recipe(found.uri, sparsity=0.125, method="mi")
    compress(
        Recipe.parse(recipe | {"output": {"uri": found.uri, "name": "tiny", "shard_gb": 0.00002}})
    )
    stopped = recipe | {"sparsity": 0.25, "output": {"uri": found.uri, "name": "stopped"}}
    with pytest.raises(KeyboardInterrupt):
        compress(Recipe.parse(stopped), Stopping())
    return found


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", 10_000)
    monkeypatch.setattr(download, "PAUSE", 0.0)


def test_a_pulled_model_loads_and_only_reads_were_made(
    s3, outputs: Outputs, tmp_path: Path
) -> None:
    before = len(s3.requests())
    target = pull(outputs.model, tmp_path / "model")
    assert {method for method, _ in s3.requests()[before:]} <= READING
    there = {
        key.rsplit("/", 1)[-1]: data
        for key, data in s3.objects(outputs.bucket).items()
        if key.startswith("results/tiny-p12.5/")
    }
    assert {path.name: path.read_bytes() for path in target.iterdir()} == there
    assert sum(name.endswith(".safetensors") for name in there) > 1
    model, report = tf.AutoModelForCausalLM.from_pretrained(
        target, dtype="auto", output_loading_info=True
    )
    assert model.config.num_hidden_layers == 7 and not any(report.values())
    assert verify(outputs.model)["good"] and verify(str(target))["good"]


def test_a_damaged_object_is_named_and_the_pull_goes_on_once_it_is_mended(
    s3, outputs: Outputs, tmp_path: Path
) -> None:
    names = {
        name: f"results/tiny-p12.5/{name}"
        for name in storage.read_json(f"{outputs.model}/fusegpt.json")["files"]
    }
    flipped, cut, lost = sorted(name for name in names if name.endswith(".safetensors"))[:3]
    good = {
        name: s3.client.get_object(Bucket=outputs.bucket, Key=names[name])["Body"].read()
        for name in (flipped, cut, lost)
    }
    s3.client.put_object(
        Bucket=outputs.bucket,
        Key=names[flipped],
        Body=good[flipped][:-1] + bytes([good[flipped][-1] ^ 1]),
    )
    s3.client.put_object(Bucket=outputs.bucket, Key=names[cut], Body=good[cut][:-1])
    s3.client.delete_object(Bucket=outputs.bucket, Key=names[lost])

    assert {row["file"] for row in verify(outputs.model)["problems"]} == {flipped, cut, lost}
    with pytest.raises(Incomplete) as caught:
        pull(outputs.model, tmp_path / "model")
    assert set(caught.value.files) == {flipped, cut, lost} and not (tmp_path / "model").exists()

    for name, data in good.items():
        s3.client.put_object(Bucket=outputs.bucket, Key=names[name], Body=data)
    before = len(s3.requests())
    pull(outputs.model, tmp_path / "model")
    asked = {
        path.partition("?")[0].rsplit("/", 1)[-1]
        for method, path in s3.requests()[before:]
        if method == "GET"
    }
    assert {name for name in names if name in asked} == {flipped, cut, lost}  # all else had arrived
    assert verify(str(tmp_path / "model"))["good"]


def test_status_and_clean(s3, outputs: Outputs, capsys: pytest.CaptureFixture[str]) -> None:
    result = status(outputs.uri)
    assert [(model["name"], model["blocks"]) for model in result["models"]] == [("tiny-p12.5", 7)]
    (run,) = result["runs"]
    assert (run["name"], run["state"], run["rounds_done"], run["rounds"]) == (
        "stopped",
        "unfinished",
        1,
        2,
    )
    assert (run["ended"], run["doing"]) == ("KeyboardInterrupt", "round 2/2: scoring 7 blocks")

    half = f"{outputs.uri}/stopped-p25"
    with suppress(KeyboardInterrupt), being_published(half, nobody_else):
        storage.write(f"{half}/model.safetensors", b"half")
        raise KeyboardInterrupt
    storage.write(f"{outputs.uri}/tiny-p25/model.safetensors", b"somebody's own")
    before = s3.objects(outputs.bucket)
    assert main(["clean", outputs.uri]) == 0
    assert s3.objects(outputs.bucket) == before
    assert main(["clean", outputs.uri, "--yes"]) == 0
    gone = ("/stopped-p25/", "/begun-p25.json")
    kept = {key: data for key, data in before.items() if not any(end in key for end in gone)}
    assert s3.objects(outputs.bucket) == kept
    assert main(["clean", outputs.uri, "--yes", "--unfinished"]) == 0
    assert s3.objects(outputs.bucket) == {
        key: data for key, data in kept.items() if "/stopped.run/" not in key
    }
    assert json.loads(s3.objects(outputs.bucket)["results/tiny-p12.5/fusegpt.json"])["kept"]
    capsys.readouterr()
