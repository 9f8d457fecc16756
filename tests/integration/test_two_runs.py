"""Two runs of one name, in real processes: exactly one owns it, whoever is late or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from racing import assert_one_owner_each, race

from fusegpt_ray.cli import main
from fusegpt_ray.run import lease

pytestmark = pytest.mark.integration


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, s3, bucket: str, tmp_path: Path) -> str:
    """An output.uri."""
    return str(tmp_path / "out") if request.param == "local" else f"s3://{bucket}/out"


def test_of_racing_processes_exactly_one_owns_each_name(place: str) -> None:
    """50 times three, while other processes keep the machine busy."""
    assert_one_owner_each(race(place, 50, busy=1 if "://" in place else 3))


# --- a run that is stopped, so that its heartbeats come late ---

STOPPING = """
import os, signal, sys
from fusegpt_ray import pipeline
from fusegpt_ray.cli import main
from fusegpt_ray.terminal.display import Display

class Stopping(Display):
    def stop(self, text):
        if sys.argv[2] in text:
            print("stopped", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    def stage(self, text, total=None):
        super().stage(text, total)
        self.stop(text)

    def epoch(self, number, epochs, loss):
        super().epoch(number, epochs, loss)
        self.stop(self.doing)

pipeline.Display = Stopping
sys.exit(main(["compress", sys.argv[1]]))
"""
MOMENTS = [
    ("local", "evaluating the dense model"),
    ("local", "(epoch 1/3"),
    ("local", "publishing tiny-p12.5"),
    ("s3", "(epoch 1/3"),
    ("s3", "publishing tiny-p12.5"),
]
"""Where, and at what the run is: before its first record, in fine-tuning, in publishing."""


def everything(place: str, s3) -> dict[str, bytes]:
    """All files of the output."""
    if "://" in place:
        return s3.objects(place.split("/")[2])
    return {str(path): path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}


@pytest.mark.parametrize(("place", "moment"), MOMENTS, indirect=["place"])
def test_a_run_that_was_stopped_for_too_long_writes_nothing_more(
    moment: str,
    place: str,
    s3,
    material,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = material.recipe(place, sparsity=0.125)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", STOPPING, str(tmp_path / "recipe.yaml"), moment]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as late:
        assert late.stdout and late.stderr
        assert late.stdout.readline() == "stopped\n", late.stderr.read()
        while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        monkeypatch.setattr(lease, "EXPIRY", 1.0)
        assert main(["compress", str(tmp_path / "recipe.yaml")]) == 0
        assert f"(process {late.pid}, since " in capsys.readouterr().err
        before = everything(place, s3)
        late.send_signal(signal.SIGCONT)
        err = late.stderr.read()
    assert late.returncode == 2, err
    told = err[err.index("error: ") :]
    assert told.startswith("error: output.name = 'tiny': ")
    assert "tiny.run is gone: another run" in told
    assert "goes on" not in err and "Traceback" not in err
    assert everything(place, s3) == before
    assert not [name for name in before if ".run/" in name]
