"""What the pages call by a name exists: the hook of the documentation site, which the short run of
the tests does not build, finds nothing to say.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_names", ROOT / "docs/check_names.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_means_something(hook: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hook.on_pre_build(None)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("see `model/stack.py`, `cluster.replicas` and `heal.tokens: 5`", []),
        ("see `model/heap.py`", ["model/heap.py"]),
        ("set `cluster.replicants`", ["replicants"]),
        ("`tests/unit/test_pages.py::test_every_name_means_" + "nothing`", ["nothing"]),
    ],
)
def test_a_name_that_means_nothing_is_found(
    hook: ModuleType, line: str, missing: list[str]
) -> None:
    assert [name.removeprefix("test_every_name_means_") for name in hook.unknown(line)] == missing
