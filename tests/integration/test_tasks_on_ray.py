"""Models that are measured side by side, as Ray tasks: the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import save_tiny
from quiz import Quiz
from words import add_tokenizer

from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring.harness import Asked
from fusegpt_ray.measuring.tasks import How, tasks
from fusegpt_ray.sections import Cluster

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
