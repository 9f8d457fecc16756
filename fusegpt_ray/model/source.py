"""Where a model comes from: local folder, hub id or fsspec URI → a folder of files, and a local copy of all that is small.

Nothing here reads weights; a hub model's configuration is fetched and checked before its weights are downloaded.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.model.anatomy import dense_stack
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, read_index, read_weight_map
from fusegpt_ray.store.manifest import MANIFEST as MANIFEST

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
HUB_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
TOKENIZER_BYTES = 100_000_000
"""Of the largest file that may belong to a tokenizer: the largest of them have a third of it."""
SMALL = re.compile(r"(?i).+\.(json|txt|model|jinja|tiktoken|spm|vocab)|(license|notice|use_policy).*")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder (any fsspec URI) and what names it."""

    name: str
    """As the recipe says it."""
    revision: str | None
    folder: str
    """Where its files are; a hub model's files may not be there yet, see `fetch`."""

    @classmethod
    def find(cls, name: str, revision: str | None, key: str = "model.source") -> Source:
        """Resolve a local folder, an fsspec URI or a hub id to a folder with its small files.

        Raises:
            UserError: it does not exist or may not be read.
        """
        if "://" in name:
            try:
                storage.filesystem(name)
            except (ValueError, ImportError) as error:  # the protocol is unknown, or its package is missing
                raise UserError(key, name, f"cannot be reached ({error})", "check the URI's protocol") from error
            return cls(name, revision, name.rstrip("/"))
        if _is_folder(name):
            return cls(name, revision, storage.absolute(name))
        if os.path.exists(os.path.expanduser(name)):
            raise UserError(key, name, "a file, not a folder", "give the folder that holds config.json")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise UserError(
                key, name, "no such folder", "give an existing folder, a URI, or a hub id such as meta-llama/Llama-2-7b-hf"
            )
        return cls(name, revision, _snapshot(name, revision, key, HUB_SMALL))

    @property
    def on_hub(self) -> bool:
        return "://" not in self.name and not _is_folder(self.name)

    def fetch(self) -> None:
        """Download a hub model's files into this node's cache, unless they are there (other sources are read where they are)."""
        if not self.on_hub:
            return
        here, key = Path(self.folder), "model.source"
        commit = here.name  # the branch may have moved on since `find`
        if not here.is_dir():
            _snapshot(self.name, commit, key, HUB_SMALL)
        if (here / SINGLE).exists():
            return
        indexed = (here / INDEX).exists()
        shards = sorted({*read_weight_map(self.folder, key).values()}) if indexed else []
        if not shards or not all((here / shard).exists() for shard in shards):
            _snapshot(self.name, commit, key, [SINGLE])  # from_pretrained, too, looks for it first
            if shards and not (here / SINGLE).exists():
                _snapshot(self.name, commit, key, shards)

    @cached_property
    def small_files(self) -> tuple[str, ...]:
        """Names of the files besides weights that a published model takes along: tokenizer, processor, licence; never code."""
        own = {"model.safetensors.index.json", "config.json", "README.md", MANIFEST}
        found = storage.names(self.folder)
        return tuple(n for n in found if SMALL.fullmatch(n) and n not in own and not n.endswith((".index.json", *WEIGHTS)))

    def config(self, key: str = "model.source") -> dict[str, Any]:
        """config.json as it is.

        Raises:
            UserError: it is missing, unreadable or not JSON.
        """
        try:
            raw = storage.read_json(storage.join(self.folder, "config.json"))
        except FileNotFoundError as error:
            raise UserError(key, self.name, "no config.json there", "give the folder of a Hugging Face checkpoint") from error
        except (ValueError, RecursionError) as error:
            raise UserError(key, self.name, f"config.json is not JSON ({error})", "download the checkpoint again") from error
        except StorageError:
            raise
        except OSError as error:
            raise UserError(key, self.name, f"cannot be read ({error})", "check the path and the permissions") from error
        if not isinstance(raw, dict):
            raise UserError(key, self.name, "config.json is not a JSON object", "download the checkpoint again")
        read_config(raw)
        return raw

    def stack(self) -> Stack:
        """The dense stack: reads config.json and the headers of the safetensors files (see `dense_stack` for errors)."""
        raw = self.config()
        self.fetch()
        return dense_stack(raw, read_index(self.folder, "model.source"))

    def tokenizer(self, key: str = "model.source") -> Any:
        """The checkpoint's tokenizer.

        Raises:
            UserError: there is none that loads without custom code.
        """
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name in (*self.small_files, "config.json"):
                if storage.size(file := storage.join(self.folder, name)) <= TOKENIZER_BYTES:
                    storage.download(file, str(Path(folder) / name))
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # of whatever kind: what these files hold decides how the library fails
                problem = f"its tokenizer does not load ({f'{error}'.partition(chr(10))[0][:300] or type(error).__name__})"
                raise UserError(key, self.name, problem, "put the model's tokenizer.json beside its weights") from error


def _is_folder(name: str) -> bool:
    """False for what cannot be a path at all, too."""
    return os.path.isdir(os.path.expanduser(name))


def _snapshot(name: str, revision: str | None, key: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        problem = f"no such folder here, and the hub does not give it ({str(error).splitlines()[0]})"
        fix = "check the spelling; for a gated model set HF_TOKEN; offline, give a local folder"
        raise UserError(key, name, problem, fix) from error
