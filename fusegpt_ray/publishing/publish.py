"""A stack → an ordinary Hugging Face checkpoint, streamed tensor by tensor; its manifest last.

A reader trusts only the manifest: a folder without `fusegpt.json` is not a model. Every file is
read back from the store as soon as it is written, and the whole is proven to be the model before
the manifest is written (see `proof.py`). Shards are written by several processes and threads at the
same time (see `shards.py`).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fusegpt_ray.model.companions import without_code
from fusegpt_ray.model.config import auto_class
from fusegpt_ray.model.licence import licence_of
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.in_vllm import wrong_in_vllm
from fusegpt_ray.publishing.modelcard import model_card
from fusegpt_ray.publishing.proof import open_published, read_back
from fusegpt_ray.publishing.shards import Put, Shards, put_shards, remove_unfinished
from fusegpt_ray.publishing.shrink import model_entries, shrink_config
from fusegpt_ray.publishing.ties import with_true_ties
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, FileRecord
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.manifest import encoded
from fusegpt_ray.store.writer import Entry, plan_shards

PACKAGES = ("fusegpt-ray", "torch", "transformers", "ray", "deepspeed", "datasets")


@dataclass(frozen=True)
class Published:
    """A finished model."""

    uri: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Extra:
    """A file for people that lies beside the model."""

    name: str
    data: bytes
    title: str = ""
    """Of a picture, which the card shows."""


Illustrate = Callable[[Mapping[str, Any]], Sequence[Extra]]
"""Makes such files of the manifest, which is whole but for its list of files."""


def no_extras(_: Mapping[str, Any]) -> Sequence[Extra]:
    """Nothing lies beside the model."""
    return ()


Measure = Callable[[Stack], Mapping[str, Any]]
"""Measures the published model, given as its stack, before the manifest is written. It returns
facts for the manifest, and raises if the model is not what it should be."""


def publish(
    folder: str,
    stack: Stack,
    dense: Stack,
    source: Source,
    shard_bytes: int,
    facts: Mapping[str, Any],
    measure: Measure = lambda _: {},
    fence: Fence = nobody_else,
    put_them: Put = put_shards,
    illustrate: Illustrate = no_extras,
) -> Published:
    """Write the model of `stack` to `folder`, in the dense checkpoint's dtypes.

    `facts` and those that `measure` finds go into the manifest and the card. `fence` is called
    before every write, and raises if another run writes there. `put_them` writes the shards.
    `illustrate` makes what lies beside them.

    Raises:
        StorageError: the store failed. No manifest is written then, nor in the next case.
        ProofError: what arrived is not what was sent, or not the model.
        FileExistsError: a finished model has this name, or another run published it meanwhile.
    """
    if storage.exists(storage.join(folder, MANIFEST)):
        raise FileExistsError(f"a finished model is already at {folder}")
    files: dict[str, FileRecord] = {}
    put = partial(_put, folder, files, fence)
    entries = list(model_entries(stack, dense))
    shards = plan_shards(entries, shard_bytes)
    written, publishing = _put_shards(folder, shards, fence, put_them)
    files.update(written)
    if list(files) != [SINGLE]:
        put(INDEX, json.dumps(_index(shards), indent=2).encode())
    config = with_true_ties(shrink_config(stack), stack)
    put("config.json", (json.dumps(config, indent=2) + "\n").encode())
    for file in source.small_files:
        put(file, without_code(file, storage.read(storage.join(source.folder, file))))
    measured = measure(open_published(folder, {entry.name: entry for entry in entries}, stack))
    told = {**facts, **measured, "publishing": publishing}
    if wrong := wrong_in_vllm(config):
        told["wrong_in_vllm"] = wrong
    manifest: dict[str, Any] = {"format": 1, **told, **_about(stack, dense, source)}
    extras = illustrate(manifest)
    for extra in extras:
        put(extra.name, extra.data)
    pictures = {extra.name: extra.title for extra in extras if extra.title}
    name = folder.rsplit("/", 1)[-1]
    card = model_card(name, manifest, auto_class(stack.config), pictures)
    put("README.md", card.encode())
    manifest["files"] = {name: record.to_json() for name, record in sorted(files.items())}
    fence()
    storage.create(storage.join(folder, MANIFEST), encoded(manifest))
    return Published(folder, manifest)


def _put(folder: str, files: dict[str, FileRecord], fence: Fence, name: str, data: bytes) -> None:
    """Write a small file, and note it in `files`."""
    fence()
    storage.write(storage.join(folder, name), data)
    files[name] = FileRecord.of(data)
    read_back(storage.join(folder, name), files[name])


def _about(stack: Stack, dense: Stack, source: Source) -> dict[str, Any]:
    """What a manifest tells of the model and of where it comes from."""
    licence = licence_of(source)
    return {
        "source": {"name": source.name, "revision": source.revision, "on_hub": source.on_hub},
        **({"license": licence} if licence else {}),
        "dense_blocks": len(dense),
        "kept": list(stack.kinds),
        "left_out": left_out(source, dense),
        "versions": versions(),
    }


def _put_shards(
    folder: str, shards: Shards, fence: Fence, put_them: Put
) -> tuple[Mapping[str, FileRecord], dict[str, float]]:
    """What was written, and how fast it was written and read back."""
    remove_unfinished(folder, fence)  # of an attempt that was killed
    began = time.monotonic()
    files = put_them(folder, shards, fence)
    seconds = time.monotonic() - began
    remove_unfinished(folder, fence)  # of a worker that was lost
    size = sum(record.size for record in files.values())
    rate = round(size / 1e9 / seconds, 3)
    return files, {"bytes": size, "seconds": round(seconds, 3), "gb_per_second": rate}


def left_out(source: Source, dense: Stack) -> list[str]:
    """What the source has and a published model lacks: files, folders ("images/") and tensors that
    no class loads.
    """
    used = {ref.file.rsplit("/", 1)[-1] for ref in dense.refs}
    return [*source.left_out(used), *dense.ignored]


def _index(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    size = sum(entry.bytes for entries in shards.values() for entry in entries)
    weight_map = {entry.name: name for name, entries in shards.items() for entry in entries}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
