"""Texts that papers measure perplexity on, read as their code does (`specs.PUBLISHED_SPECS`).

Notable:
- the rows are joined, and the whole is one call of the tokenizer, with the special tokens that it
  puts around a text by itself: so the beginning-of-sequence token, if there is one, stands in the
  first window alone. Where the recipe says `bos`, each window begins as that says;
- windows follow one another, and the incomplete one at the end is left out;
- the text is small: one process reads and tokenises it, whatever the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.recipe.sections import Evaluation
from fusegpt_ray.recipe.specs import PublishedSpec
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import hub_client, storage
from fusegpt_ray.text.calibration import consecutive_windows, leading_token, tokenize
from fusegpt_ray.text.corpus import explained, sources
from fusegpt_ray.text.formats import Source
from fusegpt_ray.text.rows import lines, opened, rows
from fusegpt_ray.text.windows import Drawn, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def published_windows(
    text: Evaluation, tokenizer: PreTrainedTokenizerBase, length: int, bos: int | None, key: str
) -> Windows:
    """The windows of a published text, which `text.published` describes.

    Args:
        bos: the token that each window begins with, if the recipe says so.

    Raises:
        UserError: the text is not there, is not the published one, or is shorter than a window.
    """
    spec = text.published
    assert spec is not None
    joined = spec.joint.join(_published_rows(text, spec, key))
    as_told = text.bos is not None
    tokens = tokenize(joined, tokenizer, special=not as_told)
    limit = text.windows or spec.windows
    windows_WT = consecutive_windows(lambda: [tokens], length, limit, key, bos)
    once = not as_told and leading_token("auto", tokenizer, key) is not None
    return Windows.of(windows_WT, bos is not None, Drawn(text.label, bos_once=once))


def _published_rows(text: Evaluation, spec: PublishedSpec, key: str) -> list[str]:
    """
    Raises:
        UserError: there are other rows than the published text has.
    """
    place = text.copy_of_published or _fetched(text.data, spec, key)
    each = (
        row for source in sources(Text(data=place), key) for row in _rows_of(source, spec, text)
    )
    found = list(islice(each, spec.rows + spec.whole))
    if len(found) != spec.rows:
        there = f"more than {spec.rows}" if len(found) > spec.rows else str(len(found))
        problem = f"has {there} rows, and {spec.title}, {spec.rows}"
        fix = f"give a copy of {spec.file} of {spec.repository}, or name the file alone"
        raise UserError(key, text.data, problem, fix)
    return found


def _rows_of(source: Source, spec: PublishedSpec, text: Evaluation) -> Iterator[str]:
    with explained(source.key, source.uri):
        if source.format != "text":
            yield from rows(source)
            return
        if not spec.lines:
            problem = "plain text, which does not tell one document from another"
            fix = "give a copy of the published table, such as JSON Lines or Parquet"
            raise UserError(source.key, text.data, problem, fix)
        with opened(source) as file:
            for _, line in lines(file, source):
                yield line if line.strip() else ""


def _fetched(name: str, spec: PublishedSpec, key: str) -> str:
    """The published file in the hub's cache."""
    from huggingface_hub import hf_hub_download

    if storage.exists(name):
        problem = "both a published text and something that lies here"
        fix = f"say {name}=FILE for a copy of the published text, or ./{name} for what lies here"
        raise UserError(key, name, problem, fix)
    fix = f"check the network, or name a copy of that file: {name}=FILE"
    hub_client.patient()
    problem = f"the hub does not give {spec.file} of the dataset {spec.repository}"
    with reading_users_file(key, name, problem, fix):
        return hf_hub_download(
            spec.repository, spec.file, repo_type="dataset", revision=spec.revision
        )
