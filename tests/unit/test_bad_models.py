"""Checkpoints that are malformed, hostile, or of the wrong kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from desk import Desk
from mistakes import Bad, check, edit, table
from models import DEPTH, GROUPED, VOCAB
from spoilt import AGAIN, FOLDER, SINGLE, configured, model, replaced, source, unreadable


def config(data: bytes) -> Callable[[Desk], object]:
    """config.json holds this."""
    return lambda desk: (desk.model / "config.json").write_bytes(data)


def custom_code(desk: Desk) -> None:
    """An architecture of its own, whose code leaves a trace where it runs."""
    (desk.model / "own.py").write_text("open('ran', 'w')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(
        desk,
        "config.json",
        lambda data: data | {"model_type": "own", "architectures": ["Own"], "auto_map": auto},
    )


def architecture(made: tf.PreTrainedModel) -> Callable[[Desk], object]:
    """The checkpoint of another architecture, as transformers writes it."""

    def spoil(desk: Desk) -> None:
        (desk.model / SINGLE).unlink()
        made.save_pretrained(desk.model)

    return spoil


def mixture(desk: Desk) -> list[str]:
    """A mixture of experts whose config.json asks for one more than there are."""
    config = tf.MixtralConfig(**GROUPED, num_local_experts=2)
    architecture(tf.MixtralForCausalLM(config))(desk)
    file = desk.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_local_experts": 3}))
    return ["compress", desk.write(method="mi")]


def foreign(
    name: str,
    build: Callable[[], tf.PreTrainedModel],
    value: str,
    problem: str,
    fix: str = "use a causal language model",
    **changes: Any,
) -> Bad:
    """A model that is no causal language model, as transformers writes it; `changes`: of its
    config.json."""

    def spoil(desk: Desk) -> None:
        architecture(build())(desk)
        configured(**changes)(desk)

    return model(name, spoil, value, problem, fix)


ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
PICTURES = {key: value for key, value in ENCODER.items() if key != "vocab_size"} | {
    "image_size": 8,
    "patch_size": 4,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": DEPTH,
    "num_heads": 2,
}
OWN = {
    "hidden_size_per_layer_input": 0,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCAB,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
DEEP = "[" * 500 + "]" * 500
CONTAINED = "transformers itself contains"
REPAIR = "config.json|checkpoint"
MODELS = [
    source("no-such-folder", "nowhere", "no such folder", "hub id such as"),
    source(
        "hub-id-offline",
        "some-lab/no-such-model",
        "the hub does not give it",
        "offline, give a local folder",
    ),
    source(
        "unknown-protocol", "nosuch://bucket/model", r"^(?!.*JSON).*nosuch", "path|URI|protocol"
    ),
    source("a-file", "model/config.json", "a file, not a folder", "folder that holds config.json"),
    model(
        "no-config",
        lambda desk: (desk.model / "config.json").unlink(),
        "model'",
        "no config.json there",
        FOLDER,
    ),
    model("config-not-json", config(b"{"), "model'", "config.json is not JSON", AGAIN),
    model("config-array", config(b"[1]"), "model'", "not a JSON object", AGAIN),
    model("config-empty", config(b"{}"), "", "model_type", CONTAINED),
    model(
        "type-unknown",
        config(b'{"model_type": "martian"}'),
        "martian",
        "model_type is unknown",
        CONTAINED,
    ),
    model("type-a-list", config(b'{"model_type": ["llama"]}'), "", "model_type", CONTAINED),
    model(
        "custom-code", custom_code, "own", "model_type is unknown", "trust_remote_code stays off"
    ),
    model(
        "architecture-unknown",
        configured(architectures=["Own"]),
        "Own",
        "no architecture that transformers knows",
        "if it is a LlamaForCausalLM",
    ),
    model(
        "architecture-a-number",
        configured(architectures=[5]),
        "5",
        "no architecture that transformers knows",
        CONTAINED,
    ),
    model(
        "architecture-a-function",
        configured(architectures=["pipeline"]),
        "pipeline",
        "config.json",
        "transformers itself contains|config.json",
    ),
    model(
        "a-key-that-the-library-does-not-name",
        lambda desk: (
            architecture(tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**GROUPED, **OWN)))(desk)
            or configured(per_layer_config={"full_attention": {"head_dim": 8}})(desk)
        ),
        "gemma4_text",
        r"not valid \(invalid literal for int.*\), as its per_layer_config is wrong",
        AGAIN,
    ),
    model("wrong-type-in-config", configured(hidden_size="big"), "", "hidden_size", REPAIR),
    model(
        "heads-do-not-divide", configured(num_attention_heads=5), "", "hidden size|heads", REPAIR
    ),
    model("no-heads", configured(num_attention_heads=0), "", "config.json", REPAIR),
    model(
        "no-blocks", configured(num_hidden_layers=0), "", "no decoder blocks found", "decoder-only"
    ),
    model(
        "quantized",
        configured(quantization_config={"quant_method": "fp8"}),
        "",
        "quantiz",
        "original dtype",
    ),
    foreign(
        "bert",
        lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
        "BertForMaskedLM",
        "an encoder, which",
    ),
    foreign(
        "sentence-transformers",
        lambda: tf.BertModel(tf.BertConfig(**ENCODER)),
        "BertModel",
        "an encoder, which",
    ),
    foreign(
        "t5",
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "T5ForConditionalGeneration",
        "an encoder–decoder; only decoder-only models",
        "use a decoder-only model",
    ),
    foreign(
        "t5-without-a-name",
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "t5",
        "an encoder–decoder; only decoder-only models",
        "use a decoder-only model",
        architectures=None,
    ),
    foreign(
        "bart",
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        "BartForConditionalGeneration",
        "an encoder–decoder; only decoder-only models",
        "use a decoder-only model",
    ),
    foreign(
        "quantized-bart",
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        "BartForConditionalGeneration",
        "an encoder–decoder; only decoder-only models",
        "use a decoder-only model",
        quantization_config={"quant_method": "fp8"},
    ),
    foreign(
        "vit",
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**PICTURES)),
        "ViTForImageClassification",
        "not a causal language model",
    ),
    foreign(
        "base-model",
        lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)),
        "LlamaModel",
        "without its head, as embedding models are",
        "use the LlamaForCausalLM that it was made from",
    ),
    foreign(
        "classifier",
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED)),
        "LlamaForSequenceClassification",
        "not a causal language model",
    ),
    model(
        "original-llava",
        configured(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"]),
        *("LlavaLlamaForCausalLM", "the original LLaVA's own layout", "llava-hf/llava-1.5-7b-hf"),
    ),
    source("its-own-link", "loop", "no such folder", "existing folder"),
    source("a-name-of-no-file", "a\0b", "no such folder", "existing folder", r"'a\x00b'"),
    source("half-a-character", "\ud800", "not a text", "another text", r"\ud800"),
    source("a-long-name", "long" * 2000, "no such folder", "existing folder", "long" * 100),
    model(
        "config-utf-16",
        config("{}".encode("utf-16")),
        "model'",
        "config.json is a text in UTF-16",
        "save it as UTF-8",
    ),
    model("config-binary", config(bytes(range(256))), "model'", "config.json is not JSON", AGAIN),
    model(
        "config-deep",
        config(f'{{"model_type": "llama", "x": {DEEP}}}'.encode()),
        "llama",
        "config.json is not",
        AGAIN,
    ),
    model("config-deeper", config(b'{"x":' * 100_000), "model'", "config.json is not JSON", AGAIN),
    model(
        "config-a-folder",
        replaced("config.json", Path.mkdir),
        "model'",
        "cannot be read",
        "permissions",
    ),
    model(
        "config-its-own-link",
        replaced("config.json", lambda path: path.symlink_to(path)),
        "model'",
        "cannot be read|no config",
        "",
    ),
    model(
        "config-a-device",
        replaced("config.json", lambda path: path.symlink_to("/dev/zero")),
        "model'",
        "cannot be read",
        "",
    ),
    model(
        "config-unreadable", unreadable("config.json"), "model'", "cannot be read", "permissions"
    ),
    model(
        "a-billion-blocks",
        configured(num_hidden_layers=10**9),
        "llama",
        r"num_hidden_layers = 1e\+09",
        AGAIN,
    ),
    model(
        "a-billion-heads",
        configured(num_attention_heads=10**9),
        "llama",
        "attention heads.*1000000000",
        AGAIN,
    ),
    model(
        "a-number-without-end",
        configured(num_hidden_layers=1e400),
        "llama",
        "num_hidden_layers|not valid",
        "",
    ),
    model(
        "blocks-below-zero",
        configured(num_hidden_layers=-1),
        "",
        "no decoder blocks|config.json",
        "",
    ),
    model(
        "a-huge-vocabulary",
        configured(vocab_size=10**15),
        "Llama",
        "does not build a model .*allocate",
        REPAIR,
    ),
    Bad(
        "mixture-of-experts",
        mixture,
        "model.source",
        "gate.weight",
        r"\[2, 32\] in the checkpoint, \[3, 32\] by config.json",
        "the config.json that belongs to the weights",
    ),
]


@table(MODELS)
def test_models(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "loop").symlink_to("loop")
    check(bad, desk, weight_reads, capsys)
