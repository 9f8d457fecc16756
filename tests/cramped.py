"""Work under a real limit of memory, in a process of its own, and a model whose activations are
what takes memory.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from models import GROUPED, open_stack, randomize, token_windows

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

LENGTH = 256
WIDTH = 2048
MB = 1_000_000
SCORED, TRAINED = 16, 8
"""Windows in a call of scoring, and in a loss batch."""
MANY = 400
"""Windows of 64 tokens of 512 numbers: 52 MB of states entering a group, and as much of those
leaving it."""
LIMITS = {"score": 80 * MB, "finetune": 180 * MB}
"""Enough for half of the windows at once, not for all: for each token and unit of the wide layers
these take 3 and (in three blocks) 12 to 16 numbers, 100 and 200 to 270 MB."""


def save_wide(folder: Path) -> Path:
    """A tiny llama with narrow states and wide layers between them."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **GROUPED | {"intermediate_size": WIDTH, "max_position_embeddings": LENGTH},
        tie_word_embeddings=False,
    )
    model = tf.LlamaForCausalLM(config)
    randomize(model)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(0.1)  # so many inputs would drown the states
    model.save_pretrained(folder)
    return folder


def limit_memory(more: int) -> None:
    """From here on this process may take only `more` bytes beyond what it has (RLIMIT_DATA: heap
    and private mappings).

    What is freed is free again only with MALLOC_MMAP_THRESHOLD_ in the environment: else the heap
    keeps it, in pieces.
    """
    taken = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert taken is not None
    resource.setrlimit(resource.RLIMIT_DATA, (int(taken[1]) * 1024 + more, resource.RLIM_INFINITY))


def save_broad(folder: Path) -> Path:
    """A tiny llama with broad states and narrow layers between them: states are what takes
    memory.
    """
    torch.manual_seed(0)
    broad = {
        "hidden_size": 512,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
    }
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED | broad, tie_word_embeddings=False))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def tune_many(_: int, folder: Path, out: Path, more: int | None) -> None:
    """Fine-tune a group on `MANY` windows of 64 tokens with `more` bytes at hand; saves what
    comes out to `out`.
    """
    torch.set_num_threads(1)
    recipe = Recipe.parse(
        {
            "model": {"source": str(folder)},
            "calibration": {"data": "unused", "windows": MANY, "length": 64},
            "fusion": {"group_size": 2, "epochs": 1, "batch": TRAINED, "rank": 4, "lora_rank": 4},
            "cluster": {"engine": "local"},
            "output": {"uri": str(out.parent), "name": "x", "report": False},
        }
    )
    dense, windows = open_stack(folder), token_windows(MANY, 64).numpy()
    with LocalWorkers(Setup.of(recipe, Source.find(str(folder), None), dense)) as engine:
        assert (
            evaluation.perplexity(engine, dense, windows[:1]) > 1
        )  # what is loaded once is loaded before the limit
        if more is not None:
            limit_memory(more)
        job = GroupFusion(dense, dense, 1, recipe.fusion, True, 0, f"{out}-blocks")
        torch.save(tune(engine, job, windows, recipe), out)


def work(_: int, folder: Path, out: Path, what: str, loss: str, more: int | None) -> None:
    """Score, or fine-tune a group, with `more` bytes at hand (None: as many as it likes); saves
    what comes out to `out`.
    """
    torch.set_num_threads(1)
    recipe = Recipe.parse(
        {
            "model": {"source": str(folder)},
            "calibration": {"data": "unused", "windows": SCORED, "length": LENGTH},
            "importance": {"windows": SCORED, "batch": SCORED if what == "score" else 1},
            "fusion": {
                "group_size": 3,
                "epochs": 2,
                "batch": TRAINED,
                "rank": 4,
                "lora_rank": 4,
                "loss": loss,
            },
            "cluster": {"engine": "local"},
            "output": {"uri": str(out.parent), "name": "x", "report": False},
        }
    )
    dense, windows = open_stack(folder), token_windows(SCORED, LENGTH).numpy()
    with LocalWorkers(Setup.of(recipe, Source.find(str(folder), None), dense)) as engine:
        assert (
            evaluation.perplexity(engine, dense, windows[:1]) > 1
        )  # what is loaded once is loaded before the limit
        if more is not None:
            limit_memory(more)
        if what == "score":
            torch.save(score(engine, dense, windows, recipe.importance), out)
        else:
            job = GroupFusion(dense, dense, 2, recipe.fusion, True, 0, f"{out}-blocks")
            torch.save(tune(engine, job, windows, recipe), out)


def tune(engine: LocalWorkers, job: GroupFusion, windows: np.ndarray, recipe: Recipe) -> Trained:
    """Train a group as a round does."""
    task = job.task(windows, recipe.cluster, "origin", f"{job.folder}-checkpoints")
    return train_span(engine, task, lambda _: None)
