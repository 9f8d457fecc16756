"""How long files (those of tests, too) and functions may be. `make style` checks the rest: lines,
types and which way imports point.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

from fusegpt_ray.importance.metrics import METRICS
from fusegpt_ray.methods import METHODS
from fusegpt_ray.recipe.sections import Method, Metric
from fusegpt_ray.recipe.specs import METHOD_SPECS, METRIC_SPECS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fusegpt_ray", "jobs", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 350, 60


def test_no_file_is_too_long() -> None:
    assert len(FILES) > 100 and len(TESTS) > 100, "the files are not where this test looks"
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES + TESTS
    }
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    """From its `def` to its last line, the docstring included."""
    long = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{file.relative_to(ROOT)}: {node.name}"] = lines
    assert long == {}


def test_every_method_that_a_recipe_may_name_is_there() -> None:
    assert METHODS.keys() == METHOD_SPECS.keys() == {*get_args(Method)}


def test_every_metric_that_a_recipe_may_name_is_there() -> None:
    assert METRICS.keys() == METRIC_SPECS.keys() == {*get_args(Metric)}
    assert all(METRICS[name].spec is spec for name, spec in METRIC_SPECS.items())
