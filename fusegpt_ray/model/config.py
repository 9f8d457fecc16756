"""A checkpoint's config.json → the configuration and the empty model that transformers makes of
it.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.generation import GenerationMixin
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from fusegpt_ray.errors import UserError, reading_users_file

KEY = "model.source"
ALONE = threading.RLock()
"""Held while libraries make a model or are kept quiet: both change something for all threads."""
_DEEPEST = 10_000
"""Blocks that no model has: configurations make lists of them before a model is built."""
_DEPTH = re.compile(r"(n|num)_(hidden_)?layers?|(en|de)coder_layers|depth")
_MODULES = 250_000
"""Modules that no model has; the largest mixtures of experts have a third of it."""
_CAUSAL = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
_ARCHITECTURES = {
    *_CAUSAL,
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}
_KEYS = 100
"""Of a config.json that does not load, among which the wrong one is looked for."""
_HEADLESS = "a language model without its head, as embedding models are: it predicts no next token"
_ORIGINAL_LLAVA = re.compile(r"Llava(Llama|Mistral|Mixtral|Mpt|Qwen|Gemma|Cohere)\w*ForCausalLM")
"""Architectures of LLaVA's own code."""
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Where quantizers note what they did: most of them, MLX, and older compressed-tensors."""


class QuantizedError(UserError):
    """A checkpoint is quantized."""


def read_config(raw: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The configuration object of a config.json.

    Raises:
        UserError: the model type is unknown to transformers (custom code is never run), a value is
            invalid, the model is an encoder–decoder, or the weights are quantized.
    """
    return copy.deepcopy(_read(json.dumps(raw)))


@lru_cache(maxsize=64)
def _read(text: str) -> transformers.PretrainedConfig:
    """See `read_config`. A run asks for the same few configurations a hundred times."""
    raw = json.loads(text)
    kind = raw.get("model_type")
    if kind is None and "_diffusers_version" in raw:
        named = raw.get("_class_name")
        fix = "give the folder of a causal language model, as save_pretrained writes it"
        raise UserError(KEY, named, "a part of a diffusers pipeline, no language model", fix)
    if _ORIGINAL_LLAVA.fullmatch(_named(raw)):
        problem = "the original LLaVA's own layout, whose code transformers does not contain"
        fix = "use the same model as converted for transformers, such as llava-hf/llava-1.5-7b-hf"
        raise UserError(KEY, raw["architectures"], problem, fix)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        fix = "use an architecture that transformers itself contains; trust_remote_code stays off"
        raise UserError(KEY, kind, "this model_type is unknown to the installed transformers", fix)
    if _has_an_encoder(raw):
        problem = "an encoder–decoder; only decoder-only models can be made shallower or deeper"
        fix = "use a decoder-only model, such as LLaMA, Mistral, Qwen, Gemma or LLaVA"
        raise UserError(KEY, raw.get("architectures") or kind, problem, fix)
    again = "download the checkpoint again"
    if absurd := _absurd(raw):
        raise UserError(KEY, kind, f"config.json is not valid ({absurd})", again)
    if how := _quantized(raw):
        fix = (
            "use the checkpoint in its original dtype, or what transformers makes of it"
            " (model.dequantize(), then save_pretrained); quantize what this tool publishes"
        )
        problem = f"a quantized checkpoint ({how}), where plain weights are needed"
        raise QuantizedError(KEY, kind, problem, fix)
    if named := raw.get("transformers_weights"):
        fix = "load the checkpoint with transformers and save_pretrained it, under the usual names"
        raise UserError(KEY, named, "config.json gives its weights a name of their own", fix)
    try:
        with reading_users_file(KEY, kind, "config.json is not valid", again):
            return _loaded(raw)
    except UserError as error:
        if any(key in error.problem for key in raw):
            raise
        keys = [key for key in [*raw][:_KEYS] if _loads_without(key, raw)]
        if not keys:
            raise
        problem = f"{error.problem}, as its {' or '.join(keys[:3])} is wrong"
        raise UserError(KEY, kind, problem, again) from error


def _has_an_encoder(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json, or the text model's in it, is an encoder–decoder's: it says so, its
    class does, or it has a part for either. The decoder alone may be a causal language model
    (BartForCausalLM), and is then named as such.
    """
    name, text = raw.get("model_type"), raw.get("text_config")
    known = isinstance(name, str) and name in transformers.CONFIG_MAPPING
    if not known or _named(raw) in _CAUSAL:
        return False
    kind = transformers.CONFIG_MAPPING[name]
    parts = kind.sub_configs
    both = "decoder" in parts and any(part.endswith("encoder") for part in parts)
    told = bool(raw.get("is_encoder_decoder", kind.is_encoder_decoder))
    return told or both or (isinstance(text, dict) and _has_an_encoder(text))


def _named(raw: Mapping[str, Any]) -> str:
    """The class that config.json names; nothing where it names none."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    return name if isinstance(name, str) else ""


def _loaded(raw: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """Through a file, as transformers reads it, which has a way of its own to write infinity."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        config.get_text_config().use_cache = False
    return config


def _loads_without(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether this key is what is wrong with a config.json, for messages that do not name it."""
    try:
        _loaded({name: value for name, value in raw.items() if name != key})
    except Exception:  # of whatever kind: see `reading_users_file`
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on a config.json, made anew each time that it is read. What
    they are shown by is one for all threads.
    """
    with ALONE:
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def _absurd(raw: Mapping[str, Any]) -> str:
    """A depth, anywhere in a config.json, that no model has: "num_hidden_layers = 1e+09"."""
    for key, value in raw.items():
        if isinstance(value, dict) and key.endswith("_config") and (found := _absurd(value)):
            return found
        if isinstance(value, int) and value > _DEEPEST and _DEPTH.fullmatch(key):
            return f"{key} = {value:.3g}"
    return ""


def _quantized(raw: Mapping[str, Any]) -> str:
    """By what the weights were quantized, or one of the text model's: "awq"; nothing if they were
    not.
    """
    for key in _QUANTIZED:
        if settings := raw.get(key):
            if not isinstance(settings, dict):
                return key
            usual = "MLX" if key == "quantization" else None
            if any(name.startswith("load_in_") for name in settings):  # before methods had names
                usual = "bitsandbytes"
            method = settings.get("quant_method", usual)
            return method if isinstance(method, str) else key
    sections = (
        value for key, value in raw.items() if isinstance(value, dict) and key.endswith("_config")
    )
    return next((found for section in sections if (found := _quantized(section))), "")


def model_class(raw: Mapping[str, Any]) -> type[transformers.PreTrainedModel]:
    """The class that config.json names; where it names none, the one that the auto classes take for
    its type.

    Raises:
        UserError: none of transformers' own causal or image-text-to-text models, or one that does
            not predict each token from those before it.
    """
    kind = _class_named(raw)
    if not issubclass(kind, GenerationMixin):  # it fills in blocks of text, or moves a robot
        problem = (
            "it does not write a text token after token, each from those before it, as"
            " transformers has no such generation for it"
        )
        fix = "use a causal language model, or an image-text-to-text model that answers so"
        raise UserError(KEY, kind.__name__, problem, fix)
    return kind


def _class_named(raw: Mapping[str, Any]) -> type[transformers.PreTrainedModel]:
    """See `model_class`."""
    names, name = raw.get("architectures"), _named(raw)
    known_name = name if name in _ARCHITECTURES else ""
    usual = _usual_class(raw, known_name)
    if usual and (known_name or not names):
        return usual
    if known_name:
        found: type[transformers.PreTrainedModel] = getattr(transformers, known_name)
        return found
    known = bool(name) and isinstance(getattr(transformers, name, None), type)
    problem = "config.json names no architecture that transformers knows"
    if known or not names:
        problem = _other_kind(read_config(raw), name) or problem
    fix = (
        "use a causal language model, or an image-text-to-text model, that transformers itself"
        " contains"
    )
    if usual and not known:
        fix += (
            f'; if it is a {usual.__name__}, say so in config.json: "architectures":'
            f' ["{usual.__name__}"]'
        )
    elif usual and problem is _HEADLESS:
        fix = f"use the {usual.__name__} that it was made from"
    raise UserError(KEY, names, problem, fix)


def _other_kind(config: transformers.PretrainedConfig, name: str) -> str:
    """What the class of that name is, which is none of ours, in words; nothing if that is not known
    and there is no name.
    """
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "an encoder, which sees all of a text and predicts no next token"
    if not name:
        return ""
    if name.endswith("Model") and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return _HEADLESS
    return "not a causal language model"


def _usual_class(raw: Mapping[str, Any], name: str) -> type[transformers.PreTrainedModel] | None:
    """What the auto class that knows `name` builds; of both, if there is no name."""
    kind = type(read_config(raw))
    causal, sees = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    found = causal.get(kind, None) if not name or name in _CAUSAL else None
    found = found or (sees.get(kind, None) if not name or name not in _CAUSAL else None)
    return found[0] if isinstance(found, tuple) else found


def build_skeleton(raw: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """The dense model with every parameter on the meta device (no memory) and every buffer real.

    Raises:
        UserError: see `read_config`, `model_class`; or the class does not build.
    """
    config = read_config(raw)
    kind = model_class(raw)
    problem, fix = "config.json does not build a model", "repair config.json"
    building = reading_users_file(KEY, kind.__name__, problem, fix)
    with ALONE, building, _quiet(), _bounded(), _without_values():
        model = kind(config)
    return model.eval().requires_grad_(False)


@contextmanager
def _without_values() -> Iterator[None]:
    """While a model is built: parameters are on the meta device, and nobody gives them values,
    which takes a third of the time. Buffers get theirs as usual.
    """

    def has_values(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            vars(parameter)["_is_hf_initialized"] = True  # transformers leaves such as they are

    hook = register_module_parameter_registration_hook(has_values)
    try:
        with init_empty_weights(include_buffers=False), guard_torch_init_functions():
            yield
    finally:
        hook.remove()


@contextmanager
def _bounded() -> Iterator[None]:
    """While a model is built: a number of parts that no memory holds is an error, whatever a
    config.json calls it.
    """
    count = 0

    def counted(owner: nn.Module, name: str, part: nn.Module) -> None:
        nonlocal count
        count += 1
        if count > _MODULES:
            raise ValueError(f"it asks for more than {_MODULES:,} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def auto_class(raw: Mapping[str, Any]) -> str:
    """The class of transformers whose `from_pretrained` loads such a checkpoint: the auto class, or
    the model's own, where the auto class does not know what it writes (Emu3's text model).
    """
    found, kind = model_class(raw), type(read_config(raw))
    causal = is_causal(found.__name__)
    known = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if kind not in known:
        return found.__name__
    return "AutoModelForCausalLM" if causal else "AutoModelForImageTextToText"


def is_causal(name: str) -> bool:
    """Whether the class of that name, or the auto class, is of causal language models; else it is
    one of those that see.
    """
    return name in _CAUSAL or name == "AutoModelForCausalLM"
