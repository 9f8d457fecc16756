"""What the hub reads at the top of a model card, made by its own library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fusegpt_ray.text.protocol import stages

TASKS = {
    "AutoModelForCausalLM": ("text-generation", "Text Generation"),
    "AutoModelForImageTextToText": ("image-text-to-text", "Image-Text-to-Text"),
}
"""The hub's word for what such a model does, and its title."""


def header(name: str, manifest: Mapping[str, Any], auto_class: str) -> str:
    """The YAML between the two lines of dashes, with them."""
    source = manifest["source"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[auto_class][0],
        tags=["fusegpt", "depth-pruning"],
        base_model=source["name"] if source["on_hub"] else None,
        model_name=name,
        eval_results=[*_results(manifest["perplexity"], TASKS[auto_class])] or None,
        **manifest.get("license", {}),
    )
    if data.eval_results is None:
        del data.model_name  # the library writes it only as part of the results
    return f"---\n{data.to_yaml()}\n---"


def _results(
    perplexity: Mapping[str, Mapping[str, Any]], task: tuple[str, str]
) -> Iterator[EvalResult]:
    """The published model's own, those that are numbers to YAML, too."""
    for text, row in perplexity.items():
        last = stages([row])[-1]
        if math.isfinite(row[last]):
            protocol = {key: row[key] for key in ("windows", "length", "bos") if key in row}
            yield EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type=str(row.get("data", text)),
                dataset_name=text,
                metric_type="perplexity",
                metric_name="Perplexity",
                metric_value=round(row[last], 4),
                metric_args=protocol,
            )
