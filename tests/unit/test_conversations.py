"""Conversations with images, from files and through a model's own processor."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from albums import album, paint, save_llava, write_lines
from pictures import IMAGE, PATCHES
from PIL import Image
from transformers import AutoProcessor

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.text.album import album as album_of
from fusegpt_ray.text.conversations import (
    Conversation,
    conversation_sources,
    conversations,
    shuffled,
)
from fusegpt_ray.text.images import Processing, opened

KEY = "calibration.data"
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(name="model", scope="session")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava") / "model")


def processing(model: Path, length: int = 40) -> Processing:
    return Processing(
        Source.find(str(model), None).processor(), IMAGE, length, KEY, "calibration.length"
    )


def read(file: Path) -> list[Conversation]:
    (source,) = conversation_sources(Text(data=str(file)), KEY)
    return list(conversations(source))


def as_messages(row: dict[str, Any], image: Any) -> dict[str, Any]:
    """The same in the other layout, with this part for its image."""
    messages = [
        {
            "role": ROLES[turn["from"]],
            "content": [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}],
        }
        for turn in row["conversations"]
    ]
    messages[0]["content"].insert(0, {"type": "image", **image})
    return {"messages": messages}


def test_every_layout_gives_the_same_samples(model: Path, tmp_path: Path) -> None:
    rows = album(tmp_path, 3)
    raw = [(tmp_path / row["image"]).read_bytes() for row in rows]
    data = [f"data:image/png;base64,{base64.b64encode(item).decode()}" for item in raw]
    layouts = {
        "llava": rows,
        "path": [as_messages(row, {"path": row["image"]}) for row in rows],
        "absolute": [as_messages(row, {"image": str(tmp_path / row["image"])}) for row in rows],
        "url": [as_messages(row, {"url": f"file://{tmp_path}/{row['image']}"}) for row in rows],
        "data": [
            as_messages(row, {"type": "image_url", "image_url": {"url": url}})
            for row, url in zip(rows, data, strict=True)
        ],
        "beside": [{**as_messages(row, {}), "images": [row["image"]]} for row in rows],
        "roles": [
            row
            | {
                "conversations": [
                    turn | {"from": ROLES[turn["from"]]} for turn in row["conversations"]
                ]
            }
            for row in rows
        ],
    }
    files = [write_lines(tmp_path / f"{name}.jsonl", given) for name, given in layouts.items()]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    inside = [
        {"image": {"bytes": item, "path": None}, "conversations": row["conversations"]}
        for row, item in zip(rows, raw, strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(inside), tmp_path / "inside.parquet")
    files += [tmp_path / "array.json", tmp_path / "inside.parquet"]
    found = [
        fingerprint(album_of(Text(data=str(file)), processing(model)).drawn(None)[0])
        for file in files
    ]
    assert len({*found}) == 1 and len(found) == 9


def test_a_sample_is_what_the_processor_makes_and_its_answers_are_the_targets(
    model: Path, tmp_path: Path
) -> None:
    rows = album(tmp_path, 6)
    file = write_lines(tmp_path / "chats.jsonl", rows)
    samples, _ = album_of(Text(data=str(file)), processing(model)).drawn(None)
    processor = AutoProcessor.from_pretrained(model)
    for number, row in enumerate(rows):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        text = f"<s>user : <image> {turns[0]} assistant : {turns[1]} </s> "
        answers = [f"{turns[1]} </s>"]
        if len(turns) == 4:
            text += f"user : {turns[2]} assistant : {turns[3]} </s> "
            answers.append(f"{turns[3]} </s>")
        image = Image.open(tmp_path / row["image"])
        made = processor(text=text, images=image, add_special_tokens=False, return_tensors="np")
        n = made["input_ids"].shape[1]
        assert samples.tokens_WT[number, :n].tolist() == made["input_ids"][0].tolist()
        assert (samples.tokens_WT[number, n:] == -1).all()
        np.testing.assert_array_equal(
            samples.inputs[number].load()["pixel_values"], made["pixel_values"]
        )
        assert samples.images_WT[number].sum() == PATCHES
        targets = samples.tokens_WT[number, samples.targets_WT[number]]
        assert processor.tokenizer.convert_ids_to_tokens(targets) == " ".join(answers).split()


def test_longer_ones_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", album(tmp_path, 8))
    lengths = [len(processing(model).sample(one).tokens_n) for one in read(file)]
    limit = sorted(lengths)[4]
    chosen = album_of(Text(data=str(file)), processing(model, limit))
    samples, left_out = chosen.drawn(None)
    assert len(samples) == sum(n <= limit for n in lengths)
    assert left_out == sum(n > limit for n in lengths) > 0
    with pytest.raises(UserError, match="all 8 conversations are longer than 4 tokens") as caught:
        album_of(Text(data=str(file)), processing(model, 4)).drawn(None)
    assert caught.value.key == "calibration.length"


@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_the_first_that_fit_are_taken_in_the_order_of_the_seed(
    wanted: int, model: Path, tmp_path: Path
) -> None:
    """However many longer ones stand between, and of several files."""
    first = write_lines(tmp_path / "1.jsonl", album(tmp_path, 9)[:4])
    second = write_lines(tmp_path / "2.jsonl", album(tmp_path, 9)[4:])
    every = [processing(model).sample(one) for file in (first, second) for one in read(file)]
    limit = sorted(len(sample.tokens_n) for sample in every)[6]
    order = shuffled(9, 3)
    fits = [place for place in order if len(every[place].tokens_n) <= limit]
    taken = fits[:wanted]
    text = Text(data=str(tmp_path / "*.jsonl"))
    samples, left_out = album_of(text, processing(model, limit)).drawn(wanted, seed=3)
    expected = processing(model, limit).assembled([every[place] for place in taken])
    assert fingerprint(samples) == fingerprint(expected)
    past = len(order) if wanted > len(fits) else order.index(taken[-1]) + 1
    assert left_out == past - len(taken)


def test_an_image_is_processed_once(model: Path, tmp_path: Path) -> None:
    """However many answers a conversation has."""
    made = processing(model)
    real, seen = made.processor.image_processor.real, []

    class Watched:
        def __call__(self, images: Any, **options: Any) -> Any:
            seen.append(images)
            return real(images, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    made.processor.image_processor.real = Watched()
    rows = [row for row in album(tmp_path, 8) if len(row["conversations"]) == 4]
    found = read(write_lines(tmp_path / "chats.jsonl", rows))
    for one in found:
        made.sample(one)
    assert len(seen) == len(found) > 0


def test_a_dataset_needs_no_column_of_text(model: Path, tmp_path: Path) -> None:
    """A local folder, which `datasets` loads: its rows are those of the file in it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_lines(folder / "train.jsonl", album(folder, 4))
    one, other = (drawn(model, Text(data=str(data))) for data in (folder, file))
    assert one == other


def drawn(model: Path, text: Text) -> str:
    return fingerprint(album_of(text, processing(model)).drawn(None)[0])


def test_images_may_lie_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LLaVA's data come: one array of all conversations, and the folder of their images."""
    rows = album(tmp_path / "images", 4)
    beside = write_lines(tmp_path / "images" / "chats.jsonl", rows)
    (tmp_path / "texts").mkdir()
    array = tmp_path / "texts" / "train.json"
    array.write_text(json.dumps(rows, indent=1))
    monkeypatch.chdir(tmp_path)
    for folder in ("images", str(tmp_path / "images")):
        found = drawn(model, Text(data=str(array), image_folder=folder))
        assert found == drawn(model, Text(data=str(beside)))


def test_several_images_of_a_conversation_keep_their_order(model: Path, tmp_path: Path) -> None:
    first, other = paint(tmp_path, 2)
    turns = [
        {"from": "human", "value": "<image>\nwhat is this and <image> that"},
        {"from": "gpt", "value": "red"},
    ]
    file = write_lines(
        tmp_path / "chats.jsonl", [{"image": [first, other], "conversations": turns}]
    )
    (one,) = read(file)
    assert [str(image).rpartition("/")[2] for image in one.images] == [first, other]
    sample = processing(model).sample(one)
    assert sample is not None and (sample.tokens_n == IMAGE).sum() == 2 * PATCHES


def test_a_photo_is_upright(tmp_path: Path) -> None:
    """A camera that was turned says so in EXIF data, and leaves the pixels as they were."""
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half becomes the upper one
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    found = np.asarray(opened(str(tmp_path / "photo.png"), "here", KEY)[1])
    assert found.shape == (16, 8, 3)
    assert (found[:8, :, 0] == 255).all() and not found[8:].any()


def test_the_order_follows_from_the_seed() -> None:
    first, again, other = (shuffled(8, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == [*range(8)]


TURNS = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
WRONG = {
    "no conversation": ({"text": "what"}, "it lacks 'conversations'"),
    "no image": ({"conversations": TURNS}, "a place for an image is left without one"),
    "another column": (
        {"imag": "0.png", "conversations": TURNS},
        "left without one; its columns: imag, conversations",
    ),
    "no place": ({"image": "0.png", "conversations": TURNS[1:]}, "have no place in its text"),
    "a number": ({"image": 5, "conversations": TURNS}, "an image is 5, and neither"),
    "an image of nothing": ({"image": {"size": 3}, "conversations": TURNS}, "it lacks 'url'"),
    "no base64": ({"image": "data:image/png;base64,$$", "conversations": TURNS}, "base64"),
    "no answer": ({"image": "0.png", "conversations": TURNS[:1]}, "nobody answers"),
    "a speaker": (
        {"conversations": [{"from": "cat", "value": "mew"}]},
        "a turn from 'cat', which is none of human, gpt, system",
    ),
    "a video": (
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]},
        "'video' is neither text nor image",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_is_none_is_named(case: str, tmp_path: Path) -> None:
    row, problem = WRONG[case]
    file = write_lines(tmp_path / "chats.jsonl", [row])
    with pytest.raises(UserError, match=problem) as caught:
        read(file)
    assert "line 1 of" in caught.value.problem


def test_a_small_file_of_a_huge_image_is_named_and_not_unpacked(
    model: Path, tmp_path: Path
) -> None:
    """400 million pixels in some tens of bytes: Pillow looks at the header, and refuses."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    chunks = [
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    ]
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    row = {"image": "huge.png", "conversations": TURNS}
    file = write_lines(tmp_path / "chats.jsonl", [row])
    with pytest.raises(UserError, match=r"cannot be read.*decompression bomb"):
        album_of(Text(data=str(file)), processing(model)).drawn(None)


def test_an_image_that_is_missing_or_none_is_named(model: Path, tmp_path: Path) -> None:
    paint(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("missing.png", "broken.png"):
        row = {"image": name, "conversations": TURNS}
        file = write_lines(tmp_path / "chats.jsonl", [row])
        with pytest.raises(UserError, match=r"an image of line 1 of .* cannot be read") as caught:
            album_of(Text(data=str(file)), processing(model)).drawn(None)
        assert str(caught.value.value).endswith(name)
