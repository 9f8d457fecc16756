"""`fusegpt clean` where many dead runs lie side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from left_behind import Capture, aged, names
from test_clean import ALL, verdicts

from fusegpt_ray.run.journal import Journal
from fusegpt_ray.store import storage


def test_it_looks_at_each_dead_run_only_twice(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: not at all of them again before it removes one."""
    many, looked = 20, list[str]()
    for number in range(many):
        Journal(str(tmp_path / f"demo-{number:02d}.run")).begin({"a": 1})
        (tmp_path / f"demo-{number:02d}.tensorboard").mkdir()
        (tmp_path / f"demo-{number:02d}.tensorboard/events.out.tfevents.1").touch()
    aged(tmp_path)
    below = storage.below
    monkeypatch.setattr(storage, "below", lambda uri: (looked.append(uri), below(uri))[1])
    said = verdicts(tmp_path, *ALL, capsys=capsys)
    assert len(said) == many and {what.split()[0] for what in said.values()} == {"removed"}
    assert names(tmp_path) == {f"demo-{number:02d}.tensorboard" for number in range(many)}
    # Twice at a run and at its curves.
    assert len(looked) == 4 * many
