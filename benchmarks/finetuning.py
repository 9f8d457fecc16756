"""Fine-tuning one group: our loop beside plain loops written here without the package, the same
loss curve from all of them.

    python benchmarks/finetuning.py MODEL --data valid.txt [--donors 3 8 12] [--epochs 5]

- **ours**: `GroupFusion`, `TorchStepper`, `train`; the states entering the group and the
  teacher's are computed once a group;
- **plain**: the simplest loop that computes the same: W + B·A + (C·D) ⊙ W_p by plain operators in
  every forward pass, softmax and kl_div, Adam and CosineAnnealingLR; states computed once, as the
  paper's public code does;
- **plain, collecting**: with `gc.collect()` after every step, as the paper's public code does;
- **ours, compiled**: the student under `torch.compile` (with `--compile`; the first turn is slow);
- **plain, states anew**: with the states entering the group and the teacher's computed again for
  every batch of every epoch.

All start from the same coefficients, in float32, with the paper's loss, teacher and rates, and take
turns epoch by epoch. Ratios are taken within a turn; medians are shown. Wall seconds are noisy
where others use the machine too, CPU seconds less so. "20 epochs" counts the states too: once for
those that compute them once. Loss: the largest relative difference from ours in any epoch.

Then the FLOPs of one step's matrix products (torch's own counter; attention is not in it): "all ÷
student" is what computing the states once can win at most. And where our step's time goes, by
operator (torch.profiler).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from plain import adam, blocks_forward, knowledge_loss, plain_group
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusegpt_ray import Recipe
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.source import Source
from fusegpt_ray.text import calibration
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

Epoch = Callable[[], float]
"""Trains for one epoch; returns its mean loss."""
HEADER = """| donor | way | tokens/s | CPU s an epoch | ÷ ours: wall | CPU | CPU with the states, 20 epochs | loss differs by |
|---|---|---|---|---|---|---|---|"""  # noqa: E501 - a table
BUDGET = 20
"""Epochs a group, in the paper."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a LLaMA: the plain loops know no other architecture")
    parser.add_argument("--data", required=True)
    help = "blocks to fuse away, one group each"
    parser.add_argument("--donors", type=int, nargs="+", default=[3, 8, 12], help=help)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128, help="of both low-rank terms")
    parser.add_argument(
        "--epochs", type=int, default=5, help="turns; the first one warms up and is not counted"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args()

    results: dict[str, Any] = {
        "arguments": vars(arguments),
        "threads": torch.get_num_threads(),
        "groups": {},
    }
    print(HEADER)
    for donor in arguments.donors:
        group = Group(arguments, donor)
        rows = group.measure(arguments.epochs)
        for name, row in rows.items():
            keys = ("wall_ratio", "cpu_ratio", "budget_ratio")
            ratios = " | ".join(f"{row[key]:.2f}" for key in keys)
            print(
                f"| {donor} | {name} | {row['tokens']:.0f} | {row['cpu']:.2f} | {ratios} |"
                f" {row['loss']:.1e} |",
                flush=True,
            )
        results["groups"][donor] = {
            "rows": rows,
            "flops": group.flops(),
            "profile": group.profile(),
        }
    _print_tables(results["groups"], arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _print_tables(groups: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.compile:
        print("\n| donor | CPU seconds of the first turn: ours | ours, compiled |\n|---|---|---|")
        for donor, result in groups.items():
            print(
                f"| {donor} | "
                + " | ".join(
                    f"{result['rows'][way]['turns'][0][1]:.1f}"
                    for way in ("ours", "ours, compiled")
                )
                + " |"
            )
    print(
        "\n| donor | GFLOPs a step: student | teacher | blocks before the group | all ÷ student |"
    )
    print("|---|---|---|---|---|")
    for donor, result in groups.items():
        student, teacher, before = (
            result["flops"][key] / 1e9 for key in ("student", "teacher", "before")
        )
        print(
            f"| {donor} | {student:.1f} | {teacher:.1f} | {before:.1f} |"
            f" {(student + teacher + before) / student:.2f} |"
        )
    print("\n| operator of our step | share of CPU time | calls |")
    print("|---|---|---|")
    for row in groups[arguments.donors[0]]["profile"]:
        print(f"| {row['operator']} | {row['share']:.1%} | {row['calls']} |")


class Group:
    """One group of a model and the ways to fine-tune it."""

    def __init__(self, arguments: argparse.Namespace, donor: int) -> None:
        recipe = Recipe.parse(
            {
                "model": {"source": arguments.model, "dtype": "float32"},
                "calibration": {
                    "data": arguments.data,
                    "windows": arguments.windows,
                    "length": arguments.length,
                    "bos": "never",  # as the paper
                },
                "importance": {"windows": min(32, arguments.windows)},
                "preset": "paper",
                "fusion": dict.fromkeys(("rank", "lora_rank"), arguments.rank),
                "cluster": {"engine": "local"},
                "output": {"uri": tempfile.gettempdir(), "name": "none"},  # nothing is written
            }
        )
        source = Source.find(arguments.model, None)
        self.engine = LocalWorkers(Setup.of(recipe, source, source.stack()))
        text, self.settings = recipe.calibration, recipe.fusion
        stream = self.engine.tokens(text, "data")
        self.windows_WT = torch.from_numpy(
            calibration.sample_windows(stream, text.windows, text.length, text.seed, "data")
        )
        dense = self.engine.setup.dense
        self.job = GroupFusion(dense, dense, donor, self.settings, True, 0, "unused")
        self.steps = BUDGET * text.windows // self.settings.batch
        self.compile: bool = arguments.compile
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32
        ).eval()

    def measure(self, epochs: int) -> dict[str, dict[str, Any]]:
        """Every way's seconds, ratios to ours and losses."""
        self.states()  # warming up
        states_cpu = time.process_time()
        entering_WTD, leaving_WTD = self.states()
        states_cpu = time.process_time() - states_cpu
        ways: dict[str, tuple[Epoch, bool]] = {
            "ours": (self.ours(entering_WTD, leaving_WTD), True),
            **(
                {"ours, compiled": (self.ours(entering_WTD, leaving_WTD, compiled=True), True)}
                if self.compile
                else {}
            ),
            "plain": (self.plain(entering_WTD, leaving_WTD), True),
            "plain, collecting": (self.plain(entering_WTD, leaving_WTD, collect=True), True),
            "plain, states anew": (self.plain(None, None), False),
        }
        walls: dict[str, list[float]] = {name: [] for name in ways}
        cpus: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(epochs):
            for name, (way, _) in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                losses[name].append(way())
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
            print(
                f"turn {turn}: "
                + ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in walls.items()),
                file=sys.stderr,
            )

        def ratio(seconds: dict[str, list[float]], name: str) -> float:
            return statistics.median(
                other / own
                for other, own in zip(seconds[name][1:], seconds["ours"][1:], strict=True)
            )

        rows = {}
        budget = {
            name: BUDGET * statistics.median(cpus[name][1:]) + once * states_cpu
            for name, (_, once) in ways.items()
        }
        for name in ways:
            pairs = zip(losses[name], losses["ours"], strict=True)
            rows[name] = {
                "tokens": self.windows_WT.numel() / statistics.median(walls[name][1:]),
                "cpu": statistics.median(cpus[name][1:]),
                "wall_ratio": ratio(walls, name),
                "cpu_ratio": ratio(cpus, name),
                "budget_ratio": budget[name] / budget["ours"],
                "loss": max(abs(loss / own - 1) for loss, own in pairs),
                "losses": losses[name],
                "turns": list(zip(walls[name], cpus[name], strict=True)),
            }
        return rows

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.job.source.walk(self.engine.runner, self.windows_WT)

    def student(self, compiled: bool = False) -> Span:
        trunk, settings = self.engine.runner.trunk, self.settings
        contexts = trunk.contexts(settings.batch, self.windows_WT.shape[1])
        cpu, run = torch.device("cpu"), block_function(compiled)
        return self.job.build(trunk.meta_blocks, contexts, cpu, torch.float32, run=run)

    def ours(
        self, entering_WTD: torch.Tensor, leaving_WTD: torch.Tensor, compiled: bool = False
    ) -> Epoch:
        student = self.student(compiled)
        config = TrainingConfig(self.settings.loss, self.settings.batch, 1)
        groups, cpu = self.job.parameter_groups(student), torch.device("cpu")
        stepper = TorchStepper.make(student, groups, config, self.steps, cpu)
        size = self.settings.batch

        def epoch() -> float:
            return train(
                stepper,
                lambda _: States(entering_WTD, leaving_WTD).batches(size),
                1,
                lambda *_: None,
            )[0]

        return epoch

    def plain(
        self,
        entering_WTD: torch.Tensor | None,
        leaving_WTD: torch.Tensor | None,
        collect: bool = False,
    ) -> Epoch:
        """A plain loop on these states, or on states computed for every batch."""
        student, settings, base = self.plain_student(), self.settings, self.model.model
        optimizer, schedule = adam(student, self.steps)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            if entering_WTD is not None and leaving_WTD is not None:
                yield from zip(
                    entering_WTD.split(settings.batch),
                    leaving_WTD.split(settings.batch),
                    strict=True,
                )
            else:
                yield from map(self.plain_states, self.windows_WT.split(settings.batch))

        def epoch() -> float:
            losses: list[float] = []
            for entering_BTD, leaving_BTD in batches():
                optimizer.zero_grad()
                loss = knowledge_loss(blocks_forward(base, student, entering_BTD), leaving_BTD)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if collect:
                    gc.collect()
            return statistics.mean(losses)

        return epoch

    @torch.no_grad()
    def plain_states(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states entering the group and the teacher's leaving it, by the model's own blocks."""
        base, span = self.model.model, self.job.span
        entering_BTD = blocks_forward(base, base.layers[: span.start], base.embed_tokens(ids_BT))
        return entering_BTD, blocks_forward(base, base.layers[span.start : span.stop], entering_BTD)

    def plain_student(self) -> nn.ModuleList:
        """The group's blocks by transformers; their coefficients start as ours do."""
        layers = self.model.model.layers
        neighbours = [layers[neighbour.dense] for neighbour in self.job.neighbours]
        starts = self.student().learned.blocks
        return plain_group(neighbours, layers[self.job.donor], starts, self.settings.rank)

    def flops(self) -> dict[str, int]:
        """Of one step's matrix products: student forward and backward, teacher forward, the
        blocks before the group.
        """
        base, span, student = self.model.model, self.job.span, self.student()
        ids_BT = self.windows_WT[: self.settings.batch]
        found = {}
        with FlopCounterMode(display=False) as count, torch.no_grad():
            entering_BTD = blocks_forward(
                base, base.layers[: span.start], base.embed_tokens(ids_BT)
            )
        found["before"] = count.get_total_flops()
        with FlopCounterMode(display=False) as count, torch.no_grad():
            blocks_forward(base, base.layers[span.start : span.stop], entering_BTD)
        found["teacher"] = count.get_total_flops()
        with FlopCounterMode(display=False) as count:
            student.form(student.learned)
            student(entering_BTD).sum().backward()
            student.collect()
            student.root().backward()
        found["student"] = count.get_total_flops()
        return found

    def profile(self) -> list[dict[str, Any]]:
        """The operators that take most of the CPU time of one of our epochs."""
        epoch = self.ours(*self.states())
        epoch()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            epoch()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = math.fsum(event.self_cpu_time_total for event in events)
        return [
            {"operator": e.key, "share": e.self_cpu_time_total / total, "calls": e.count}
            for e in events[:12]
        ]


if __name__ == "__main__":
    sys.exit(main())
