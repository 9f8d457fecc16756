"""Every architecture block by block, against the real model's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    DEPTH,
    MODELS,
    SUPPORTED,
    hidden_states,
    load_model,
    open_stack,
    rewrite,
    save_tiny,
    token_windows,
    without_blocks,
)
from safetensors.torch import load_file

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.architecture import dense_stack, find_blocks
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.device import pick_dtype
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Stack, Terms
from fusegpt_ray.store.checkpoint import TensorRef, read_index

CPU = torch.device("cpu")
IDS = token_windows(5, 11)
Tensors = dict[str, torch.Tensor]


def make_runner(stack: Stack, dtype: torch.dtype = torch.float32, rows: int = 16) -> Runner:
    return Runner(stack, CPU, dtype, rows)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- the same numbers as the real model ---


REMOVED = ((1, 3), (0,), (DEPTH - 1,))
PAIRS = [
    (name, removed)
    for number, name in enumerate(MODELS)
    for removed in ((), REMOVED[number % len(REMOVED)])
]
"""Every model whole, and without some of its blocks: inner ones, the first or the last."""


@pytest.mark.parametrize(("name", "removed"), PAIRS, ids=str)
def test_states_and_logits_are_the_real_models_to_the_bit(
    name: str, removed: tuple[int, ...], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    kept = [i for i in range(DEPTH) if i not in removed]
    real = without_blocks(load_model(folder), name, kept)
    stack = open_stack(folder)
    for dense in removed:
        stack = stack.drop(dense)
    stack = Stack.from_json(
        json.loads(json.dumps(stack.to_json()))
    )  # as it comes back from a journal
    runner = make_runner(stack)

    expected = hidden_states(real, name, IDS)
    got = [h.clone() for h in runner.walk(stack, IDS)]

    # The same operations on the same numbers in the same order: nothing may differ.
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * (
        len(kept) + 1
    )
    assert torch.equal(runner.trunk.logits(got[-1]), real(input_ids=IDS).logits)
    assert torch.equal(runner.embed(IDS), expected[0])


@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_at_once_change_only_the_last_bits(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    stack = open_stack(checkpoint(name))
    *_, expected = make_runner(stack).walk(stack, IDS)
    for rows in (1, 2):
        *_, got = make_runner(stack, rows=rows).walk(stack, IDS)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_token_losses_are_the_real_models(name: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    runner = make_runner(stack)
    *_, last = runner.walk(stack, IDS)
    real = load_model(folder)
    expected = [real(input_ids=window[None], labels=window[None]).loss.item() for window in IDS]
    assert runner.token_losses(last, IDS).tolist() == pytest.approx(expected, rel=1e-5)


def test_layers_of_different_kinds_get_contexts_of_their_own(
    checkpoint: Callable[[str], Path],
) -> None:
    """Or the tests above would not notice one context used for all."""
    for name in ("gemma3", "qwen2"):
        stack = open_stack(checkpoint(name))
        runner = make_runner(stack)
        contexts = runner.trunk.contexts(len(IDS), IDS.shape[1])
        own, borrowed = (
            runner.apply(runner.weights.of(stack.blocks[0]), dense, runner.embed(IDS))
            for dense in (0, 1 if name == "gemma3" else 4)
        )
        assert len(contexts) == DEPTH
        assert (own - borrowed).abs().max() > 1e-3


def test_llava_under_its_names_in_memory(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Newer checkpoints say model.language_model.layers.N, older ones
    language_model.model.layers.N."""
    folder = checkpoint("llava")
    assert any(
        name.startswith("language_model.model.layers.")
        for name in load_file(folder / "model.safetensors")
    )

    def rename(tensors: Tensors) -> Tensors:
        return {new_name(name): value for name, value in tensors.items()}

    def new_name(name: str) -> str:
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.", 1)
        if name.startswith("language_model.lm_head"):
            return name.removeprefix("language_model.")
        return f"model.{name}"

    renamed = rewrite(folder, tmp_path, rename)
    stack = open_stack(renamed)
    assert stack.prefix == "model.language_model.layers."
    *_, last = make_runner(stack).walk(stack, IDS)
    assert torch.equal(last, hidden_states(load_model(folder), "llava", IDS)[-1])


def test_llava_without_its_image_part_would_be_missed(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llava"))
    parts = {name.split(".")[0] for name in stack.trunk}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    assert not any(".layers." in name and name.startswith("language_model") for name in stack.trunk)


def test_gpt2_under_its_old_names(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, and each block's causal mask saved with it."""
    folder = checkpoint("gpt2")

    def rename(tensors: Tensors) -> Tensors:
        old = {
            name.removeprefix("transformer."): value
            for name, value in tensors.items()
            if name != "lm_head.weight"
        }
        return old | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(DEPTH)}

    stack = open_stack(rewrite(folder, tmp_path, rename))
    assert stack.prefix == "h."
    runner = make_runner(stack)
    *_, last = runner.walk(stack, IDS)
    assert torch.equal(runner.trunk.logits(last), load_model(folder)(input_ids=IDS).logits)


def test_saved_rotary_buffers_do_no_harm(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """LLaMA checkpoints of old carry one in every block."""
    folder = checkpoint("llama")
    extra = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(DEPTH)
    }
    stack = open_stack(rewrite(folder, tmp_path, lambda tensors: tensors | extra))
    *_, last = make_runner(stack).walk(stack, IDS)
    assert torch.equal(last, hidden_states(load_model(folder), "llama", IDS)[-1])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16_arithmetic_of_a_float32_checkpoint(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    runner = make_runner(stack, torch.bfloat16)
    auto = transformers.AutoModelForCausalLM
    real = auto.from_pretrained(folder, dtype=torch.bfloat16).eval()
    *_, last = runner.walk(stack, IDS)
    assert last.dtype == torch.bfloat16
    assert torch.equal(last, hidden_states(real, name, IDS)[-1])
    assert torch.equal(runner.trunk.logits(last), real(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("stored", "on_gpu"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_auto_dtype_is_float32_on_a_cpu_and_bfloat16_for_16_bit_checkpoints_on_a_gpu(
    stored: torch.dtype, on_gpu: torch.dtype, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def lower(tensors: Tensors) -> Tensors:
        return {name: value.to(stored) for name, value in tensors.items()}

    stack = open_stack(rewrite(checkpoint("llama"), tmp_path, lower))
    assert pick_dtype("auto", stack, CPU) == torch.float32
    assert pick_dtype("auto", stack, torch.device("cuda")) == on_gpu
    for device in ("cpu", "cuda"):
        assert pick_dtype("bfloat16", stack, torch.device(device)) == torch.bfloat16


def test_auto_dtype_is_the_same_in_every_round(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fused blocks are written in float32; the arithmetic stays that of the dense checkpoint."""
    float32 = open_stack(checkpoint("llama"))
    dense = open_stack(
        rewrite(
            checkpoint("llama"),
            tmp_path,
            lambda t: {name: value.bfloat16() for name, value in t.items()},
        )
    )
    for fused in range(DEPTH):
        stack = dense.swap({fused: float32.blocks[fused]})
        assert pick_dtype("auto", stack, torch.device("cuda")) == torch.bfloat16


# --- what a stack is ---


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_holds_every_tensor_of_the_checkpoint_once(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    on_disk = read_index(str(folder), "model.source")
    assert stack.prefix == MODELS[name].prefix
    assert stack.kept == tuple(range(DEPTH))
    rebuilt = dict(stack.trunk)
    for block in stack.blocks:
        rebuilt |= {
            f"{stack.prefix}{block.dense}.{name}": ref for name, ref in block.weights.items()
        }
    assert rebuilt == on_disk
    kinds = {tuple(sorted(block.weights)) for block in stack.blocks}
    assert len(kinds) == (2 if name == "lfm2" else 1)


def test_stacks_are_json_and_back(checkpoint: Callable[[str], Path]) -> None:
    dense = open_stack(checkpoint("llama-sharded"))
    a, b = dense.blocks[0], dense.blocks[1]
    fused = Block(
        0,
        b.weights,
        Terms(a.weights, (b.weights, a.weights), {"x.C0": b.weights["mlp.up_proj.weight"]}),
    )
    stack = dense.drop(1).swap({0: fused})
    assert stack.kept == (0, 2, 3, 4)
    assert stack.position(2) == 1
    assert (len(stack), len(dense)) == (4, 5)
    again = Stack.from_json(json.loads(json.dumps(stack.to_json())))
    assert again == stack
    assert again.blocks[0].terms == fused.terms
    assert again.blocks[1].terms is None


@pytest.mark.parametrize(
    "step", [lambda stack: stack.drop(9), lambda stack: stack.swap({9: stack.blocks[0]})]
)
def test_only_blocks_that_are_there_are_dropped_and_swapped(
    step: Callable[[Stack], Stack], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(AssertionError):
        step(open_stack(checkpoint("llama")))


# --- a user's mistakes ---


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


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixture of experts"):
        open_stack(save_tiny("mixtral", tmp_path))


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


def test_a_skeleton_holds_no_weights(checkpoint: Callable[[str], Path]) -> None:
    for name in SUPPORTED:
        model = build_skeleton(config_of(checkpoint(name)))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}
        assert find_blocks(model) == MODELS[name].blocks


def test_a_trunk_holds_no_blocks(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llama"))
    trunk = make_runner(stack).trunk
    assert {name for name, _ in trunk.model.named_parameters()} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert {
        parameter.device.type
        for meta_block in trunk.meta_blocks
        for parameter in meta_block.parameters()
    } == {"meta"}
