"""Planned bytes of weights are the most that a run reads: of all stages together, by all that is
read of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from desk import Desk
from stopped_runs import Watching, recipe
from test_healed_runs import HEAL
from torch import nn

from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.model.stack import Block
from fusegpt_ray.model.weights import Weights, stored_bytes
from fusegpt_ray.pipeline import compress, open_workers
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.store import writer
from fusegpt_ray.store.writer import Entry
from fusegpt_ray.workers.room import Allocation


@pytest.mark.parametrize("weights", ["streamed", "resident"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "last", "heal": HEAL},
        {"method": "mi"},
        {"fusion": {"start": "linear"}},
        {"method": "last", "output": {"samples": ["w5 w6", "w7"]}},
        {"method": "last", "calibration": {"data": [{"generate": True}]}},
    ],
    ids=["healed", "mi", "repaired", "samples", "generated"],
)
def test_a_run_reads_no_more_than_was_planned(
    weights: str, changes: dict[str, Any], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not much less: with two texts, most of it is measuring."""
    read: list[int] = []
    whole = Weights._read

    def counted(self: Weights, block: Block) -> nn.Module:
        read.append(stored_bytes([block]))
        return whole(self, block)

    monkeypatch.setattr(Weights, "_read", counted)
    sections: dict[str, Any] = {}
    for key, value in changes.items():
        both = isinstance(value, dict) and key in desk.recipe()
        sections[key] = desk.recipe()[key] | value if both else value
    held_out = {name: {"data": str(desk.heldout), "windows": 4} for name in ("one", "two")}
    cluster = {"engine": "local", "weights": weights}
    asked = recipe(desk, evaluation=held_out, cluster=cluster, **sections)
    show = Watching()
    planned = plan(asked, show)
    with open_workers(planned.setup, show) as workers:
        held = Allocation(workers.replicas, workers.training_workers, 0)
        rows = planned.traffic_of(planned.targets, held, workers.streams)
        Compression.begin(planned, workers, show).publish_all(False)
        assert workers.streams == (weights == "streamed")
    most = sum(row.read for row in rows if row.stage != "publishing")
    assert most / 4 < sum(read) <= most


@pytest.mark.parametrize(
    ("method", "fold"),
    [("fusegpt", "each_round"), ("fusegpt", "at_end"), ("mi+linear", "each_round")],
)
def test_rounds_write_no_more_than_was_planned(
    method: str, fold: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights, without the headers of files; also the layers that were repaired. And not much
    less.
    """
    headers: dict[str, int] = {}
    whole = writer._write_once

    def counted(file: str, entries: Sequence[Entry]) -> Any:
        record, refs = whole(file, entries)
        if "/blocks/round-" in file and "checkpoint" not in file:
            headers[file] = min(ref.begin for ref in refs.values())
        return record, refs

    monkeypatch.setattr(writer, "_write_once", counted)
    sections = {
        "calibration": desk.recipe()["calibration"] | {"windows": 12},
        "fusion": desk.recipe()["fusion"] | {"start": "linear", "fold": fold, "epochs": 1},
    }
    (model,) = compress(recipe(desk, method=method, sparsity=0.4, **sections), Watching())
    assert all(round["repair"]["block"] is not None for round in model.manifest["rounds"])
    written = model.manifest["moved"]["fine-tuning"]["written"] - sum(headers.values())
    rows = model.manifest["planned_bytes"]
    (most,) = [row["written"] for row in rows if row["stage"] == "fine-tuning"]
    assert most / 4 < written <= most
