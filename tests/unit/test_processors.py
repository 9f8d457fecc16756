"""Models whose processors have a part for videos, which needs torchvision: whole runs on images
without it, beside plain transformers; and what Qwen3-VL adds to the states behind its first blocks.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from albums import QWEN, album, save_qwen
from models import GROUPED
from pictures import ADDING, IMAGE, load_seeing
from PIL import Image
from ray import cloudpickle
from safetensors.torch import load_file
from test_runs_on_images import METHODS, asked
from transformers.utils import is_torchvision_available

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.processors import load_processor
from fusegpt_ray.model.recorder import Recorded
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe

Saved = Callable[[str], Path]


@pytest.fixture(name="saved", scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("qwen")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else save_qwen(name, folder)

    return get


def inputs(model: Path, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
    """What the class takes, without the processor: as many placeholders as four patches make one
    of.
    """
    made = tf.Qwen2VLImageProcessorPil.from_pretrained(model)(image, return_tensors="pt")
    count = int(made["image_grid_thw"].prod()) // 4
    words = tf.AutoTokenizer.from_pretrained(model)
    text = text.replace("<image>", " ".join(["<image>"] * count))
    ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long(), **made}


@torch.no_grad()
def answers_perplexity(model: Path, folder: Path) -> float:
    plain, total, count = load_seeing(model), 0.0, 0
    words = tf.AutoTokenizer.from_pretrained(model)
    for row in album(folder, 5, seed=1):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        text = "<s>user : <image> " + " </s> user : ".join(
            f"{question} assistant : {answer}"
            for question, answer in zip(turns[::2], turns[1::2], strict=True)
        )
        made = inputs(model, f"{text} </s>", Image.open(folder / row["image"]).convert("RGB"))
        log_p = plain(**made).logits[0].double().log_softmax(-1)
        said = words.convert_ids_to_tokens(made["input_ids"][0])
        for begin in (i + 2 for i in range(len(said)) if said[i : i + 2] == ["assistant", ":"]):
            for place in range(begin, said.index("</s>", begin) + 1):
                total -= log_p[place - 1, made["input_ids"][0, place]].item()
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("name", QWEN)
def test_a_processor_is_loaded_without_its_part_for_videos(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    processor = load_processor(str(saved(name)), local_files_only=True)
    assert type(processor).__name__ == QWEN[name]
    assert getattr(processor, "video_processor", None) is None
    (row, *_) = album(tmp_path, 3)
    image = Image.open(tmp_path / row["image"]).convert("RGB")
    text = "user : <image> what is this"
    made = processor(text=[text], images=[image], return_tensors="pt")
    for key, value in inputs(saved(name), text, image).items():
        assert torch.equal(made[key], value), key


PARTS = [
    ["image_processor", "tokenizer", "video_processor"],
    ["video_processor", "image_processor", "tokenizer"],
    ["image_processor", "video_processor", "tokenizer"],
]


def test_the_part_for_videos_may_stand_anywhere_among_the_others(
    saved: Saved, tmp_path: Path
) -> None:
    """Other classes have them in other orders; each gets its parts by their names."""
    folder, orders = saved("qwen2_vl"), set[tuple[str, ...]]()
    for name in ("Qwen2VLProcessor", "LlavaNextVideoProcessor", "VideoLlavaProcessor"):
        for file in folder.glob("*[!s]"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps(config | {"processor_class": name})
        )
        found = load_processor(str(tmp_path), local_files_only=True)
        assert isinstance(found, getattr(tf, name))
        assert isinstance(found.image_processor, tf.Qwen2VLImageProcessorPil)
        assert isinstance(found.tokenizer, tf.PreTrainedTokenizerBase)
        orders.add(tuple(getattr(tf, name).get_attributes()))
    assert orders == {tuple(order) for order in PARTS}


def test_a_processor_goes_to_other_processes(saved: Saved) -> None:
    """As Ray sends it: its class, which is made here, goes along."""
    folder = str(saved("qwen2_vl"))
    sent = pickle.loads(cloudpickle.dumps(load_processor(folder, local_files_only=True)))
    assert isinstance(sent, tf.Qwen2VLProcessor)
    image = Image.new("RGB", (8, 8))
    made = sent(text=["what <image> is"], images=[image], return_tensors="np")
    assert (made["input_ids"] == IMAGE).sum() == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_run_on_images(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    """The published model's perplexities are those that plain transformers finds."""
    model, first = saved(name), ADDING.get(name, 0)
    given = asked(model, tmp_path, sparsity=0.4, **METHODS[method])
    (published,) = compress(Recipe.parse(given))
    out, manifest = Path(published.uri), published.manifest
    row = manifest["perplexity"]["chats"]
    last = "healed" if method == "fusegpt" else "dropped"
    assert row["dense"] == pytest.approx(answers_perplexity(model, tmp_path / "held"), rel=1e-4)
    assert row[last] == pytest.approx(answers_perplexity(out, tmp_path / "held"), rel=1e-4)
    assert len(manifest["removed"]) == 2 and min(manifest["removed"]) >= first
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    seeing = [key for key in before if ".visual." in key or key.startswith("visual.")]
    assert seeing and all(torch.equal(before[key], after[key]) for key in seeing)


def test_too_few_blocks_behind_which_nothing_is_added(saved: Saved, tmp_path: Path) -> None:
    given = asked(saved("qwen3_vl"), tmp_path, sparsity=0.6)
    with pytest.raises(UserError) as caught:
        compress(Recipe.parse(given))
    assert caught.value.key == "sparsity" and "only the blocks 2, 3, 4" in caught.value.problem
    assert not (tmp_path / "out").exists()
    given["calibration"]["images"] = False  # text alone asks for nothing to stay
    given["calibration"]["data"] = str(tmp_path / "plain.txt")
    (tmp_path / "plain.txt").write_text("what is this red green blue big small\n" * 200)
    del given["evaluation"]
    (published,) = compress(Recipe.parse(given))
    assert len(published.manifest["removed"]) == 3


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_a_processor_that_needs_torchvision_is_refused(saved: Saved, tmp_path: Path) -> None:
    """Where all of it does, the message says so."""
    model = tmp_path / "model"
    model.mkdir()
    for file in saved("qwen2_vl").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "preprocessor_config.json").read_text())
    named = json.dumps(config | {"processor_class": "PixtralProcessor"})
    (model / "preprocessor_config.json").write_text(named)
    with pytest.raises(UserError) as caught:
        compress(Recipe.parse(asked(model, tmp_path)))
    assert caught.value.key == "model.source" and "orchvision" in caught.value.problem
    assert "install" in caught.value.fix


def test_only_an_addition_to_the_states_is_carried() -> None:
    """Of what a model does between two blocks; anything else is told."""
    recorded = Recorded(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), "model.layers")
    ids = torch.arange(6)[None]
    more = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "adds": lambda h_BTD: h_BTD + more,
        "scales": lambda h_BTD: 2 * h_BTD,
    }
    for name, change in changes.items():
        hook = recorded.recorders[1].register_forward_hook(lambda *args: change(args[2]))  # noqa: B023
        recorded(ids)
        entering = recorded.recorders[2].h_BTD
        assert "between blocks 1 and 2" in recorded.not_in_a_row()
        recorded.learn_added(lambda: recorded(ids))
        added = recorded.contexts[1].added
        if name == "adds":
            assert added is not None and torch.equal(added, more)
            assert recorded.not_in_a_row() == ""
            assert recorded.recorders[2].h_BTD is entering
        else:
            assert added is None and "between blocks 1 and 2" in recorded.not_in_a_row()
        hook.remove()
