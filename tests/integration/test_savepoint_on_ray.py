"""A Ray Train job whose workers are killed: what they had learned until their last savepoint is not learned again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from test_training import EPOCHS, TWO, fit, kill_a_worker

from fusegpt_ray.distributed import training

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]

KILLED = 4
"""The epoch at whose beginning a worker is killed."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every block file."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    assert len(found) == 6
    return found


def test_a_killed_worker_costs_the_epochs_since_the_last_savepoint(checkpoint, tmp_path) -> None:
    said: list[str] = []
    _, losses, _ = fit(checkpoint("llama"), tmp_path / "one")
    killer = kill_a_worker(tmp_path / "marks", epoch=KILLED)
    wrap = lambda data: data.map_batches(killer, batch_size=None)  # noqa: E731
    _, losses_again, heard = fit(checkpoint("llama"), tmp_path / "two", wrap, minutes=0, say=said.append)
    assert heard == [1, 2, 3, 4, 5]
    assert said == [f"  going on after epoch {KILLED - 1} of {EPOCHS}"]
    assert len(list((tmp_path / "marks").iterdir())) == EPOCHS + 1  # the data were read once for each epoch, and for the broken one
    assert losses_again == losses
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_a_run_that_was_given_up_goes_on(checkpoint, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody starts the workers again: the job fails, as if its driver had been killed, and the same is begun by another."""
    three, said = replace(TWO, zero_stage=3), list[str]()
    _, losses, _ = fit(checkpoint("llama"), tmp_path / "one", workers=three)
    killer = kill_a_worker(tmp_path / "marks", epoch=KILLED)
    wrap = lambda data: data.map_batches(killer, batch_size=None)  # noqa: E731
    monkeypatch.setattr(training, "MAX_FAILURES", 0)
    with pytest.raises(ray.train.TrainingFailedError):
        fit(checkpoint("llama"), tmp_path / "two", wrap, three, minutes=0)
    _, losses_again, heard = fit(checkpoint("llama"), tmp_path / "two", workers=three, minutes=1e6, say=said.append)
    assert (heard, losses_again) == ([4, 5], losses)
    assert said == [f"  going on after epoch {KILLED - 1} of {EPOCHS}"]
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
