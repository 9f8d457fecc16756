"""What a source holds beside its weights: carried over, or named as left out; the same wherever
the source is."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import transformers as tf
from desk import Desk
from models import save_tiny

from fusegpt_ray import pull, verify
from fusegpt_ray.cli import main
from fusegpt_ray.model import companions
from fusegpt_ray.model.source import Source

TAKEN = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "vocab.bpe",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "qwen.tiktoken",
    "source.spm",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENCE",
    "LICENCE.txt",
    "license.txt",
    "COPYING",
    "COPYING.LESSER",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "ACCEPTABLE_USE_POLICY.md",
    "Notice.md",
    "LICENSE-MODEL",
    "LICENSE.pdf",
    "TERMS_OF_USE.md",
    "Responsible-Use-Guide.pdf",
    "prophetnet.tokenizer",
    "bpe.codes",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "qformer_tokenizer/tokenizer.json",
    "qformer_tokenizer/tokenizer_config.json",
    "qformer_tokenizer/vocab.txt",
]
LEFT = [
    "modeling_own.py",
    "pytorch_model.bin",
    "model.gguf",
    "optimizer.pt",
    "training_args.bin",
    "picture.png",
    "LICENSE.png",
    "license_checker.py",
    "adapter_config.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "events.out.tfevents",
    "consolidated.safetensors",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "training_args.json",
    "license.ipynb",
    "vocab.dll",
]
FOLDERS = {
    "original/params.json": "original/",
    "onnx/model.onnx": "onnx/",
    "checkpoint-5/config.json": "checkpoint-5/",
}
UNSPOKEN = [
    "config.json",
    "README.md",
    "fusegpt.json",
    ".gitattributes",
    ".cache/huggingface/x.json",
]


def fill(folder: Path) -> None:
    for name in (*TAKEN, *LEFT, *FOLDERS, *UNSPOKEN):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("{}")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("full") / "model")
    fill(folder)
    return folder


def test_by_name_alone() -> None:
    files = [*TAKEN, *LEFT, *FOLDERS, *UNSPOKEN, "model.safetensors"]
    assert companions.taken(files) == sorted(TAKEN)
    assert companions.left_out(files, ["model.safetensors"]) == sorted([*LEFT, *FOLDERS.values()])


def test_what_no_manifest_could_name_stays() -> None:
    """Else the published model could not be pulled."""
    names = ["LICENSE", "license", "Config.json", "a:b.txt", "vocab.json"]
    assert companions.taken(names) == ["LICENSE", "vocab.json"]
    assert companions.left_out(names, []) == ["Config.json", "a:b.txt", "license"]
    crowd = [f"additional_chat_templates/{number}.jinja" for number in range(5000)]
    assert companions.taken(crowd) == []
    assert companions.left_out(crowd, []) == ["additional_chat_templates/"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer_config.json", b"{not JSON auto_map"),
        ("tokenizer.json", b'{"vocab": {"auto_map": 5}}'),
        ("preprocessor_config.json", b'{"size":  8}'),
    ],
)
def test_nothing_else_is_rewritten(name: str, data: bytes) -> None:
    assert companions.without_code(name, data) == data


def test_no_setting_says_where_code_is() -> None:
    before = {"a": [{"auto_map": 1, "b": "\ud800"}], "custom_pipelines": {"x": {"impl": "own.X"}}}
    after = companions.without_code("processor_config.json", json.dumps(before).encode())
    assert json.loads(after) == {"a": [{"b": "\ud800"}]}


@pytest.mark.parametrize("where", ["folder", "store"])
def test_the_same_for_a_folder_and_a_store(where: str, full: Path) -> None:
    place = str(full)
    if where == "store":
        memory, place = fsspec.filesystem("memory"), "memory://taken/model"
        memory.put(str(full), "/taken/model", recursive=True)
    source = Source.find(place, None)
    assert sorted(source.small_files) == sorted(TAKEN)
    assert source.left_out(["model.safetensors"]) == sorted([*LEFT, *FOLDERS.values()])


AUTO = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.Own",
    "AutoTokenizer": ["own.Tokenizer", None],
}


def dress(desk: Desk) -> None:
    """What published models of others have beside their weights."""
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(
        json.dumps(config | {"auto_map": AUTO, "rope_scaling": None})
    )
    about = json.loads((desk.model / "tokenizer_config.json").read_text())
    (desk.model / "tokenizer_config.json").write_text(json.dumps(about | {"auto_map": AUTO}))
    (desk.model / "processor_config.json").write_text(
        json.dumps({"image_processor": {"auto_map": AUTO, "size": 8}})
    )
    (desk.model / "own.py").write_text("raise SystemExit")
    (desk.model / "USE_POLICY.md").write_text("Be kind.")
    (desk.model / "additional_chat_templates").mkdir()
    (desk.model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (desk.model / "images").mkdir()
    (desk.model / "images/plot.png").write_bytes(b"png")


def test_published_pulled_and_verified(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    dress(desk)
    assert main(["compress", desk.write(method="mi")]) == 0
    assert f"not taken over from {desk.model}: images/, own.py" in capsys.readouterr().err
    (model,) = desk.out.glob("demo-p*")
    manifest = json.loads((model / "fusegpt.json").read_text())
    assert manifest["left_out"] == ["images/", "own.py"]
    assert (model / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert (model / "USE_POLICY.md").read_text() == "Be kind."
    assert [
        path.name
        for path in model.rglob("*")
        if path.is_file() and "auto_map" in path.read_text(errors="replace")
    ] == []
    assert json.loads((model / "processor_config.json").read_text()) == {
        "image_processor": {"size": 8}
    }
    assert (
        tf.AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=True
        ).config.num_hidden_layers
        == 3
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert tokenizer.chat_template == {"tool_use": "{{ tools }}"}
    here = pull(str(model), desk.folder / "here")
    assert {p.relative_to(here): p.read_bytes() for p in here.rglob("*") if p.is_file()} == {
        p.relative_to(model): p.read_bytes() for p in model.rglob("*") if p.is_file()
    }
    assert verify(str(here))["good"]
    (here / "additional_chat_templates/tool_use.jinja").write_text("{{ other }}")
    assert [row["file"] for row in verify(str(here))["problems"]] == [
        "additional_chat_templates/tool_use.jinja"
    ]
