"""What the dense and the published model answer about images, beside plain transformers."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albums import QWEN, album, save_llava, save_qwen, write_lines
from models import save_tiny
from pictures import load_seeing
from PIL import Image
from stopped_runs import Watching
from words import add_tokenizer

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.processors import load_processor
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.sample_prompts import TOKENS
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.specs import SAMPLE_PROMPTS
from fusegpt_ray.reporting import page
from fusegpt_ray.reporting.facts import facts, of_manifest
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.questions import SIDE, thumbnail

MODELS = ("llava", *QWEN)
TEXT = "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29\n" * 12


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("seen") / "llava")


def asked(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe that calibrates on text alone."""
    (folder / "text.txt").write_text(TEXT)
    given = {
        "model": {"source": str(model)},
        "sparsity": 0.2,
        "method": "mi",
        "calibration": {"data": str(folder / "text.txt"), "windows": 4, "length": 12},
        "importance": {"windows": 2, "batch": 2},
        "cluster": {"engine": "local"},
        "output": {"uri": str(folder / "out"), "name": "shallow", "report": False},
    }
    return given | more


def sampling(model: Path, folder: Path, samples: list[Any]) -> dict[str, Any]:
    given = asked(model, folder)
    given["output"]["samples"] = samples
    return given


def photograph(file: Path, width: int = 1200, height: int = 700) -> Path:
    """A large image that compresses badly."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@torch.no_grad()
def plain(model: Path, image: Path, prompt: str) -> str:
    """The greedy answer by `from_pretrained`."""
    loaded, processor = load_seeing(model), load_processor(str(model))
    text = f"<s>user : <image> {prompt} assistant :"
    picture = Image.open(image).convert("RGB")
    made = processor(text=[text], images=[picture], add_special_tokens=False, return_tensors="pt")
    found = loaded.generate(**made, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    answer = found[0, made["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True))


def thumb(sample: dict[str, Any]) -> Any:
    uri = sample["image"]["thumbnail"]
    assert len(uri) <= 20_500
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make = save_llava if name == "llava" else lambda folder: save_qwen(name, folder)
    model, image = make(tmp_path / "model"), photograph(tmp_path / "cat.png", 12, 9)
    prompts = ["what is this", "is this big", "w20 red w31"]
    about = [{"image": str(image), "prompt": prompt} for prompt in prompts]
    (made,) = compress(Recipe.parse(sampling(model, tmp_path, ["w20 w21", *about])))
    text, *seen = made.manifest["samples"]
    assert text["prompt"] == "w20 w21" and "image" not in text
    assert [sample["prompt"] for sample in seen] == prompts
    for sample in seen:
        assert sample["dense"] == plain(model, image, sample["prompt"])
        assert sample["published"] == plain(Path(made.uri), image, sample["prompt"])
    assert any(sample["dense"] != sample["published"] for sample in seen)


def test_the_image_is_shown_and_its_place_is_not_told(model: Path, tmp_path: Path) -> None:
    image = photograph(tmp_path / "cat ```.png")
    about = {"image": str(image), "prompt": "what is <b>this"}
    (made,) = compress(Recipe.parse(sampling(model, tmp_path, [about])))
    (sample,) = made.manifest["samples"]
    assert sample["image"]["name"] == "cat ```.png"
    assert sample["image"]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(made.manifest["samples"])
    for file in ("README.md", "metrics.jsonl"):
        assert str(tmp_path) not in (Path(made.uri) / file).read_text(), "nor any other place"
    small = thumb(sample)
    assert max(small.size) <= SIDE and small.width > small.height
    shutil.rmtree(tmp_path / "out" / "shallow.run", ignore_errors=True)
    image.unlink()
    shown, card = page.html(facts(made.uri)), (Path(made.uri) / "README.md").read_text()
    assert str(tmp_path) not in shown and '"image": "cat ```.png"' in card
    assert f'<img src="{sample["image"]["thumbnail"]}"' in shown
    assert 'alt="The image cat ```.png, which the prompt is about"' in shown
    assert "what is &lt;b&gt;this" in shown
    assert "image       cat ```.png" in card and "data:image" not in card
    assert "````text" in card, "a name's own fence does not end the card's"


def test_a_run_with_images_asks_about_two_of_them(model: Path, tmp_path: Path) -> None:
    """Of the held-out text, with its own questions; and of the calibration text where no other has
    images."""
    rows = album(tmp_path, 6)
    rows[0] = {
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "."}]
    }
    seen, show = write_lines(tmp_path / "seen.jsonl", rows), Watching()
    given = asked(model, tmp_path, evaluation={"chats": {"data": str(seen), "images": True}})
    given["evaluation"]["chats"]["length"] = 36
    (made,) = compress(Recipe.parse(given), show)
    samples = made.manifest["samples"]
    assert [sample["prompt"] for sample in samples] == [*SAMPLE_PROMPTS, *["what is this"] * 2]
    assert [sample["image"]["name"] for sample in samples[3:]] == ["1.png", "2.png"]
    for number, sample in enumerate(samples[3:], 1):
        image = tmp_path / "images" / f"{number}.png"
        assert sample["dense"] == plain(model, image, "what is this")
        assert np.array_equal(np.array(thumb(sample)), np.array(Image.open(image)))
    given = asked(model, tmp_path, evaluation={"text": {"data": str(tmp_path / "text.txt")}})
    seeing = {"data": str(seen), "images": True, "windows": 4, "length": 36}
    given["calibration"], given["output"]["name"] = seeing, "other"
    given["evaluation"]["text"]["images"] = False
    (again,) = compress(Recipe.parse(given))
    assert [s["image"] for s in again.manifest["samples"][3:]] == [s["image"] for s in samples[3:]]


def test_text_samples_stay_where_images_cannot_be_asked_about(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise UserError("calibration.data", "", "gone", "")

    monkeypatch.setattr("fusegpt_ray.preparing.sample_prompts.found_in", broken)
    seen, show = write_lines(tmp_path / "seen.jsonl", album(tmp_path, 6)), Watching()
    given = asked(model, tmp_path)
    given["calibration"] = {"data": str(seen), "images": True, "windows": 4, "length": 36}
    (made,) = compress(Recipe.parse(given), show)
    assert any("no samples about images" in line and "gone" in line for line in show.said)
    assert len(made.manifest["samples"]) == len(SAMPLE_PROMPTS)


def refused(given: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        plan(Recipe.parse(given), Display(), looks=True)
    return caught.value


def test_mistakes_are_found_before_the_run(model: Path, tmp_path: Path) -> None:
    (tmp_path / "none.png").write_text("no image")
    for name, problem in (("missing.png", "No such file"), ("none.png", "no image that pillow")):
        about = {"image": str(tmp_path / name), "prompt": "what is this"}
        error = refused(sampling(model, tmp_path, ["w20", about]))
        assert error.key == "output.samples.1.image" and error.value == about["image"]
        assert "it cannot be read" in error.problem and problem in error.problem
    image = str(photograph(tmp_path / "cat.png", 9, 9))
    error = refused(sampling(model, tmp_path, [{"image": image, "prompt": "this " * 60}]))
    assert error.key == "output.samples.0.image" and "tokens with its image" in error.problem
    blind = save_tiny("llama", tmp_path / "blind")
    add_tokenizer(blind)
    error = refused(sampling(blind, tmp_path, [{"image": image, "prompt": "this"}]))
    assert error.key == "output.samples.0.image" and "a model of text alone" in error.problem


@pytest.mark.parametrize(
    ("sample", "key"),
    [
        ({"image": "cat.png"}, "output.samples.0.prompt"),
        ({"prompt": "this"}, "output.samples.0.image"),
        ({"image": "cat.png", "prompt": ""}, "output.samples.0.prompt"),
        ({"image": "s3://key:secret@bucket/cat.png", "prompt": "this"}, "output.samples.0.image"),
        ({"image": "cat.png", "prompt": "this", "size": 8}, "output.samples.0.size"),
        (7, "output.samples.0"),
    ],
)
def test_recipes_that_ask_wrongly(model: Path, tmp_path: Path, sample: Any, key: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.parse(sampling(model, tmp_path, [sample]))
    assert caught.value.key == key


def test_a_report_holds_few_images(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="10 at most") as caught:
        Recipe.parse(sampling(model, tmp_path, [{"image": "cat.png", "prompt": "this"}] * 11))
    assert caught.value.key == "output.samples"


def test_a_manifest_of_others_brings_nothing_but_an_image() -> None:
    """Into a page that is opened in a browser."""
    told = {"source": {"name": "dense"}, "method": "mi", "recipe": {}, "rounds": []}
    small = thumbnail(Image.new("RGBA", (2000, 10), (200, 0, 0, 9)).convert("RGB"))
    for uri, good in ((small, True), ("https://cat.example/1.png", False), (f"{small}x'", False)):
        image = {"name": '"><script>', "thumbnail": uri}
        samples = [{"prompt": "", "dense": "", "published": "", "image": image}]
        if not good:
            with pytest.raises(ValueError, match="thumbnail"):
                of_manifest("demo", told | {"samples": samples}, 10)
            continue
        shown = page.html(of_manifest("demo", told | {"samples": samples}, 10))
        assert uri in shown and '"><script>' not in shown
