"""Conversations whose images lie on S3: beside their file, in a folder, or anywhere by URI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from albums import album, save_llava, write_lines
from pictures import IMAGE

from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.text.album import album as album_of
from fusegpt_ray.text.images import Processing

pytestmark = pytest.mark.integration


def test_images_on_s3_give_the_samples_of_a_folder(s3: Any, bucket: str, tmp_path: Path) -> None:
    rows = album(tmp_path, 3)
    here = write_lines(tmp_path / "chats.jsonl", rows)
    s3.upload((tmp_path / "images").iterdir(), bucket, "all/images")
    s3.upload([here], bucket, "all")
    uris = [{**row, "image": f"s3://{bucket}/all/{row['image']}"} for row in rows]
    source = Source.find(str(save_llava(tmp_path / "llava")), None)
    keys = "calibration.data", "calibration.length"
    processing = Processing(source.processor(), IMAGE, 40, *keys)
    texts = [
        Text(data=str(here)),
        Text(data=f"s3://{bucket}/all/chats.jsonl"),
        Text(data=str(here), image_folder=f"s3://{bucket}/all"),
        Text(data=str(write_lines(tmp_path / "uris.jsonl", uris))),
    ]
    found = [fingerprint(album_of(text, processing).drawn(None)[0]) for text in texts]
    assert len({*found}) == 1
