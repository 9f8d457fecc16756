"""The same small run on both engines, in several ways, and each made once a file of tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusegpt_ray import Recipe, compress

Run = Callable[[str], "Finished"]


class Finished:
    """A finished run: its recipe, and what it published, the lightest compression first."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.recipe = Recipe.parse(data)
        self.published = compress(self.recipe)
        self.folders = [Path(item.uri) for item in self.published]
        self.manifests = [
            json.loads((folder / "fusegpt.json").read_text()) for folder in self.folders
        ]


LIGHT = {"sparsity": 0.125}
TWO_WORKERS = {"engine": "ray", "workers": 2}
HEALED = LIGHT | {
    "method": "mi",
    "heal": {
        "tokens": 512,
        "batch": 4,
        "held_out": 4,
        "looks": 2,
        "rank": 4,
        "learning_rate": 0.005,
    },
}
SEARCHED = HEALED | {"search": {"candidates": ["mi", "run", "spaced"], "tokens": 256}}
BOTH = {"cluster": TWO_WORKERS | {"zero_stage": 3, "replicas": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "local": {},
    "ray": {"cluster": {"engine": "ray", "replicas": 2}},
    "ray, 2 workers": LIGHT | {"cluster": TWO_WORKERS | {"zero_stage": 3}},
    "local mi+ft": LIGHT | {"method": "mi+ft"},
    "ray mi+ft, 2 workers": LIGHT | {"method": "mi+ft", "cluster": TWO_WORKERS | {"zero_stage": 2}},
    "local mi": {"method": "mi"},
    "ray mi": {"method": "mi", "cluster": {"engine": "ray", "replicas": 3}},
    "local healed": HEALED,
    "ray healed, 2 workers": HEALED | BOTH,
    "local searched": SEARCHED,
    "ray searched, 2 workers": SEARCHED | BOTH,
    "local bf16": {},
}
"""What each run changes in the tests' recipe."""


@pytest.fixture(name="run", scope="module")
def _run(material, tmp_path_factory, request) -> Run:
    """Name of a run → the finished run; each is made once."""
    finished: dict[str, Finished] = {}

    def get(name: str) -> Finished:
        if name not in finished:
            if name.startswith("ray"):
                request.getfixturevalue("ray_session")
            model = {
                "source": str(material.model_bf16 if name.endswith("bf16") else material.model)
            }
            data = material.recipe(tmp_path_factory.mktemp("out"), **{"model": model} | RUNS[name])
            finished[name] = Finished(data)
        return finished[name]

    return get
