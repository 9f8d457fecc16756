"""What a newcomer turns to: `fusegpt keys`, `python -m fusegpt_ray`, and the pages' Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from desk import LENGTH, Desk

import fusegpt_ray
from fusegpt_ray.cli import main
from fusegpt_ray.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def test_every_key_that_a_recipe_may_have_is_listed(desk: Desk, capsys: Capture) -> None:
    """With the default that a recipe without it gets, and with what it means."""
    assert main(["keys", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["keys"]}
    whole = Recipe.parse(desk.recipe(heal={}, search={"candidates": ["mi", "kl"]})).model_dump()
    for section, value in whole.items():
        names = [f"{section}.{key}" for key in value] if isinstance(value, dict) else [section]
        assert {re.sub(r"^evaluation\.\w+", "evaluation", name) for name in names} <= (
            rows.keys() | {"evaluation"}
        ), section
    assert rows["calibration.windows"]["default"] == "1024"
    assert rows["calibration.windows"]["values"] == "at least 1, at most 10,000,000"
    assert rows["model.source"]["default"] == "required"
    assert {"evaluation.NAME.length", "calibration.data.N.weight", "family.gpus"} <= rows.keys()


def test_one_section_or_key_is_listed_alone(capsys: Capture) -> None:
    assert main(["keys", "heal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert told[:1] == ["heal"] and "heal.tokens" in told
    assert all(key.startswith("heal.") for key in told[1:])
    assert main(["keys", "heal.tokens", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["keys"]
    assert row["key"] == "heal.tokens"
    assert main(["keys", "heel"]) == 2
    assert "no such section or key" in capsys.readouterr().err


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "fusegpt_ray", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fusegpt")


def test_the_example_of_evaluate_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the page, on a model with fewer positions."""
    page = (ROOT / "docs/python.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "told" in code]
    (desk.folder / "llama-p25").symlink_to(desk.model)
    monkeypatch.chdir(desk.folder)
    names: dict[str, dict[str, float]] = {}
    exec(example.replace("length=128", f"length={LENGTH}"), names)
    assert names["told"]["perplexity"] > 1


def test_each_public_name_can_be_imported() -> None:
    assert {type(getattr(fusegpt_ray, name)).__name__ for name in fusegpt_ray.__all__} <= {
        "type",
        "function",
        "ModelMetaclass",
    }
    assert issubclass(fusegpt_ray.StorageError, OSError)
