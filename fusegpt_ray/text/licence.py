"""Under which licence a text stands: as the recipe says it, or else the dataset's own card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from fusegpt_ray.recipe.text_sections import GeneratedText, Text
from fusegpt_ray.store import hub_client
from fusegpt_ray.store.front_matter import front_matter, is_name
from fusegpt_ray.text.corpus import names_a_dataset
from fusegpt_ray.text.windows import Windows

NOT_STATED = "not stated"
_CARD = "README.md"


def licensed(windows: Windows, texts: Sequence[Text | GeneratedText]) -> Windows:
    """With the licence of each of the texts that they were drawn from, but of those that the dense
    model wrote.
    """
    drawn = tuple(
        replace(drawn, licence=licence(text)) if isinstance(text, Text) else drawn
        for drawn, text in zip(windows.texts, texts, strict=True)
    )
    return replace(windows, texts=drawn)


def licence(text: Text) -> str:
    """The recipe's own word; or what stands in the card of a dataset of the hub or in the README.md
    of a local folder, in the words of the hub; or `NOT_STATED`.
    """
    if text.licence:
        return text.licence
    folder = Path(text.data).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    spec = getattr(text, "published", None)
    if spec:
        return _of_dataset(spec.repository, spec.revision)
    return _of_dataset(text.data, text.revision) if names_a_dataset(text.data) else NOT_STATED


def _of_folder(folder: Path) -> str:
    try:
        return _said((folder / _CARD).read_bytes())
    except OSError:  # no card, or none that may be read
        return NOT_STATED


@cache
def _of_dataset(repository: str, revision: str | None) -> str:
    """By its card on the hub, or in the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    hub_client.patient()
    try:
        card = hf_hub_download(repository, _CARD, repo_type="dataset", revision=revision)
        return _said(Path(card).read_bytes())
    except (EntryNotFoundError, HFValidationError, OSError):  # no card, or no hub to be asked
        return NOT_STATED


def _said(card: bytes) -> str:
    found = front_matter(card)
    said = found.get("license") if isinstance(found, dict) else None
    if not is_name(said):
        return NOT_STATED
    name = found.get("license_name")
    if said == "other" and is_name(name):
        said = name
    return ", ".join(said) if isinstance(said, list) else str(said)
