"""Conversations with images that Ray Data reads and processes are the samples of one process, to
the byte, and so is what is made of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from albums import WORDS, album, save_llava, write_lines
from pictures import IMAGE

from fusegpt_ray import Recipe, compress
from fusegpt_ray.distributed import images
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.text.album import album as of_one_process
from fusegpt_ray.text.images import Processing

pytestmark = pytest.mark.integration

KEY = "calibration.data"


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(name="text", scope="module")
def _text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Three files."""
    folder = tmp_path_factory.mktemp("text")
    rows = album(folder, 14)
    for number, part in enumerate((rows[:9], rows[9:10], rows[10:])):
        write_lines(folder / f"{number}.jsonl", part)
    return Text(data=str(folder / "*.jsonl"))


def processing(model: Path, length: int) -> Processing:
    return Processing(Source.find(str(model), None).processor(), IMAGE, length, KEY, "x.length")


@pytest.mark.parametrize("length", [18, 40])
@pytest.mark.parametrize(("limit", "seed"), [(None, None), (5, 3)])
def test_samples_are_those_of_one_process(
    limit: int | None, seed: int | None, length: int, model: Path, text: Text, ray_session: None
) -> None:
    """Also where some are too long; and their pixels lie in the object store."""
    alone, left = of_one_process(text, processing(model, length)).drawn(limit, seed)
    found, left_out = images.album(text, processing(model, length)).drawn(limit, seed)
    assert fingerprint(found) == fingerprint(alone)
    assert left == left_out and bool(left) == (length == 18)
    for one, other in zip(alone.inputs, found.inputs, strict=True):
        assert isinstance(other, images.Stored)
        here, there = one.load(), other.load()
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[name], there[name]) for name in here)


def test_samples_are_loaded_where_they_are_needed(
    model: Path, text: Text, ray_session: None
) -> None:
    """After the dataset that made them is gone, by a task that is given a part of them."""
    found, _ = images.album(text, processing(model, 40)).drawn(None)

    @ray.remote
    def pixels(samples: Any) -> list[bytes]:
        return [each.load()["pixel_values"].tobytes() for each in samples.inputs]

    alone, _ = of_one_process(text, processing(model, 40)).drawn(None)
    expected = [each.load()["pixel_values"].tobytes() for each in alone[3:6].inputs]
    assert ray.get(pixels.remote(found[3:6])) == expected


def test_a_users_mistake_comes_home(model: Path, tmp_path: Path, ray_session: None) -> None:
    rows = album(tmp_path, 4)
    file = tmp_path / "chats.jsonl"
    for wrong in ({"image": "missing.png"}, {"conversations": "none"}):
        write_lines(file, [*rows[:2], rows[2] | wrong, rows[3]])
        said = []
        for make in (of_one_process, images.album):
            with pytest.raises(UserError) as caught:
                make(Text(data=str(file)), processing(model, 40)).drawn(None)
            said.append(str(caught.value))
        assert said[0] == said[1] and "line 3 of" in said[0]


def published(model: Path, folder: Path, engine: str, texts: list[Any]) -> dict[str, Any]:
    """`texts`: of a mixture with the conversations, if there are any."""
    seen = str(write_lines(folder / "seen.jsonl", album(folder, 12)))
    parts = [*texts, {"data": seen, "images": True}]
    data = {"data": parts} if texts else {"data": seen, "images": True}
    given = {
        "model": {"source": str(model)},
        "sparsity": 0.2,
        "method": "fusegpt",
        "fusion": {"group_size": 3, "rank": 4, "lora_rank": 4, "batch": 4, "epochs": 1},
        "heal": {"batch": 2, "held_out": 2, "looks": 2},
        "calibration": {**data, "windows": 8, "length": 36},
        "evaluation": {"chats": {"data": seen, "windows": 3, "images": True}},
        "importance": {"windows": 4, "batch": 2},
        "cluster": {"engine": engine},
        "output": {"uri": str(folder / engine), "name": "shallow", "report": False},
    }
    (found,) = compress(Recipe.parse(given))
    weights = Path(found.uri) / "model.safetensors"
    made = hashlib.sha256(weights.read_bytes()).hexdigest()
    same = ("perplexity", "calibration", "removed")
    return {"weights": made} | {key: found.manifest[key] for key in same}


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_is_that_of_one_process(
    mixture: bool, model: Path, tmp_path: Path, ray_session: None
) -> None:
    """To the byte, where one worker trains."""
    words = np.random.default_rng(5).choice(WORDS, 900)
    (tmp_path / "plain.txt").write_text(" ".join(words))
    texts = [{"data": str(tmp_path / "plain.txt")}] * mixture
    on_ray = published(model, tmp_path, "ray", texts)
    assert on_ray == published(model, tmp_path, "local", texts)
    assert ("parts" in on_ray["calibration"]) == mixture
