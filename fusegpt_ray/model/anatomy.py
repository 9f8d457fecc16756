"""Where the decoder blocks, the trunk and the head are in a Hugging Face architecture, and how to run one block alone.

Shapes: B rows (windows, or windows × candidates), T tokens, D hidden size, V vocabulary.

Notable:
- nothing is known by architecture name. Blocks are the one ModuleList as long as the text configuration says the model is deep,
  and what a block is called with (masks, rotary embeddings, differing by layer) is recorded from the model's own forward pass;
- the checkpoint's tensor names are mapped to the model's by transformers' own rules, the ones `from_pretrained` uses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Block, Refs, Stack
from fusegpt_ray.store.checkpoint import TensorRef, read_tensors

KEY = "model.source"
Read = Callable[[Refs], Mapping[str, torch.Tensor]]
_PARTS = 10_000
"""More blocks, heads or experts than any model has: a module is made for each before its weights are looked at."""
_PLAIN = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Computed nowadays, and ignored by transformers where an old checkpoint still has them."""
_ARCHITECTURES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}


@dataclass(frozen=True)
class Context:
    """What a model calls a block with besides the hidden states: masks, positions, rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> Context:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        return Context(tree_map_only(torch.Tensor, move, self.args), tree_map_only(torch.Tensor, move, self.kwargs))


def run_block(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """One block's output hidden states [B, T, D]."""
    out = block(h_BTD, *context.args, **context.kwargs)
    return out[0] if isinstance(out, tuple) else out


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


def find_blocks(model: transformers.PreTrainedModel) -> str:
    """The path of the decoder blocks' ModuleList, such as `model.layers`.

    Raises:
        UserError: there is none, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(block) for block in module}) == 1
        and not re.search(r"vision|visual|image|audio|encoder\b", name)
    ]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outermost) != 1:
        what = (
            f"{len(outermost)} lists of {depth} decoder blocks found ({', '.join(outermost)})" if found else "no decoder blocks found"
        )
        fix = "use a decoder-only model whose blocks are all of one class (LLaMA, LLaVA, Mistral, Qwen, Gemma, OPT, GPT-2 …)"
        raise UserError(KEY, type(model).__name__, what, fix)
    return outermost[0]


def block_moulds(raw: Mapping[str, Any]) -> list[nn.Module]:
    """The dense model's blocks without weights, by dense number, for whoever needs no trunk (see `load_block`)."""
    model = build_skeleton(raw)
    return list(model.get_submodule(find_blocks(model)))


def dense_stack(raw: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> Stack:
    """The stack of a whole dense checkpoint: its config.json and the tensors of its files.

    Raises:
        UserError: blocks cannot be found; or the checkpoint lacks tensors of the model, has them in another shape or quantized, or
            has others that `from_pretrained` would report as unexpected (biases that are left out, say).
    """
    model = build_skeleton(raw)
    path = find_blocks(model)
    expected = dict(model.state_dict(keep_vars=True))
    conversions = get_model_conversion_mapping(model)
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    renamings = [item for item in conversions if not isinstance(item, WeightConverter)]
    in_block = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")
    trunk: dict[str, TensorRef] = {}
    blocks: dict[int, dict[str, TensorRef]] = {}
    prefixes: set[str] = set()
    seen: set[str] = set()
    buffers = {name for name, _ in model.named_buffers()}
    ignored = re.compile("|".join([*_OLD_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]))
    extra: list[str] = []
    for name, ref in tensors.items():
        inside, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if converted is not None:
            fix = "use a model whose checkpoint holds its weights as the model uses them (not a mixture of experts)"
            raise UserError(KEY, name, "transformers rearranges this tensor on loading, which fusing cannot follow yet", fix)
        target = expected.get(inside)
        if target is not None and tuple(target.shape) != ref.shape:
            problem = f"shape {list(ref.shape)} in the checkpoint, {list(target.shape)} by config.json"
            raise UserError(KEY, name, problem, "use the config.json that belongs to the weights")
        if target is not None and target.is_floating_point() and ref.code not in _PLAIN:
            problem = f"stored as {ref.code}, which says nothing without scales"
            raise UserError(KEY, name, problem, f"use the checkpoint in its original dtype, one of {', '.join(_PLAIN)}")
        if target is None and inside not in buffers and not ignored.search(inside):
            extra.append(name)
        seen.add(inside)
        match = in_block.fullmatch(inside)
        if match is None:
            trunk[name] = ref
            continue
        tail = f"{match[1]}.{match[2]}"
        if not name.endswith(tail):
            raise UserError(KEY, name, f"called {inside} in the model", "re-save the checkpoint with save_pretrained")
        prefixes.add(name.removesuffix(tail))
        blocks.setdefault(int(match[1]), {})[match[2]] = ref
    tied = set(model.all_tied_weights_keys)
    missing = sorted(name for name, value in expected.items() if name not in seen | tied and isinstance(value, nn.Parameter))
    if missing:
        raise UserError(KEY, missing[0], f"the checkpoint lacks {len(missing)} tensors of the model", "download it again")
    depth = len(model.get_submodule(path))
    if sorted(blocks) != list(range(depth)) or len(prefixes) != 1:
        raise UserError(KEY, f"{len(blocks)} blocks", f"config.json says {depth}", "use the config.json of these weights")
    if extra:
        problem = f"the checkpoint has {len(extra)} tensors that the model of its config.json does not use"
        raise UserError(KEY, min(extra), problem, "use the config.json that belongs to the weights")
    return Stack(dict(raw), prefixes.pop(), trunk, tuple(Block(i, blocks[i]) for i in range(depth)))


class _Splice(nn.Module):
    """Stands in for a block: keeps what it is called with, hands the hidden states on (or others, `inject`)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its weights are not the trunk's
        self.h_BTD: torch.Tensor | None = None
        self.context: Context | None = None
        self.inject: torch.Tensor | None = None
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:  # models look at attributes of a block, such as its attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        self.h_BTD, self.context = args[0], Context(args[1:], kwargs)
        out = args[0] if self.inject is None else self.inject
        return (out,) if self.returns_tuple else out


def _returns_tuple(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> bool:
    """Whether this architecture's blocks return a tuple, found by running one on the meta device (shapes only)."""
    at = context.to("meta")
    return isinstance(copy.deepcopy(block).to("meta")(h_BTD.to("meta"), *at.args, **at.kwargs), tuple)


class Trunk:
    """All of the model but its blocks, loaded: embeds tokens, tells the blocks' contexts, turns final states into logits."""

    def __init__(self, stack: Stack, device: torch.device, dtype: torch.dtype, read: Read = read_tensors) -> None:
        self.device, self.dtype = device, dtype
        self.model = build_skeleton(stack.config)
        path = find_blocks(self.model)
        self.moulds: list[nn.Module] = list(self.model.get_submodule(path))
        """The dense model's blocks, by dense number, without weights, for `load_block` to fill."""
        self.splices = [_Splice(block) for block in self.moulds]
        self.model.set_submodule(path, nn.ModuleList(self.splices))
        expected = self.model.state_dict()
        renamings = get_model_conversion_mapping(self.model)
        weights = {
            rename_source_key(name, renamings, [], self.model.base_model_prefix, expected)[0]: tensor
            for name, tensor in read(stack.trunk).items()
        }
        _assign(self.model, weights, dtype)
        self.model.tie_weights()
        self.model.to(device)
        self._contexts: dict[tuple[int, int], list[Context]] = {}

    @torch.no_grad()
    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] entering the first block."""
        self._forward(ids_BT, logits_to_keep=1)
        h_BTD = self.splices[0].h_BTD
        assert h_BTD is not None
        return h_BTD

    @torch.no_grad()
    def contexts(self, rows: int, length: int) -> list[Context]:
        """By dense block number, what each block is called with for `rows` rows of `length` tokens without padding."""
        if (rows, length) not in self._contexts:
            self._forward(torch.zeros(rows, length, dtype=torch.int64), logits_to_keep=1)
            contexts = [splice.context for splice in self.splices if splice.context is not None]
            self._contexts[rows, length] = contexts
        return self._contexts[rows, length]

    @torch.no_grad()
    def logits(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the states after the last block (before the final norm)."""
        self.splices[-1].inject = h_BTD
        try:
            ids_BT = torch.zeros(h_BTD.shape[:2], dtype=torch.int64)
            return self._forward(ids_BT)
        finally:
            self.splices[-1].inject = None

    def _forward(self, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        first = self.splices[0]
        if first.context is None:  # the first pass finds out what blocks return, then stops: later ones rely on it
            hook = first.register_forward_hook(_stop)
            try:
                self.model(input_ids=ids_BT[:1, :2].to(self.device), use_cache=False)
            except _Stop:
                pass
            finally:
                hook.remove()
            assert first.h_BTD is not None and first.context is not None
            as_tuple = _returns_tuple(self.moulds[0], first.h_BTD, first.context)
            for splice in self.splices:
                splice.returns_tuple = as_tuple
        return self.model(input_ids=ids_BT.to(self.device), use_cache=False, **options).logits


class _Stop(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Stop


def load_block(mould: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A block of its own with these weights: `mould` is `Trunk.moulds[dense]`."""
    block = copy.deepcopy(mould)
    _assign(block, weights, dtype)
    return block.to(device)


def _assign(module: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Put weights in place of meta parameters, cast to `dtype` where they are floating."""
    known = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    module.load_state_dict(known, strict=False, assign=True)
    module.requires_grad_(False)
