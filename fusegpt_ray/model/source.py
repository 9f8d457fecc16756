"""Where a model comes from: local folder, hub id or fsspec URI → a folder of files, and a local
copy of all that is small.

Nothing here reads weights; a hub model's configuration is fetched and checked before its weights
are downloaded.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusegpt_ray.errors import StorageError, UserError, reading_users_file
from fusegpt_ray.model import companions, hub
from fusegpt_ray.model.architecture import dense_stack
from fusegpt_ray.model.companions import CONFIG
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import diagnosis, storage
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, choice, read_index, read_weight_map
from fusegpt_ray.store.manifest import MANIFEST as MANIFEST

TOKENIZER_BYTES = 100_000_000
"""Of the largest file that may belong to a tokenizer: the largest of them have a third of it."""
LOOK_INTO = 20
"""Folders of a folder that is no model, to say where there is one."""
_WEB = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve)/([^/?#]+))?.*"
)
_BLOB = re.compile(r"/models--[^/]+/blobs/([0-9a-f]{64})$")
"""Where the hub's cache keeps a large file. Its name there is the SHA-256 that the hub knows it by;
small files are named by git's shorter one."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder (any fsspec URI) and what names it."""

    name: str
    """As the recipe says it."""
    revision: str | None
    folder: str
    """Where its files are; a hub model's files may not be there yet, see `fetch`."""
    listed: tuple[str, ...] = ()
    """All files of a hub model, by path, those that are not fetched among them; none where the hub
    could not be asked."""

    @classmethod
    def find(cls, name: str, revision: str | None, key: str = "model.source") -> Source:
        """Resolve a local folder, an fsspec URI or a hub id to a folder with its small files.

        Raises:
            UserError: it does not exist or may not be read.
        """
        if page := _WEB.fullmatch(name):
            fix = f"use the hub id {page[1]}" + (
                f" with model.revision: {page[2]}" if page[2] else ""
            )
            raise UserError(key, name, "the address of a page on the hub", fix)
        if name.startswith(("http://", "https://")):
            fix = "give a hub id such as meta-llama/Llama-2-7b-hf, a local folder, or a URI such as s3://"
            raise UserError(key, name, "the address of a web page, not of a folder", fix)
        if "://" in name:
            with reading_users_file(key, name, "cannot be reached", "check the URI's protocol"):
                storage.filesystem(name)
            return cls(name, revision, name.rstrip("/"))
        if _is_folder(name):
            return cls(name, revision, storage.absolute(name))
        if os.path.exists(path := os.path.expanduser(name)):
            raise UserError(key, name, *diagnosis.unusable_file(name, _beginning(path)))
        if not _HUB_ID.fullmatch(name):
            raise UserError(key, name, "no such folder", hub.FIX)
        return cls(name, revision, *hub.snapshot(name, revision, key, companions.small))

    @property
    def on_hub(self) -> bool:
        return "://" not in self.name and not _is_folder(self.name)

    def fetch(self) -> None:
        """Download a hub model's files into this node's cache, unless they are there (other sources
        are read where they are).
        """
        if not self.on_hub:
            return
        here, key = Path(self.folder), "model.source"
        commit, listed = here.name, self.listed  # the branch may have moved on since `find`
        if not here.is_dir():
            listed = hub.snapshot(self.name, commit, key, companions.small)[1]
        if not self._is_here(shards := self._shards(listed)):
            hub.snapshot(self.name, commit, key, lambda _: sorted(shards))

    def _shards(self, listed: Sequence[str]) -> set[str]:
        """A hub model's files of weights; `listed`: all of its files, if they are known.

        Raises:
            UserError: there are none that can be read.
        """
        found = choice(listed or storage.names(self.folder))
        if found is None and listed:
            problem, fix = diagnosis.unusable_folder(*_directly_in(listed))
            raise UserError(
                "model.source", self.name, problem or f"holds no {SINGLE} and no {INDEX}", fix
            )
        if found == INDEX:
            return set(read_weight_map(self.folder, "model.source").values())
        return {SINGLE}

    def _is_here(self, shards: Collection[str]) -> bool:
        return all((Path(self.folder) / shard).exists() for shard in shards)

    @cached_property
    def small_files(self) -> tuple[str, ...]:
        """Paths of the files besides weights that a published model takes along: tokenizer,
        processor, licence; never code.
        """
        return tuple(companions.taken(self._there))

    @cached_property
    def _there(self) -> list[str]:
        """Paths of the files in the folder, and in those directly in it that may belong to the
        model; of others their names.
        """
        files = storage.names(self.folder)
        for name in storage.folders(self.folder):
            inside = (
                storage.names(storage.join(self.folder, name))
                if companions.may_be_part(name)
                else []
            )
            files += [f"{name}/{file}" for file in inside] or [f"{name}/"]
        return files

    def left_out(self, weights: Collection[str]) -> list[str]:
        """What of the source a published model does not take along; `weights`: the files whose
        tensors it does.
        """
        return companions.left_out(self.listed or self._there, weights)

    def config(self, key: str = "model.source") -> dict[str, Any]:
        """config.json as it is.

        Raises:
            UserError: it is missing, unreadable or not JSON.
        """
        try:
            data = storage.read(storage.join(self.folder, CONFIG), storage.SMALL)
        except FileNotFoundError as error:
            files, folders = (
                _directly_in(self.listed)
                if self.listed
                else (storage.names(self.folder), storage.folders(self.folder))
            )
            problem, fix = diagnosis.unusable_folder(files, folders)
            if not problem and (inner := self._with_config(folders)):
                problem, fix = (
                    f"but in {', '.join(inner)}",
                    f"give the model's own folder, such as …/{inner[0]}",
                )
            missing = "no config.json there"
            raise UserError(
                key, self.name, f"{missing} ({problem})" if problem else missing, fix
            ) from error
        except StorageError:
            raise
        except OSError as error:
            raise UserError(
                key, self.name, f"cannot be read ({error})", "check the path and the permissions"
            ) from error
        diagnosis.refuse_other_kinds(key, self.name, CONFIG, data[: diagnosis.BEGINNING])
        with reading_users_file(
            key, self.name, "config.json is not JSON", "download the checkpoint again"
        ):
            raw = json.loads(data.decode())
        if not isinstance(raw, dict):
            raise UserError(
                key, self.name, "config.json is not a JSON object", "download the checkpoint again"
            )
        read_config(raw)
        return raw

    def _with_config(self, folders: Sequence[str]) -> list[str]:
        """Which of the first folders are models of their own."""
        return [
            name
            for name in folders[:LOOK_INTO]
            if f"{name}/{CONFIG}" in self.listed
            or storage.exists(storage.join(self.folder, name, CONFIG))
        ]

    def stack(self, fetches: bool = True) -> Stack:
        """The dense stack: reads config.json and the headers of the safetensors files (see
        `dense_stack` for errors).

        Args:
            fetches: whether a hub model is downloaded for it; else its headers are read where it
                is, and no weights can be read by the stack.
        """
        raw, key = self.config(), "model.source"
        if fetches:
            self.fetch()
        elif self.on_hub and not self._is_here(shards := self._shards(self.listed)):
            commit = Path(self.folder).name
            return dense_stack(raw, hub.headers(self.name, commit, sorted(shards), key))
        return dense_stack(raw, read_index(self.folder, key))

    def tokenizer(self, key: str = "model.source") -> Any:
        """The checkpoint's tokenizer.

        Raises:
            UserError: there is none that loads without custom code.
        """
        from transformers import AutoTokenizer

        fix = "put the model's tokenizer.json beside its weights"
        if "tokenizer.json" in self.small_files:
            fix = "download the tokenizer's files again (tokenizer.json, tokenizer_config.json, …)"
        return self._loaded(AutoTokenizer.from_pretrained, key, "its tokenizer does not load", fix)

    def processor(self, key: str = "model.source") -> Any:
        """What makes samples of images and text for the checkpoint.

        Raises:
            UserError: there is none that loads without custom code.
        """
        from fusegpt_ray.model.processors import load_processor

        problem = "its processor, which the images need, does not load"
        fix = (
            "put the files of the model's processor beside its weights (preprocessor_config.json),"
            " and install the packages that it asks for"
        )
        found = self._loaded(load_processor, key, problem, fix)
        if not hasattr(found, "image_processor"):  # of text alone, it is the tokenizer
            raise UserError(key, self.name, "it has no processor, which the images need", fix)
        return found

    def _loaded(self, load: Callable[..., Any], key: str, problem: str, fix: str) -> Any:
        """What `load` makes of the checkpoint's small files."""
        with tempfile.TemporaryDirectory() as folder:
            beginnings = self._copy_small(Path(folder))
            for name, beginning in beginnings.items():
                if diagnosis.is_placeholder(beginning):
                    diagnosis.refuse_other_kinds(key, self.name, name, beginning)
            try:
                with reading_users_file(key, self.name, problem, fix, folder):
                    return load(folder, trust_remote_code=False, local_files_only=True)
            except UserError:
                # Of others than texts the library says only that they are bad.
                for name, beginning in beginnings.items():
                    if name.endswith((".json", ".txt", ".jinja")):
                        diagnosis.refuse_other_kinds(key, self.name, name, beginning)
                raise

    def _copy_small(self, folder: Path) -> dict[str, bytes]:
        """All small files that may belong to a tokenizer, copied; how each begins."""
        beginnings = {}
        for name in (*self.small_files, CONFIG):
            if storage.size(file := storage.join(self.folder, name)) <= TOKENIZER_BYTES:
                copy = folder / name
                copy.parent.mkdir(exist_ok=True)
                storage.download(file, str(copy))
                with copy.open("rb") as opened:
                    beginnings[name] = opened.read(diagnosis.BEGINNING)
        return beginnings


def hub_sha256(file: str) -> str | None:
    """SHA-256, in hex, of a large file in the hub's cache, as the hub told it; None for any other.

    Nothing is read: a file of the cache is trusted as the libraries trust it that load it.
    """
    found = None if "://" in file else _BLOB.search(os.path.realpath(file))
    return found[1] if found else None


def _directly_in(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of the files, and of the folders, directly in what has files at these paths."""
    folders = {path.partition("/")[0]: None for path in paths if "/" in path}
    return [path for path in paths if "/" not in path], [*folders]


def _beginning(path: str) -> bytes:
    """Of a file; nothing of what is none or may not be read."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return b""
    with open(path, "rb") as file:
        return file.read(diagnosis.BEGINNING)


def _is_folder(name: str) -> bool:
    """False for what cannot be a path at all, too."""
    return os.path.isdir(os.path.expanduser(name))
