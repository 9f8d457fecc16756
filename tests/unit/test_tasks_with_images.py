"""`fusegpt tasks` with images: lm-eval's numbers are those of plain `generate`, and what it cannot
ask is refused before weights are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from albums import BOS, EOS, paint, save_llava, save_qwen
from desk import add_tokenizer
from mistakes import MESSAGE
from models import save_tiny
from pictures import load_seeing, save_seeing
from PIL import Image
from test_processors import inputs

from fusegpt_ray.cli import main

COUNT, WORDS = 9, 4
YAML = """task: album
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: answer
doc_to_image: !function utils.images
{more}
generation_kwargs:
  until: ["{end}"]
  max_gen_toks: {words}
  do_sample: false
metric_list:
  - metric: {metric}
"""
TEXT = f"{BOS} user : <image> {{{{question}}}} assistant :"
UTILS = """from PIL import Image


def images(doc):
    return [Image.open(doc["path"]).convert("RGB")]
"""

Save = Callable[[Path], Path]
MODELS: dict[str, Save] = {
    "llava": save_llava,
    "qwen2_vl": lambda folder: save_qwen("qwen2_vl", folder),
}


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def rows(folder: Path) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    return [
        {
            "path": str(folder / "images" / name),
            "question": " ".join(f"w{draw.integers(60)}" for _ in range(draw.integers(1, 4))),
            "choices": ["red", "green"],
            "answer": "red",
        }
        for name in paint(folder / "images", COUNT)
    ]


def write(folder: Path, made: list[dict[str, Any]], kind: str = "generate_until") -> None:
    """The task, and its questions."""
    file = folder / "album.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    metric, more = "exact_match", ""
    if kind == "multiple_choice":
        metric, more = "acc", "doc_to_choice: choices"
    told = {"file": file, "kind": kind, "text": TEXT, "end": EOS, "words": WORDS, "metric": metric}
    told |= {"more": more}
    (folder / "album.yaml").write_text(YAML.format(**told))
    (folder / "utils.py").write_text(UTILS)


@torch.no_grad()
def written(model: Path, row: dict[str, Any]) -> str:
    """What plain transformers writes for a question alone."""
    text = TEXT.replace("{{question}}", row["question"])
    image = Image.open(row["path"]).convert("RGB")
    if (model / "processor_config.json").exists():
        processor = tf.AutoProcessor.from_pretrained(model)
        made = processor(text=text, images=image, return_tensors="pt")
    else:
        made = inputs(model, text, image)
    out = load_seeing(model).generate(**made, max_new_tokens=WORDS, do_sample=False)
    words = tf.AutoTokenizer.from_pretrained(model)
    new = out[0, made["input_ids"].shape[1] :]
    return str(words.decode(new, skip_special_tokens=True))


def ask(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    command = ["tasks", "model", "--tasks", "album", "--tasks-folder", "tasks", *more]
    assert main([*command, "--json", "--quiet"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    return found["tasks"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_plain_generate(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of nine questions, five are right if what is written is the same for each of them."""
    model, folder = MODELS[name](tmp_path / "model"), tmp_path / "tasks"
    made = rows(folder)
    answers = [written(model, row) for row in made]
    assert len({*answers}) > 1
    for number, row in enumerate(made):
        row["answer"] = answers[number] if number % 2 == 0 else "small w1"
    write(folder, made)
    found = ask(capsys, "--batch", "2")
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(5 / COUNT)
    assert found["samples"] == found["of"] == COUNT


def test_a_number_is_measured_again_for_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The questions only name them."""
    save_llava(tmp_path / "model")
    write(tmp_path / "tasks", rows(tmp_path / "tasks"))
    kept = tmp_path / "kept"
    for expected in (1, 1):
        ask(capsys, "--cache", str(kept), "--limit", "2")
        assert sum(file.is_file() for file in kept.rglob("*")) == expected
    paint(tmp_path / "tasks" / "images", COUNT, seed=5)
    ask(capsys, "--cache", str(kept), "--limit", "2")
    assert sum(file.is_file() for file in kept.rglob("*")) == 2


def _text_alone(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    add_tokenizer(save_tiny("llama", folder / "model"))


def _no_processor(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    add_tokenizer(save_seeing("llava", folder / "model"))


def _choices(folder: Path) -> None:
    write(folder / "tasks", rows(folder / "tasks"), "multiple_choice")


def _no_image(folder: Path) -> None:
    (folder / "tasks" / "images" / "0.png").unlink()


BAD = {
    "text alone": (_text_alone, "--tasks", "a model of text alone"),
    "no processor": (_no_processor, "MODEL", "its processor, which the images need, does not load"),
    "choices": (_choices, "--tasks", "only for text that a model writes"),
    "no image": (_no_image, "--tasks", "an image cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_one_message(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llava(tmp_path / "model")
    write(tmp_path / "tasks", rows(tmp_path / "tasks"))
    spoil, key, problem = BAD[name]
    spoil(tmp_path)
    assert main(["tasks", "model", "--tasks", "album", "--tasks-folder", "tasks"]) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.search(stderr)
    assert message and stdout == "" and stderr.count("error: ") == 1, stderr
    assert message["key"].endswith(key) and problem in message["problem"], stderr
