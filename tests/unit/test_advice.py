"""What a run that ended early leaves, and what it says of going on: only what is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from stopped_runs import BeforeItsSecondModel, Watching, contents, recipe, run_folder, stopped

from fusegpt_ray.cli import main
from fusegpt_ray.errors import GOES_ON, UserError
from fusegpt_ray.pipeline import compress

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


class Failing(Watching):
    """Fails, as our own bug or a lost node would, where a stage begins."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.failing = stage

    def stage(self, text: str, total: int | None = None) -> None:
        super().stage(text, total)
        if text.startswith(self.failing):
            raise RuntimeError("something broke")


def failed(stage: str, desk: Desk, monkeypatch: Patch, capsys: Capture) -> str:
    """What the command says that fails where this stage begins."""
    with monkeypatch.context() as patch:
        patch.setattr("fusegpt_ray.pipeline.Display", lambda: Failing(stage))
        assert main(["compress", desk.write()]) == 1
    return capsys.readouterr().err


NOTHING_SAVED = ["checking the model's files", "comparing with", "round 1/2: scoring"]


@pytest.mark.parametrize("stage", NOTHING_SAVED)
def test_a_run_that_saved_nothing_leaves_nothing_and_promises_nothing(
    stage: str, desk: Desk, monkeypatch: Patch, capsys: Capture
) -> None:
    before = contents(desk.folder)
    err = failed(stage, desk, monkeypatch, capsys)
    assert "failed: RuntimeError: something broke" in err and "goes on" not in err
    assert not desk.out.exists()
    assert {*contents(desk.folder)} == {*before, "recipe.yaml"}


def test_ctrl_c_before_anything_is_saved(desk: Desk, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr("fusegpt_ray.pipeline.Display", lambda: Watching(stop=1))
    assert main(["compress", desk.write()]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert not desk.out.exists()


@pytest.mark.parametrize("stage", ["round 1: fusing", "round 2/2: scoring"])
def test_what_is_saved_is_told(stage: str, desk: Desk, monkeypatch: Patch, capsys: Capture) -> None:
    assert failed(stage, desk, monkeypatch, capsys).splitlines()[-1] == GOES_ON
    assert main(["compress", desk.write()]) == 0


def test_another_recipe_may_follow(desk: Desk, monkeypatch: Patch, capsys: Capture) -> None:
    """Not even scores that were noted are in its way."""
    failed("round 1: fusing", desk, monkeypatch, capsys)
    assert (run_folder(desk) / "scores-001.json").exists()
    show = Watching()
    compress(recipe(desk, seed=1, sparsity=0.2), show)
    assert any("of another recipe had finished no round" in line for line in show.said)
    assert not run_folder(desk).exists()


KILLED = """
import os, signal, sys
from stopped_runs import Watching
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe

class Dying(Watching):
    def round_begins(self, number, rounds, blocks):
        os.kill(os.getpid(), signal.SIGKILL)

compress(Recipe.load(sys.argv[1]), Dying())
"""


def test_another_recipe_may_follow_one_that_was_killed_before_its_first_round(desk: Desk) -> None:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, [tests / "unit", tests, tests.parent]))
    command = [sys.executable, "-c", KILLED, desk.write()]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode == -9
    assert (run_folder(desk) / "identity.json").exists()
    compress(recipe(desk, seed=1, sparsity=0.2), Watching())
    assert {path.name for path in desk.out.iterdir()} == {"demo-p20"}


def test_restart_is_named_and_removes_only_the_runs_own(desk: Desk, capsys: Capture) -> None:
    stopped(desk)
    (run_folder(desk) / "my notes.txt").write_text("somebody else's")
    changed = ["compress", desk.write(seed=1, method="mi")]
    before = contents(desk.out)
    assert main(changed) == 2
    err = capsys.readouterr().err
    assert "or --restart, which forgets it" in err and "goes on" not in err
    assert contents(desk.out) == before
    assert main([*changed, "--restart"]) == 0
    left = contents(run_folder(desk))
    assert left == {"my notes.txt": b"somebody else's"}


def test_a_text_that_changed_is_refused_before_anything_is_written(desk: Desk) -> None:
    stopped(desk)
    text = desk.folder / "calibration.txt"
    text.write_text("w5 " + text.read_text())
    before = contents(desk.folder)
    with pytest.raises(UserError, match=r"windows_sha256 .* or --restart, which forgets it"):
        compress(recipe(desk), Watching())
    assert contents(desk.folder) == before


def test_a_finished_model_is_named_where_restart_alone_is_no_way_out(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), BeforeItsSecondModel())
    with pytest.raises(UserError, match=r"--restart, .* \(once .*demo-p20 is moved or removed\)"):
        compress(recipe(desk, seed=1), Watching())


def test_a_loss_that_is_not_finite(desk: Desk, monkeypatch: Patch, capsys: Capture) -> None:
    from fusegpt_ray.training import finetune

    train, calls = finetune.train_and_save, list[int]()

    def second_fails(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise FloatingPointError("the training loss became nan in epoch 1")
        return train(*arguments)

    monkeypatch.setattr(finetune, "train_and_save", second_fails)
    assert main(["compress", desk.write()]) == 1
    told = "another recipe begins anew with --restart, which forgets them"
    assert capsys.readouterr().err.splitlines()[-1] == told
