"""Finding a model: local folders, URIs, and the hub through its local cache (offline)."""

from __future__ import annotations

import hashlib
import json
import shutil

import fsspec
import pytest
from models import save_tiny

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source, hub_sha256
from fusegpt_ray.run.identity import model_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_hub_model(tmp_path, monkeypatch):
    """`some-org/tiny` as the hub client keeps it: blobs, and a snapshot of links to them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = save_tiny("llama", tmp_path / "model")
    repository = tmp_path / "hub" / "models--some-org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return model


def test_a_hub_model_is_read_from_the_cache(cached_hub_model):
    source = Source.find("some-org/tiny", None)
    assert source.on_hub
    here = Source.find(str(cached_hub_model), None)
    assert source.config() == here.config()
    there, local = source.stack(), here.stack()
    assert there.kept == local.kept
    assert set(there.trunk) == set(local.trunk)
    assert set(source.small_files) == set(here.small_files)


def test_the_checksum_of_a_large_hub_file_is_its_name(cached_hub_model, tmp_path, weight_reads):
    """As it would be computed; nothing is known of what is not in the cache, or not named by it."""
    weights = cached_hub_model / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    repository = tmp_path / "hub" / "models--some-org--tiny"
    cached = repository / "snapshots" / COMMIT / "model.safetensors"
    assert hub_sha256(str(cached)) is None, "a name that is no SHA-256"
    (repository / "blobs" / "model.safetensors").rename(repository / "blobs" / digest)
    cached.unlink()
    cached.symlink_to(f"../../blobs/{digest}")
    assert hub_sha256(str(cached)) == digest
    for other in (weights, tmp_path / digest, f"s3://models--a--b/blobs/{digest}", tmp_path / "no"):
        assert hub_sha256(str(other)) is None

    stacks = [Source.find(name, None).stack() for name in (str(cached_hub_model), "some-org/tiny")]
    weight_reads.clear()
    there = model_identity(stacks[1])["files"]
    assert weight_reads == []
    here = model_identity(stacks[0])["files"]
    assert there == here == {"model.safetensors": f"sha256 {digest}"} and weight_reads


def test_an_unknown_hub_model_is_the_users_mistake(cached_hub_model):
    with pytest.raises(UserError, match=r"model\.source = 'some-org/other'.*check the spelling"):
        Source.find("some-org/other", None)


def test_any_fsspec_uri(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/models/tiny/{file.name}", file.read_bytes())
    source = Source.find("memory://models/tiny", None)
    assert source.stack().kept == Source.find(str(folder), None).stack().kept
    memory.rm("/models", recursive=True)


def test_only_known_small_files_travel(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    for name in (
        "README.md",
        "modeling_custom.py",
        "pytorch_model.bin",
        "training_args.pt",
        "LICENSE",
        "merges.txt",
        "fusegpt.json",
    ):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = set(Source.find(str(folder), None).small_files)
    assert {"LICENSE", "merges.txt", "chat_template.jinja", "generation_config.json"} <= found
    assert not found & {
        "README.md",
        "modeling_custom.py",
        "pytorch_model.bin",
        "training_args.pt",
        "fusegpt.json",
        "config.json",
    }


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("not json", "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        (
            json.dumps({"model_type": "my_own", "auto_map": {"AutoModel": "modeling.Mine"}}),
            "unknown to the installed transformers",
        ),
    ],
)
def test_a_bad_config_is_named(tmp_path, config, problem):
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=problem):
        Source.find(str(folder), None).config()
