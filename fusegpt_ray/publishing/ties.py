"""Which weights of a checkpoint are one and the same, as `from_pretrained` decides it: by its
config.json and its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fusegpt_ray.model.config import build_skeleton, read_config
from fusegpt_ray.model.names import Names
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.shrink import text_section
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import TensorRef


def tied(stack: Stack) -> set[str]:
    """The model's names of weights that are another's: the head that is the embedding.

    Those that config.json ties, but for pairs of which both are stored with different values.
    """
    model = build_skeleton(stack.config)
    names = Names.of(model)
    stored = {names.inside(name): ref for name, ref in stack.trunk.items()}
    ties = model.all_tied_weights_keys.items()
    return {
        target
        for target, source in ties
        if not {target, source} <= stored.keys() or _equal(stored[target], stored[source])
    }


def with_true_ties(config: Mapping[str, Any], stack: Stack) -> dict[str, Any]:
    """The stack's config.json, which ties nothing where nothing is: some loaders ask nothing
    else.
    """
    raw = copy.deepcopy(dict(config))
    if not build_skeleton(raw).all_tied_weights_keys or tied(stack):
        return raw
    whole = read_config(raw)
    for section in (raw, text_section(raw, whole, whole.get_text_config())):
        section["tie_word_embeddings"] = False
    return raw


def _equal(first: TensorRef, second: TensorRef) -> bool:
    """Compared piece by piece: these are the largest tensors of a model."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    size = first.end - first.begin
    for at in range(0, size, storage.STEP):
        end = min(at + storage.STEP, size)
        pieces = [
            storage.read_ranges(ref.file, [(ref.begin + at, ref.begin + end)])[0]
            for ref in (first, second)
        ]
        if pieces[0] != pieces[1]:
            return False
    return True
