"""The hub client against a server that speaks the hub's protocol, on this machine: what is
downloaded, and when."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from experts import save_split
from models import load_model, save_tiny
from words import add_tokenizer

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-org/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one model's folder as `NAME`, branch main at `COMMIT`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, list[tuple[str, str]]()

    @property
    def downloads(self) -> list[str]:
        return [
            path.rsplit("/", 1)[-1]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        ]

    @property
    def files(self) -> list[str]:
        return sorted(
            str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()
        )


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        path = self.path.split("?")[0].replace("/gpt2", f"/{NAME}")
        if path.startswith(f"/api/models/{NAME}/tree/"):
            sizes = {name: (self.server.folder / name).stat().st_size for name in self.server.files}
            tree = [
                {"type": "file", "path": name, "size": size, "oid": f"{number:040x}"}
                for number, (name, size) in enumerate(sizes.items())
            ]
            self._answer(json.dumps(tree).encode(), "application/json")
        elif path.startswith(f"/api/models/{NAME}"):
            files = [{"rfilename": name} for name in self.server.files]
            self._answer(
                json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode(),
                "application/json",
            )
        elif (
            path.startswith(f"/{NAME}/resolve/")
            and (file := self.server.folder / path.split("/", 5)[-1]).is_file()
        ):
            self._answer(file.read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = save_tiny("llama", tmp_path / "model")
    load_model(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    with serving(folder) as server:
        yield server


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def reached(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    reach(hub, tmp_path / "cache", monkeypatch)
    return hub


def reach(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client of this process asks this server: it read its environment at its import."""
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{hub.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)


def in_a_process(code: str, hub: Hub, home: Path) -> dict[str, Any]:
    """What `code` prints as JSON, run where the hub is this server and its cache is in `home`."""
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    lines = "import json\nfrom fusegpt_ray.model.source import Source\n" + code
    done = subprocess.run(
        [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the hub client has nothing to say beside us"
    return json.loads(done.stdout.splitlines()[-1])


def test_configuration_first_then_the_shards_and_never_pickles_or_code(
    reached: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Source.find(NAME, None)
    source.config()
    assert len(source.stack().blocks) > 0
    assert source.folder.endswith(COMMIT)
    shards = sorted(file.name for file in reached.folder.glob("*.safetensors"))
    assert len(shards) > 2
    fetched = reached.downloads
    assert fetched.index("config.json") < fetched.index(shards[0])
    assert sorted(name for name in fetched if name.endswith(".safetensors")) == shards
    assert not {"pytorch_model.bin", "modeling_tiny.py"} & {*fetched}
    assert capfd.readouterr().err == "", "the hub client has nothing to say beside us"


def test_headers_alone_tell_the_stack(hub: Hub, tmp_path: Path) -> None:
    """For a plan; a dtype that nobody knows is told before any weights are fetched."""
    shard = min(hub.folder.glob("*.safetensors"))
    code = f"""
from pathlib import Path
from fusegpt_ray.errors import UserError
source = Source.find({NAME!r}, None)
told = source.stack(fetches=False)
refs = [told.trunk, *(block.weights for block in told.blocks)]
shapes = [sorted((n, r.dtype.itemsize, r.shape, r.end - r.begin) for n, r in part.items())
          for part in refs]
file = Path({str(shard)!r})
file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F99"', 1))
try:
    Source.find({NAME!r}, None).stack(fetches=False)
    problem = ""
except UserError as error:
    problem = str(error)
print(json.dumps([shapes, problem]))
"""
    found, problem = in_a_process(code, hub, tmp_path / "home")
    assert "unknown dtype 'F99'" in problem and NAME in problem
    shard.write_bytes(shard.read_bytes().replace(b'"F99"', b'"F32"', 1))
    dense = Source.find(str(hub.folder), None).stack()
    for part, told in zip(
        [dense.trunk, *(block.weights for block in dense.blocks)], found, strict=True
    ):
        there = sorted(
            [name, ref.dtype.itemsize, [*ref.shape], ref.end - ref.begin]
            for name, ref in part.items()
        )
        assert told == there
    assert not list((tmp_path / "home").rglob("*.safetensors"))


SHALLOWER = {"method": "mi", "sparsity": 0.2}


def test_what_headers_tell_is_refused_before_any_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that share weights, and a deeper model, of Jamba, whose blocks are of several kinds by
    their numbers. A plan without mistakes does fetch.
    """
    save_split("jamba", tmp_path / "jamba")
    add_tokenizer(tmp_path / "jamba")
    common = {
        "model": {"source": NAME},
        "calibration": {"data": "text.txt", "length": 12},
        "output": {"uri": str(tmp_path / "out"), "name": "demo", "samples": []},
    }

    def told(changes: dict[str, Any]) -> tuple[str, int]:
        """The mistake, and how many files of weights are in the cache then."""
        problem = ""
        try:
            plan(Recipe.parse(common | changes), Display())
        except UserError as error:
            problem = f"{error.key}: {error.problem}"
        return problem, len([*(tmp_path / "cache").rglob("*.safetensors")])

    with serving(tmp_path / "jamba") as hub:
        reach(hub, tmp_path / "cache", monkeypatch)
        divides, no = told(SHALLOWER | {"heal": {"share": 3}})
        kinds, none = told(SHALLOWER | {"heal": {"share": 2}})
        depth, zero = told({"method": "tli", "every": 2})
        assert told(SHALLOWER) == ("", 1)
    assert "heal.share: does not divide the 4 blocks" in divides
    assert "heal.share: the model's blocks have matrices of several shapes" in kinds
    assert "model.source: block" in depth and "would become block" in depth
    assert no == none == zero == 0


def test_a_node_that_joins_later_fetches_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    """The source of the driver, sent to a node with an empty cache at the same path."""
    home = tmp_path / "home"
    (folder,) = in_a_process(
        f"source = Source.find({NAME!r}, 'main')\nprint(json.dumps([source.folder]))", hub, home
    )
    shutil.rmtree(home)
    hub.asked.clear()
    fetch = f"source = Source({NAME!r}, 'main', {folder!r})\nsource.fetch()\n"
    fetch += "print(json.dumps([len(source.stack().blocks)]))"
    assert in_a_process(fetch, hub, home)[0] > 0
    assert all("main" not in path for _, path in hub.asked), "the branch may have moved"
    assert sorted(path.name for path in Path(folder).glob("*.safetensors")) == sorted(
        file.name for file in hub.folder.glob("*.safetensors")
    )
    hub.asked.clear()
    in_a_process(fetch, hub, home)
    assert hub.asked == [], "what is there is not asked for again"


def test_the_same_files_as_of_a_folder(hub: Hub, tmp_path: Path) -> None:
    for name in (
        "LICENCE",
        "USE_POLICY.md",
        "qwen.tiktoken",
        "tokenizer.model.v3",
        "additional_chat_templates/rag.jinja",
    ):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text("{}")
    (hub.folder / "images").mkdir()
    (hub.folder / "images/plot.png").write_bytes(b"png")
    here = Source.find(str(hub.folder), None)
    code = f"source = Source.find({NAME!r}, None)\n"
    code += "print(json.dumps([source.small_files, source.left_out([])]))"
    assert in_a_process(code, hub, tmp_path / "home") == [[*here.small_files], here.left_out([])]
    assert {"LICENCE", "additional_chat_templates/rag.jinja"} <= {*here.small_files}
    assert not {"plot.png", "modeling_tiny.py"} & {*hub.downloads}


def test_a_single_file_goes_before_an_old_index(hub: Hub, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "newer")
    shutil.copy(tmp_path / "newer/model.safetensors", hub.folder)
    used = "{ref.file for ref in source.stack().trunk.values()}"
    code = f"source = Source.find({NAME!r}, None)\nprint(json.dumps([*{used}]))"
    (file,) = in_a_process(code, hub, tmp_path / "home")
    assert file.endswith("/model.safetensors")
    assert [name for name in hub.downloads if name.endswith(".safetensors")] == [
        "model.safetensors"
    ]


def test_a_name_of_one_word(hub: Hub, tmp_path: Path) -> None:
    """Such as gpt2; a folder of that name goes first."""
    home = tmp_path / "home"
    code = "source = Source.find('gpt2', None)\nprint(json.dumps([source.on_hub, source.folder]))"
    on_hub, folder = in_a_process(code, hub, home)
    assert on_hub and folder.endswith(COMMIT)
    (tmp_path / "gpt2").mkdir()
    on_hub, folder = in_a_process(f"import os\nos.chdir({str(tmp_path)!r})\n{code}", hub, home)
    assert not on_hub and folder == str(tmp_path / "gpt2")


def test_without_a_network_the_cache_or_one_clear_message(reached: Hub) -> None:
    folder = Source.find(NAME, None).folder
    with pytest.raises(UserError, match="check the spelling") as unknown:
        Source.find("some-org/other", None)
    assert "the hub does not give it (Client error '404" in unknown.value.problem
    reached.shutdown()
    reached.server_close()  # whoever asks is refused
    assert Source.find(NAME, None).folder == folder
    with pytest.raises(UserError, match="offline, give a local folder") as alone:
        Source.find("some-org/other", None)
    problem = alone.value.problem
    assert "cannot be reached" in problem and "nor is it in the cache here" in problem


OTHERS = {
    "adapter_config.json": "an adapter (adapter_config.json), not a whole model",
    "tiny.Q4_0.gguf": "a GGUF checkpoint (tiny.Q4_0.gguf)",
    "pytorch_model.bin": "not a safetensors checkpoint (found pytorch_model.bin)",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_checkpoints_are_told_by_what_the_hub_lists(
    name: str, reached: Hub, tmp_path: Path
) -> None:
    """None of their files is fetched."""
    for file in reached.folder.iterdir():
        if file.name != "config.json" or not name.endswith(".bin"):
            file.unlink()
    (reached.folder / name).write_bytes(b"none of ours")
    for fetches in (False, True):
        with pytest.raises(UserError) as caught:
            Source.find(NAME, None).stack(fetches)
        assert OTHERS[name] in caught.value.problem
        assert caught.value.value == NAME
    assert name not in reached.downloads
