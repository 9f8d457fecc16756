"""Ctrl-C, as a terminal sends it to a process: it ends, says what is kept, and how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from desk import Desk
from models import save_tiny
from quiz import Quiz
from words import add_tokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.measuring import harness

GENEROUS = 120
"""Seconds for what takes a few, on a machine that does other things as well."""
pytestmark = pytest.mark.timeout(3 * GENEROUS)


COMMAND = """
import signal, sys
from fusegpt_ray.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
"""As from a terminal: what a shell starts behind `&` ignores Ctrl-C, and so would these tests."""


def started(desk: Desk, verb: str, file: str, until: Path) -> subprocess.Popen[str]:
    """A process at work, which has come so far that a file is there."""
    command = [sys.executable, "-c", COMMAND, verb, file]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=desk.folder, env=environment, **pipes)
    end = time.monotonic() + GENEROUS
    while not until.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail("".join(process.communicate()))
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("verb", ["compare", "family"])
def test_a_process_ends_and_says_what_is_kept(verb: str, desk: Desk) -> None:
    """While the second of two runs trains for hours, of which its scores are saved."""
    fusion = desk.recipe()["fusion"] | {"epochs": 1_000_000}
    methods = ["last", {"name": "long", "method": "fusegpt", "fusion": fusion}]
    section: dict[str, object] = {"methods": methods, "sparsities": [0.4]}
    if verb == "family":
        section["members"] = [{"name": "one"}]
    held_out = {"heldout": {"data": str(desk.heldout)}}
    data = desk.recipe(evaluation=held_out) | {verb: section}
    name = "demo-one-long" if verb == "family" else "demo-long"
    file = desk.write(**data)
    process = started(desk, verb, file, desk.out / f"{name}.run" / "scores-001.json")
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=GENEROUS)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    what = "runs" if verb == "family" else "cells"
    assert stderr.splitlines()[-1] == (
        "stopped; the same command goes on from what is saved; "
        f"1 of 2 {what} are finished and stay so; the same command goes on with the others"
    )


@pytest.mark.parametrize("cache", [(), ("--cache", "kept")])
def test_ctrl_c_tells_what_is_kept(
    cache: tuple[str, ...],
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The user presses it while the second model is measured."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", desk.folder / "datasets")
    Quiz.make(desk.folder / "tasks")
    add_tokenizer(save_tiny("qwen3", desk.folder / "other"))
    whole, measured = harness.Suite.measure, list[str]()

    def measure(self: harness.Suite, name: str, model: Any) -> dict[str, Any]:
        measured.append(name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(self, name, model)

    monkeypatch.setattr(harness.Suite, "measure", measure)
    capsys.readouterr()
    command = ["tasks", "model", "other", "--tasks", "quiz", "--tasks-folder", "tasks", *cache]
    assert main([*command, "--quiet"]) == 130
    told = "nothing is kept without --cache"
    if cache:
        told = f"what was measured is in {desk.folder}/kept; the same command goes on with the rest"
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; {told}"
    assert (desk.folder / "kept").exists() == bool(cache)
