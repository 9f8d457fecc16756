"""What the hub reads at the top of a model card, made by its own library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fusegpt_ray.model.config import is_causal
from fusegpt_ray.text.corpus import names_a_dataset
from fusegpt_ray.text.protocol import stages

_WRITES = ("text-generation", "Text Generation")
"""The hub's word for what such a model does, and its title."""
_SEES = ("image-text-to-text", "Image-Text-to-Text")


def header(name: str, manifest: Mapping[str, Any], auto_class: str) -> str:
    """The YAML between the two lines of dashes, with them."""
    source = manifest["source"]
    task = _WRITES if is_causal(auto_class) else _SEES
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task[0],
        tags=["fusegpt", _kind(manifest)],
        base_model=source["name"] if source["on_hub"] else None,
        datasets=[*_datasets(manifest["recipe"])] or None,
        model_name=name,
        eval_results=[*_results(manifest, task)] or None,
        **manifest.get("license", {}),
    )
    if data.eval_results is None:
        del data.model_name  # the library writes it only as part of the results
    return f"---\n{data.to_yaml()}\n---"


def _kind(manifest: Mapping[str, Any]) -> str:
    """What was done to the model, as the hub calls it."""
    if manifest.get("inserted"):
        return "depth-up-scaling"
    return "width-pruning" if manifest.get("width") else "depth-pruning"


def _datasets(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Those of the hub that it was calibrated and healed with, each once."""
    sections = [recipe.get(key) or {} for key in ("calibration", "heal")]
    data = [section.get("data") for section in sections]
    texts = [text for one in data for text in (one if isinstance(one, list) else [{"data": one}])]
    names = dict.fromkeys(text.get("data") for text in texts)
    yield from (name for name in names if name and names_a_dataset(name))


def _results(manifest: Mapping[str, Any], task: tuple[str, str]) -> Iterator[EvalResult]:
    """The published model's own perplexities, those that are numbers to YAML, too. Of a text that
    is no dataset of the hub, no path is told.
    """
    asked = manifest["recipe"].get("evaluation", {})
    for text, row in manifest["perplexity"].items():
        said = asked.get(text, {})
        public = names_a_dataset(said.get("data", ""))
        last = stages([row])[-1]
        if math.isfinite(row[last]):
            protocol = {key: row[key] for key in ("windows", "length", "bos") if key in row}
            yield EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type=said["data"] if public else text,
                dataset_name=text,
                dataset_config=said["config"] if public else None,
                dataset_split=said["split"] if public else None,
                dataset_revision=said["revision"] if public else None,
                metric_type="perplexity",
                metric_name=f"Perplexity ({text})",  # the hub groups results by dataset alone
                metric_value=round(row[last], 4),
                metric_args=protocol,
            )
