"""Folders and files that are not what they should be, for common reasons (Git LFS pointers, web
pages, adapters, other formats, a folder too high or too low, a page's address): the message says
what each is and what to do, and nothing else happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf
from desk import Desk
from mistakes import Bad, check, table
from models import GROUPED
from spoilt import INDEX, SINGLE, configured, model, source
from spoilt_weights import only, sharded

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4400000000\n"
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
LFS, AGAIN = "Git LFS pointer", "git lfs pull"


def instead(name: str, data: bytes) -> Callable[[Desk], object]:
    return lambda desk: (desk.model / name).write_bytes(data)


def marked(name: str, mark: bytes = b"\xef\xbb\xbf") -> Callable[[Desk], object]:
    """The file begins with a byte-order mark."""
    return lambda desk: (desk.model / name).write_bytes(mark + (desk.model / name).read_bytes())


def adapter(desk: Desk) -> None:
    (desk.model / "config.json").unlink()
    only("adapter_model.safetensors", (desk.model / SINGLE).read_bytes())(desk)
    (desk.model / "adapter_config.json").write_text("{}")


def adapter_with_config(desk: Desk) -> None:
    only("adapter_model.safetensors", (desk.model / SINGLE).read_bytes())(desk)
    (desk.model / "adapter_config.json").write_text("{}")


def training_folder(desk: Desk) -> None:
    inner = desk.folder / "inner"
    desk.model.rename(inner)
    for step in (500, 1000):
        shutil.copytree(inner, desk.model / f"checkpoint-{step}")
    shutil.rmtree(inner)


def subfolder(desk: Desk) -> None:
    inner = desk.folder / "inner"
    desk.model.rename(inner)
    desk.model.mkdir()
    inner.rename(desk.model / "language_model")
    (desk.model / "README.md").write_text("A model and more.")


def cache_folder(desk: Desk) -> None:
    inner = desk.folder / "inner"
    desk.model.rename(inner)
    (desk.model / "snapshots").mkdir(parents=True)
    inner.rename(desk.model / "snapshots" / "abc")


def diffusers(desk: Desk) -> None:
    """A pipeline, as `DiffusionPipeline.save_pretrained` lays it out."""
    shutil.rmtree(desk.model)
    for part in ("unet", "vae", "text_encoder"):
        (desk.model / part).mkdir(parents=True)
        (desk.model / part / "config.json").write_text("{}")
    (desk.model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def diffusers_part(desk: Desk) -> None:
    shutil.rmtree(desk.model)
    desk.model.mkdir()
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
    (desk.model / "config.json").write_text(json.dumps(config))
    (desk.model / "diffusion_pytorch_model.safetensors").write_bytes(b"x")


def given(name: str, file: str, data: bytes | None, problem: str, fix: str) -> Bad:
    """A file of the model in place of its folder; `data`: what it holds, if it is not there."""

    def make(desk: Desk) -> list[str]:
        if data is not None:
            (desk.model / file).write_bytes(data)
        return ["compress", desk.write(model={"source": f"model/{file}"})]

    return Bad(name, make, "model.source", f"model/{file}", problem, fix)


def quantized(name: str, said: str = "", key: str = "quantization_config", **how: object) -> Bad:
    """`how`: what the quantizer notes in config.json."""
    problem = rf"quantized checkpoint \({said or name}\)"
    return model(name, configured(**{key: how}), "llama", problem, "original dtype.*dequantize")


def deepspeed(desk: Desk) -> None:
    (desk.model / SINGLE).unlink()
    (desk.model / "config.json").unlink()
    (desk.model / "global_step10").mkdir()


DIAGNOSES = [
    model("lfs-weights", instead(SINGLE, POINTER), SINGLE, LFS, AGAIN),
    model(
        "lfs-config", instead("config.json", POINTER), "model'", f"config.json is a {LFS}", AGAIN
    ),
    model(
        "lfs-tokenizer",
        instead("tokenizer.json", POINTER),
        "model'",
        f"tokenizer.json is a {LFS}",
        AGAIN,
    ),
    model("lfs-licence", instead("LICENSE", POINTER), "model'", f"LICENSE is a {LFS}", AGAIN),
    model(
        "lfs-index",
        sharded(lambda folder: (folder / INDEX).write_bytes(POINTER)),
        "model'",
        f"index.json is a {LFS}",
        AGAIN,
    ),
    model(
        "lfs-shard",
        sharded(lambda folder: max(folder.glob("*-of-*")).write_bytes(POINTER)),
        "of-0000",
        LFS,
        AGAIN,
    ),
    model(
        "page-for-config",
        instead("config.json", PAGE),
        "model'",
        "config.json is a web page",
        "credentials",
    ),
    model("page-for-weights", instead(SINGLE, PAGE), SINGLE, "a web page", "credentials"),
    model(
        "mark-in-config",
        marked("config.json"),
        "model'",
        "config.json is a text .*byte-order mark",
        "UTF-8 without",
    ),
    model(
        "mark-in-tokenizer",
        marked("tokenizer.json"),
        "model'",
        "tokenizer.json is a text .*byte-order mark",
        "without",
    ),
    model(
        "mark-in-tokenizer-config",
        marked("tokenizer_config.json"),
        "model'",
        "tokenizer_config.json .*byte-order",
        "without",
    ),
    model(
        "gguf-only",
        only("model-q4.gguf", b"GGUF"),
        "model'",
        "a GGUF checkpoint",
        "convert to GGUF what",
    ),
    model(
        "gguf-renamed",
        instead(SINGLE, b"GGUF" + bytes(60)),
        SINGLE,
        "a GGUF file",
        "original checkpoint",
    ),
    given("gguf-file", "q4.gguf", b"GGUF" + bytes(60), "a GGUF file", "original checkpoint"),
    given("pickle-file", "pytorch_model.bin", b"PK\x03\x04", "never opened", "save_pretrained"),
    given("tensorflow-file", "tf_model.h5", b"x", "not a safetensors checkpoint$", "save_pre"),
    given("safetensors-file", SINGLE, None, "a file, not a folder", "give its folder"),
    given("other-file", "tokenizer.json", None, "a file, not a folder", "holds config.json"),
    model("pickles", only("pytorch_model.bin", b"PK"), "model'", "never opened", "save_pretrained"),
    model("diffusers", diffusers, "model'", "a diffusers pipeline", "causal language model"),
    model(
        "diffusers-part",
        diffusers_part,
        "UNet2DConditionModel",
        "part of a diffusers pipeline",
        "causal language model",
    ),
    quantized("gptq", quant_method="gptq", bits=4, group_size=128),
    quantized("awq", quant_method="awq", bits=4, version="gemm"),
    quantized("bitsandbytes", quant_method="bitsandbytes", load_in_4bit=True),
    quantized("bitsandbytes-unnamed", "bitsandbytes", load_in_8bit=True),
    quantized("compressed-tensors", quant_method="compressed-tensors", format="pack-quantized"),
    quantized(
        "compressed-tensors-old",
        "compressed-tensors",
        "compression_config",
        quant_method="compressed-tensors",
    ),
    model("adapter", adapter, "model'", "no config.json.*an adapter", "merge_and_unload"),
    model("adapter-with-config", adapter_with_config, "model'", "an adapter", "merge_and_unload"),
    model(
        "no-index",
        sharded(lambda f: (f / INDEX).unlink()),
        "model'",
        r"\d+ shards.*model-00001-of.*index",
        "download the index",
    ),
    model("deepspeed", deepspeed, "model'", r"DeepSpeed \(global_step10\)", "zero_to_fp32"),
    model("onnx", only("model.onnx", b"x"), "model'", r"\(found model.onnx\)$", "save_pretrained"),
    source("web-address", "https://example.invalid/x", "address of a web page", "hub id such as"),
    model(
        "variant",
        lambda desk: (desk.model / SINGLE).rename(desk.model / "model.fp16.safetensors"),
        "",
        "model.fp16",
        "save_pre",
    ),
    model(
        "training-folder",
        training_folder,
        "model'",
        "training folder.*checkpoint-500, checkpoint-1000",
        "checkpoint-1000",
    ),
    model(
        "subfolder",
        subfolder,
        "model'",
        r"no config.json there \(but in language_model\)",
        "…/language_model",
    ),
    model("cache-folder", cache_folder, "model'", "hub's cache", "snapshots/COMMIT"),
    model(
        "padding-beyond",
        configured(pad_token_id=900),
        "LlamaForCausalLM",
        "does not build.*adding_idx",
        "repair",
    ),
    model(
        "named-weights",
        configured(transformers_weights="own.safetensors"),
        "own.",
        "a name of their own",
        "save_pretrained",
    ),
    source(
        "page",
        "https://huggingface.co/org/name",
        "address of a page on the hub",
        "hub id org/name$",
    ),
    source(
        "page-of-a-branch",
        "https://hf.co/org/name/tree/v2",
        "address of a page",
        "org/name with model.revision: v2",
    ),
    source(
        "page-without-scheme", "huggingface.co/org/name", "address of a page", "hub id org/name"
    ),
    source(
        "one-word-offline",
        "gpt2-of-nobody",
        "the hub does not give it .*HF_HUB_OFFLINE is set",
        "existing folder",
    ),
]


@table(DIAGNOSES)
def test_diagnoses(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


def test_no_message_names_a_temporary_path(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusegpt_ray.cli import main

    hidden = desk.folder / "hidden"
    hidden.mkdir()
    monkeypatch.setenv("TMPDIR", str(hidden))
    monkeypatch.setattr("tempfile.tempdir", None)
    (desk.model / "tokenizer_config.json").write_text("{")
    (desk.model / "tokenizer.json").unlink()
    assert main(["compress", desk.write()]) == 2
    message = capsys.readouterr().err
    assert "its tokenizer does not load" in message and str(hidden) not in message


def test_a_sharded_checkpoint_beside_a_newer_single_file(desk: Desk) -> None:
    """As an upload over an older one leaves it: transformers takes the single file, and so do
    we."""
    from fusegpt_ray.model.source import Source

    old = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**GROUPED))
    old.save_pretrained(desk.folder / "old", max_shard_size="30KB")
    for file in (desk.folder / "old").glob("model*"):
        shutil.copy(file, desk.model)
    stack = Source.find(str(desk.model), None).stack()
    used = {
        Path(ref.file).name
        for refs in (stack.trunk, *(block.weights for block in stack.blocks))
        for ref in refs.values()
    }
    assert used == {SINGLE}
    assert json.loads((desk.model / INDEX).read_text())["weight_map"]
