"""A first recipe for a model and the machine at hand, for `fusegpt init`."""

from __future__ import annotations

import json
import re
from math import prod

import torch
import yaml

from fusegpt_ray.cost.footprint import healing_bytes
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.device import pick_dtype
from fusegpt_ray.planning.outlook import Device
from fusegpt_ray.preparing.opening import find_model, look_at
from fusegpt_ray.recipe.recipe import Recipe, blocks_to_remove
from fusegpt_ray.recipe.sections import Model

SPARSITY = 0.25
ROOM = 0.8
"""The share of a device's memory that healing all weights may need by the formula."""
TEMPLATE = """\
# A first recipe for a model of {blocks} blocks and {parameters:,} parameters, on {where}.
# `fusegpt plan` tells what it will cost, `fusegpt compress` carries it out.
# Every key with its default: `fusegpt keys`.
model:
  source: {source}
sparsity: {sparsity}        # the share of blocks to remove
method: fusegpt       # mi+linear trains nothing; mi merely drops blocks
preset: best          # fills in what is left out here; or paper, rounds
calibration:          # text like that which the model will be used on
  {text}
  windows: {windows}
  length: {length}         # tokens a window{positions}
heal:                 # all blocks are trained together in the end
  tokens: {tokens}      # more are better, and cost in proportion
  train: {train}          # {why}
{evaluation}
cluster:
  engine: {engine}       # ray: on one machine or many; local: one process, no Ray
  replicas: {gpus}         # of the model, which score blocks side by side
  workers: {workers}          # which train blocks together
{training}output:
  uri: runs           # or a bucket: s3://bucket/models
  name: {name}
  # track: tensorboard  # draws curves while it works; or wandb, mlflow, trackio
"""
WIKITEXT = "{data: wikitext, config: wikitext-2-raw-v1}"
EVALUATED = f"""\
evaluation:           # held-out text; its perplexity is told after each stage
  wikitext2: {WIKITEXT}"""
NOT_EVALUATED = """\
# evaluation:         # held-out text; its perplexity is told after each stage
#   heldout: {data: heldout.txt}"""
ON_GPUS = """\
  zero_stage: 3       # what learns is shared by the workers
  micro_batch: 1
  recompute_activations: true
"""


def first_recipe(source: str, device: Device, gpus: int, data: str | None = None) -> str:
    """A commented recipe in YAML, which `Recipe.load` takes. Reads no weights.

    Args:
        gpus: how many GPUs there are.
        data: a text of the user's own; None: WikiText-2, from the hub.

    Raises:
        UserError: there is no such model, or it cannot be made shallower.
    """
    found, _ = find_model(Recipe.check(Model, {"source": source}, "model"), {})
    dense = look_at(found).stack
    config = read_config(dense.config).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    on_gpus = device.kind == "cuda"
    length = min(2048 if on_gpus else 256, positions if positions > 0 else 2048)
    values = {
        "blocks": len(dense),
        "parameters": sum(prod(ref.shape) for ref in dense.refs),
        "where": f"{gpus} × {device.name}" if on_gpus else device.name,
        "source": json.dumps(source),  # YAML reads JSON's strings
        "sparsity": SPARSITY,
        "text": f"data: {json.dumps(data)}" if data else WIKITEXT[1:-1].replace(", ", "\n  "),
        "windows": 1024 if on_gpus else 64,
        "length": length,
        "positions": f"; the model has {positions} positions" if positions > 0 else "",
        "tokens": 2_000_000 if on_gpus else 64 * length,
        "evaluation": NOT_EVALUATED if data else EVALUATED,
        "engine": "ray" if on_gpus else "local",
        "gpus": max(1, gpus),
        "workers": max(n for n in (1, 2, 4, 8) if n <= max(1, gpus)),
        "training": ON_GPUS if on_gpus else "",
        "name": json.dumps(_name(source)),
    }
    text = TEMPLATE.format(
        **values, train="all", why="or lora: low-rank updates, folded at the end"
    )
    recipe = Recipe.parse(yaml.safe_load(text))
    dtype = pick_dtype(recipe.model.dtype, dense, torch.device(device.kind))
    kept = len(dense) - blocks_to_remove(len(dense), SPARSITY)
    if healing_bytes(recipe, dense, dtype, kept) > ROOM * device.memory:
        text = TEMPLATE.format(**values, train="lora", why="for all, memory would be short here")
    return text


def _name(source: str) -> str:
    """Of a model's last part, what may stand in a folder's name."""
    last = source.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.").lower() or "model"
