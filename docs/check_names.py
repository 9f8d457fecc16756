"""A hook of the documentation site: what pages, the README and others call by a name must exist.

- A file, such as `model/stack.py` or `tests/slow.py`: somewhere in this repository.
- A test, such as `test_a_live_run_is_left_alone`: somewhere in `tests/`.
- A key of a recipe, such as `cluster.replicas`: in one of the files that define its sections; that
  of a text in a list, such as `calibration.data.1.weight`, too.

What is wrong is a warning, which `mkdocs build --strict` takes for an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.hooks.check_names")
SECTIONS = "model|calibration|evaluation|importance|search|fusion|heal|cluster|output"
FILE = re.compile(r"`[^`\s]*?([\w./-]+\.py)(?:::\w+)?[^`]*`")
TEST = re.compile(r"\btest_\w+(?!\.py)\b")
KEY = re.compile(rf"`(?:{SECTIONS})\.(?:data\.\d+\.)?(?!py`)([a-z_]+)(?:[:=] ?[^`]*)?`")


def on_pre_build(config: Any) -> None:
    """Look through the pages and what lies beside them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for name in unknown(line):
                log.warning("%s:%d: there is no %s", page.relative_to(ROOT), number, name)


def unknown(line: str) -> list[str]:
    """The names in a line that mean nothing."""
    files = [name for name in FILE.findall(line) if not _is_file(name)]
    tests = [name for name in TEST.findall(line) if not re.search(rf"\b{name}\b", TESTS)]
    keys = [name for name in KEY.findall(line) if not re.search(rf"^    {name}:", KEYS, re.M)]
    return files + tests + keys


def _is_file(name: str) -> bool:
    return any(path == name or path.endswith(f"/{name}") for path in PATHS)


def _paths() -> list[str]:
    folders = ("fusegpt_ray", "tests", "benchmarks", "jobs", "examples", "docs")
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in found]


PATHS = _paths()
TESTS = "\n".join(
    [(ROOT / path).read_text() for path in PATHS if path.startswith("tests/")]
    + [Path(path).stem for path in PATHS]
)
KEYS = "\n".join(path.read_text() for path in (ROOT / "fusegpt_ray/recipe").glob("*.py"))
