"""What a training worker holds of all that learns is what `plan` and the warnings count."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Literal

import pytest
import torch
from groups import process_group
from torch import nn
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.cost.footprint import values_held
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.training.deepspeed_stepper import deepspeed_config
from fusegpt_ray.training.optimizer import make_optimizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LAYERS, WIDTH = 20, 1000
VALUES = LAYERS * WIDTH**2
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells the peak of a while")
@pytest.mark.parametrize("stage", [1, 0, 2, 3])  # the usual one first: it is always tried
def test_a_backward_pass_holds_what_is_counted(
    stage: Literal[0, 1, 2, 3], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is let go is given back at once
    spawn(measure, (stage, tmp_path), nprocs=1)
    found = int((tmp_path / "peak").read_text()) / 4 / VALUES
    counted = values_held(Cluster(workers=1, zero_stage=stage), VALUES) / VALUES
    assert found == pytest.approx(counted, rel=0.03)


def measure(rank: int, stage: int, out: Path) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with process_group(rank, 1, out):
        peak(stage, 10)  # what is made once does not count
        (out / "peak").write_text(str(peak(stage, WIDTH)))


def peak(stage: int, width: int) -> int:
    """The bytes that a backward pass takes after the first step, which makes Adam's moments."""
    import deepspeed

    gc.collect()
    before = memory("VmRSS")
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS)])
    optimizer = make_optimizer([{"params": [*model.parameters()], "lr": 1e-3}], (0.9, 0.95), 1e-8)
    config = deepspeed_config(1, stage, LAYERS * width**2, bf16=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(2):
        RESET.write_text("5")
        engine.backward(engine(torch.randn(1, width)).square().mean())
        held = memory("VmHWM") - before
        engine.step()
    engine.destroy()
    return held


def memory(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
