"""How a recipe answers values of the wrong kind."""

from __future__ import annotations

from typing import Any

import pytest
from recipes import merged, mistake


@pytest.mark.parametrize(
    ("sections", "key", "problem", "fix"),
    [
        (
            {"model": "examples/tiny-llama"},
            "model",
            "not a section with keys of its own",
            "write model: {source: examples/tiny-llama}",
        ),
        (
            {"model": None},
            "model",
            "not a section with keys of its own",
            "write model: {source: …}",
        ),
        (
            {"evaluation": "x"},
            "evaluation",
            "no mapping of names to values",
            "evaluation: {name: x}",
        ),
        ({"sparsity": "25%"}, "sparsity", "not a number", "write 0.25"),
        ({"sparsity": ["12.5 %"]}, "sparsity.0", "not a number", "write 0.125"),
        ({"seed": 1.5}, "seed", "not a whole number", "give a whole number"),
        (
            {"calibration": {"windows": "many"}},
            "calibration.windows",
            "not a whole number",
            "give a whole number of at least 1",
        ),
        (
            {"calibration": {"windows": 10**8}},
            "calibration.windows",
            "not 10000000 or less",
            "give a whole number of at least 1 and of at most 10,000,000",
        ),
        (
            {"importance": {"racing": 1}},
            "importance.racing",
            "not below 1",
            "give a number above 0 and below 1",
        ),
        ({"output": {"track": "wand"}}, "output.track", "not one of", "did you mean wandb"),
        ({"fusion": {"betas": [0.9]}}, "fusion.betas", "a value too few", "give one more"),
        ({"fusion": {"betas": 0.9}}, "fusion.betas", "not a list", "write fusion.betas: [0.9]"),
        ({"output": {"name": "a/b"}}, "output.name", "characters", "use letters, digits, dots"),
        ({"cluster": {"deterministic": "so"}}, "cluster.deterministic", "neither", "true or false"),
        ({"cluster": {"labels": {"a b": "c"}}}, "cluster.labels.a b", "characters", "use letters"),
    ],
)
def test_wrong_kinds_are_answered_in_words(
    sections: dict[str, Any], key: str, problem: str, fix: str
) -> None:
    """Without pydantic's own, and without places in a list that nobody wrote."""
    error = mistake(merged(sections))
    assert error.key == key and problem in error.problem
    assert fix in error.fix and "nput should" not in error.problem
