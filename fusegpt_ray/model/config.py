"""A checkpoint's config.json → the configuration and the empty model that transformers makes of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from fusegpt_ray.errors import UserError

KEY = "model.source"
_PARTS = 10_000
"""More blocks, heads or experts than any model has: a module is made for each before its weights are looked at."""
_ARCHITECTURES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}


def read_config(raw: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The configuration object of a config.json.

    Raises:
        UserError: the model type is unknown to transformers (custom code is never run), or a value is invalid.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        fix = "use an architecture that transformers itself contains; trust_remote_code stays off"
        raise UserError(KEY, kind, "this model_type is unknown to the installed transformers", fix)
    if absurd := _absurd(raw):
        raise UserError(KEY, kind, f"config.json is not valid ({absurd})", "download the checkpoint again")
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(raw)))
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError, StrictDataclassError) as error:
        raise UserError(KEY, kind, f"config.json is not valid ({error})", "download the checkpoint again") from error
    if raw.get("quantization_config"):
        fix = "use the checkpoint in its original dtype; quantise what this tool publishes"
        raise UserError(KEY, kind, "a quantized checkpoint, whose weights cannot be fused", fix)
    config.get_text_config().use_cache = False
    return config


def _absurd(raw: Mapping[str, Any]) -> str:
    """A number of parts, anywhere in a config.json, that no model has and no memory holds: "num_hidden_layers = 1000000000"."""
    for key, value in raw.items():
        if isinstance(value, dict) and key.endswith("_config") and (found := _absurd(value)):
            return found
        if isinstance(value, int) and value > _PARTS and re.search(r"n.*(layer|expert|head|stage)", key):
            return f"{key} = {value:.3g}"
    return ""


def build_skeleton(raw: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """The dense model with every parameter on the meta device (no memory) and every buffer real."""
    config = read_config(raw)
    names = config.architectures or []
    model_class = getattr(transformers, names[0]) if names and names[0] in _ARCHITECTURES else None
    if model_class is None:
        known = bool(names) and isinstance(names[0], str) and isinstance(getattr(transformers, names[0], None), type)
        problem = "not a causal language model" if known else "config.json names no architecture that transformers knows"
        fix = "use a causal language model, or an image-text-to-text model, that transformers itself contains"
        raise UserError(KEY, names, problem, fix)
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(config)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise UserError(KEY, names[0], f"config.json does not build a model ({error})", "repair config.json") from error
    return model.eval().requires_grad_(False)


def auto_class(raw: Mapping[str, Any]) -> str:
    """The class of transformers whose `from_pretrained` loads such a checkpoint."""
    is_causal = raw["architectures"][0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "AutoModelForCausalLM" if is_causal else "AutoModelForImageTextToText"
