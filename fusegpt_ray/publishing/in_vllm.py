"""What vLLM takes from a block's number, where transformers has a list in config.json, from which
publishing takes the blocks that went. vLLM is right about such a model only if the list is still
what the numbers say: where neighbours went in pairs, say, and two kinds of blocks still alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.shrink import shrink_config

SEEN_IN = "0.32"
"""The version of vLLM of which all this is known; `make served` looks again."""
INSTEAD = "--model-impl transformers"
"""With it vLLM runs the class of transformers, where it can."""


def _alternating(text: PretrainedConfig) -> list[str]:
    kinds = ("sliding_attention", "full_attention")
    return [kinds[number % 2] for number in range(text.num_hidden_layers)]


def _every_nth(text: PretrainedConfig) -> list[int]:
    step = text.interleave_moe_layer_step
    return [*range(step - 1, text.num_hidden_layers, step)] if step else []


@dataclass(frozen=True)
class ByNumber:
    """What vLLM makes of the blocks' numbers."""

    what: str
    """In words, for messages."""
    key: str
    """The list of config.json that says it otherwise."""
    list_of: Callable[[PretrainedConfig], list[Any]]
    """What it would have to be."""
    instead: str
    """How to use a model of which it is something else."""


BY_NUMBER = {
    "gpt_oss": ByNumber(
        "the kind of a block's attention", "layer_types", _alternating, f"serve it with {INSTEAD}"
    ),
    "llama4_text": ByNumber(
        "whether a block has experts", "moe_layers", _every_nth, "use transformers instead"
    ),
}
"""By the text model's type."""


def wrong_in_vllm(config: Mapping[str, Any]) -> str:
    """That vLLM is wrong about the model of this config.json, and what to do; or nothing."""
    text = read_config(config).get_text_config()
    rule = BY_NUMBER.get(text.model_type)
    if rule is None or getattr(text, rule.key) == rule.list_of(text):
        return ""
    return f"{_told(rule)}. That is wrong for this model: {rule.instead}"


def maybe_wrong_in_vllm(dense: Stack) -> str:
    """The same of models with other blocks than the dense one, before it is known which."""
    rule = BY_NUMBER.get(read_config(dense.config).get_text_config().model_type)
    if rule is None:
        return ""  # other classes may not take a model without its first block
    # A block less at the beginning moves all others, and so changes every order that can change.
    if not wrong_in_vllm(shrink_config(dense.drop(dense.kept[0]))):
        return ""
    told = f"{_told(rule)}. That is wrong for a model with gaps that change their order"
    return f"{told}: {rule.instead}. The README.md of each says whether it is one"


def _told(rule: ByNumber) -> str:
    return f"vLLM {SEEN_IN} takes {rule.what} from its number, not from {rule.key} in config.json"
