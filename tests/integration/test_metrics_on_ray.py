"""A run's numbers, as Prometheus reads them from a node of Ray."""

from __future__ import annotations

import re
import time
from urllib.request import urlopen

import pytest
import ray

from fusegpt_ray.distributed.monitor import listener

pytestmark = pytest.mark.integration

EVENTS = (
    ("scores", {"scores": {"3": 0.25}, "lowest": 3, "block_forwards": {"done": 52}}),
    ("scores", {"scores": {"2": 0.5}, "lowest": 2, "block_forwards": {"done": 30}}),
    ("part", {"model": "demo-p20", "loss": 0.5, "held_out": 0.75, "tokens_per_second": 100.0}),
    ("perplexity", {"perplexity": {"wiki": {"dense": 7.5}}}),
    ("round", {"round": 2, "removed": 2, "bytes_written": 7, "seconds": {"score": 0}}),
    ("healed", {"bytes_written": 3, "seconds": {"heal": 1.5}}),
    ("published", {"bytes": 11, "seconds": 0.5, "retries": 2}),
)
SPENT = {"hours": 0.5, "gpu_hours": 4.0, "money": 12.0}


TOLD = {
    "ray_fusegpt_round": 2,
    "ray_fusegpt_removed_block": 2,
    "ray_fusegpt_lowest_score": 0.5,
    "ray_fusegpt_block_forwards_total": 82,
    "ray_fusegpt_loss/demo-p20": 0.5,
    "ray_fusegpt_held_out_loss/demo-p20": 0.75,
    "ray_fusegpt_tokens_per_second/demo-p20": 100,
    "ray_fusegpt_perplexity/wiki/dense": 7.5,
    "ray_fusegpt_stage_seconds_total/heal": 1.5,
    "ray_fusegpt_stage_seconds_total/publish": 0.5,
    "ray_fusegpt_bytes_read_total/score": 20,
    "ray_fusegpt_bytes_read_total/round": 5,
    "ray_fusegpt_bytes_read_total/heal": 5,
    "ray_fusegpt_bytes_read_total/publish": 11,
    "ray_fusegpt_bytes_written_total/round": 7,
    "ray_fusegpt_bytes_written_total/heal": 3,
    "ray_fusegpt_bytes_written_total/publish": 11,
    "ray_fusegpt_retries_total/round": 1,
    "ray_fusegpt_retries_total/publish": 2,
    "ray_fusegpt_spent_hours": 0.5,
    "ray_fusegpt_spent_gpu_hours": 4,
    "ray_fusegpt_spent_money": 12,
}


def exported(port: int, run: str) -> dict[str, float]:
    """What a node tells of a run: the name, with the labels that are ours → the value."""
    text = urlopen(f"http://127.0.0.1:{port}", timeout=10).read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_fusegpt_\w+){(.*)} (\S+)$", text, re.MULTILINE):
        known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if known["run"] == run:
            ours = (known[key] for key in ("of", "text", "stage") if key in known)
            found["/".join([name, *ours])] = float(value)
    return found


def test_prometheus_is_told_each_number_by_its_name(ray_session: None) -> None:
    hear = listener("demo")
    for event, values in EVENTS:
        hear(event, {"bytes_read": 10, "states_bytes_read": 5, "retries": 1, **values})
    hear("spent", SPENT)
    port, end = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + 120
    found: dict[str, float] = {}
    while found != TOLD and time.monotonic() < end:
        time.sleep(1)
        found = exported(port, "demo")
    assert found == TOLD
