"""`fusegpt tasks`: true numbers, kept for as long as they are true."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from desk import Desk
from mistakes import MESSAGE, tree
from models import load_model, save_tiny
from pulling import manifest
from quiz import Quiz
from safetensors.torch import load_file, save_file
from words import add_tokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.measuring import harness
from fusegpt_ray.measuring.checkpoint import Checkpoint
from fusegpt_ray.store.records import opened, sealed


@pytest.fixture(autouse=True)
def _own_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared tables never go to the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def quiz(desk: Desk) -> Quiz:
    return Quiz.make(desk.folder / "tasks")


@pytest.fixture
def other(desk: Desk) -> Path:
    """A second model."""
    folder = save_tiny("qwen3", desk.folder / "other")
    add_tokenizer(folder)
    return folder


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(*arguments: str) -> dict[str, Any]:
        command = ["tasks", *arguments, "--tasks-folder", "tasks", "--json", "--quiet"]
        assert main(command) == 0
        stdout = capsys.readouterr().out
        assert stdout.count("\n") == 1
        return json.loads(stdout)

    return run


def values(row: dict[str, Any]) -> dict[str, float]:
    return {name: number["value"] for name, number in row["metrics"].items()}


def test_accuracies_are_those_of_plain_log_likelihoods(
    desk: Desk, other: Path, quiz: Quiz, ask: Ask
) -> None:
    plain = Quiz.make(quiz.folder, "plain", seed=1, norm=False)
    found = ask("model", "other", "--tasks", "quiz,plain")
    assert [model["model"] for model in found["models"]] == ["model", "other"]
    different = set()
    for model, folder in zip(found["models"], (desk.model, other), strict=True):
        first, second = model["tasks"]
        real = load_model(folder)
        expected = quiz.accuracies(real), plain.accuracies(real)
        assert values(first) == expected[0]
        assert values(second) == {"acc": expected[1]["acc"]}
        for number in first["metrics"].values():  # of a proportion, by the sample's variance
            p = number["value"]
            assert number["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(quiz.rows) - 1)))
        assert (first["samples"], first["of"], first["version"], first["shots"]) == (15, 15, 3, 0)
        mean = model["mean"]
        assert mean["acc"]["value"] == pytest.approx((expected[0]["acc"] + expected[1]["acc"]) / 2)
        # A task without acc_norm enters by its acc.
        assert mean["acc_norm"]["value"] == pytest.approx(
            (expected[0]["acc_norm"] + expected[1]["acc"]) / 2
        )
        different.add(tuple(expected[0].values()))
    assert len(different) == 2, "or one model was measured twice"


def test_the_first_samples_alone_and_examples_before_them(desk: Desk, quiz: Quiz, ask: Ask) -> None:
    (row,) = ask("model", "--tasks", "quiz", "--limit", "7")["models"][0]["tasks"]
    assert values(row) == quiz.accuracies(load_model(desk.model), 7)
    assert (row["samples"], row["of"]) == (7, 15)
    (row,) = ask("model", "--tasks", "quiz", "--limit", "7", "--shots", "2")["models"][0]["tasks"]
    assert row["shots"] == 2


def test_a_tag_stands_for_its_tasks_by_name(quiz: Quiz, ask: Ask) -> None:
    """The library keeps them in a set, whose order differs from process to process."""
    names = [f"quiz-{letter}" for letter in "dacb"]
    for name in names:
        file = Quiz.make(quiz.folder, name).folder / f"{name}.yaml"
        file.write_text(f"tag: mine\n{file.read_text()}")
    found = ask("model", "--tasks", "mine", "--limit", "2")["models"][0]["tasks"]
    assert [row["task"] for row in found] == sorted(names)


def test_the_table_has_models_as_rows_and_the_average_last(
    desk: Desk, other: Path, quiz: Quiz, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tasks", "model", "other", "--tasks", "quiz", "--tasks-folder", "tasks"]) == 0
    told = capsys.readouterr().out
    head, *rows = [line.split() for line in told.splitlines() if line.strip()][1:]
    assert head == ["model", "quiz", "average"]
    acc = quiz.accuracies(load_model(desk.model))["acc"]
    assert ["model", *[f"{100 * acc:.2f}"] * 2] in rows
    assert "acc_norm, else acc" in told and "samples: quiz 15" in told


def test_a_number_is_measured_once_for_the_same_files_questions_and_settings(
    desk: Desk, quiz: Quiz, ask: Ask
) -> None:
    command = ("model", "--tasks", "quiz", "--cache", "kept")
    ask(*command)
    (record,) = (desk.folder / "kept").iterdir()
    body = opened(record.read_bytes())
    body["value"]["metrics"]["acc"]["value"] = 0.125  # what no quiz of 15 can give
    record.write_bytes(sealed(body))

    def again(*arguments: str) -> float:
        (row,) = ask(*command, *arguments)["models"][0]["tasks"]
        return values(row)["acc"]

    assert again() == 0.125, "it was measured again"
    for arguments in (("--limit", "14"), ("--shots", "1"), ("--dtype", "bfloat16")):
        assert again(*arguments) != 0.125, arguments


def test_a_number_of_other_questions_or_weights_is_not_taken(
    desk: Desk, quiz: Quiz, ask: Ask
) -> None:
    def check() -> dict[str, float]:
        (row,) = ask("model", "--tasks", "quiz", "--cache", "kept")["models"][0]["tasks"]
        expected = quiz.accuracies(load_model(desk.model))
        assert values(row) == expected
        return expected

    before = check()
    for row in quiz.rows[::2]:
        row["answer"] = (row["answer"] + 1) % 3
    quiz.write()
    answered = check()
    weights = load_file(desk.model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
    save_file(weights, desk.model / "model.safetensors", metadata={"format": "pt"})
    assert len({str(found) for found in (before, answered, check())}) == 3, "or it shows nothing"


def test_a_damaged_record_is_told_and_measured_again(
    desk: Desk, quiz: Quiz, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["model", "--tasks", "quiz", "--cache", "kept"]
    first = ask(*command)
    (record,) = (desk.folder / "kept").iterdir()
    record.write_bytes(record.read_bytes().replace(b'"quiz"', b'"quip"'))
    assert main(["tasks", *command, "--tasks-folder", "tasks", "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == first
    assert f"{record.name} is damaged" in stderr


def test_a_model_at_a_uri_is_the_same_model(desk: Desk, quiz: Quiz, ask: Ask) -> None:
    memory = fsspec.filesystem("memory")
    for file in desk.model.iterdir():
        memory.pipe_file(f"/uri-tasks/{file.name}", file.read_bytes())
    here, there = ask("model", "memory://uri-tasks", "--tasks", "quiz")["models"]
    assert here["tasks"] == there["tasks"]
    assert (here["name"], there["name"]) == ("model", "uri-tasks")


def test_a_model_of_several_files_at_a_uri_is_loaded(desk: Desk, quiz: Quiz, ask: Ask) -> None:
    """Without a manifest of ours; loaders find the files by their index."""
    real = load_model(desk.model)
    (desk.model / "model.safetensors").unlink()
    real.save_pretrained(desk.model, max_shard_size="50KB")
    assert len([*desk.model.glob("*.safetensors")]) > 1
    memory = fsspec.filesystem("memory")
    for file in desk.model.iterdir():
        memory.pipe_file(f"/shards/{file.name}", file.read_bytes())
    (row,) = ask("memory://shards", "--tasks", "quiz")["models"][0]["tasks"]
    assert values(row) == quiz.accuracies(real)


def test_a_published_model_has_one_identity_wherever_it_lies(desk: Desk) -> None:
    """Its manifest tells it at a URI, where no weights are read for it."""
    memory = fsspec.filesystem("memory")
    files = {file.name: file.read_bytes() for file in desk.model.iterdir()}
    for name, data in {**files, "fusegpt.json": manifest(files)}.items():
        (desk.model / name).write_bytes(data)
        memory.pipe_file(f"/published/{name}", data)
    here, there = (Checkpoint.open(name) for name in (str(desk.model), "memory://published"))
    assert here.identity() == there.identity()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= here.identity().keys()
    with there.local() as folder:
        assert (
            files.items()
            <= {file.name: file.read_bytes() for file in Path(folder).iterdir()}.items()
        )
    assert not Path(folder).exists()


def test_what_a_tasks_own_code_raises_is_one_message(
    desk: Desk, quiz: Quiz, capsys: pytest.CaptureFixture[str]
) -> None:
    (quiz.folder / "utils.py").write_text("def scored(doc, results):\n    return doc['prize']\n")
    with (quiz.folder / "quiz.yaml").open("a") as file:
        file.write("process_results: !function utils.scored\n")
    command = ["tasks", "model", "--tasks", "quiz", "--tasks-folder", "tasks"]
    assert main(command) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.search(stderr)
    assert message and stdout == "" and stderr.count("error: ") == 1, stderr
    assert message["key"].endswith("--tasks") and "prize" in message["problem"], stderr
    assert "mend the task's files" in message["fix"]


@pytest.mark.usefixtures("no_ray")
def test_a_cluster_that_does_not_answer_is_told_by_what_names_it(
    desk: Desk, quiz: Quiz, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command has no argument for the address."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1")  # without a port
    command = ["tasks", "model", "--tasks", "quiz", "--tasks-folder", "tasks", "--engine", "ray"]
    check(command, desk, "RAY_ADDRESS", "no Ray cluster answers", "leave RAY_ADDRESS out", capsys)


BAD = {
    "no-model": (["nowhere"], "MODEL", "no such folder", "existing folder"),
    "no-tokenizer": (["bare"], "MODEL", "tokenizer does not load", "tokenizer.json"),
    "no-folder": (["model", "--tasks-folder", "none"], "--tasks-folder", "no such", "task files"),
    "no-names": (["model", "--tasks", " ,"], "--tasks", "names no task", "commas"),
    "no-data": (["model", "--tasks", "quiz"], "--tasks", "cannot be loaded", "local data"),
    "cache-in-a-file": (
        ["model", "--cache", "tasks/quiz.yaml"],
        "--cache",
        "cannot be written",
        "check the path",
    ),
    "no-protocol": (
        ["model", "--cache", "moon://kept"],
        "--cache",
        "cannot be reached",
        "protocol",
    ),
    "secret": (
        ["model", "--cache", "s3://key:secret@bucket/kept"],
        "--cache",
        "user name, key or password",
        "environment",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_message_and_nothing_is_written(
    name: str, desk: Desk, quiz: Quiz, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(desk.model, desk.folder / "bare")
    for file in desk.folder.glob("bare/tokenizer*"):
        file.unlink()
    if name == "no-data":
        (quiz.folder / "quiz.jsonl").unlink()
    arguments, key, problem, fix = BAD[name]
    usual = {"--tasks": "quiz", "--tasks-folder": "tasks", "--cache": "kept"}
    for option, value in usual.items():
        arguments = arguments if option in arguments else [*arguments, option, value]
    check(["tasks", *arguments], desk, key, problem, fix, capsys)


def test_without_the_library_one_message_says_how_to_install_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fix = r"pip install 'fusegpt-ray\[eval\]'"
    check(["tasks", "model"], desk, "--tasks", "not installed", fix, capsys)


def test_an_unknown_task_is_told_with_names_like_it(
    desk: Desk, quiz: Quiz, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against all of the library's tasks."""
    command = ["tasks", "model", "--tasks", "quiz,helaswag", "--tasks-folder", "tasks"]
    check(command, desk, "--tasks", "no task of this name", "did you mean hellaswag", capsys)


def test_names_like_an_unknown_one_are_of_the_users_folder_too(desk: Desk, quiz: Quiz) -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(quiz.folder), include_defaults=False)
    assert "did you mean quiz" in str(harness.unknown("quizz", index.all_tasks))


def check(
    command: list[str],
    desk: Desk,
    key: str,
    problem: str,
    fix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(desk.folder)
    assert main(command) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.search(stderr)
    assert message and stdout == "" and stderr.count("error: ") == 1, stderr
    assert message["key"].endswith(key) and problem in message["problem"], stderr
    assert re.search(fix, message["fix"]), stderr
    assert {name: held for name, held in tree(desk.folder).items() if "datasets" not in name} == {
        name: held for name, held in before.items() if "datasets" not in name
    }
