"""A whole run on a store that fails, or on a full disk: what passes is waited for, with the same
bytes in the end; what does not is one clear error, and the same command goes on afterwards.

The store's faults are injected between the package and a real S3 server (see `faults.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from failing_store import BUSY, EXPIRED, _proxy  # noqa: F401 - fixtures
from faults import FOREVER, Fault, Proxy, full_disk, lost, reset, reset_halfway, stalled, truncated

from fusegpt_ray.cli import main
from fusegpt_ray.store.checkpoint import read_header

pytestmark = pytest.mark.integration

RESULTS = ("/model.safetensors", "/config.json")


def results(objects: dict[str, bytes]) -> dict[str, bytes]:
    return {
        key.split("results/")[-1]: data
        for key, data in objects.items()
        if key.endswith(RESULTS) and "tiny-p" in key
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(s3, material, tmp_path_factory) -> dict[str, bytes]:
    """The weights and configurations of a run in a folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert (
        main(["compress", written(folder / "recipe.yaml", material.recipe(folder / "results"))])
        == 0
    )
    found = results(files(folder))
    assert len(found) == 4
    return found


def written(path: Path, recipe: dict) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture
def recipe(s3, material, bucket: str, proxy: Proxy, tmp_path: Path) -> str:
    """The path of a recipe that reads and writes everything on S3."""
    s3.upload(material.model.iterdir(), bucket, "models/dense")
    s3.upload([material.calibration, material.heldout], bucket, "texts")
    changes = {
        "model": {"source": f"s3://{bucket}/models/dense"},
        "calibration": {"data": f"s3://{bucket}/texts/{material.calibration.name}"},
        "evaluation": {"heldout": {"data": f"s3://{bucket}/texts/{material.heldout.name}"}},
    }
    return written(tmp_path / "recipe.yaml", material.recipe(f"s3://{bucket}/results", **changes))


def test_a_run_survives_what_passes(
    recipe: str, s3, bucket: str, proxy: Proxy, undisturbed: dict[str, bytes]
) -> None:
    faults = [
        Fault(BUSY[503], "GET", "dense/config.json"),
        Fault(BUSY[429], "GET", "list-type=2", times=3),
        Fault(truncated, "GET", "dense/model.safetensors", skip=5, times=3),
        Fault(stalled, "GET", "dense/model.safetensors", skip=20),
        Fault(reset_halfway, "GET", r"texts/calibration\.txt$", times=3),
        Fault(lost, "PUT", "identity.json"),
        Fault(lost, "PUT", "round-001.json"),
        Fault(BUSY[500], "PUT", "round-002.json", times=3),
        Fault(reset, "PUT", "blocks/round-002", times=3),
        Fault(lost, "PUT", "tiny-p12.5/model.safetensors"),
        Fault(truncated, "GET", "tiny-p12.5/model.safetensors", times=3),
        Fault(BUSY[503], "PUT", "tiny-p25/config.json", times=3),
        Fault(lost, "PUT", "fusegpt.json", times=2),
    ]
    proxy.inject(*faults)
    assert main(["compress", recipe]) == 0
    assert {fault.path: fault.hit for fault in faults} == {
        fault.path: fault.times for fault in faults
    }
    assert results(s3.objects(bucket)) == undisturbed


def assert_one_clear_error(err: str, *parts: str) -> None:
    line = next(line for line in err.splitlines() if line.startswith(("failed: ", "error: ")))
    for part in parts:
        assert part in line
    assert "Traceback" not in err and "PLANTED" not in err


@pytest.mark.parametrize(
    "path", ["blocks/round-002", "tiny-p12.5/model.safetensors", "tiny-p25/fusegpt.json"]
)
def test_a_run_that_may_not_go_on(
    path: str,
    recipe: str,
    s3,
    bucket: str,
    proxy: Proxy,
    undisturbed: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy.inject(Fault(EXPIRED, "PUT", path, times=FOREVER))
    assert main(["compress", recipe]) == 1
    err = capsys.readouterr().err
    assert_one_clear_error(
        err, path, "ExpiredToken", "renew the credentials and run the same command again"
    )
    assert err.endswith("The same command goes on from what is saved.\n")
    published = sum(key.endswith("fusegpt.json") for key in s3.objects(bucket))
    assert published == (
        path == "tiny-p25/fusegpt.json"
    )  # the first model, which was finished before

    proxy.inject()
    assert main(["compress", recipe]) == 0
    assert "going on after round" in capsys.readouterr().err
    assert results(s3.objects(bucket)) == undisturbed


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("GET", "models/dense/config.json", "model.source"),
        ("GET", "models/dense/model.safetensors", "model.source"),
        ("PUT", "results/", "output.uri"),
        ("GET", "texts/calibration.txt", "calibration.data"),
        ("GET", "texts/heldout.txt", "evaluation.heldout.data"),
    ],
)
def test_before_the_run_begins_it_is_the_users_mistake(
    method: str,
    path: str,
    key: str,
    recipe: str,
    s3,
    bucket: str,
    proxy: Proxy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy.inject(Fault(EXPIRED, method, path, times=FOREVER))
    assert main(["compress", recipe]) == 2
    assert_one_clear_error(
        capsys.readouterr().err, f"error: {key} = ", "ExpiredToken", "renew the credentials"
    )
    assert not [key for key in s3.objects(bucket) if key.startswith("results/")]


def test_a_full_disk(
    material, tmp_path: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", written(tmp_path / "recipe.yaml", material.recipe(tmp_path / "results"))]
    largest = max(
        ref.end
        for file in material.model.glob("*.safetensors")
        for ref in read_header(str(file), "model").values()
    )
    with full_disk(largest // 2):
        assert main(command) == 1
    err = capsys.readouterr().err
    assert_one_clear_error(err, "tiny-p12.5/model.safetensors", "File too large", "Fix: ")
    left = files(tmp_path / "results")
    assert not [name for name in left if re.search(r"fusegpt\.json|tiny-p|(^|/)\.", name)], (
        "half a file, or a manifest"
    )
    assert main(command) == 0
    assert "going on after round 2" in capsys.readouterr().err
    assert results(files(tmp_path)) == undisturbed
