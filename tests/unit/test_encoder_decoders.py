"""Every encoder–decoder is refused by its config.json alone, for that reason and no other."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import build_skeleton, read_config

REASON = "an encoder–decoder; only decoder-only models"
WORDS = {"vocab_size": 100, "d_model": 16}
SMALL = WORDS | {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
SEES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = {"model_type": "t5", "d_model": 16, "num_layers": 2}
BERT = tf.BertConfig(**SEES, vocab_size=100)
TINY: list[tuple[str, tf.PretrainedConfig]] = [
    ("T5ForConditionalGeneration", tf.T5Config(**WORDS, num_layers=2)),
    ("MT5ForConditionalGeneration", tf.MT5Config(**WORDS, num_layers=2)),
    ("BartForConditionalGeneration", tf.BartConfig(**SMALL, encoder_layers=2)),
    ("MBartForConditionalGeneration", tf.MBartConfig(**SMALL, encoder_layers=2)),
    ("MarianMTModel", tf.MarianConfig(**SMALL, encoder_layers=2, pad_token_id=0)),
    ("WhisperForConditionalGeneration", tf.WhisperConfig(**SMALL, encoder_layers=2)),
    ("ProphetNetForConditionalGeneration", tf.ProphetNetConfig(vocab_size=100)),
    ("Pix2StructForConditionalGeneration", tf.Pix2StructConfig()),
    ("Florence2ForConditionalGeneration", tf.Florence2Config()),
    ("T5Gemma2ForConditionalGeneration", tf.T5Gemma2Config()),
    ("MusicgenForConditionalGeneration", tf.MusicgenConfig()),
    ("EncoderDecoderModel", tf.EncoderDecoderConfig(encoder=BERT, decoder=BERT)),
    ("VisionEncoderDecoderModel", tf.VisionEncoderDecoderConfig(encoder=BERT, decoder=BERT)),
    ("Blip2ForConditionalGeneration", tf.Blip2Config(text_config=TEXTS)),
]


def described(name: str, config: tf.PretrainedConfig) -> dict[str, Any]:
    return config.to_dict() | {"architectures": [name]}


@pytest.mark.parametrize(("name", "config"), TINY, ids=[name for name, _ in TINY])
def test_encoder_decoders_are_refused(name: str, config: tf.PretrainedConfig) -> None:
    with pytest.raises(UserError, match=REASON) as caught:
        build_skeleton(described(name, config))
    assert caught.value.value == [name]
    assert "use a decoder-only model" in caught.value.fix


KINDS = (
    "bart bigbird_pegasus blenderbot canary encoder-decoder fsmt led longt5 m2m_100 marian mbart"
    " moonshine mt5 mvp nllb-moe nougat pegasus pegasus_x plbart pop2piano prophetnet rag"
    " seamless_m4t speech-encoder-decoder speech_to_text speecht5 switch_transformers t5 t5gemma"
    " t5gemma2 udop umt5 vision-encoder-decoder whisper"
)


@pytest.mark.parametrize("kind", KINDS.split())
def test_the_type_alone_is_enough(kind: str) -> None:
    """Whatever else the config.json lacks or says."""
    with pytest.raises(UserError, match=REASON):
        read_config({"model_type": kind, "num_hidden_layers": 10**9})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BartForCausalLM", tf.BartConfig(**SMALL, is_encoder_decoder=False)),
        ("BartForCausalLM", tf.BartConfig(**SMALL)),
        ("WhisperForCausalLM", tf.WhisperConfig(**SMALL, pad_token_id=0)),
    ],
)
def test_the_decoder_alone_is_none(name: str, config: tf.PretrainedConfig) -> None:
    """Its class leaves the encoder out, whatever its config.json says."""
    assert type(build_skeleton(described(name, config))).__name__ == name


def test_parts_of_other_names_make_none() -> None:
    """A byte-latent model has small encoders and decoders of bytes, and is one decoder."""
    assert read_config({"model_type": "blt"}).model_type == "blt"
