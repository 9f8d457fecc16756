"""The `fusegpt` command as a process of its own: what it imports, who else talks, and what a
wrong command line gets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from desk import LENGTH, Desk
from expected import assert_plain, macro_influence, perplexity, windows_of
from models import load_model

from fusegpt_ray.cli import VERBS, main

BEGINNING = [
    "starting the local engine",
    "tokenising",
    "comparing with what from_pretrained loads",
]


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, **options)


def test_a_process_of_its_own_with_relative_paths_and_without_ray(desk: Desk) -> None:
    text = desk.recipe()["calibration"] | {"data": "calibration.txt"}
    desk.write(calibration=text, model={"source": "model"}, output={"uri": "out", "name": "demo"})
    done = run(
        "-X",
        "importtime",
        "-m",
        "fusegpt_ray.cli",
        "score",
        "recipe.yaml",
        "--json",
        folder=desk.folder,
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    scores = [row["score"] for row in json.loads(done.stdout)["blocks"]]
    assert scores == pytest.approx(
        macro_influence(load_model(desk.model), windows_of(desk, 4)), rel=1e-4
    )
    imports, said = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    protocol = "4 windows of 12 tokens of calibration.txt, without a beginning-of-sequence token"
    assert said == [*BEGINNING, f"calibration: {protocol}", "scoring 5 blocks on 4 windows"]
    modules = {line.rpartition("|")[2].strip() for line in imports}
    assert "torch" in modules and not {"ray", "datasets", "s3fs"} & modules


def test_no_library_talks_beside_us(desk: Desk) -> None:
    """A local dataset, which `datasets` would prepare under a progress bar of its own."""
    (desk.folder / "texts").mkdir()
    (desk.folder / "texts/test.jsonl").write_text(json.dumps({"text": desk.heldout.read_text()}))
    command = ["evaluate", "model", "--data", "texts", "--length", str(LENGTH), "--json"]
    done = run("-m", "fusegpt_ray.cli", *command, folder=desk.folder)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(
        perplexity(load_model(desk.model), desk.heldout), rel=1e-5
    )
    assert_plain(done.stderr)
    said = [*BEGINNING, f"evaluating 5 windows of {LENGTH} tokens"]
    assert done.stderr.splitlines() == said


LIGHT = """
import sys
from fusegpt_ray.cli import VERBS, main
heavy = {"torch", "transformers", "ray", "deepspeed", "datasets", "s3fs", "numpy", "lm_eval"}
verbs = [verb.name for verbs in VERBS.values() for verb in verbs]
helps = (["--help"], *([verb, "--help"] for verb in verbs))
for command in (*helps, ["compress", "no.yaml"], ["pull", "no", "where"], ["status", "no"]):
    print("exit", main(command), *heavy & set(sys.modules))
"""


def test_help_and_a_wrong_recipe_need_no_heavy_imports(tmp_path: Path) -> None:
    done = run("-c", LIGHT, folder=tmp_path)
    helps = 1 + sum(map(len, VERBS.values()))
    exits = re.findall(r"^exit.*", done.stdout, re.MULTILINE)
    assert exits == ["exit 0"] * helps + ["exit 2"] * 3, done
    for word in (
        "compress",
        "score",
        "evaluate",
        "pull",
        "verify",
        "clean",
        "status",
        "RECIPE",
        "--set",
        "--json",
        "--data",
        "--length",
    ):
        assert word in done.stdout


def test_the_help_groups_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    places = [told.index(f"{title}:") for title in VERBS]
    assert places == sorted(places)
    for verbs, begin, end in zip(VERBS.values(), places, [*places[1:], len(told)], strict=True):
        for verb in verbs:
            assert re.search(rf"^  {verb.name} +[A-Z]", told[begin:end], re.MULTILINE)
    assert "..." not in told  # no sentence is cut


def test_a_shell_completes_verbs(tmp_path: Path) -> None:
    words = {"COMP_WORDS": "fusegpt sc", "COMP_CWORD": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_FUSEGPT_COMPLETE": "bash_complete", **words}.items():
            patch.setenv(name, value)
        done = run("-m", "fusegpt_ray.cli", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,score\n", "")


def test_what_stopped_a_command_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An end of file is an error of ours, and not Ctrl-C, for which click takes it."""
    raised: list[BaseException] = [KeyboardInterrupt(), EOFError("cut off")]

    def pull(*arguments: object) -> None:
        raise raised.pop(0)

    monkeypatch.setattr("fusegpt_ray.publishing.download.pull", pull)
    assert main(["pull", "model", str(tmp_path / "here")]) == 130
    stopped = capsys.readouterr()
    assert stopped == ("", "stopped; the same command goes on with what has arrived\n")
    assert main(["pull", "model", str(tmp_path / "here")]) == 1
    assert capsys.readouterr().err.endswith("failed: EOFError: cut off\n")


@pytest.mark.parametrize(
    "arguments", [("compress",), ("scor",), ("compress", "no.yaml")], ids=" ".join
)
def test_errors_are_red_on_a_terminal(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Those of a wrong command line like all others."""
    command = [sys.executable, "-m", "fusegpt_ray.cli", *arguments]
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = os.openpty()
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": theirs, "env": environment | variables}
        assert subprocess.run(command, cwd=tmp_path, timeout=120, **pipes).returncode == 2
        os.close(theirs)
        said = os.read(ours, 10_000).decode()
        os.close(ours)
        red = "\x1b[31m\x1b[1merror:\x1b[0m" in said
        assert (red, "\x1b" in said) == (coloured, coloured), said
        assert "error:" in said


def test_the_installed_command_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="fusegpt")
    assert command.load() is main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["scor"], "Did you mean 'score'"),
        (["compress"], "RECIPE"),
        (["status", "out", "--loud"], "--loud"),
        (["evaluate", "model", "--length", "8"], "--data"),
        (["pull", "s3://bucket/model"], "DIR"),
        (["clean", "out", "--age", "soon"], "'soon'"),
        (["evaluate", "model", "--data", "text.txt", "--length", "eight"], "'eight'"),
        (
            ["evaluate", "model", "--data", "text.txt", "--length", "8", "--engine", "spark"],
            "'spark'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_exits_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert named in stderr.splitlines()[-1]
