"""A published model that computes something else than the stack gets no manifest; an honest one is
proven exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from desk import Desk
from models import MODELS, load_model, open_stack, rewrite, token_windows
from proving import (  # noqa: F401 - fixtures
    FACTS,
    Q,
    Tensors,
    _folder,
    opened,
    shortened,
    with_block,
    without,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fusegpt_ray.model.compiled import CompiledBlock
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.publishing.plain import compare_plain
from fusegpt_ray.publishing.proof import ProofError, compare, prove
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.recipe.recipe import Recipe

# --- a model that computes something else ---

IDS = token_windows(2, 9)


def runners(dense: Stack, published: Stack) -> tuple[Runner, Runner]:
    return Runner(dense, torch.device("cpu"), torch.float32, 8), Runner(
        published, torch.device("cpu"), torch.float32, 8
    )


@pytest.mark.parametrize("name", [*MODELS])
def test_an_honest_model_is_proven_exactly(
    name: str, folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    out, dense = folder(name), open_stack(checkpoint(name))
    published = opened(out, dense)
    proof = prove(published, str(out), shortened(dense), *runners(dense, published), IDS)
    assert proof.states == 0
    assert proof.kl < 1e-12
    assert proof.plain_kl is not None and proof.plain_kl < 1e-9


def test_rounding_to_the_published_dtype_is_no_difference(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load_model(checkpoint("llama")).bfloat16().save_pretrained(tmp_path / "source")
    dense = open_stack(tmp_path / "source")
    stack = with_block(dense, tmp_path, lambda _, tensor: tensor + 1e-3 * torch.randn_like(tensor))
    publish(
        str(tmp_path / "out"),
        stack,
        dense,
        Source.find(str(tmp_path / "source"), None),
        10**9,
        FACTS,
    )
    published = Source.find(str(tmp_path / "out"), None).stack()
    assert (
        {ref.code for ref in published.blocks[1].weights.values()}
        == {"BF16"}
        != {ref.code for ref in stack.blocks[1].weights.values()}
    )
    assert compare(published, stack, *runners(dense, published), IDS) == (0, 0)


def swapped(tensors: Tensors) -> Tensors:
    """Two blocks have changed places."""
    other = {"0": "1", "1": "0"}
    return {
        re.sub(r"layers\.([01])\.", lambda m: f"layers.{other[m[1]]}.", name): value
        for name, value in tensors.items()
    }


def nudged(name: str, by: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name] * (1 + by)}


OTHER = {
    "swapped": (swapped, r"block 0 \(block 0 of the dense model\) is off"),
    "nudged": (
        nudged("model.layers.2.mlp.down_proj.weight", 0.01),
        r"block 2 \(block 4 of the dense model\) is off",
    ),
    "embedding": (nudged("model.embed_tokens.weight", 0.01), "its embedding is off"),
    "head": (
        nudged("lm_head.weight", 0.1),
        r"logits differ from the stack's: mean KL .* nats a token",
    ),
}


@pytest.mark.parametrize(("change", "problem"), OTHER.values(), ids=OTHER)
def test_other_values_are_found_by_running_them(
    change: Callable[[Tensors], Tensors],
    problem: str,
    folder: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
) -> None:
    out, dense = folder("llama"), open_stack(checkpoint("llama"))
    rewrite(out, out, change)
    published = opened(out, dense)  # names and shapes are right
    with pytest.raises(ProofError, match=problem):
        compare(published, shortened(dense), *runners(dense, published), IDS)


def test_another_attention_pattern_is_found(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    """A setting with one value a block, out of step: only running the model shows it."""
    out, dense = folder("gemma3"), open_stack(checkpoint("gemma3"))
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 3
    (out / "config.json").write_text(
        json.dumps(
            config | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        )
    )
    published = opened(out, dense)
    with pytest.raises(ProofError, match=r"block 1 \(block 2 of the dense model\) is off"):
        compare(published, shortened(dense), *runners(dense, published), IDS)


def test_what_from_pretrained_makes_of_it_counts(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out, dense = folder("llama"), open_stack(checkpoint("llama"))
    published = opened(out, dense)
    here, there = runners(dense, published)
    other = rewrite(out, tmp_path / "other", nudged("lm_head.weight", 0.1))
    with pytest.raises(ProofError, match="from_pretrained loads differ from the streamed ones"):
        prove(published, str(other), shortened(dense), here, there, IDS)
    less = rewrite(out, tmp_path / "less", lambda tensors: without(tensors, Q))
    assert Q in compare_plain(str(less), published, there, IDS).problem


def test_compiled_blocks_are_not_compared_with_others(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    """They round otherwise, and would be compiled wherever all windows are a whole batch."""
    out, dense = folder("llama"), open_stack(checkpoint("llama"))
    published, compiler = opened(out, dense), CompileCounterWithBackend("aot_eager")
    compiling = runners(dense, published)
    for runner in compiling:
        runner.compiled, runner.run_block = True, CompiledBlock(compiler)
        runner.batch_size = len(IDS)
    prove(published, str(out), shortened(dense), *compiling, IDS)
    assert compare_plain(str(out), published, compiling[1], IDS).problem == ""
    assert compiler.frame_count == 0
    list(compiling[1].walk(published, IDS))
    assert compiler.frame_count == 1


# --- in a run ---


def test_the_manifest_tells_of_the_proof_and_of_the_published_weights(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load_model(checkpoint("llama")).bfloat16().save_pretrained(tmp_path / "bf16")
    desk = Desk.make(tmp_path / "desk", tmp_path / "bf16")
    held_out = {"heldout": {"data": str(desk.heldout)}}
    (done,) = compress(Recipe.parse(desk.recipe(evaluation=held_out)))
    assert done.manifest["proof"]["states"] == 0
    assert done.manifest["proof"]["kl"] < 1e-9 and done.manifest["proof"]["plain_kl"] < 1e-6

    from fusegpt_ray.pipeline import evaluate
    from fusegpt_ray.recipe.cluster_section import Cluster
    from fusegpt_ray.recipe.sections import Evaluation

    length = done.manifest["perplexity"]["heldout"]["length"]
    text = Evaluation(data=str(desk.heldout), length=length)
    found = evaluate(done.uri, text, cluster=Cluster(engine="local"))
    assert found["perplexity"] == done.manifest["perplexity"]["heldout"]["fused"]
