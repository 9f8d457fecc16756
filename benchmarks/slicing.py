"""What one rotation for all blocks costs, beside SliceGPT's rotation for each: in plain
transformers, by projecting the states of the dense model. Also how well the axes are known, by the
number of calibration windows.

A rotation of its own in front of every norm needs a matrix on every residual connection, which no
ordinary checkpoint has. In the coordinates of the dense model it is a projection of the whole
stream, x ← x·P·Pᵀ, in front of that norm. The common one projects onto the same axes everywhere.

The baseline, `each`, is that of SliceGPT's authors in that each norm's axes are those of states
that are already sliced at all norms before it. It is not in two respects, and so what it shows is
the cost of one rotation, found in one walk, alone: the states in front of the final norm are sliced
too, where their code leaves the head as wide as it was unless asked to, and the axes are those of
normalised states, where their code takes the states as they are. `common` has the axes of one walk
of the dense model.

Shapes: W windows, T tokens, D hidden size, K of it kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusegpt_ray.fusion.rotation import normalised, principal_axes

Project = Callable[[int, torch.Tensor], torch.Tensor]
"""Of the states in front of the norm of this number: what they become."""
BATCH = 4


def windows_of(file: str, tokenizer: Any, length: int, limit: int | None) -> torch.Tensor:
    ids = torch.tensor(tokenizer(Path(file).read_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    if limit and limit < len(rows):  # evenly spread over the text
        rows = rows[torch.linspace(0, len(rows) - 1, limit).long()]
    return rows


@torch.no_grad()
def last_states(model: Any, ids_WT: torch.Tensor, project: Project) -> torch.Tensor:
    """[W, T, D] as the final norm reads them; `project` sees all windows at once, one norm after
    the other.
    """
    body = model.model
    h_WTD = body.embed_tokens(ids_WT)
    positions = torch.arange(ids_WT.shape[1])[None]
    rotary = body.rotary_emb(h_WTD[:1], positions)
    places = positions.expand(BATCH, -1)

    def of_batches(change: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> torch.Tensor:
        return torch.cat([part + change(part) for part in h.split(BATCH)])

    for number, block in enumerate(body.layers):

        def attend(part: torch.Tensor, block: Any = block) -> torch.Tensor:
            given = {"position_embeddings": rotary, "position_ids": places[: len(part)]}
            out: torch.Tensor = block.self_attn(
                hidden_states=block.input_layernorm(part), attention_mask=None, **given
            )[0]
            return out

        def feed(part: torch.Tensor, block: Any = block) -> torch.Tensor:
            out: torch.Tensor = block.mlp(block.post_attention_layernorm(part))
            return out

        h_WTD = of_batches(attend, project(2 * number, h_WTD))
        h_WTD = of_batches(feed, project(2 * number + 1, h_WTD))
    return project(2 * len(body.layers), h_WTD)


@torch.no_grad()
def perplexity(model: Any, ids_WT: torch.Tensor, project: Project) -> float:
    losses = []
    for h_BTD, ids_BT in zip(
        last_states(model, ids_WT, project).split(BATCH), ids_WT.split(BATCH), strict=True
    ):
        logits = model.lm_head(model.model.norm(h_BTD))[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
            )
        )
    return float(torch.cat(losses).double().mean().exp())


def covariance(h_WTD: torch.Tensor, eps: float) -> torch.Tensor:
    x_nD = normalised(h_WTD, eps).flatten(0, 1)
    return x_nD.T @ x_nD


def common_axes(model: Any, ids_WT: torch.Tensor) -> torch.Tensor:
    """[D, D]: of what enters all norms of the dense model."""
    hidden, eps = model.config.hidden_size, model.config.rms_norm_eps
    total = torch.zeros(hidden, hidden, dtype=torch.float64)

    def add(number: int, h_WTD: torch.Tensor) -> torch.Tensor:
        total.add_(covariance(h_WTD, eps))
        return h_WTD

    last_states(model, ids_WT, add)
    return principal_axes(total)[0]


def own_axes(model: Any, ids_WT: torch.Tensor, kept: int) -> dict[int, torch.Tensor]:
    """By norm, [D, K] of what enters it, once all norms before it are sliced (as in the paper)."""
    found: dict[int, torch.Tensor] = {}

    def find(number: int, h_WTD: torch.Tensor) -> torch.Tensor:
        axes_DD, _ = principal_axes(covariance(h_WTD, model.config.rms_norm_eps))
        found[number] = axes_DD[:, :kept]
        return onto(found[number], h_WTD)

    last_states(model, ids_WT, find)
    return found


def onto(axes_DK: torch.Tensor, h_WTD: torch.Tensor) -> torch.Tensor:
    axes_DK = axes_DK.to(h_WTD.dtype)
    return h_WTD @ axes_DK @ axes_DK.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[64])
    parser.add_argument("--test-windows", type=int)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.875, 0.75])
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    test = windows_of(arguments.test, tokenizer, arguments.length, arguments.test_windows)
    dense = perplexity(model, test, lambda number, h_WTD: h_WTD)
    print(json.dumps({"dense": round(dense, 2), "windows": len(test)}), flush=True)
    for count in arguments.windows:
        given = windows_of(arguments.calibration, tokenizer, arguments.length, count)
        axes_DD = common_axes(model, given)
        for share in arguments.kept:
            kept = round(model.config.hidden_size * share)
            own = own_axes(model, given, kept)
            ways: dict[str, Project] = {
                "common": lambda number, h, axes=axes_DD[:, :kept]: onto(axes, h),  # type: ignore[misc]
                "each": lambda number, h, own=own: onto(own[number], h),  # type: ignore[misc]
            }
            row = {name: round(perplexity(model, test, way), 2) for name, way in ways.items()}
            print(json.dumps({"calibration": len(given), "kept": kept, **row}), flush=True)


if __name__ == "__main__":
    main()
