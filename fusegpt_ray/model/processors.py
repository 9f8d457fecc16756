"""The model's own processor, with whatever backend for images is installed, and without its part
for videos.

transformers prepares images by torchvision, or by pillow and numpy where that is not installed. The
part for videos that some processors have (Qwen2-VL's, LLaVA-OneVision's) needs torchvision, so that
without it the whole processor would not load. Conversations with images do not use that part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING,
    processor_class_from_name,
)

_VIDEOS = "video_processor"
_NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""The files that may name the processor's class, the first that does so deciding."""


def load_processor(folder: str, **options: Any) -> Any:
    """What AutoProcessor loads from a folder, but for the part for videos.

    Raises:
        Exception: whatever transformers raises where it cannot be loaded.
    """
    kind = _class(folder)
    if kind is None or _VIDEOS not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, **options)
    without: Any = type(kind.__name__, (kind, _WithoutVideos), {})
    return without.from_pretrained(folder, **options)


def _class(folder: str) -> type[ProcessorMixin] | None:
    """The processor's class, found as AutoProcessor finds it; None: the library has none."""
    for name in _NAMING:
        if (file := Path(folder) / name).exists():
            named = json.loads(file.read_text(encoding="utf-8")).get("processor_class")
            if named is not None:
                return processor_class_from_name(named)  # type: ignore[no-any-return]
    config = type(AutoConfig.from_pretrained(folder, local_files_only=True))
    return PROCESSOR_MAPPING.get(config, None)  # type: ignore[no-any-return]


class _WithoutVideos(ProcessorMixin):
    """Stands behind a processor's class among the bases of one that has no part for videos."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        there = {name: value for name, value in options.items() if value is not None}
        super().__init__(*(part for part in parts if part is not None), **there)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The names of its parts, in the order of its arguments."""
        return [name for name in super().get_attributes() if name != _VIDEOS]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **options: Any) -> Any:
        """None in the place of what is left out."""
        place = super().get_attributes().index(_VIDEOS)
        parts = [*args[:place], None, *args[place:]]
        rest = {name: value for name, value in processor_dict.items() if name != _VIDEOS}
        return super().from_args_and_dict(parts, rest, **options)
