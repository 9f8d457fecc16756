"""What the fuzzing throws at readers: good recipes, manifests, records, indexes and safetensors
files, altered in a few places, and things that were never any.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import yaml
from hypothesis import strategies as st

RECIPE: dict[str, Any] = {
    "model": {"source": "meta-llama/Llama-2-7b-hf", "revision": "main", "dtype": "auto"},
    "sparsity": [0.2, 0.25],
    "method": "fusegpt",
    "calibration": {
        "data": "wikitext",
        "config": "wikitext-2-raw-v1",
        "windows": 1024,
        "length": 2048,
        "seed": 3,
    },
    "evaluation": {"wikitext2": {"data": "s3://bucket/text.jsonl", "column": "text", "windows": 5}},
    "importance": {"windows": 32, "batch": 4, "racing": 0.05},
    "preset": "paper",
    "fusion": {"rank": 16, "betas": [0.9, 0.95], "learning_rate": 1e-3},
    "cluster": {"engine": "local", "workers": 2, "micro_batch": 1},
    "output": {"uri": "s3://bucket/models", "name": "llama", "shard_gb": 5.0},
}
FILE = {"bytes": 4, "sha256": "0" * 64}
MANIFEST = {
    "format": 1,
    "kept": [0, 2],
    "files": {"config.json": FILE, "model.safetensors": FILE},
    "perplexity": {"a": {"dense": 2.5}},
}
RECORD = {
    "round": {"removed": 3, "losses": [0.5, 0.25]},
    "stack": {"prefix": "model.layers."},
    "files": {},
}
INDEXED = {
    "metadata": {"total_size": 24},
    "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [34, 42]},
    "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [42, 42]},
}
DATA = bytes(range(42))
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of an element, by dtype."""
NUMBERS = st.integers(-3, 70) | st.sampled_from(
    [2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, math.inf, math.nan]
)
STRINGS = st.text(max_size=8) | st.sampled_from(
    ["\0", "\ud800", "..", "/", "s3://a:b@c/d", "U16", "mi", "", *SIZES]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=12,
)
WORDS = (
    "[ ] { } \" , : - 0 1e9 null NaN true \\ud800 &a *a !! \xff \0 % ' ? <<: __metadata__ "
    '"a.weight": 99999999999999999999999'
)
TOKENS = st.sampled_from(
    [
        word.encode("latin-1")
        for word in (*WORDS.split(" "), "\n", "  ", "\t", "- ", "? ", "|\n", "\xef\xbb\xbf")
    ]
)
EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 12), st.one_of(TOKENS, st.binary(max_size=3))),
    min_size=1,
    max_size=5,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """A few places overwritten, cut out or filled in."""
    for place, cut, put in edits:
        place %= len(data) + 1
        data = data[:place] + put + data[place + cut :]
    return data


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of all parts of a tree but the whole."""
    below = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [found for key, value in below for found in [(*path, key), *_paths(value, (*path, key))]]


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with some parts replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(tree)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        inside = tree
        for key in parents:
            inside = inside[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "replace":
            inside[last] = draw(TREES)
        elif what == "remove":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(STRINGS)] = draw(TREES)
        else:
            inside.append(draw(TREES))
    return tree


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=True).encode()


def _file(header: bytes, data: bytes = DATA) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def malformed(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON like this one with some parts replaced, or its text, or anything."""
    text = EDITS.map(lambda edits: edited(_json(tree), edits))
    return st.one_of(altered(tree).map(_json), text, TREES.map(_json), st.binary(max_size=64))


def _laid_out(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A whole file of tensors with these names, dtypes and shapes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return _file(_json(header), bytes(end))


YAML = yaml.safe_dump(RECIPE, sort_keys=False).encode()
WHOLE = _file(_json(HEADER))
SHAPED = st.tuples(st.sampled_from(list(SIZES)), st.lists(st.integers(0, 5), max_size=4))
LAID_OUT = st.dictionaries(STRINGS, SHAPED, max_size=5).map(_laid_out)
FILES = st.one_of(
    LAID_OUT,
    st.tuples(LAID_OUT, EDITS).map(lambda parts: edited(*parts)),
    EDITS.map(lambda edits: edited(WHOLE, edits)),
    EDITS.map(lambda edits: _file(edited(_json(HEADER), edits))),
    malformed(HEADER).map(_file),
    st.tuples(altered(HEADER).map(_json), st.binary(max_size=60)).map(lambda parts: _file(*parts)),
    st.binary(max_size=64),
)
