"""Text models whose blocks are called with what depends on the tokens: per-layer embeddings."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from models import GROUPED, SLIDING, VOCAB, open_stack, randomize, token_windows
from runners import local_workers
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.structure import observe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.samples import PADDING

BLOCKS = 6
IDS = token_windows(3, 11)
LENGTHS = [11, 6, 11]


def gemma4(**changes: Any) -> tf.PretrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    sizes = {"num_hidden_layers": BLOCKS, "head_dim": 8, "global_head_dim": 16}
    settings = GROUPED | sizes | own | {"sliding_window": SLIDING, "layer_types": kinds} | changes
    return tf.Gemma4TextConfig(**settings)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(gemma4(), dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def padded() -> np.ndarray:
    windows_WT = IDS.numpy().copy()
    for row, length in zip(windows_WT, LENGTHS, strict=True):
        row[length:] = PADDING
    return windows_WT


class Nothing(nn.Module):
    """In place of a block."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def passes(folder: Path, out: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By the real model, without a block: what enters the final norm, and the logits, of each
    window without its padding.
    """
    auto = tf.AutoModelForCausalLM
    model = copy.deepcopy(auto.from_pretrained(folder, dtype=torch.float32).eval())
    if out is not None:
        model.model.layers[out] = Nothing()
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits = [
        model(input_ids=IDS[row : row + 1, :length], use_cache=False).logits[0]
        for row, length in enumerate(LENGTHS)
    ]
    return list(zip(seen, logits, strict=True))


def test_a_walk_is_the_models_own_pass(folder: Path) -> None:
    runner = Runner(open_stack(folder), torch.device("cpu"), torch.float32, batch_size=2)
    assert runner.trunk.by_sample
    for h_WTD in runner.walk(runner.stack, torch.tensor(padded())):  # noqa: B007 - the last
        pass
    for row, (states, _) in enumerate(passes(folder)):
        assert torch.equal(h_WTD[row, : len(states)], states)


def test_scores_and_perplexity_are_those_of_whole_passes(folder: Path) -> None:
    full, losses, expected = passes(folder), list[float](), []
    for out in range(BLOCKS):
        terms = [
            1 - torch.cosine_similarity(a.double(), b.double(), dim=-1)
            for (a, _), (b, _) in zip(full, passes(folder, out), strict=True)
        ]
        expected.append(torch.cat(terms).mean().item())
    for row, (_, logits) in enumerate(full):
        targets = IDS[row, 1 : LENGTHS[row]]
        losses += nn.functional.cross_entropy(logits[:-1], targets, reduction="none").tolist()
    settings = Importance(all=True, windows=3, batch=2)
    with local_workers(folder, settings) as workers:
        stack = open_stack(folder)
        found = score(workers, stack, padded(), settings)
        perplexity = evaluation.perplexity(workers, stack, padded())
        assert evaluation.compare_source(workers, padded()).problem == ""
    assert list(found.scores.values()) == pytest.approx(expected, rel=1e-4)
    assert perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_blocks_that_need_others_are_refused() -> None:
    """Keys and values of earlier blocks; and states that are several."""
    config = gemma4(num_kv_shared_layers=3)
    sparse = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * BLOCKS}
    given = {key: value for key, value in gemma4().to_dict().items() if key in _SHARED}
    altup = tf.Gemma3nTextConfig(**given, **sparse, num_kv_shared_layers=0)
    for built, name in ((config, "Gemma4ForCausalLM"), (altup, "Gemma3nForCausalLM")):
        raw = json.loads(built.to_json_string(use_diff=False)) | {"architectures": [name]}
        with pytest.raises(UserError, match=name):
            observe(raw)


_SHARED = {
    *GROUPED,
    "layer_types",
    "head_dim",
    "sliding_window",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
}
