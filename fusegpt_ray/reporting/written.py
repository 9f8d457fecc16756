"""What a manifest tells of what two models write; whoever wrote it. Light: no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fusegpt_ray.store.foreign import Part

Thumbnail = Annotated[
    str, Field(max_length=30_000, pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$")
]
"""A data URI, which a page shows as it is."""


class Picture(Part):
    """An image that a prompt is about."""

    name: str
    thumbnail: Thumbnail


class Sample(Part):
    """What two models write after a prompt."""

    prompt: str
    image: Picture | None = None
    dense: str
    published: str
