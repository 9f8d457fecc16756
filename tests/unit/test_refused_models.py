"""Checkpoints that are refused: tensors that are not those of the configuration, architectures that
are unknown or no decoders, and quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from experts import save_split
from models import DEPTH, open_stack, rewrite
from runners import Tensors, config_of

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.architecture import build_meta_blocks, dense_stack
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.checkpoint import TensorRef, read_index


def tensors_changed(change: Callable[[Tensors], Tensors]) -> Callable[[Path, Path], Stack]:
    return lambda folder, out: open_stack(rewrite(folder, out, change))


def config_changed(**values: Any) -> Callable[[Path, Path], Stack]:
    return lambda folder, _: dense_stack(
        config_of(folder) | values, read_index(str(folder), "model.source")
    )


def without(name: str) -> Callable[[Path, Path], Stack]:
    return tensors_changed(
        lambda tensors: {key: value for key, value in tensors.items() if key != name}
    )


Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
MISTAKES = {
    "a tensor of another shape": (
        tensors_changed(lambda t: t | {Q_PROJ: torch.zeros(32, 16)}),
        Q_PROJ,
        "[32, 16]",
    ),
    "a tensor with a dimension more": (
        tensors_changed(lambda t: t | {Q_PROJ: torch.zeros(1, 32, 32)}),
        Q_PROJ,
        "shape",
    ),
    "a block's tensor is missing": (without(Q_PROJ), Q_PROJ, "lacks 1 tensors"),
    "the embedding is missing": (
        without("model.embed_tokens.weight"),
        "model.embed_tokens.weight",
        "lacks",
    ),
    "the head is missing and not tied": (without("lm_head.weight"), "lm_head.weight", "lacks"),
    "a whole block is missing": (
        tensors_changed(
            lambda t: {key: value for key, value in t.items() if ".layers.4." not in key}
        ),
        "model.layers.4.",
        "lacks",
    ),
    "one block more than the configuration says": (
        config_changed(num_hidden_layers=DEPTH - 1),
        "",
        "config.json",
    ),
    "one block fewer than the configuration says": (
        config_changed(num_hidden_layers=DEPTH + 1),
        "model.layers.5.",
        "lacks",
    ),
    "another width": (config_changed(hidden_size=64), "", "config.json"),
    "an unknown model_type": (config_changed(model_type="frobnicate"), "frobnicate", "unknown"),
    "no model_type": (config_changed(model_type=None), "None", "unknown"),
    "custom code": (
        config_changed(
            model_type="my_llama", auto_map={"AutoModelForCausalLM": "modeling.MyLlama"}
        ),
        "my_llama",
        "trust_remote_code",
    ),
    "an unknown architecture": (
        config_changed(architectures=["FrobnicateForCausalLM"]),
        "Frobnicate",
        "architecture",
    ),
    "a model_type that is a list": (config_changed(model_type=["llama"]), "llama", "unknown"),
    "an architecture that is a number": (config_changed(architectures=[7]), "7", "architecture"),
    "a name that is no model": (
        config_changed(architectures=["AutoTokenizer"]),
        "AutoTokenizer",
        "Fix",
    ),
    "heads that do not fit": (config_changed(num_attention_heads="many"), "", "config.json"),
    "a depth that is text": (config_changed(num_hidden_layers="five"), "", "config.json"),
    "a negative width": (config_changed(intermediate_size=-1), "", "config.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(
    mistake: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    attempt, value, problem = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        attempt(checkpoint("llama"), tmp_path)
    assert caught.value.key == "model.source"
    assert value in str(caught.value)
    assert problem in str(caught.value)


def test_custom_code_is_never_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A known model_type with an auto_map: the library's own class is used, the checkpoint's code
    stays unread."""
    trap = tmp_path / "modeling.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass MyLlama: pass\n")
    folder = rewrite(checkpoint("llama"), tmp_path, lambda tensors: tensors)
    config = config_of(folder) | {
        "auto_map": {"AutoModelForCausalLM": "modeling.MyLlama", "AutoConfig": "modeling.MyConfig"}
    }
    model = build_skeleton(config)
    assert type(model) is transformers.LlamaForCausalLM
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("missing", ["w1", "w2"])
def test_a_mixture_without_one_of_its_experts_is_refused(missing: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = f".2.block_sparse_moe.experts.1.{missing}"
        return {name: value for name, value in tensors.items() if part not in name}

    folder = rewrite(save_split("mixtral", tmp_path / "whole"), tmp_path / "part", without)
    with pytest.raises(UserError, match=r"experts") as caught:
        open_stack(folder)
    assert "layers.2" in f"{caught.value}"


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
IDS_BELOW_VOCAB = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
NOT_DECODERS = {
    "ViTForImageClassification": lambda: transformers.ViTConfig(**SMALL),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8
    ),
    "BartForConditionalGeneration": lambda: transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2
    ),
    "ModernBertForMaskedLM": lambda: transformers.ModernBertConfig(**SMALL, **IDS_BELOW_VOCAB),
    "BertForMaskedLM": lambda: transformers.BertConfig(**SMALL),
    "BertLMHeadModel": lambda: transformers.BertConfig(**SMALL),
    "LlamaForSequenceClassification": lambda: transformers.LlamaConfig(**SMALL),
    "LlamaModel": lambda: transformers.LlamaConfig(**SMALL),
}


@pytest.mark.parametrize("architecture", NOT_DECODERS)
def test_models_that_do_not_predict_the_next_token_are_refused(architecture: str) -> None:
    raw = NOT_DECODERS[architecture]().to_dict() | {"architectures": [architecture]}
    with pytest.raises(UserError):
        dense_stack(
            raw,
            {
                name: TensorRef("file", name, "F32", shape, 0, 0)
                for name, shape in shapes_of(raw).items()
            },
        )


OTHERWISE = {
    "BertLMHeadModel": "is_decoder: false: an encoder",
    "DiffusionGemmaForBlockDiffusion": "does not write a text token after token",
    "PI0ForConditionalGeneration": "does not write a text token after token",
}


@pytest.mark.parametrize("architecture", OTHERWISE)
def test_a_head_over_all_tokens_does_not_make_a_model_that_writes_one_after_another(
    architecture: str,
) -> None:
    """Of classes that the auto classes for language models know."""
    config = getattr(transformers, architecture).config_class().to_dict()
    with pytest.raises(UserError, match=OTHERWISE[architecture]):
        build_meta_blocks(config | {"architectures": [architecture]})


def shapes_of(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds."""
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with torch.device("meta"):
        model = getattr(transformers, raw["architectures"][0])(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_quantized_checkpoints_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Their scales lie in tensors of their own: without them the weights are other numbers."""
    scale = Q_PROJ + "_scale_inv"

    def quantize(tensors: Tensors) -> Tensors:
        return tensors | {
            Q_PROJ: (tensors[Q_PROJ] * 16).to(torch.float8_e4m3fn),
            scale: torch.tensor([[1 / 16]]),
        }

    folder = rewrite(checkpoint("llama"), tmp_path, quantize)
    with pytest.raises(UserError, match="quantiz"):
        dense_stack(
            config_of(folder) | {"quantization_config": {"quant_method": "fp8"}},
            read_index(str(folder), "model.source"),
        )
