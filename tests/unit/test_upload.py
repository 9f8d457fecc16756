"""`fusegpt publish`, by the hub's own library, against a server that speaks the hub's protocol on
this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import hub_server
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from mistakes import MESSAGE, tree
from published_models import dressed, load, published, same_logits

from fusegpt_ray.cli import main
from fusegpt_ray.publishing import upload

REPO = "me/tiny-p40"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model in several shards."""
    folder = tmp_path_factory.mktemp("made")
    published(dressed(checkpoint("llama"), folder / "source"), folder / "tiny-p40", 25_000)
    return folder / "tiny-p40"


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models/tiny-p40"))


class Told(NamedTuple):
    code: int
    out: str
    err: str


Publish = Callable[..., Told]


@pytest.fixture
def publish(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Publish:
    """`fusegpt publish` where the hub is this server, and files of more than 10,000 bytes are
    large."""
    addresses = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload, "FROM_MEMORY", 10_000)

    def publish(*arguments: object) -> Told:
        told = Told(main(["publish", *map(str, arguments)]), *capsys.readouterr())
        assert TOKEN not in told.out + told.err
        return told

    return publish


def on_disk(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def to_be_sent(folder: Path) -> dict[str, bytes]:
    """All of it; where the dense model lay here is told as its name."""
    files = on_disk(folder)
    manifest = json.loads(files["fusegpt.json"])
    manifest["source"]["name"] = Path(manifest["source"]["name"]).name
    return files | {"fusegpt.json": (json.dumps(manifest, indent=1) + "\n").encode()}


def on_hub(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.repos[REPO].files(branch)
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def test_a_model_is_there_as_it_was_published(
    hub: Hub, model: Path, tmp_path: Path, publish: Publish
) -> None:
    before = to_be_sent(model)
    (model / "notes.txt").write_text("mine")
    first = publish(model, REPO, "--private", "--message", "A first one", "--json")
    again = publish(model, REPO)
    assert (first.code, again.code) == (0, 0), (first.err, again.err)
    repo = hub.repos[REPO]
    assert on_hub(hub) == before and repo.private
    assert repo.messages == ["initial", "A first one"]
    assert json.loads(first.out) == {
        "repo": REPO,
        "revision": "main",
        "commit": repo.branches["main"],
        "url": f"{hub.address}/{REPO}",
        "new": True,
    }
    assert "holds this model already" in again.out and len(repo.messages) == 2
    sent = [path for path in hub.written if path.startswith("/lfs/")]
    assert len(sent) == len(set(sent)) == len([*model.glob("*.safetensors")]) > 2


def test_from_another_store(hub: Hub, model: Path, publish: Publish) -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.put(str(model), "/bucket/tiny-p40", recursive=True)
    assert publish("memory://bucket/tiny-p40", REPO).code == 0
    assert on_hub(hub) == to_be_sent(model)


def test_no_place_on_this_machine_is_told(hub: Hub, model: Path, publish: Publish) -> None:
    manifest = json.loads((model / "fusegpt.json").read_text())
    manifest["recipe"]["calibration"] = {"data": "/home/alice/plans/words.jsonl"}
    (model / "fusegpt.json").write_text(json.dumps(manifest))
    assert publish(model, REPO).code == 0
    told = on_hub(hub)
    assert not any(b"alice" in data for data in told.values())
    there = json.loads(told["fusegpt.json"])
    assert there["recipe"]["calibration"] == {"data": "words.jsonl"}
    assert there["files"] == manifest["files"] and there.keys() == manifest.keys()
    assert "holds this model already" in publish(model, REPO).out


ROUND_TRIP = f"""
import sys, transformers
from fusegpt_ray.cli import main
model, home = sys.argv[1:]
assert main(["publish", model, {REPO!r}, "--quiet"]) == 0
loaded = transformers.AutoModelForCausalLM.from_pretrained({REPO!r}, dtype="auto")
loaded.save_pretrained(home + "/loaded")
sys.exit(main(["pull", "hf://{REPO}", home + "/pulled", "--quiet"]))
"""


def test_what_was_sent_loads_and_can_be_pulled(hub: Hub, model: Path, tmp_path: Path) -> None:
    """By the hub's name, in a process of its own that knows the hub from its environment alone."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    arguments = [sys.executable, "-c", ROUND_TRIP, str(model), str(tmp_path)]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert on_disk(tmp_path / "pulled") == to_be_sent(model)
    assert same_logits(load(tmp_path / "loaded"), load(model))


def test_a_branch_of_its_own(hub: Hub, model: Path, publish: Publish) -> None:
    """It holds this model alone, and `main` stays as it is. One that was only begun is gone on
    with."""
    other = {"config.json": b"{}", "model.safetensors": b"another"}
    hub.create(REPO, **other)
    hub.failing = "/commit/"
    assert publish(model, REPO, "--revision", "p40").code == 1
    hub.failing = ""
    told = publish(model, REPO, "--revision", "p40")
    assert told.code == 0 and told.out == f"{hub.address}/{REPO}/tree/p40\n", told.err
    assert on_hub(hub, "p40") == to_be_sent(model) and on_hub(hub) == other
    new = publish(model, "me/new", "--revision", "p40")
    assert new.code == 0 and hub.repos["me/new"].files("p40").keys() > on_disk(model).keys()


def test_files_that_the_hub_leaves_out_are_named(hub: Hub, model: Path, publish: Publish) -> None:
    """A new branch inherits the `.gitignore` of `main`, and the library says nothing of it."""
    hub.create(REPO, **{".gitignore": b"*.log\ntokenizer.json\n", "config.json": b"{}"})
    told = publish(model, REPO, "--revision", "p40")
    assert told.code == 2 and "'tokenizer.json'" in told.err and ".gitignore" in told.err


def test_after_a_failure_it_goes_on(hub: Hub, model: Path, publish: Publish) -> None:
    hub.failing = "/commit/"
    failed = publish(model, REPO)
    assert failed.code == 1 and f"failed: hf://{REPO}" in failed.err
    assert "Traceback" not in failed.err and "run the same command again" in failed.err
    assert on_hub(hub) == {}
    hub.failing, sent = "", [path for path in hub.written if path.startswith("/lfs/")]
    assert publish(model, REPO).code == 0 and on_hub(hub) == to_be_sent(model)
    assert [path for path in hub.written if path.startswith("/lfs/")] == sent


def test_what_changes_on_the_way_is_not_shown(
    hub: Hub, model: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes into the folder after the model was verified."""
    verify = upload.verify

    def then_damage(*arguments: Any) -> Any:
        found = verify(*arguments)
        flip(max(model.glob("*.safetensors")))
        return found

    monkeypatch.setattr(upload, "verify", then_damage)
    refused(publish(model, REPO), "URI", "has changed since it was verified")
    assert on_hub(hub) == {}


def refused(told: Told, key: str, problem: str) -> None:
    message = MESSAGE.search(told.err)
    assert told.code == 2 and message, told.err
    assert message["key"] == key and problem in message["problem"], told.err
    assert told.out == "" and "Traceback" not in told.err


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def unfinished(model: Path) -> None:
    (model / "fusegpt.json").unlink()


def with_a_pickle(model: Path) -> None:
    manifest = json.loads((model / "fusegpt.json").read_text())
    manifest["files"]["pytorch_model.bin"] = {"bytes": 0, "sha256": "0" * 64}
    (model / "fusegpt.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda model: flip(min(model.glob("*.safetensors"))), "another checksum than was written"),
        (unfinished, "holds no fusegpt.json"),
        (with_a_pickle, "lists 'pytorch_model.bin': weights, but not safetensors"),
        (shutil.rmtree, "holds no fusegpt.json"),
    ],
    ids=["damaged", "unfinished", "a pickle", "nothing"],
)
def test_nothing_is_sent_that_is_not_whole(
    spoil: Callable[[Path], object],
    problem: str,
    hub: Hub,
    model: Path,
    tmp_path: Path,
    publish: Publish,
) -> None:
    spoil(model)
    before = tree(tmp_path)
    refused(publish(model, REPO), "URI", problem)
    assert hub.written == [] and hub.repos == {} and tree(tmp_path) == before


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/ti ny", "https://hub/me/tiny", "me/--x", ""])
def test_names_of_repositories(name: str, hub: Hub, model: Path, publish: Publish) -> None:
    refused(publish(model, name), "REPO", "nam")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["", "a..b", "p 40", "/p40", "p40/", "-p", "p.lock"])
def test_names_of_branches(name: str, hub: Hub, model: Path, publish: Publish) -> None:
    refused(publish(model, REPO, f"--revision={name}"), "--revision", "not the name of a branch")
    assert hub.asked == []


def test_an_empty_message(model: Path, publish: Publish) -> None:
    refused(publish(model, REPO, "--message", " "), "--message", "is empty")


def test_where_one_may_not_write(hub: Hub, model: Path, publish: Publish) -> None:
    told = publish(model, "somebody-else/tiny")
    refused(told, "REPO", "the hub refuses it")
    assert "somebody-else" in told.err and hub.repos == {}


def test_a_repository_with_something_else_in_it(hub: Hub, model: Path, publish: Publish) -> None:
    hub.create(REPO, **{"fusegpt.json": b"{}", "model.safetensors": b"other"})
    hub.create("me/mine", **{"README.md": b"mine"})
    hub.create("me/public")
    before = {name: repo.files() for name, repo in hub.repos.items()}
    other = publish(model, REPO)
    refused(other, "REPO", "its branch main holds another model: fusegpt.json, model.safetensors")
    refused(publish(model, "me/mine"), "REPO", "files that are not of this model: README.md")
    refused(publish(model, "me/public", "--private"), "--private", "is there, and is public")
    assert {name: repo.files() for name, repo in hub.repos.items()} == before and not hub.written


@pytest.mark.parametrize("token", [None, "hf_unknown"])
def test_without_a_token(
    token: str | None, hub: Hub, model: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    told = publish(model, REPO)
    refused(told, "HF_TOKEN", "does not accept this token" if token else "nobody is logged in")
    assert "hf_unknown" not in told.err and hub.written == []


def test_without_a_hub(
    hub: Hub, model: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    told = publish(model, REPO)
    assert told.code == 1 and f"failed: hf://{REPO}" in told.err and "Traceback" not in told.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(publish(model, REPO), "HF_HUB_OFFLINE", "may not be reached")
