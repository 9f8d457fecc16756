"""Fine-tuning whose memory ran out, and that is stopped, goes on with as few windows at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (  # noqa: F401 - fixtures
    BATCH,
    EPOCHS,
    WHOLE,
    Bench,
    Stopped,
    _bench,
    _undisturbed,
    result,
)

from fusegpt_ray.training.stepper import TorchStepper


@pytest.fixture
def cramped(bench: Bench, tmp_path: Path) -> Any:
    """A run whose memory is too small from its second epoch on, and that nobody disturbs."""
    there = replace(bench, folder=str(tmp_path / "cramped"), fits=2, until=WHOLE + 1)
    found = result(there.tune())
    assert there.heard == [1, 1, 2, 3, 4]
    assert found[2] == 2
    return found


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_took_fewer_windows_goes_on_with_as_few(
    after: int, bench: Bench, cramped: Any, undisturbed: Any
) -> None:
    assert cramped[0] != undisturbed[0]
    bench.fits = 2
    bench.stopped(after)
    bench.fits = (
        BATCH  # now there would be room, but the run is to end as if it had not been stopped
    )
    assert result(bench.tune()) == cramped
    assert bench.heard == [*range(after + 1, EPOCHS + 1)]
    assert set(bench.steps) == {2}


def test_that_memory_ran_out_is_known_before_the_first_checkpoint(
    bench: Bench, cramped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the attempt with more windows does not count, nor are they tried again."""
    bench.fits, bench.until = 2, WHOLE + 1
    calls = []

    def dies(stepper: TorchStepper, batch: Any) -> torch.Tensor:
        calls.append(stepper.micro_batch)
        if stepper.micro_batch == 2:
            raise Stopped
        return step(stepper, batch)

    step = TorchStepper.step
    monkeypatch.setattr(TorchStepper, "step", dies)
    with pytest.raises(Stopped):
        bench.tune()
    assert calls == [BATCH] * bench.until + [2]
    monkeypatch.undo()
    bench.fits = BATCH
    assert result(bench.tune()) == cramped
    assert bench.heard == [1, 2, 3, 4]
    assert set(bench.steps) == {2}
