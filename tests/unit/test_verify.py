"""Published models of which something is wrong, however small."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from faulty import failing
from published_models import published
from safetensors.torch import load_file, save_file

from fusegpt_ray import verify
from fusegpt_ray.cli import main
from fusegpt_ray.store.checkpoint import INDEX, SINGLE

MANIFEST = "fusegpt.json"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retries of storage have their own tests (`tests/integration/test_faults.py`)."""
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "0")


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file and in several."""
    folder = tmp_path_factory.mktemp("models")
    published(checkpoint("llama"), folder / "single")
    published(checkpoint("llama"), folder / "sharded", shard_bytes=25_000)
    return folder


@pytest.fixture(params=["single", "sharded"])
def model(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / request.param, tmp_path / "model"))


def weights(model: Path) -> Path:
    """One of the model's safetensors files."""
    return max(model.glob("*.safetensors"))


def seal(model: Path, **changes: Any) -> None:
    """Make the manifest agree with the files there: whoever published the model was wrong, not the
    way it took."""
    files = {file.name: file.read_bytes() for file in model.iterdir() if file.name != MANIFEST}
    records = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    manifest = json.loads((model / MANIFEST).read_text())
    (model / MANIFEST).write_text(json.dumps(manifest | {"files": records} | changes))


# --- good ones ---


def test_a_published_model_is_good(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model)]) == 0
    stdout, stderr = capsys.readouterr()
    files = [file for file in model.iterdir() if file.name != MANIFEST]
    size = sum(file.stat().st_size for file in files)
    assert stdout == f"good: {model}, {len(files)} files, {size} bytes\n"
    assert all(f"  {file.name}  is whole\n" in stderr for file in files)


def test_a_good_model_anywhere_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "notes.txt").write_text("mine")
    (model / "sub").mkdir()
    (model / "sub/more.txt").write_text("mine too")
    fsspec.filesystem("memory").put(f"{model}/", "/verify/model/", recursive=True)
    assert main(["verify", "memory://verify/model/", "--json"]) == 0
    stdout = capsys.readouterr().out
    result = json.loads(stdout)
    assert stdout.count("\n") == 1 and set(result) == {
        "model",
        "good",
        "files",
        "bytes",
        "problems",
        "remarks",
    }
    assert result["good"] is True and result["problems"] == []
    remarks = [
        {"file": name, "remark": "is not in the manifest"} for name in ("notes.txt", "sub/more.txt")
    ]
    assert result["remarks"] == remarks
    fsspec.filesystem("memory").rm("/verify", recursive=True)


def test_the_files_may_be_links(model: Path) -> None:
    """As in a hub's cache."""
    (model / "blobs").mkdir()
    for file in list(model.glob("*.*")):
        file.rename(model / "blobs" / file.name.replace(".", "-"))
        file.symlink_to(model / "blobs" / file.name.replace(".", "-"))
    assert verify(str(model))["good"]


# --- files that are not what was written ---


def flip(file: Path) -> str:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "has another checksum than was written"


def cut(file: Path) -> str:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    return f"has {size - 1} bytes, {size} were written"


def grow(file: Path) -> str:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0")
    return f"has {size + 1} bytes, {size} were written"


def lose(file: Path) -> str:
    file.unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [flip, cut, grow, lose])
@pytest.mark.parametrize("name", ["weights", "config.json", "README.md"])
def test_a_damaged_file_is_named(
    name: str, damage: Callable[[Path], str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights(model) if name == "weights" else model / name
    what = damage(file)
    assert main(["verify", str(model)]) == 1
    assert capsys.readouterr().out == f"{file.name} {what}\n"


def test_every_damaged_file_is_named(model: Path) -> None:
    files = sorted(file.name for file in model.iterdir() if file.name != MANIFEST)
    problems = [{"file": name, "problem": cut(model / name)} for name in files]
    assert verify(str(model))["problems"] == problems


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_checked(
    models: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models / "sharded", tmp_path / "model"))
    shard, short = weights(model).name, cut(model / "README.md")

    def broken(name: str, begin: int, data: bytes) -> bytes:
        if name == shard:
            raise ConnectionResetError("the line went dead")
        return data

    with failing(broken):
        problems = {row["file"]: row["problem"] for row in verify(f"faulty://{model}")["problems"]}
    assert problems == {
        "README.md": short,
        shard: "cannot be read (ConnectionResetError: the line went dead; given up after 1 try)",
    }


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "pytorch_model.bin",
        "old/consolidated.00.pth",
        "MODEL.GGUF",
        "pytorch_model.bin.index.json",
    ],
)
def test_weights_beside_the_manifest_are_a_problem(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"pickle")
    assert main(["verify", str(model)]) == 1
    assert (
        capsys.readouterr().out
        == f"{name} is not in the manifest, but a loader may take it for weights\n"
    )


# --- files that were written wrongly ---


def rewrite_index(model: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def index_points_at_another_shard(model: Path) -> str:
    other = min(model.glob("*.safetensors")).name
    moved = max(load_file(weights(model)))
    rewrite_index(model, lambda names: names.update({moved: other}))
    return f"{other} does not have the tensor {moved}"


def index_lacks_a_tensor(model: Path) -> str:
    lost = max(load_file(weights(model)))
    rewrite_index(model, lambda names: names.pop(lost) and None)
    return f"{weights(model).name} has the tensor {lost}"


def index_has_a_tensor_too_many(model: Path) -> str:
    rewrite_index(model, lambda names: names.update({"lm_head.bias": weights(model).name}))
    return f"{INDEX} {INDEX} lists lm_head.bias, no shard has it"


def index_points_outside(model: Path) -> str:
    rewrite_index(model, lambda names: names.update({"lm_head.bias": "../model.safetensors"}))
    return f"{INDEX} {INDEX} points outside its folder"


def index_is_no_index(model: Path) -> str:
    (model / INDEX).write_text("[]")
    return f"{INDEX} damaged {INDEX}"


def a_shard_that_the_index_leaves_out(model: Path) -> str:
    save_file({"extra": torch.zeros(2)}, model / "another.safetensors")
    return "another.safetensors has the tensor extra"


def a_tensor_in_two_shards(model: Path) -> str:
    name = max(load_file(weights(model)))
    other = min(model.glob("*.safetensors"))
    save_file(load_file(other) | {name: torch.zeros(2)}, other)
    return f"{other.name} has the tensor {name}"


def a_truncated_shard(model: Path) -> str:
    cut(weights(model))
    return f"{weights(model).name} damaged safetensors header"


def a_shard_that_is_none(model: Path) -> str:
    weights(model).write_bytes(b"\xff" * 100)
    return f"{weights(model).name} not a safetensors file"


def a_deeper_configuration(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    )
    return "config.json "


def no_configuration(model: Path) -> str:
    (model / "config.json").unlink()
    return "config.json "


@pytest.mark.parametrize(
    "mistake",
    [
        index_points_at_another_shard,
        index_lacks_a_tensor,
        index_has_a_tensor_too_many,
        index_points_outside,
        index_is_no_index,
        a_shard_that_the_index_leaves_out,
        a_tensor_in_two_shards,
        a_truncated_shard,
        a_shard_that_is_none,
        a_deeper_configuration,
        no_configuration,
    ],
)
def test_files_that_do_not_fit_together_are_found_though_every_checksum_is_right(
    mistake: Callable[[Path], str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(models / "sharded", tmp_path / "model"))
    said = mistake(model)
    seal(model)
    assert main(["verify", str(model)]) == 1
    stdout = capsys.readouterr().out
    assert stdout.startswith(said) and stdout.count("\n") == 1


def test_the_depth_is_that_of_the_kept_blocks(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(model, kept=[1, 2, 3, 4])
    assert main(["verify", str(model)]) == 1
    assert capsys.readouterr().out == "config.json says 3 blocks, fusegpt.json keeps 4\n"


def test_a_model_without_weights_is_not_good(model: Path) -> None:
    for file in [*model.glob("*.safetensors"), *model.glob(INDEX)]:
        file.unlink()
    seal(model)
    (problem,) = verify(str(model))["problems"]
    assert problem["file"] == SINGLE


# --- a user's mistakes ---


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (None, "holds no fusegpt.json"),
        (b"{", "is not JSON"),
        (b'{"format": 7, "kept": [], "files": {"a": {}}}', "has the format 7"),
        (
            b'{"format": 1, "kept": [], "files": {"../a": {}}}',
            "lists the file '../a', which would lie outside",
        ),
    ],
)
def test_without_a_manifest_to_go_by_it_is_the_users_mistake(
    raw: bytes | None, named: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / MANIFEST).unlink() if raw is None else (model / MANIFEST).write_bytes(raw)
    assert main(["verify", str(model), "--json"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and named in stderr and stderr.count("\n") == 1
