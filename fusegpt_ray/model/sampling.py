"""Text that a model writes: prompts continued by transformers' own `generate`.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList

from fusegpt_ray.model.device import deterministic_where_possible
from fusegpt_ray.model.empty import in_arithmetic
from fusegpt_ray.model.finite import finite
from fusegpt_ray.model.runner import Runner

ROWS = 16
"""Prompts of a part of a text that is kept, which are continued on one walk."""


@torch.no_grad()
def continuations(
    runner: Runner,
    prompts: Sequence[np.ndarray],
    length: int,
    temperature: float,
    top_p: float,
    ends: Sequence[int],
    seed: int,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """What the model of the runner writes after each prompt, int32 [tokens]: up to `length` tokens
    with the longest of the prompts beside it, or up to the first of the tokens `ends`, which is the
    last one then. As many prompts are continued at once as the runner's batch has windows.

    The same prompts, seed and batch give the same tokens on a CPU, and on a GPU as far as its
    kernels do.

    Args:
        prompts: int [tokens], none empty.
        length: larger than any prompt's.
        temperature: 0: each token is the most probable one.
        inputs: what else the model's class takes for the prompts, such as an image's pixels; of
            one prompt alone.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    sampled = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        do_sample=temperature > 0,
        **sampled,
        max_length=length,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        use_cache=True,
    )
    given = {
        name: in_arithmetic(torch.tensor(value, device=runner.device), runner.trunk.dtype)
        for name, value in (inputs or {}).items()
    }
    gpus = [runner.device] if runner.device.type == "cuda" else []
    written = []
    with torch.random.fork_rng(gpus), deterministic_where_possible():
        blocks = [module for _, module in runner.weights.walk(runner.stack.blocks)]
        model = runner.trunk.with_blocks(blocks)
        torch.manual_seed(seed)
        for first in range(0, len(prompts), runner.batch_size):
            ids_BT, mask_BT = _padded(prompts[first : first + runner.batch_size])
            found_BT = model.generate(
                input_ids=ids_BT.to(runner.device),
                attention_mask=mask_BT.to(runner.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_check_finite]),
                **given,
            )
            new_BT = found_BT[:, ids_BT.shape[1] :].cpu().numpy().astype(np.int32)
            written += [_ended(new_T, ends) for new_T in new_BT]
    return written


def _padded(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts that end together, and which of their tokens are real: int64 [B, T] each."""
    length = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, length - len(prompt) :] = 1
    return ids_BT, mask_BT


def _check_finite(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """Sampling from NaN would end the process on a GPU."""
    if not finite(logits_BV):
        raise FloatingPointError("the logits of a prompt's continuation are not finite")
    return logits_BV


def _ended(tokens_T: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Up to the first that ends the text: what follows is padding."""
    at = np.flatnonzero(np.isin(tokens_T, ends))
    return tokens_T[: at[0] + 1] if len(at) else tokens_T
