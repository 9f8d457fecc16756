"""Folding, rotating and slicing, against the real models: rotated alone they compute the same, and
sliced they compute what the dense model does on states that are projected after every write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from models import GROUPED, MODELS, VOCAB
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.rotation import (
    EMBEDDING,
    HEAD,
    NORM,
    WRITES,
    normalised,
    principal_axes,
    sliced_block,
    sliced_trunk,
)
from fusegpt_ray.fusion.width import MODEL_TYPES, Width, check_width, sliced_config, sliced_width

NEAR = {"rtol": 1e-5, "atol": 1e-5}
"""Of logits of about 1: a hundred roundings of norms in float32."""
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % VOCAB
GRANITE = {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0}
CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama, tied": lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MODELS["mistral"].config,
    "qwen2": MODELS["qwen2"].config,
    "qwen3": MODELS["qwen3"].config,
    "phi3": MODELS["phi3"].config,
    "granite": lambda: tf.GraniteConfig(**GROUPED, **GRANITE),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED),
    "seed_oss": lambda: tf.SeedOssConfig(**GROUPED, head_dim=8),
}


def dense_model(name: str) -> Any:
    """Random, in float64 but for the norms, which transformers computes in float32. Norm weights
    and biases are random, too, and ε is large: a mistake in them would change nothing otherwise.
    """
    torch.manual_seed(3)
    config = CONFIGS[name]()
    config.rms_norm_eps = 0.05
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for key, value in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            nn.init.uniform_(value, 0.5, 1.5)
        else:
            nn.init.normal_(value, std=0.2)
    return model


def sliced_model(model: Any, axes_DK: torch.Tensor) -> Any:
    """A model of the narrower config.json with the sliced tensors."""
    dense, kept = axes_DK.shape
    raw = sliced_config(model.config.to_dict(), Width(dense, kept))
    config = type(model.config)(**raw)
    made = type(model)(config).to(torch.float64).eval()
    state = model.state_dict()
    head = state.get(HEAD, state[EMBEDDING])
    tensors = sliced_trunk(state[EMBEDDING], state[NORM], head, axes_DK)
    for number, block in enumerate(model.model.layers):
        sliced = sliced_block(block.state_dict(), axes_DK)
        tensors |= {f"model.layers.{number}.{key}": value for key, value in sliced.items()}
    made.load_state_dict(tensors)
    return made


def random_axes(kept: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0][:, :kept].contiguous()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def projected(model: Any, axes_DK: torch.Tensor) -> Any:
    """The dense model with every write to the stream projected onto the axes, by hooks."""
    other = copy.deepcopy(model)
    onto_DD = axes_DK @ axes_DK.T

    def project(module: nn.Module, given: Any, out_BTD: torch.Tensor) -> torch.Tensor:
        return out_BTD @ onto_DD

    writers = [other.model.embed_tokens]
    writers += [block.get_submodule(name) for block in other.model.layers for name in WRITES]
    for module in writers:
        module.register_forward_hook(project)
    return other


def test_every_architecture_that_is_taken_is_tried() -> None:
    assert {name.partition(",")[0] for name in CONFIGS} == {*MODEL_TYPES}


@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_alone_it_is_the_same_model(name: str) -> None:
    model = dense_model(name)
    found = logits(sliced_model(model, random_axes(32)))
    torch.testing.assert_close(found, logits(model), **NEAR)


@pytest.mark.parametrize("name", CONFIGS)
def test_sliced_it_is_the_dense_model_on_projected_states(name: str) -> None:
    """Also the norms' mean over fewer numbers and its ε, which would show in the fourth digit."""
    model, axes_DK = dense_model(name), random_axes(24)
    wanted = logits(projected(model, axes_DK))
    torch.testing.assert_close(logits(sliced_model(model, axes_DK)), wanted, **NEAR)
    assert not torch.allclose(wanted, logits(model), rtol=0.01)


def test_axes_are_those_of_the_covariance() -> None:
    """Against numbers by hand: states along two known directions, and the formula of the norm."""
    h_nD = torch.tensor([[3.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, -2.0, 0.0]])
    x_nD = normalised(h_nD, 0.0)
    root = 3**0.5
    wanted = torch.tensor([[root, 0, 0], [0, root, 0], [0, -root, 0]], dtype=torch.float64)
    torch.testing.assert_close(x_nD, wanted)
    axes_DD, value_D = principal_axes(x_nD.T @ x_nD)
    torch.testing.assert_close(value_D, torch.tensor([6.0, 3.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(axes_DD, torch.eye(3, dtype=torch.float64)[:, [1, 0, 2]])


def test_principal_axes_lose_the_least() -> None:
    """Of all subspaces of 24 dimensions, here against random ones (Eckart–Young)."""
    torch.manual_seed(1)
    x_nD = normalised(torch.randn(200, 32) * torch.linspace(2, 0.1, 32), 1e-6)
    axes_DD, value_D = principal_axes(x_nD.T @ x_nD)

    def lost(axes_DK: torch.Tensor) -> float:
        return float((x_nD - x_nD @ axes_DK @ axes_DK.T).square().sum())

    assert lost(axes_DD[:, :24]) == pytest.approx(float(value_D[24:].sum()))
    assert lost(axes_DD[:, :24]) < 0.5 * lost(random_axes(24))
    torch.testing.assert_close(axes_DD.T @ axes_DD, torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("hidden", "heads", "sparsity", "kept"),
    [(192, 6, 0.25, 144), (192, 6, 0.125, 168), (4096, 32, 0.25, 3072), (3584, 28, 0.3, 2520)],
)
def test_the_width_is_the_nearest_that_a_config_can_have(
    hidden: int, heads: int, sparsity: float, kept: int
) -> None:
    raw = tf.LlamaConfig(
        **GROUPED | {"hidden_size": hidden, "num_attention_heads": heads}
    ).to_dict()
    assert sliced_width(raw, sparsity) == Width(hidden, kept)


@pytest.mark.parametrize("sparsity", [0.01, 0.99])
def test_a_width_that_does_not_exist_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="the nearest multiple of 8"):
        sliced_width(tf.LlamaConfig(**GROUPED).to_dict(), sparsity)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_sliced_is_taken(name: str) -> None:
    raw = CONFIGS[name]().to_dict()
    assert check_width(raw, 0.25) == Width(32, 24)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "needs RMSNorm"),
        ("opt", "needs RMSNorm"),
        ("gemma3", "does not know what post_feedforward_layernorm"),
        ("llava", "exact for llama"),
        ("lfm2", "does not know what"),
    ],
)
def test_what_cannot_be_sliced_is_refused(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_width(MODELS[name].config().to_dict(), 0.25)


def test_a_class_that_knows_its_hidden_size_is_refused() -> None:
    """Gemma multiplies its embedding by the root of it, though its tensors are LLaMA's."""
    raw = tf.GemmaConfig(**GROUPED, head_dim=8).to_dict()
    with pytest.raises(UserError, match="exact for llama"):
        check_width(raw, 0.25)
