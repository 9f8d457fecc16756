"""The README.md of a published model: what it is, how it was made, what it costs in perplexity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fusegpt_ray.sections import METHOD_SPECS
from fusegpt_ray.text.protocol import described


def model_card(name: str, manifest: Mapping[str, Any], auto_class: str) -> str:
    """Markdown with the front matter the Hugging Face hub reads; `manifest` as in `fusegpt.json`,
    without its files.

    `auto_class`: the class of transformers whose `from_pretrained` loads the model.
    """
    source, removed = manifest["source"], manifest["removed"]
    front = ["library_name: transformers", "tags: [fusegpt, depth-pruning]"]
    if source["on_hub"]:
        front.append(f"base_model: {source['name']}")
    rows = [
        f"| {data} ({row['length']} tokens a window) | {row['dense']:.2f} | {row['dropped']:.2f} |"
        f" {row['fused']:.2f} |"
        for data, row in manifest["perplexity"].items()
    ]
    table = (
        ["| perplexity on | dense | dropped | this model |", "|---|---|---|---|", *rows]
        if rows
        else ["Not evaluated."]
    )
    revision = f" (revision {source['revision']})" if source["revision"] else ""
    less, protocol = manifest.get("fewer_at_once"), manifest.get("calibration", {})
    lines = [
        "---",
        *front,
        "---",
        f"# {name}",
        "",
        (
            f"{source['name']}{revision} with {len(removed)} of its {manifest['dense_blocks']}"
            f" decoder blocks removed: {METHOD_SPECS[manifest['method']].about}."
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
        *table,
        "",
        *(f"{data}: {described(row)}.  " for data, row in manifest["perplexity"].items()),
        *([f"Calibration: {described(protocol)}.  "] if protocol else []),
        *([f"Warning: {protocol['warning']}.  "] if "warning" in protocol else []),
        "",
        "*Dropped*: the same blocks removed, nothing fused or trained.",
        f"Blocks removed, in order (numbers in the dense model): {', '.join(map(str, removed))}.",
        *(
            [
                "Fewer windows at once than the recipe says, beyond rounding with the same result:"
                f" {less}."
            ]
            if less
            else []
        ),
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
