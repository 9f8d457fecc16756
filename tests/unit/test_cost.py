"""The cost of a run is known before it begins: each count against what torch and a real run count
themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import LENGTH as WORDS
from desk import Desk
from experts import save_merged, save_split
from models import open_stack, token_windows
from random_stack import empty_stack
from safetensors.torch import load_file
from shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconMambaConfig

from fusegpt_ray.cost.cost import Cost, block_flops, healing_flops, matrix_flops
from fusegpt_ray.cost.footprint import (
    activation_bytes,
    generating_bytes,
    healing_bytes,
    replica_bytes,
    shortage,
    trained_elements,
    training_bytes,
    worker_bytes,
)
from fusegpt_ray.cost.matrices import attention_heads
from fusegpt_ray.cost.rates import MEASURED, RATES
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model import runner as runner_module
from fusegpt_ray.model.recorder import has_experts, run_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display, flop_count
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.span import Span
from fusegpt_ray.workers import local

CPU, LENGTH = torch.device("cpu"), 7


def recipe(desk: Desk, **changes: Any) -> Recipe:
    return Recipe.load(desk.write(**changes))


def costs(desk: Desk, **changes: Any) -> Cost:
    return plan(recipe(desk, **changes), Display()).cost


def stages(found: Cost) -> dict[str, int]:
    return {stage.name: stage.block_forwards for stage in found.stages}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_flops_of_a_block_are_those_that_torch_counts(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    dense = open_stack(checkpoint(name))
    runner = Runner(dense, CPU, torch.float32, 1)
    h_1TD, counted = runner.enter(token_windows(1, LENGTH))[0], 0
    runner.trunk.contexts(1, LENGTH)  # what all blocks share, such as rotary angles
    for block in dense.blocks:
        module = runner.weights.of(block)
        # The kernels that torch has for attention on a CPU are not all known to its counter.
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            h_1TD = runner.apply(module, block.dense, h_1TD)
        counted += counter.get_total_flops()
    assert counted == len(dense) * block_flops(dense, LENGTH)


@pytest.mark.parametrize("layout", [save_split, save_merged])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_flops_count_the_experts_that_a_token_passes(
    name: str, layout: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    dense = open_stack(layout(name, tmp_path))
    runner = Runner(dense, CPU, torch.float32, 1)
    h_1TD, counted = runner.trunk.embed(token_windows(1, LENGTH)), 0
    for block in dense.blocks:
        module = runner.weights.of(block)
        for experts in filter(has_experts, module.modules()):
            experts.config._experts_implementation = "eager"  # in products that are counted
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            runner.apply(module, block.dense, h_1TD)
        # What attention computes by itself is counted without experts above.
        counted += sum(
            flops
            for op, flops in counter.get_flop_counts()["Global"].items()
            if op is not torch.ops.aten.bmm
        )
    assert counted // len(dense) == matrix_flops(dense, LENGTH)


@pytest.mark.parametrize("layout", [save_split, save_merged])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_learns_in_experts_is_counted(
    name: str, layout: Callable[[str, Path], Path], desk: Desk, tmp_path: Path
) -> None:
    folder = tmp_path / "experts"
    folder.mkdir()
    dense = open_stack(layout(name, folder))
    asked = recipe(desk)
    job = GroupFusion(dense, dense, 2, asked.fusion, True, 0, "nowhere")
    runner = Runner(dense, CPU, torch.float32, 4)
    contexts = runner.trunk.contexts(4, WORDS)
    span = job.build(runner.trunk.meta_blocks, contexts, CPU, torch.float32)
    factors = [
        value.numel()
        for name, value in span.learned.named_parameters()
        if name.rpartition(".")[2] in ("A", "B", "C0", "D0")
    ]
    routers = sum(
        (asked.fusion.rank + asked.fusion.lora_rank) * sum(value.shape)
        for block in span.blocks
        for path, value in block.named_parameters()
        if ("router" in path and value.dim() == 2) or path == "mlp.gate.weight"
    )
    assert sum(factors) + routers == trained_elements(asked, dense, 1)


@pytest.mark.parametrize("method", ["fusegpt", "streamline", "foldgpt"])
def test_block_forwards_are_those_of_a_real_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Windows that pass blocks, in the walks of scoring, states and evaluation, and in training."""
    held = {"heldout": {"data": str(desk.heldout), "windows": 4}}
    asked = {"method": method, "evaluation": held}
    expected = stages(costs(desk, **asked))
    counted = count_block_forwards(monkeypatch)
    compress(recipe(desk, **asked), Display())
    gates = 3 * 4 * 5 * 64 if method == "foldgpt" else 0  # 64 passes of the 4 windows
    assert counted["trained"] == expected.get("fine-tuning", 0) + gates
    most = expected["scoring"] + expected.get("states", 0) + expected["evaluation"] - gates
    proofs = max(0.2 * most, 5 * 5)  # at most 5 windows through 5 blocks
    assert 0.5 * most < counted["walked"] < most + proofs


def test_block_forwards_of_a_tournament_are_those_of_a_real_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    heal = {"tokens": 8 * LENGTH, "batch": 4, "held_out": 4, "looks": 2, "train": "all"}
    asked: dict[str, Any] = {
        "method": "mi",
        "heal": heal,
        "importance": {"all": True, "windows": 4, "batch": 2},
    }
    asked |= {"search": {"candidates": ["mi", "loss", "run"], "tokens": 4 * LENGTH}}
    expected = stages(costs(desk, **asked))
    assert expected.keys() == {"search", "healing"}
    counted = count_block_forwards(monkeypatch)
    compress(recipe(desk, **asked), Display())
    most = sum(expected.values())
    # Two ways may lead to the same set, which is healed once; the proofs come on top.
    assert 0.6 * most < sum(counted.values()) < 1.2 * most


def count_block_forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of what runs from now on; a pass that is learned from counts as three."""
    counted = {"walked": 0, "trained": 0}
    run_block, call = runner_module.run_block, Span.__call__

    def counted_block(module: Any, h_BTD: torch.Tensor, context: Any) -> torch.Tensor:
        counted["walked"] += len(h_BTD)
        return run_block(module, h_BTD, context)

    def counted_span(span: Span, h_bTD: torch.Tensor, owns: Any = None) -> torch.Tensor:
        times = 3 if torch.is_grad_enabled() else 1
        counted["trained"] += times * len(h_bTD) * len(span.blocks)
        return call(span, h_bTD, owns)

    monkeypatch.setattr(runner_module, "run_block", counted_block)
    monkeypatch.setattr(Span, "__call__", counted_span)
    return counted


def test_sizes_are_those_of_the_files(desk: Desk) -> None:
    found = costs(desk)
    tensors = load_file(desk.model / "model.safetensors")
    assert found.source_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    published = compress(recipe(desk), Display())
    for item in published:
        files = Path(item.uri).glob("*.safetensors")
        size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        assert size == found.published_bytes[Path(item.uri).name]


def test_dropping_trains_nothing(desk: Desk) -> None:
    assert stages(costs(desk, method="mi")).keys() == {"scoring"}


def test_what_makes_a_run_dearer_costs_more(desk: Desk) -> None:
    dense = plan(recipe(desk), Display()).model.stack
    plain, one = costs(desk), {"engine": "local", "micro_batch": 1}
    for change in (
        {"fusion": desk.recipe()["fusion"] | {"loss": "batch_kl"}, "cluster": one},
        {"cluster": {"engine": "local", "recompute_activations": True}},
    ):
        dearer = costs(desk, **change)
        assert stages(dearer)["fine-tuning"] * 3 == stages(plain)["fine-tuning"] * 4
        assert dearer.flops > plain.flops
    few, many = (replica_bytes(dense, torch.float32, windows, LENGTH) for windows in (1, 9))
    assert many - few == 8 * (len(dense) + 1) * LENGTH * 4 * 32
    asked, whole = recipe(desk), torch.float32
    sizes = [
        worker_bytes(asked, dense, torch.bfloat16),
        worker_bytes(asked, dense, whole),
        worker_bytes(asked, dense, whole, rounds=3),
    ]
    assert sizes == sorted(set(sizes))
    folded = recipe(desk, fusion=desk.recipe()["fusion"] | {"fold": "each_round"})
    assert worker_bytes(folded, dense, whole, 3) == worker_bytes(folded, dense, whole, 1)


def test_a_line_tells_work_and_sizes(desk: Desk) -> None:
    line = costs(desk).in_words()
    number, size = r"\d+(\.\d+)?", r"\d+(\.\d+)? [kMG]?B"
    shares = r"scoring \d+%, states \d+%, fine-tuning \d+%"
    assert re.fullmatch(rf"at most {number} [MGTPE]FLOP \({shares}\); {size} become {size}", line)
    assert [flop_count(flops) for flops in (5e5, 12_345e6, 2e15, 3e22)] == [
        "0.5 MFLOP",
        "12.3 GFLOP",
        "2 PFLOP",
        "3e+04 EFLOP",
    ]


def test_what_does_not_fit_is_said_with_the_keys_that_help(desk: Desk) -> None:
    dense, whole = plan(recipe(desk), Display()).model.stack, torch.float32
    asked, enough = recipe(desk), 10**9
    needed = training_bytes(asked, dense, whole, 3) + activation_bytes(asked, dense, whole)
    assert not shortage(asked, dense, whole, 3, enough)
    assert not shortage(asked, dense, whole, 3, needed)
    told = shortage(asked, dense, whole, 3, needed - 1)
    for key in ("fold: each_round", "micro_batch", "recompute_activations", "group_size"):
        assert key in told
    one = {"engine": "local", "micro_batch": 1, "recompute_activations": True}
    folded = desk.recipe()["fusion"] | {"fold": "each_round"}
    frugal = recipe(desk, cluster=one, fusion=folded)
    told = shortage(frugal, dense, whole, 3, 1)
    assert "fold" not in told and "micro_batch" not in told and "recompute" not in told
    assert activation_bytes(frugal, dense, whole) < activation_bytes(asked, dense, whole)


def test_compress_says_before_the_work_that_memory_is_short(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "device_bytes", lambda _: 1000)
    compress(recipe(desk), Display())
    said = " ".join(capsys.readouterr().err.split())
    assert said.index("fine-tuning needs about") < said.index("round 1/2")


def test_hours_follow_from_measured_rates(desk: Desk) -> None:
    rates = RATES[MEASURED]
    found = costs(desk)
    assert set(stages(found)) <= set(rates)
    expected = sum(stage.flops / rates[stage.name] for stage in found.stages) / 3600
    assert found.hours(rates) == pytest.approx(expected)
    assert found.hours(rates, 8) == pytest.approx(expected / 8)


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_healing_are_those_that_torch_counts(
    train: str, recompute: bool, desk: Desk
) -> None:
    heal = {"train": train, "rank": 3, "batch": 4, "held_out": 4, "tokens": 8 * WORDS}
    cluster = {"engine": "local", "recompute_activations": recompute}
    asked = recipe(desk, heal=heal, cluster=cluster)
    dense = open_stack(desk.model)
    assert asked.heal
    job = WholeModel(dense.drop(2), dense, asked.heal, 0, "nowhere")
    runner = Runner(dense, CPU, torch.float32, 4)
    ids_WT = token_windows(4, WORDS)
    task = job.task(ids_WT.numpy(), ids_WT.numpy(), asked.cluster, {}, "nowhere")
    contexts = runner.trunk.contexts(4, WORDS)
    blocks = runner.trunk.meta_blocks
    span = job.build(blocks, contexts, CPU, torch.float32, recompute, run_block)
    batch = task.source.walk(runner, ids_WT)
    span.form(span.learned)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        accumulate(span, LossBatch(*batch), job.loss(runner.trunk), None, False)
    found, expected = counter.get_total_flops(), 4 * healing_flops(asked, dense, len(dense) - 1)
    if recompute:  # torch leaves out what comes after a block's last saved tensor
        assert 0.9 * expected < found < expected
    else:
        assert found == expected


def test_healing_of_large_models_fits_where_it_should(desk: Desk) -> None:
    """7B with low-rank updates on one GPU of 80 GB, 70B on eight of them with ZeRO 3; all weights
    of 70B on no eight of them. By the shapes of LLaMA-2's tensors."""
    cluster = {"micro_batch": 1, "recompute_activations": True, "zero_stage": 3}
    heal = {"train": "lora", "rank": 64, "batch": 8, "held_out": 8}
    calibration = {"data": "text", "windows": 8, "length": 2048}
    for shape, workers, train, fits in (
        (SHAPES["llama2-7b"], 1, "lora", True),
        (SHAPES["llama2-70b"], 8, "lora", True),
        (SHAPES["llama2-70b"], 1, "lora", False),
        (SHAPES["llama2-70b"], 8, "all", False),
    ):
        asked = recipe(
            desk,
            heal=heal | {"train": train},
            cluster=cluster | {"workers": workers},
            calibration=calibration,
            fusion={"batch": 8},
        )
        dense = empty_stack(shape, 2048, torch.bfloat16)
        needed = healing_bytes(asked, dense, torch.bfloat16, len(dense) * 3 // 4)
        assert (needed < 80e9) == fits, (shape, workers, needed)


def test_a_model_without_attention_keeps_no_keys_and_values() -> None:
    config = FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50).to_dict()
    stack = Stack(config, "", {}, ())
    assert attention_heads(stack) == (0, 0)
    assert generating_bytes(stack, torch.float32, LENGTH) == 0  # nothing but weights, and none here
