"""Which of a checkpoint's files, beside its weights, a published model takes along: judged by their
names alone.

The same for a folder, an object store and the hub. Code is never among them, and what would mislead
a loader (adapters, indexes of other shards) neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from transformers.utils import CHAT_TEMPLATE_DIR

from fusegpt_ray.store.checkpoint import INDEX, choice
from fusegpt_ray.store.manifest import MANIFEST, METRICS, unusable

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".pkl",
)
CONFIG = "config.json"
CARD = "README.md"
REPORT = "report.html"
PICTURES = {
    "sparsities": "sparsities.png",
    "scores": "scores.png",
    "groups": "groups.png",
    "healing": "healing.png",
}
"""The charts of a report that a model card shows, by what `reporting/charts.py` calls them."""
OWN = {CONFIG, INDEX, MANIFEST, METRICS, CARD, REPORT, *PICTURES.values()}
"""Written anew for the published model."""
_TOKENIZER = re.compile(
    r".+\.(json|txt|model|jinja2?|tiktoken|spm|vocab|bpe|codes|tokenizer)|.*tokenizer\.model.*|(vocab|merges|chat_template)\..*",
    re.IGNORECASE,
)
_TERMS = re.compile(
    r".*(licen[cs]e|copying|copyright|notice|use_policy|(acceptable|responsible)[-_"
    r" ]use|terms_of|terms\b|patents)[^/]*",
    re.IGNORECASE,
)
_NO_TEXT = re.compile(
    r".*\.(py\w*|ipynb|so|dll|sh|js|exe|zip|tar|gz|png|jpe?g|gif|svg|webp|mp4)", re.IGNORECASE
)
_MISLEADING = re.compile(
    r"adapter_.*|.*\.index\.json|(hf_)?quant(ize)?_config\.json"
    r"|(trainer_state|training_args|params|model_index)\.json|\..*",
    re.IGNORECASE,
)
_CODE = ("auto_map", "custom_pipelines")
"""Settings that say where code is."""
_MOST = 100
"""Files of a folder that belongs to a tokenizer; one with more is something else."""
_LOADED = {
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
}
"""What a processor's part saves into a folder of its own."""


def belongs(name: str) -> bool:
    """Whether a file of this name, without folders, goes along: tokenizer, processor, generation,
    licence, policy.
    """
    if (
        name in OWN
        or name.lower().endswith(WEIGHTS)
        or _MISLEADING.fullmatch(name)
        or _NO_TEXT.fullmatch(name)
    ):
        return False
    return bool(_TOKENIZER.fullmatch(name) or _TERMS.fullmatch(name))


def taken(files: Iterable[str]) -> list[str]:
    """Of a checkpoint's files, by path, those that go along, sorted: its own and those of folders
    that belong to them.
    """
    inside: dict[str, set[str]] = {}
    for name in files:
        folder, _, rest = name.rpartition("/")
        inside.setdefault(folder, set()).add(rest)
    found = []
    for folder, names in inside.items():
        if not folder:
            found += [name for name in names if belongs(name)]
        elif len(names) <= _MOST and _is_part(folder, names):
            found += [f"{folder}/{name}" for name in names if belongs(name)]
    # A manifest takes no name that a file system cannot hold, or takes for another's.
    apart = {name.casefold(): name for name in sorted(found, reverse=True) if not unusable(name)}
    written = {name.casefold() for name in OWN}
    return sorted(name for key, name in apart.items() if key not in written)


def small(files: Iterable[str]) -> list[str]:
    """Of a hub model's files those that are fetched before its weights: what says which and how."""
    files = list(files)
    return [*taken(files), *(name for name in (CONFIG, INDEX, CARD) if name in files)]


def may_be_part(folder: str) -> bool:
    """Whether it is worth looking into a folder of this name, directly in a checkpoint's."""
    return not folder.startswith(".") and not re.fullmatch(r"checkpoint-\d+", folder)


def _is_part(folder: str, names: Collection[str]) -> bool:
    """Of the tokenizer or processor, or of the licence; no model of its own."""
    if "/" in folder:
        return False
    named = folder == CHAT_TEMPLATE_DIR or _TERMS.fullmatch(folder) is not None
    return named or (CONFIG not in names and bool(_LOADED & {*names}))


def left_out(files: Iterable[str], weights: Collection[str]) -> list[str]:
    """What a published model does not take along, sorted: files, and folders as wholes. Hidden ones
    are not spoken of.

    `weights`: the files whose tensors are published.
    """
    files = list(files)
    along = {*taken(files), *weights, *(OWN if choice(files) == INDEX else OWN - {INDEX})}
    parts = {name.partition("/")[0] for name in along if "/" in name}
    left = {name for name in files if name not in along}
    shown = {
        name if name.partition("/")[0] in parts else re.sub(r"/.*", "/", name) for name in left
    }
    return sorted(name for name in shown if not name.startswith("."))


def without_code(name: str, data: bytes) -> bytes:
    """A file as it is published: a configuration does not say where code is that is not published.

    Such an `auto_map` would break the model for whoever loads it with `trust_remote_code`.
    """
    if not name.endswith(CONFIG):
        return data
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):  # no loader finds anything in it either
        return data
    kept = unmapped(whole)
    return data if kept == whole else (json.dumps(kept, indent=2) + "\n").encode()


def unmapped(value: Any) -> Any:
    """A configuration, or part of one, that does not say where code is."""
    if isinstance(value, dict):
        return {key: unmapped(item) for key, item in value.items() if key not in _CODE}
    return [unmapped(item) for item in value] if isinstance(value, list) else value
