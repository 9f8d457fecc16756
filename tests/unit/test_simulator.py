"""The simulator of `benchmarks/`: it counts what is really done, more GPUs never hurt, and what cannot be divided stays."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import simulator
import torch
from models import open_stack, token_windows

from fusegpt_ray.importance.search import search
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.sections import Importance


def test_it_needs_neither_torch_nor_ray() -> None:
    folder = Path(simulator.__file__).parent
    code = "import sys, simulator; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    paths = os.pathsep.join([str(folder), str(folder.parent)])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=True)


def test_it_counts_what_scoring_really_does(checkpoint) -> None:
    stack, windows_WT = open_stack(checkpoint("llama")), token_windows(10, 9)
    runner = Runner(stack, torch.device("cpu"), torch.float32, 4, "resident")
    parts = windows_WT.split(4)
    table_WN = torch.cat(sweep(runner, stack, [Part(part, tuple(range(len(stack)))) for part in parts])).numpy()
    done, apply = 0, runner.apply

    def counting(module, dense: int, h_BTD: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += len(h_BTD)
        return apply(module, dense, h_BTD)

    runner.apply = counting  # type: ignore[method-assign]

    def measure(jobs):
        return [found.numpy() for found in sweep(runner, stack, [Part(parts[batch], positions) for batch, positions in jobs])]

    ranking = search(measure, stack.kept, list(map(len, parts)), 9, Importance(windows=10, batch=4))
    budget = simulator.Budget(score_windows=10, batch=4, length=9)
    found = simulator.score(table_WN, stack.kept, budget, 1, simulator.Rates(block=0.5, tune_window=0))
    assert found.ranking == ranking
    assert found.done == found.busiest == ranking.cost.done == done
    assert found.seconds == pytest.approx(0.5 * done)


def test_more_replicas_find_the_same_and_pay_with_walks_of_the_full_model() -> None:
    table_WN, budget = simulator.synthetic_table(16, 32, 8), simulator.Budget(length=8)
    rates = simulator.Rates(block=1, tune_window=0)
    one, *others = (simulator.score(table_WN, range(16), budget, replicas, rates) for replicas in (1, 2, 8, 64))
    for found in others:
        assert found.ranking == one.ranking
        assert (found.done - one.done) % 16 == 0
    assert one.seconds > others[0].seconds > others[1].seconds > others[2].seconds == others[2].busiest


@pytest.mark.parametrize(
    ("seconds", "replicas", "how", "expected"),
    [
        ([3, 2, 2, 1], 1, {}, (8, 0, [0])),
        ([3, 2, 2, 1], 2, {}, (4, 0, [0, 0])),
        ([3, 2, 2, 1], 2, {"busy": [0, 5]}, (7, 0, [0, 0])),  # the second one comes for the last: 5 + 1 < 7
        ([8, 8], 2, {"speeds": [0.25]}, (24, 1, [8, 0])),  # due after 16 s, done again from then on; the slow one would end at 32
        ([4, 4], 2, {"speeds": [0]}, (12, 1, [math.inf, 0])),
        ([1, 1], 2, {"speeds": [0]}, (6, 1, [math.inf, 0])),  # not before five seconds
        ([1, 1], 2, {"speeds": [0.5]}, (2, 0, [0, 0])),
    ],
)
def test_the_queue(seconds: list[float], replicas: int, how: dict, expected: tuple) -> None:
    assert simulator.queue(seconds, replicas, **how) == expected


@pytest.fixture(scope="module")
def seven() -> dict[int, dict[str, float]]:
    return simulator.predictions(["llama2-7b"], simulator.Budget(), simulator.Machine(), {})["llama2-7b"]["seconds"]


def test_more_gpus_never_take_longer(seven: dict) -> None:
    totals = [sum(seven[gpus].values()) for gpus in simulator.GPUS]
    assert all(more <= few * 1.001 for few, more in pairwise(totals))
    for phase in ("score", "states", "finetune"):
        assert seven[256][phase] < seven[1][phase]


def test_amdahl(seven: dict) -> None:
    """Workers divide a loss batch of 8; what starts and ends a run is not divided at all."""
    assert seven[256]["finetune"] == seven[8]["finetune"] > seven[1]["finetune"] / 8
    assert seven[4]["finetune"] > seven[8]["finetune"]
    assert seven[256]["fixed"] == seven[1]["fixed"]
    limit = sum(seven[1].values()) / (seven[8]["finetune"] + seven[1]["fixed"])
    assert 0.98 * limit < sum(seven[1].values()) / sum(seven[256].values()) < limit
    assert [simulator.workers_of(n, simulator.Budget()) for n in (1, 3, 7, 8, 100)] == [1, 2, 4, 8, 8]


def test_a_run_by_hand() -> None:
    """A fifth of five blocks: all are the group, the dense teacher is walked to its end."""
    shape = simulator.Shape(5, 8, 16, 2, 2, 11)
    budget = simulator.Budget(score_windows=2, batch=2, windows=16, length=4, epochs=3, sparsity=0.2, group=4)
    rates = simulator.Rates(block=1, tune_window=10, tune_step=1, train=100, group=1000, replica=3, once=50)
    table_WN = np.array([[5.0, 4, 3, 2, 1]] * 2)
    phases = simulator.run(shape, budget, 1, rates, table_WN=table_WN)
    assert phases == {"score": 2 * 15, "states": 16 * 5, "finetune": 3 * 2 * (8 * 10 + 1), "fixed": 3 + 100 + 1000 + 50}


def test_rates_measured_on_a_gpu() -> None:
    budget = simulator.Budget()
    row = {"score": {"seconds": 36.0}, "states": {"seconds": 10.0}, "finetune": {"build": 2.0, "tokens": 20000.0}, "resident": True}
    rates = simulator.gpu_rates(simulator.SHAPES["toy"], budget, simulator.Machine(), row)
    assert rates.block == pytest.approx(36 / 32 / 36)  # 32 windows, 8 · 9 / 2 block-forwards
    assert 8 * rates.tune_window + rates.tune_step == pytest.approx(8 * 2048 / 20000)
    assert (rates.group, rates.keeps) == (2.0, True)


def test_streamed_weights_are_read_for_every_walk() -> None:
    table_WN, budget = simulator.synthetic_table(8, 32, 8), simulator.Budget(length=8)
    rates = simulator.Rates(block=1e-6, tune_window=0, read=2.0, keeps=False)
    one = simulator.score(table_WN, range(8), budget, 1, rates)
    assert one.seconds == pytest.approx(one.waves * 16, rel=1e-3)
    crowded = simulator.score(table_WN, range(8), budget, 1, rates._replace(held=1))  # a batch at a time
    assert crowded.seconds > one.seconds


def test_the_table_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert simulator.main(["--shape", "toy", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| toy |") for line in lines) == 9
    assert "peak tflops 989" in "\n".join(lines)
    assert set(json.loads(out.read_text())["shapes"]["toy"]["seconds"]) == {str(gpus) for gpus in simulator.GPUS}
