"""The README.md of a published model: what it is, how it was made, what it costs in perplexity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fusegpt_ray.specs import METHOD_SPECS, METRIC_SPECS
from fusegpt_ray.text.protocol import STAGES, described, stages, warnings

HEALED = "; then all blocks trained together to the dense model's next-token distributions"


def model_card(name: str, manifest: Mapping[str, Any], auto_class: str) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        manifest: as in `fusegpt.json`, without its files.
        auto_class: the class of transformers whose `from_pretrained` loads the model.
    """
    source, removed = manifest["source"], manifest["removed"]
    about = METHOD_SPECS[manifest["method"]].about.format(blocks=_which(manifest))
    revision = f" (revision {source['revision']})" if source["revision"] else ""
    if "healing" in manifest:
        about = about.replace(", nothing trained", "") + HEALED
    lines = [
        *_front_matter(source),
        f"# {name}",
        "",
        (
            f"{source['name']}{revision} with {len(removed)} of its {manifest['dense_blocks']}"
            f" decoder blocks removed: {about}."
        ),
        "",
        "An ordinary checkpoint with fewer layers; no custom code:",
        "",
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer",
        f'model = {auto_class}.from_pretrained("<this folder>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
        "```",
        "",
        *_measured(manifest),
        "",
        *(f"*{stage.capitalize()}*: {STAGES[stage]}.  " for stage in _between(manifest)),
        f"Blocks removed, in order (numbers in the dense model): {', '.join(map(str, removed))}.",
    ]
    lines += _search(manifest)
    if less := manifest.get("fewer_at_once"):
        lines.append(
            "Fewer windows at once than the recipe says, beyond rounding with the same result:"
            f" {less}."
        )
    lines += [
        "",
        (
            "`fusegpt.json` holds every round's scores and losses, and each file's size and sha256."
            " The recipe:"
        ),
        "",
        "```json",
        json.dumps(manifest["recipe"], indent=1),
        "```",
        "",
        "The source model's licence applies.",
        "",
    ]
    return "\n".join(lines)


def _front_matter(source: Mapping[str, Any]) -> list[str]:
    base = [f"base_model: {source['name']}"] if source["on_hub"] else []
    return ["---", "library_name: transformers", "tags: [fusegpt, depth-pruning]", *base, "---"]


def _which(manifest: Mapping[str, Any]) -> str:
    """The blocks that went, in a few words."""
    if "search" in manifest:
        sets = len(manifest["search"]["tried"])
        return f"blocks chosen of {sets} sets by healing each for a while"
    title = METRIC_SPECS[manifest["recipe"]["importance"]["metric"]].title
    return f"blocks with the lowest {title}"


def _search(manifest: Mapping[str, Any]) -> list[str]:
    """A table of the sets that were tried, if there was a search."""
    if "search" not in manifest:
        return []
    search = manifest["search"]
    healed = f"after {search['tokens']:,} tokens of healing"
    return [
        "",
        f"| blocks tried | found by | held-out loss | {healed} |",
        "|---|---|---|---|",
        *(
            f"| {', '.join(map(str, tried['removed']))} | {', '.join(tried['ways'])} |"
            f" {tried['held_out'][0]:.4g} | {tried['held_out'][-1]:.4g} |"
            for tried in search["tried"]
        ),
        "",
    ]


def _between(manifest: Mapping[str, Any]) -> list[str]:
    """Stages between the dense and the published model."""
    return stages(manifest["perplexity"].values())[1:-1]


def _measured(manifest: Mapping[str, Any]) -> list[str]:
    """The table of perplexities, and how they were measured."""
    perplexity, protocol = manifest["perplexity"], manifest.get("calibration", {})
    shown = stages(perplexity.values())
    lines = ["Not evaluated."]
    if perplexity:
        *before, _ = shown
        head = " | ".join(["perplexity on", *before, "this model"])
        lines = [f"| {head} |", "|---" * (len(shown) + 1) + "|"]
    for data, row in perplexity.items():
        values = " | ".join(f"{row[stage]:.2f}" for stage in shown)
        lines.append(f"| {data} ({row['length']} tokens a window) | {values} |")
    lines.append("")
    # Two spaces at its end break a line in Markdown.
    lines += [f"{data}: {described(row)}.  " for data, row in perplexity.items()]
    if protocol:
        lines.append(f"Calibration: {described(protocol)}.  ")
    healing = manifest.get("healing", {}).get("data", {})
    if healing:
        lines.append(f"Healing: {described(healing)}.  ")
    told = [*warnings(protocol), *warnings(healing)]
    return lines + [f"Warning: {warning}.  " for warning in told]
