"""Models that are measured side by side, as Ray tasks: the numbers are those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from models import save_tiny
from quiz import Quiz
from words import add_tokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.distributed.apiece import apiece
from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring.harness import Asked
from fusegpt_ray.measuring.tasks import How, tasks
from fusegpt_ray.recipe.cluster_section import Cluster

pytestmark = pytest.mark.integration
RAY, LOCAL = (Cluster(engine=engine) for engine in ("ray", "local"))


def test_numbers_on_ray_are_those_of_one_process(ray_session: None, tmp_path: Path) -> None:
    quiz = Quiz.make(tmp_path / "tasks")
    models = []
    for name in ("llama", "qwen3"):
        models.append(str(save_tiny(name, tmp_path / name)))
        add_tokenizer(tmp_path / name)
    asked, kept = Asked(("quiz",), str(quiz.folder)), str(tmp_path / "kept")
    there = tasks(models, asked, How(cache=kept), RAY)
    assert there == tasks(models, asked, How(), LOCAL)
    numbers = [model["tasks"][0]["metrics"] for model in there["models"]]
    assert numbers[0] != numbers[1]
    records = sorted((tmp_path / "kept").iterdir())
    assert len(records) == 2
    assert tasks(models, asked, How(cache=kept), LOCAL) == there  # either finds the other's
    assert sorted((tmp_path / "kept").iterdir()) == records


def test_what_a_model_is_refused_for_is_said_as_in_one_process(
    ray_session: None, tmp_path: Path
) -> None:
    quiz = Quiz.make(tmp_path / "tasks")
    model = save_tiny("llama", tmp_path / "model")
    add_tokenizer(model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.norm.weight", b"model.norm.wrong_"))
    said = []
    for cluster in (LOCAL, RAY):
        with pytest.raises(UserError, match=r"^MODEL = .* Fix: ") as refused:
            tasks([str(model)], Asked(("quiz",), str(quiz.folder)), How(), cluster)
        said.append(str(refused.value))
    assert said[0] == said[1] and "model.norm.weight" in said[0]


def test_a_process_that_is_lost_again_and_again_is_one_message(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiz = Quiz.make(tmp_path / "tasks")
    model = save_tiny("llama", tmp_path / "model")
    add_tokenizer(model)
    (quiz.folder / "utils.py").write_text(
        "import os, signal\n"
        "def kept(docs):\n"
        f"    if os.getpid() != {os.getpid()}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return docs\n"
    )
    with (quiz.folder / "quiz.yaml").open("a") as file:
        file.write("process_docs: !function utils.kept\n")
    command = ["tasks", str(model), "--tasks", "quiz", "--tasks-folder", str(quiz.folder)]
    assert main([*command, "--engine", "ray", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "error: --engine = 'ray': a process was lost" in said
    assert "Fix: use local" in said


def test_a_cluster_without_a_place_is_told_by_keys_that_calls_have(ray_session: None) -> None:
    cluster = Cluster(engine="ray", gpus_per_replica=1000.0, wait_minutes=0)
    with pytest.raises(UserError, match=r"^cluster\.engine = 'ray': 1000 GPUs are needed"):
        list(apiece(print, [()], cluster))
