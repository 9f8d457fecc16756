"""Tasks of lm-eval in other processes, with code of their own and with little memory."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from cramped import LENGTH, MB, limit_memory, save_wide
from quiz import Quiz
from words import add_tokenizer

from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring.harness import Asked, Suite
from fusegpt_ray.measuring.tasks import How, tasks
from fusegpt_ray.recipe.cluster_section import Cluster


@pytest.fixture
def quiz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quiz:
    """Its prepared tables never go to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))  # of other processes
    return Quiz.make(tmp_path / "tasks")


CODE = """
from functools import partial

def kept(docs):
    return docs.filter(good)

def good(doc):
    return len(doc["choices"]) > LEAST

def asked(before, doc):
    return before + doc["question"]

question = partial(asked, "w7 ")
LEAST = 2
"""
GROUP = """group: both
task: [quiz, plain]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def identity(folder: Path, name: str) -> dict[str, Any]:
    return Suite.load(Asked((name,), str(folder))).identity(name)


def test_a_task_with_code_has_one_identity_in_all_processes_until_the_code_changes(
    quiz: Quiz,
) -> None:
    """Where functions lie in memory differs; and what they call is in no setting of the task."""
    code, file = quiz.folder / "utils.py", quiz.folder / "quiz.yaml"
    code.write_text(CODE)
    file.write_text(
        file.read_text().replace('"{{question}}"', "!function utils.question")
        + "process_docs: !function utils.kept\n"
    )
    here = identity(quiz.folder, "quiz")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(identity, (quiz.folder, "quiz")) == here
    code.write_text(CODE.replace("> LEAST", ">= LEAST"))  # all questions stay as they are
    assert identity(quiz.folder, "quiz") != here


def test_the_number_of_a_group_depends_on_its_own_rule(quiz: Quiz) -> None:
    Quiz.make(quiz.folder, "plain", seed=1)

    def found(text: str) -> dict[str, Any]:
        """Without the library's tasks, which take long to be read."""
        from lm_eval.tasks import TaskManager

        (quiz.folder / "both.yaml").write_text(text)
        index = TaskManager(include_path=str(quiz.folder), include_defaults=False)
        groups = index.load(["both"])["groups"]
        return Suite(Asked(("both",)), groups).identity("both")

    assert found(GROUP) == found(GROUP) != found(GROUP.replace("true", "false"))


def cramped(model: Path, quiz: Quiz) -> str:
    """What is said once this process has little memory left."""
    asked, local = Asked((quiz.name,), str(quiz.folder)), Cluster(engine="local")
    tasks([str(model)], asked, How(batch=1), local)  # what is loaded once is loaded before
    limit_memory(80 * MB)
    try:
        tasks([str(model)], asked, How(batch=64), local)
    except UserError as error:
        return str(error)
    return "it was measured"


def test_memory_that_runs_out_is_one_message(
    quiz: Quiz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_wide(tmp_path / "wide")
    add_tokenizer(model)
    for row in quiz.rows:
        row["question"] = " ".join(row["question"].split() * (LENGTH // 6))
    quiz.write()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        said = pool.apply(cramped, (model, quiz))
    assert re.fullmatch(r"--batch = 64: memory runs out\. Fix: give a smaller --batch, .*", said)
