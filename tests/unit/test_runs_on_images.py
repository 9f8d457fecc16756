"""Whole runs from recipes that name conversations with images, and what is refused before them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from albums import album, save_llava, write_lines
from desk import add_tokenizer
from models import DEPTH, save_tiny
from pictures import load_seeing, save_seeing
from PIL import Image
from test_training_on_images import digests
from transformers import AutoProcessor

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress, evaluate, score
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation

LENGTH = 36


@pytest.fixture(name="model", scope="session")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("seen") / "llava")


def asked(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe, and its texts."""
    (folder / "held").mkdir(exist_ok=True)
    seen = write_lines(folder / "seen.jsonl", album(folder, 12))
    held = write_lines(folder / "held" / "out.jsonl", album(folder / "held", 5, seed=1))
    given = {
        "model": {"source": str(model)},
        "sparsity": 0.2,
        "method": "mi",
        "calibration": {"data": str(seen), "images": True, "windows": 8, "length": LENGTH},
        "evaluation": {"chats": {"data": str(held)}},
        "importance": {"windows": 4, "batch": 2},
        "cluster": {"engine": "local"},
        "output": {"uri": str(folder / "out"), "name": "shallow", "report": False},
    }
    return given | more


@torch.no_grad()
def answers_perplexity(model: Path, folder: Path) -> float:
    """Of the words behind each "assistant :" up to the end of the sentence, by plain
    transformers.
    """
    plain, processor = load_seeing(model), AutoProcessor.from_pretrained(model)
    total, count = 0.0, 0
    for row in album(folder, 5, seed=1):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        text = "<s>user : <image> " + " </s> user : ".join(
            f"{question} assistant : {answer}"
            for question, answer in zip(turns[::2], turns[1::2], strict=True)
        )
        image = Image.open(folder / row["image"])
        made = processor(
            text=f"{text} </s>", images=image, add_special_tokens=False, return_tensors="pt"
        )
        ids = made["input_ids"][0]
        log_p = plain(**made).logits[0].double().log_softmax(-1)
        words = processor.tokenizer.convert_ids_to_tokens(ids)
        answering = False
        for place, word in enumerate(words):
            if answering:
                total -= log_p[place - 1, ids[place]].item()
                count += 1
            answering = (answering or words[place - 1 : place + 1] == ["assistant", ":"]) and (
                word != "</s>"
            )
    return math.exp(total / count)


METHODS: dict[str, dict[str, Any]] = {
    "mi": {},
    "fusegpt": {
        "method": "fusegpt",
        "fusion": {"group_size": 3, "rank": 4, "lora_rank": 4, "batch": 4, "epochs": 1},
        "heal": {"batch": 2, "held_out": 2, "looks": 2},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_images(method: str, model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path, **METHODS[method])
    (published,) = compress(Recipe.parse(given))
    out = Path(published.uri)
    row = published.manifest["perplexity"]["chats"]
    last = "healed" if method == "fusegpt" else "dropped"
    assert row["dense"] == pytest.approx(answers_perplexity(model, tmp_path / "held"), rel=1e-4)
    assert row[last] == pytest.approx(answers_perplexity(out, tmp_path / "held"), rel=1e-4)
    assert row["conversations"] == row["windows"] == 5 and row["left_out"] == 0
    assert published.manifest["calibration"]["conversations"] == 12
    for part in ("vision", "projector"):
        assert digests(out, part) == digests(model, part)
    assert digests(model, "vision")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    (again,) = compress(Recipe.parse(given))
    assert again.manifest == published.manifest


def test_the_commands_measure_with_images(model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path)
    data = Evaluation(**given["evaluation"]["chats"], length=LENGTH, images=True)
    found = evaluate(str(model), data, cluster=Cluster(engine="local"))
    assert found["perplexity"] == pytest.approx(
        answers_perplexity(model, tmp_path / "held"), rel=1e-4
    )
    scores = {}
    for tokens in ("all", "text", "image"):
        importance = {"windows": 4, "batch": 2, "tokens": tokens}
        blocks = score(Recipe.parse(given | {"importance": importance}))["blocks"]
        scores[tokens] = [block["score"] for block in blocks]
        assert len(blocks) == DEPTH
    both = zip(scores["text"], scores["image"], scores["all"], strict=True)
    assert all(min(text, image) < mean < max(text, image) for text, image, mean in both)


def refused(given: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        compress(Recipe.parse(given))
    assert not Path(given["output"]["uri"]).exists()
    return caught.value


def test_a_model_that_does_not_see_is_refused(tmp_path: Path) -> None:
    error = refused(asked(save_tiny("llama", tmp_path / "blind"), tmp_path))
    assert error.key == "calibration.images" and "a model of text alone" in error.problem


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    folder = save_seeing("llava", tmp_path / "bare")
    add_tokenizer(folder)
    error = refused(asked(folder, tmp_path))
    assert error.key == "model.source" and "processor" in error.problem


def test_pillow_is_asked_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusegpt_ray.text.images.find_spec", lambda _: None)
    error = refused(asked(model, tmp_path))
    assert error.key == "calibration.images" and "fusegpt-ray[vision]" in error.fix


def test_what_images_cannot_be_used_for_is_refused(model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path)
    error = refused(given | {"method": "mi+linear"})
    assert error.key == "fusion.start" and "images" in error.problem
    few = given["calibration"] | {"windows": 20}
    error = refused(given | {"calibration": few})
    assert error.key == "calibration.windows" and "12 conversations that fit" in error.problem


def test_auto_starts_from_nothing(model: Path, tmp_path: Path) -> None:
    fusion = METHODS["fusegpt"]["fusion"] | {"start": "auto"}
    given = asked(model, tmp_path, method="mi+ft", fusion=fusion)
    (published,) = compress(Recipe.parse(given))
    assert published.manifest["recipe"]["fusion"]["start"] == "none"
