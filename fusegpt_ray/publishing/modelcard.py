"""The README.md of a published model: what it is, how it was made, what it costs in perplexity, how
to use it, and under which licence it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fusegpt_ray.model.config import is_causal
from fusegpt_ray.publishing.cardheader import header
from fusegpt_ray.publishing.in_vllm import INSTEAD
from fusegpt_ray.recipe.specs import METHOD_SPECS, METRIC_SPECS
from fusegpt_ray.store.public import public
from fusegpt_ray.text.protocol import STAGES, described, stages, warnings

FOLDER = "<this folder>"
"""What stands in the card's commands for where the model is."""
HEALED = {
    "kl": "; then all blocks trained together to the dense model's next-token distributions",
    "tokens": "; then all blocks trained together on the next tokens of text",
}
"""By `heal.loss`."""


def model_card(
    name: str, manifest: Mapping[str, Any], auto_class: str, pictures: Mapping[str, str]
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        manifest: as in `fusegpt.json`, without its files.
        auto_class: the class of transformers whose `from_pretrained` loads the model.
        pictures: their titles by the names of their files, which lie beside the card.
    """
    front = header(name, manifest, auto_class)  # which asks what is on the hub
    manifest = public(manifest)
    source = manifest["source"]
    revision = f" (revision {source['revision']})" if source["revision"] else ""
    about = _about(manifest)
    lines = [
        front,
        f"# {name}",
        "",
        f"{source['name']}{revision} with {_change(manifest)}: {about}.",
        "",
        *_measured(manifest),
        "",
        *(f"*{stage.capitalize()}*: {STAGES[stage]}.  " for stage in _between(manifest)),
    ]
    lines += _blocks(manifest)
    lines += _search(manifest)
    lines += [line for file, title in pictures.items() for line in ("", f"![{title}]({file})")]
    if less := manifest.get("fewer_at_once"):
        lines.append(
            "Fewer windows at once than the recipe says, beyond rounding with the same result:"
            f" {less}."
        )
    if (seed := manifest["recipe"].get("seed")) is not None:
        lines += ["", f"Seed: {seed}, for everything that is drawn at random."]
    lines += [
        "",
        *_samples(manifest),
        *_use(auto_class, manifest),
        "",
        "## How it was made",
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
        "## Licence",
        "",
        _licence(manifest),
        "",
    ]
    return "\n".join(lines)


def _about(manifest: Mapping[str, Any]) -> str:
    """What was done, in words."""
    about = METHOD_SPECS[manifest["method"]].about.format(blocks=_which(manifest))
    if "healing" not in manifest:
        return about
    heal = manifest["recipe"].get("heal") or {}
    healed = HEALED[heal.get("loss", "kl")]
    if heal.get("train") == "new":
        healed = healed.replace("all blocks trained together", "the new blocks alone trained")
    about = about.replace(", nothing trained but these", "").replace(", nothing trained", "")
    about += healed
    if groups := manifest["healing"].get("groups"):
        about += f", in {len(groups)} groups of blocks that share weights"
    return about


def _samples(manifest: Mapping[str, Any]) -> list[str]:
    """What the dense and this model write, as code: what a model writes may look like Markdown."""
    if not (samples := manifest.get("samples")):
        return []
    lines = ["## What it writes", "", "The most probable continuation of each prompt:", ""]
    for sample in samples:
        shown = [sample["prompt"], sample["dense"], sample["published"]]
        name = sample.get("image", {}).get("name", "")
        fence = "`" * max(3, 1 + max(map(_ticks, [*shown, name])))
        lines += [f"{fence}text", *([f"image       {_indented(name)}"] if name else [])]
        lines += [f"prompt      {_indented(sample['prompt'])}"]
        lines += [f"dense model {_indented(sample['dense'])}"]
        lines += [f"this model  {_indented(sample['published'])}", fence, ""]
    return lines


def _ticks(text: str) -> int:
    """The longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _indented(text: str) -> str:
    """Its further lines below its first, behind the names; without control characters."""
    lines = "".join(c if c.isprintable() or c == "\n" else " " for c in text).split("\n")
    return ("\n" + " " * 12).join(lines).rstrip()


def _use(auto_class: str, manifest: Mapping[str, Any]) -> list[str]:
    """Commands that load, serve and quantise it."""
    sees = not is_causal(auto_class)
    kept = ["re:.*lm_head", *(["re:.*vision.*", "re:.*projector.*"] if sees else [])]
    return [
        "## Use it",
        "",
        f"An ordinary checkpoint{_layers(manifest)}; no custom code. `{FOLDER}` is where it is, or",
        "the name of its repository on the hub.",
        "",
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("{FOLDER}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        'prompt = tokenizer("Once upon a time", return_tensors="pt")',
        "tokens = model.generate(**prompt, max_new_tokens=40)",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        "```",
        "",
        *_serve(manifest.get("wrong_in_vllm", "")),
        "Quantise it next with [llm-compressor](https://docs.vllm.ai/projects/llm-compressor),"
        " after the lines above:",
        "",
        "```python",
        "from llmcompressor import oneshot",
        "from llmcompressor.modifiers.quantization import QuantizationModifier",
        "",
        f"kept = {json.dumps(kept)}",
        'recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=kept)',
        "oneshot(model=model, recipe=recipe)",
        f'model.save_pretrained("{FOLDER}-FP8")',
        f'tokenizer.save_pretrained("{FOLDER}-FP8")',
        "```",
    ]


def _serve(wrong: str) -> list[str]:
    """The command that serves it, where there is one."""
    if wrong and INSTEAD not in wrong:
        return [f"Warning: {wrong}.", ""]
    command = " ".join([f'vllm serve "{FOLDER}"', *([INSTEAD] if wrong else [])])
    lines = ["Serve it with [vLLM](https://docs.vllm.ai):", "", "```bash", command, "```", ""]
    return [f"Warning: {wrong}.", "", *lines] if wrong else lines


def _licence(manifest: Mapping[str, Any]) -> str:
    """What is known of the licence that came with the source."""
    said = manifest.get("license")
    if not said:
        return (
            f"{manifest['source']['name']} came without word of its licence. Whatever it is, it"
            " applies to this model, too."
        )
    names = said.get("license_name") or said["license"]
    name = ", ".join(names) if isinstance(names, list) else names
    link = said.get("license_link")
    named = f"[{name}]({link})" if isinstance(link, str) else name
    return f"That of {manifest['source']['name']}: {named}."


def _change(manifest: Mapping[str, Any]) -> str:
    """What it has less of, or more."""
    dense = manifest["dense_blocks"]
    if inserted := manifest.get("inserted"):
        return f"{len(inserted)} decoder blocks added to its {dense}"
    if width := manifest.get("width"):
        sizes = f"{width['dense']} → {width['kept']}"
        return f"hidden size {sizes} and all of its {dense} decoder blocks"
    return f"{len(manifest['removed'])} of its {dense} decoder blocks removed"


def _blocks(manifest: Mapping[str, Any]) -> list[str]:
    """Which blocks these are."""
    numbers = "(numbers in the dense model)"
    if inserted := manifest.get("inserted"):
        copies = ", ".join(f"{copy['like']} behind {copy['after']}" for copy in inserted)
        return [f"Copies of blocks added {numbers}: of {copies}."]
    lines = []
    if removed := ", ".join(map(str, manifest["removed"])):
        lines.append(f"Blocks removed, in order {numbers}: {removed}.")
    if run := [n for round in manifest.get("rounds", ()) for n in round.get("replaced", ())]:
        lines.append(f"Block {run[0]} was trained to stand for blocks {run[0]} to {run[-1]}.")
    if groups := manifest.get("healing", {}).get("groups"):
        which = "; ".join(", ".join(map(str, group)) for group in groups)
        lines.append(f"Blocks that share weights {numbers}: {which}.")
    return ["  \n".join(lines)] if lines else []


def _layers(manifest: Mapping[str, Any]) -> str:
    if manifest.get("width"):
        return ""
    return f" with {'more' if manifest.get('inserted') else 'fewer'} layers"


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
            f" {_first_and_last(tried['held_out'])} |"
            for tried in search["tried"]
        ),
        "",
    ]


def _first_and_last(losses: Sequence[float]) -> str:
    """Two cells of a row."""
    return f"{losses[0]:.4g} | {losses[-1]:.4g}" if losses else "diverged | –"


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
