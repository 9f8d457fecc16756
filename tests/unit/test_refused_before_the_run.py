"""Architectures of which only the proof used to say, after all rounds, that they cannot be made
shallower.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers as tf
from desk import Desk
from mistakes import Bad, check, table
from models import COMMON, DEPTH, GROUPED, VOCAB

Make = Callable[[], tf.PretrainedConfig]


def saved(desk: Desk, config: tf.PretrainedConfig) -> None:
    """The model of the recipe is a random one of this configuration."""
    (desk.model / "model.safetensors").unlink()
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(desk.model)


def refused(name: str, make: Make, problem: str, fix: str, evaluate: bool = False) -> Bad:
    def spoil(desk: Desk) -> list[str] | None:
        saved(desk, make())
        text = ["--data", str(desk.heldout), "--length", "12"]
        return ["evaluate", str(desk.model), *text] if evaluate else None

    key = "MODEL" if evaluate else "model.source"
    return Bad(name, spoil, key, "", problem, fix)


def _gemma4(**changes: object) -> tf.PretrainedConfig:
    """Every block is also given an embedding of its own of each token."""
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    own |= {"head_dim": 8, "global_head_dim": 8, "sliding_window": 8}
    return tf.Gemma4TextConfig(**GROUPED, **own | changes)


def _sharing() -> tf.PretrainedConfig:
    """The last blocks take keys and values of others."""
    return _gemma4(num_kv_shared_layers=2, layer_types=["full_attention"] * DEPTH)


def _minicpm3() -> tf.PretrainedConfig:
    """What a block adds is scaled by the depth of the whole model."""
    low = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    return tf.MiniCPM3Config(**COMMON, **low, intermediate_size=48, v_head_dim=8, scale_depth=1.4)


def _jetmoe() -> tf.PretrainedConfig:
    """Its blocks ask how many tokens go to each expert, which depends on values."""
    return tf.JetMoeConfig(
        **COMMON,
        intermediate_size=32,
        kv_channels=8,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=1,
    )


SAME = "same at every depth"
CASES: list[tuple[str, Make, str, str, bool]] = [
    ("by-the-depth", _minicpm3, "would become block|depends on its number", SAME, False),
    (
        "embeddings-of-its-own",
        _gemma4,
        "cannot be built|depends on the number of blocks",
        SAME,
        False,
    ),
    ("by-values", _jetmoe, "look at values while they run", "runs block after block", False),
    ("keys-of-others-evaluated", _sharing, "between blocks", "runs block after block", True),
]


@table([refused(*case) for case in CASES])
def test_refused(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
