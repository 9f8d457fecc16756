"""Mistakes of users: one clear message, exit code 2, before any weights are read and before anything is written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import DEPTH, GROUPED, VOCAB
from safetensors.torch import load_file, save_file
from test_cli import LENGTH, Desk, random_text

import fusegpt_ray.pipeline  # noqa: F401 - imported here, so that the time of a message is not the time of imports
from fusegpt_ray import storage
from fusegpt_ray.cli import main

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MESSAGE = re.compile(r"error: (?P<key>[^=]+?) = (?P<value>.+?): (?P<problem>.+)\. Fix: (?P<fix>.+)\.", re.DOTALL)
STAGES = r"starting the local engine|one process on cpu, \w+|tokenising|checking the model's files"
PROGRESS = re.compile(rf"[^\n]*: \d+ blocks, \d+ to remove \([^\n]*\)|{STAGES}")
"""What may stand before the message: a text is read with the model's tokenizer, after its configuration has been found good."""
SECONDS = 3.0


@pytest.fixture
def desk(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk.make(tmp_path, checkpoint("llama"))


@pytest.fixture
def weight_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The safetensors files of which more than the header has been read since (they are really read)."""
    reads: list[str] = []
    read, read_ranges = storage.read, storage.read_ranges

    def counting_read(uri: str) -> bytes:
        if uri.endswith(".safetensors"):
            reads.append(uri)
        return read(uri)

    def counting_read_ranges(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        parts = read_ranges(uri, ranges)
        if uri.endswith(".safetensors") and max(end for _, end in ranges) > 8 + header_bytes(Path(uri)):
            reads.append(uri)
        return parts

    monkeypatch.setattr(storage, "read", counting_read)
    monkeypatch.setattr(storage, "read_ranges", counting_read_ranges)
    return reads


def header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: what each file holds."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@dataclass(frozen=True)
class Bad:
    """A mistake, and what the message must say of it: the key, part of the value, patterns of the problem and the fix."""

    name: str
    make: Callable[[Desk], Sequence[str] | None]
    """Make the mistake; returns what follows `fusegpt` on the command line, or None for `compress` and the desk's recipe."""
    key: str
    value: str
    problem: str
    fix: str


def check(bad: Bad, desk: Desk, reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = bad.make(desk) or ["compress", desk.write()]
    before = tree(desk.folder)
    reads.clear()
    capsys.readouterr()
    began = time.process_time()
    code = main(arguments)
    seconds = time.process_time() - began
    stdout, stderr = capsys.readouterr()

    lines = stderr.splitlines()
    first = next((n for n, line in enumerate(lines) if not PROGRESS.fullmatch(line)), len(lines))
    message = MESSAGE.fullmatch("\n".join(lines[first:]))
    assert code == 2 and message, stderr
    assert message["key"] == bad.key
    assert bad.value in message["value"]
    assert re.search(bad.problem, message["problem"])
    assert re.search(bad.fix, message["fix"])
    assert stdout == "" and "Traceback" not in stderr and stderr.count("error: ") == 1
    assert tree(desk.folder) == before
    assert reads == []
    assert seconds < SECONDS


def table(cases: Sequence[Bad]) -> pytest.MarkDecorator:
    assert len({bad.name for bad in cases}) == len(cases)
    return pytest.mark.parametrize("bad", cases, ids=[bad.name for bad in cases])


def test_the_intact_recipe_runs_and_reads_weights(desk: Desk, weight_reads: list[str]) -> None:
    assert main(["compress", desk.write(method="mi", sparsity=0.2)]) == 0
    assert weight_reads and (desk.out / "demo-p20/fusegpt.json").exists()


# --- the recipe ---


def overridden(setting: str, value: str, problem: str, fix: str = "", key: str = "") -> Bad:
    """`--set setting` on a good recipe."""

    def make(desk: Desk) -> list[str]:
        return ["compress", desk.write(), "--set", setting]

    key = key or setting.partition("=")[0]
    return Bad(setting, make, key, value, problem, fix or f"change {key}")


FRACTION = ("not between 0 and 1", "such as 0.25")
SETTINGS = [
    overridden("sparsity=0", "0.0", *FRACTION),
    overridden("sparsity=1", "1.0", *FRACTION),
    overridden("sparsity=1.5", "1.5", *FRACTION),
    overridden("sparsity=-1", "-1.0", *FRACTION),
    overridden("sparsity=.nan", "nan", *FRACTION),
    overridden("sparsity=0.7", "0.7", "leaves 1 of 5 blocks", "at most 0.60"),
    overridden("sparsity=[0.2, 0.9]", "0.9", "leaves 0 of 5 blocks", "at most 0.60"),
    overridden("sparsity=[0.2, 0.2]", "[0.2, 0.2]", "same name", "list each one once"),
    overridden("sparsity=[]", "[]", "there is none", "list each one once"),
    overridden("sparsity=some", "'some'", "valid number", key="sparsity.0"),
    overridden("metod=mi", "'mi'", "unknown key", "did you mean method"),
    overridden("fusion.los=batch_kl", "'batch_kl'", "unknown key", "did you mean fusion.loss"),
    overridden("model.nonsense=1", "1", "unknown key", "dtype"),
    overridden("calibration.lenght=8", "8", "unknown key", "did you mean calibration.length"),
    overridden("importance.metric=bi", "'bi'", "unknown key", "windows"),
    overridden("cluster.gpus=1", "1", "unknown key", "gpus_per_replica"),
    overridden("output.url=here", "'here'", "unknown key", "did you mean output.uri"),
    overridden("evaluation.a={data: a.txt, colum: b}", "'b'", "unknown key", "did you mean evaluation.a.column", "evaluation.a.colum"),
    overridden("sparsity", "'sparsity'", "not of the form key=value", "--set fusion.epochs=5", key="--set"),
    overridden("seed=[1", "'seed=[1'", "not YAML", "quote it", key="--set"),
    overridden("seed.of=3", "{'of'", "valid integer", key="seed"),
    overridden("method=magic", "'magic'", "'mi', 'mi\\+ft' or 'fusegpt'"),
    overridden("cluster.engine=spark", "'spark'", "'ray' or 'local'"),
    overridden("fusion.loss=mse", "'mse'", "'batch_kl' or 'normalized_mse'"),
    overridden("fusion.preset=best", "'best'", "'default' or 'paper'"),
    overridden("fusion.epochs=many", "'many'", "valid integer"),
    overridden("fusion.epochs=1.5", "1.5", "valid integer"),
    overridden("fusion.batch=1", "1", "greater than or equal to 2"),
    overridden("fusion=7", "7", "dictionary"),
    overridden("fusion.learning_rate=-1", "-1", "greater than 0"),
    overridden("fusion.learning_rate=.nan", "nan", "greater than 0|finite"),
    overridden("fusion.learning_rate=.inf", "inf", "finite"),
    overridden("fusion.betas=[1.5, 0.9]", "1.5", "less than 1", key="fusion.betas.0"),
    overridden("model.source=5", "5", "valid string"),
    overridden("calibration.length=1", "1", "greater than or equal to 2"),
    overridden("calibration.windows=6", "6", "not a multiple of fusion.batch = 4", "use 8"),
    overridden("calibration.windows=2", "4", "first of the 2 calibration windows", "raise", key="importance.windows"),
    overridden("cluster.workers=3", "3", "does not divide fusion.batch = 4", r"\[1, 2, 4\]"),
    overridden("calibration.length=65", "65", "longer than the model's 64 positions", "at most 64"),
    overridden("calibration.data=''", "''", "at least 1 character|no such file"),
    overridden("evaluation.a={data: a.txt, length: 65}", "65", "longer than .* 64", "at most 64", key="evaluation.a.length"),
    overridden("evaluation.a=5", "5", "dictionary"),
    overridden("output.name=a/b", "'a/b'", "should match pattern"),
    overridden("output.name=..", "'..'", "should match pattern"),
    overridden("output.shard_gb=0", "0", "greater than 0"),
    overridden("output.shard_gb=.inf", "inf", "finite"),
    overridden("output.uri=/proc/fusegpt", "'/proc/fusegpt'", "cannot be written", "your rights"),
    overridden("output.uri=heldout.txt/deep", "'heldout.txt/deep'", "cannot be written", "the path"),
    overridden("output.uri=nosuch://bucket/out", "'nosuch://bucket/out'", "cannot be written .*nosuch", "the path"),
]


@table(SETTINGS)
def test_settings(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


def recipe_of(data: bytes) -> Callable[[Desk], list[str]]:
    def make(desk: Desk) -> list[str]:
        (desk.folder / "own.yaml").write_bytes(data)
        return ["compress", str(desk.folder / "own.yaml")]

    return make


def without(section: str) -> Callable[[Desk], list[str]]:
    def make(desk: Desk) -> list[str]:
        recipe = desk.recipe()
        del recipe[section]
        return recipe_of(json.dumps(recipe).encode())(desk)

    return make


QUICKSTART = "examples/quickstart.yaml"
RECIPES = [
    Bad("missing", lambda desk: ["score", "no.yaml"], "recipe", "'no.yaml'", "No such file", "path of a YAML recipe"),
    Bad("folder", lambda desk: ["score", str(desk.model)], "recipe", "model'", "Is a directory", "path of a YAML recipe"),
    Bad("open-bracket", recipe_of(b"model: [1"), "recipe", "own.yaml", "not valid YAML", QUICKSTART),
    Bad("list", recipe_of(b"[1, 2]"), "recipe", "own.yaml", "not a mapping", QUICKSTART),
    Bad("empty", recipe_of(b""), "recipe", "own.yaml", "not a mapping", QUICKSTART),
    Bad("not-utf-8", recipe_of(b"\xff\xfe\x00"), "recipe", "own.yaml", "cannot be read", "YAML recipe"),
    Bad("key-twice", recipe_of(b"seed: 1\nseed: 2"), "recipe", "own.yaml", "'seed' is there twice", QUICKSTART),
    Bad("code", recipe_of(b'!!python/object/apply:os.mkdir ["ran"]'), "recipe", "own.yaml", "not valid YAML", QUICKSTART),
    Bad("deep", recipe_of(b"[" * 3000), "recipe", "own.yaml", "not valid YAML", QUICKSTART),
    Bad("no-model", without("model"), "model", "None", "missing", "add model"),
    Bad("no-output", without("output"), "output", "None", "missing", "add output"),
]


@table(RECIPES)
def test_recipe_files(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


# --- the model ---


def edit(desk: Desk, file: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of the model."""
    path = desk.model / file
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def model(name: str, spoil: Callable[[Desk], object], value: str, problem: str, fix: str) -> Bad:
    """A model spoilt in some way."""

    def make(desk: Desk) -> None:
        spoil(desk)

    return Bad(name, make, "model.source", value, problem, fix)


def source(name: str, value: str, problem: str, fix: str) -> Bad:
    def make(desk: Desk) -> list[str]:
        return ["compress", desk.write(model={"source": value})]

    return Bad(name, make, "model.source", value, problem, fix)


def config(text: str) -> Callable[[Desk], object]:
    """config.json holds this text."""
    return lambda desk: (desk.model / "config.json").write_text(text)


def configured(**changes: Any) -> Callable[[Desk], object]:
    """config.json says something else."""
    return lambda desk: edit(desk, "config.json", lambda data: data | changes)


def custom_code(desk: Desk) -> None:
    """An architecture of its own, whose code leaves a trace where it runs."""
    (desk.model / "own.py").write_text("open('ran', 'w')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(desk, "config.json", lambda data: data | {"model_type": "own", "architectures": ["Own"], "auto_map": auto})


def architecture(made: tf.PreTrainedModel) -> Callable[[Desk], object]:
    """The checkpoint of another architecture, as transformers writes it."""

    def spoil(desk: Desk) -> None:
        (desk.model / SINGLE).unlink()
        made.save_pretrained(desk.model)

    return spoil


def foreign(name: str, build: Callable[[], tf.PreTrainedModel], value: str) -> Bad:
    """A model that is no causal language model."""
    return model(
        name, lambda desk: architecture(build())(desk), value, "no decoder blocks|language model", "decoder-only|language model"
    )


ENCODER = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 24}
PICTURES = {key: value for key, value in ENCODER.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": DEPTH, "num_heads": 2}
AGAIN, CONTAINED, FOLDER = "download the checkpoint again", "transformers itself contains", "folder of a Hugging Face checkpoint"
REPAIR = "config.json|checkpoint"
MODELS = [
    source("no-such-folder", "nowhere", "no such folder", "hub id such as"),
    source("hub-id-offline", "some-lab/no-such-model", "the hub does not give it", "offline, give a local folder"),
    source("unknown-protocol", "nosuch://bucket/model", r"^(?!.*JSON).*nosuch", "path|URI|protocol"),
    source("a-file", "model/config.json", "a file, not a folder", "folder that holds config.json"),
    model("no-config", lambda desk: (desk.model / "config.json").unlink(), "model'", "no config.json there", FOLDER),
    model("config-not-json", config("{"), "model'", "config.json is not JSON", AGAIN),
    model("config-array", config("[1]"), "model'", "not a JSON object", AGAIN),
    model("config-empty", config("{}"), "", "model_type", CONTAINED),
    model("type-unknown", config('{"model_type": "martian"}'), "martian", "model_type is unknown", CONTAINED),
    model("type-a-list", config('{"model_type": ["llama"]}'), "", "model_type", CONTAINED),
    model("custom-code", custom_code, "own", "model_type is unknown", "trust_remote_code stays off"),
    model("no-architecture", configured(architectures=[]), "[]", "names no architecture", "causal language model"),
    model("architecture-unknown", configured(architectures=["Own"]), "Own", "no architecture that transformers knows", CONTAINED),
    model("architecture-a-number", configured(architectures=[5]), "5", "no architecture that transformers knows", CONTAINED),
    model(
        "architecture-a-function",
        configured(architectures=["pipeline"]),
        "pipeline",
        "config.json",
        "transformers itself contains|config.json",
    ),
    model("wrong-type-in-config", configured(hidden_size="big"), "", "hidden_size", REPAIR),
    model("heads-do-not-divide", configured(num_attention_heads=5), "", "hidden size|heads", REPAIR),
    model("no-heads", configured(num_attention_heads=0), "", "config.json", REPAIR),
    model("no-blocks", configured(num_hidden_layers=0), "", "no decoder blocks found", "decoder-only"),
    model(
        "quantized",
        configured(quantization_config={"quant_method": "fp8"}),
        "",
        "quantiz",
        "original dtype",
    ),
    foreign("bert", lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), "BertForMaskedLM"),
    foreign("t5", lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "T5ForConditionalGeneration"),
    foreign("vit", lambda: tf.ViTForImageClassification(tf.ViTConfig(**PICTURES)), "ViTForImageClassification"),
    foreign("base-model", lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)), "LlamaModel"),
    foreign("classifier", lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED)), "LlamaForSequenceClassification"),
    model(
        "mixture-of-experts",
        lambda desk: architecture(tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=2)))(desk),
        "experts",
        "rearranges this tensor",
        "not a mixture of experts",
    ),
]


@table(MODELS)
def test_models(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def test_the_trap_is_one(desk: Desk) -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert (desk.folder / "ran").exists()


def only(name: str, data: bytes) -> Callable[[Desk], object]:
    """The model has this file and no other weights."""

    def spoil(desk: Desk) -> None:
        (desk.model / SINGLE).unlink()
        (desk.model / name).write_bytes(data)

    return spoil


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Desk], object]:
    return lambda desk: (desk.model / SINGLE).write_bytes(change((desk.model / SINGLE).read_bytes()))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Desk], object]:
    def spoil(desk: Desk) -> None:
        held = load_file(desk.model / SINGLE)
        change(held)
        save_file(held, desk.model / SINGLE, metadata={"format": "pt"})

    return spoil


def sharded(spoil: Callable[[Path], object]) -> Callable[[Desk], object]:
    """Two shards with an index, then spoilt."""

    def make(desk: Desk) -> None:
        tf.AutoModelForCausalLM.from_pretrained(desk.model).save_pretrained(desk.folder / "shards", max_shard_size="100KB")
        (desk.model / SINGLE).unlink()
        shutil.copytree(desk.folder / "shards", desk.model, dirs_exist_ok=True)
        spoil(desk.model)

    return make


def pointing(shard: Any) -> Callable[[Path], object]:
    """The index says that the head is in this file."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def length_field(value: int) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", value) + data[8:]


HEADER, DAMAGED, OUTSIDE = "header does not fit", "damaged safetensors header", "points outside its folder"
NAME = "model.layers.2.mlp.up_proj.weight"
PICKLE = "found pytorch_model.bin.*never opened"
WEIGHTS = [
    model("pickle", only("pytorch_model.bin", pickle.dumps(Trap())), "model'", PICKLE, "save_pretrained"),
    model("pickle-renamed", only(SINGLE, pickle.dumps(Trap())), SINGLE, HEADER, "safetensors only"),
    model("no-weights", only("notes.txt", b""), "model'", "holds no model.safetensors", FOLDER),
    model("empty", only(SINGLE, b""), SINGLE, HEADER, "again"),
    model("cut-in-the-header", rewritten(lambda data: data[:100]), SINGLE, HEADER, "again"),
    model("cut-in-the-tensors", rewritten(lambda data: data[:-1000]), SINGLE, f"{DAMAGED}.*outside the file", "again"),
    model("with-more-at-its-end", rewritten(lambda data: data + b"x"), SINGLE, "bytes that belong to no tensor", "again"),
    model("absurd-length", rewritten(length_field(2**63)), SINGLE, HEADER, "again"),
    model("short-length", rewritten(length_field(50)), SINGLE, DAMAGED, "again"),
    model("no-tensor", tensors(lambda held: held.pop(NAME)), NAME, "lacks 1 tensors", "download it again"),
    model("no-head", tensors(lambda held: held.pop("lm_head.weight")), "lm_head.weight", "lacks 1 tensors", "download it again"),
    model("wrong-shape", tensors(lambda held: held.update({NAME: torch.zeros(2, 3)})), NAME, r"\[2, 3\].*\[48, 32\]", "config.json"),
    model("more-blocks-in-config", configured(num_hidden_layers=7), "model.layers.5", "lacks 18 tensors", "again"),
    model("fewer-blocks-in-config", configured(num_hidden_layers=4), "5 blocks", "config.json says 4", "of these weights"),
    model("index-not-json", sharded(lambda folder: (folder / INDEX).write_text("{")), "model'", "damaged model.saf.*index", "again"),
    model("index-leads-up", sharded(pointing("../x.safetensors")), "model'", OUTSIDE, "trusted"),
    model("index-leads-away", sharded(pointing("/etc/passwd")), "model'", OUTSIDE, "trusted"),
    model("index-names-a-number", sharded(pointing(5)), "model'", "index", AGAIN),
    model("index-names-no-shard", sharded(pointing("more.safetensors")), "more.safetensors", "missing", "again"),
    model("shard-missing", sharded(lambda folder: max(folder.glob("*.safetensors")).unlink()), "of-0000", "file is missing", "again"),
]


@table(WEIGHTS)
def test_weights(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


def no_tokenizer(desk: Desk) -> None:
    for file in desk.model.glob("tokenizer*"):
        file.unlink()


NO_TOKENIZER, BESIDE = "tokenizer does not load", "tokenizer.json beside its weights"
TOKENIZERS = [
    model("none", no_tokenizer, "model'", NO_TOKENIZER, BESIDE),
    model("garbage", lambda desk: (desk.model / "tokenizer.json").write_text("{"), "model'", NO_TOKENIZER, BESIDE),
]


@table(TOKENIZERS)
def test_tokenizers(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


# --- texts ---


def text(file: str, data: bytes | None, key: str, problem: str, fix: str, value: str = "") -> list[Bad]:
    """A file as the text of calibration, and as the held-out text."""

    def make(section: str) -> Callable[[Desk], list[str]]:
        def spoil(desk: Desk) -> list[str]:
            if data is not None:
                (desk.folder / file).write_bytes(data)
            calibration = desk.recipe()["calibration"]
            if section == "calibration":
                return ["compress", desk.write(calibration=calibration | {"data": file})]
            return ["compress", desk.write(evaluation={"a": {"data": file}})]

        return spoil

    return [
        Bad(f"{section}-{file}", make(section), f"{section}.{key}", value or file, problem, fix)
        for section in ("calibration", "evaluation.a")
    ]


SHORT = {"problem": "the text has . tokens", "fix": "more text", "value": str(LENGTH)}
TEXTS = [
    *text("no.txt", None, "data", "no such file", "path or glob"),
    *text("empty.txt", b"", "length", **SHORT),
    *text("short.txt", b"w5 w6 w7", "length", **SHORT),
    *text("binary.txt", bytes(range(256)) * 9, "data", "not UTF-8", "convert it to UTF-8"),
    *text("latin.txt", "w5 é ".encode("latin-1") * 99, "data", "not UTF-8", "convert it to UTF-8"),
    *text("broken.jsonl", b'{"text": "w5 w6"}\n{"text": "w7\n', "data", "line 2 is not JSON", "one JSON object a line"),
    *text("array.jsonl", b'["w5 w6"]\n', "data", "line 1 is not a JSON object", "one JSON object a line"),
    *text("body.jsonl", b'{"body": "w5 w6"}\n', "column", "line 1 of .* no such column", r"\['body'\]", "'text'"),
    *text("number.jsonl", b'{"text": 5}\n', "column", "line 1 of .* no text there but 5", "column of text", "'text'"),
    *text("garbage.parquet", b"PAR1garbagePAR1", "data", "cannot be read", "the file"),
    *text("some-lab/no-such-text", None, "data", "neither a file here nor a dataset", "network"),
]


@table(TEXTS)
def test_texts(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


# --- the output folder ---


def finished_before(desk: Desk) -> None:
    assert main(["compress", desk.write(method="mi")]) == 0


def stopped_before(desk: Desk) -> list[str]:
    """A run that failed in its first round; then another rate."""
    assert main(["compress", desk.write(), "--set", "fusion.learning_rate=1e30"]) == 1
    return ["compress", desk.write(), "--set", "fusion.learning_rate=0.001"]


def in_the_way(name: str) -> Callable[[Desk], None]:
    def make(desk: Desk) -> None:
        desk.out.mkdir()
        (desk.out / name).write_text("a file of the user's")

    return make


OUTPUTS = [
    Bad("finished", finished_before, "output.name", "'demo'", "a finished model is already at .*demo-p40", "another output.name"),
    Bad("stopped", stopped_before, "output.name", "'demo'", r"recipe.fusion.learning_rate = 1e\+30, .* 0.001", "of that run"),
    Bad("a-file-for-the-model", in_the_way("demo-p40"), "output.name", "'demo'", "demo-p40", "another"),
    Bad("a-file-for-the-run", in_the_way("demo.run"), "output.name", "'demo'", "demo.run", "another"),
]


@table(OUTPUTS)
def test_outputs(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, desk, weight_reads, capsys)


# --- fusegpt evaluate ---


def evaluated(name: str, key: str, value: str, problem: str, fix: str, **changes: str) -> Bad:
    """`fusegpt evaluate` with an argument changed."""

    def make(desk: Desk) -> list[str]:
        arguments = {"model": "model", "data": "heldout.txt", "length": str(LENGTH)} | changes
        return ["evaluate", arguments.pop("model"), *(part for key, value in arguments.items() for part in (f"--{key}", value))]

    return Bad(name, make, key, value, problem, fix)


EVALUATIONS = [
    evaluated("no-model", "MODEL", "'nowhere'", "no such folder", "existing folder", model="nowhere"),
    evaluated("no-text", "--data", "'no.txt'", "no such file", "path or glob", data="no.txt"),
    evaluated("short-text", "--length", "12", "the text has . tokens", "more text", data="short.txt"),
    evaluated("long-windows", "--length", "65", "longer than the model's 64 positions", "at most 64", length="65"),
    evaluated("no-length", "--length", "0", "greater than or equal to 2", "change", length="0"),
    evaluated("no-windows", "--windows", "0", "greater than or equal to 1", "change", windows="0"),
    evaluated("no-replicas", "--replicas", "0", "greater than or equal to 1", "change", replicas="0"),
]


@table(EVALUATIONS)
def test_evaluations(bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (desk.folder / "short.txt").write_text(random_text(3, seed=3))
    check(bad, desk, weight_reads, capsys)


# --- a run that fails ---


def test_a_run_that_fails_says_where_and_how_to_go_on(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", desk.write(), "--set", "fusion.learning_rate=1e30"]) == 1
    stdout, stderr = capsys.readouterr()
    end = stderr.splitlines()[-3:]
    assert stdout == "" and not list(desk.out.glob("*/fusegpt.json"))
    assert re.fullmatch("failed: FloatingPointError: the fine-tuning loss became .* lower fusion.learning_rate", end[0])
    assert end[1] == f"stopped in round 1 of 2; 0 are finished in {desk.out / 'demo.run'}"
    assert end[2] == "The same command goes on from the last finished round."
