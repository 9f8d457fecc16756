"""The tests that `make test` leaves to `make test-all`, and the rule that marks them.

A test belongs here if it takes long, seldom fails, and another test that `make test` runs guards
the same promise (see PROMISES.md). The list lives in one place so that a glance shows what a short
run does not cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ENGINES = "tests/integration/test_engines.py"
FAULTS = "tests/integration/test_faults.py"
KILLS = "tests/chaos/test_kills.py::test_a_killed_run_ends_with_the_same_bytes"
STOPPED = (
    "tests/integration/test_two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more"
)

SLOW = (
    # A run on Ray without fine-tuning, and one with it alone: parts of the runs "ray" and
    # "ray, 2 workers", which stay.
    f"{ENGINES}::test_engines_make_the_same_model[local mi+ft-ray mi+ft, 2 workers-close2]",
    f"{ENGINES}::test_engines_make_the_same_model[local mi-ray mi-close3]",
    f"{ENGINES}::test_the_manifest_is_true[ray mi+ft, 2 workers]",
    f"{ENGINES}::test_the_manifest_is_true[ray mi]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray mi+ft, 2 workers]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray mi]",
    f"{ENGINES}::test_perplexities_are_those_of_real_models[ray mi]",
    # Credentials that expire: the first block and the last manifest stay.
    f"{FAULTS}::test_a_run_that_may_not_go_on[tiny-p12.5/model.safetensors]",
    # ... and before the run: one file of the model, one text and the output stay.
    f"{FAULTS}::test_before_the_run_begins_it_is_the_users_mistake"
    "[GET-models/dense/config.json-model.source]",
    f"{FAULTS}::test_before_the_run_begins_it_is_the_users_mistake"
    "[GET-texts/calibration.txt-calibration.data]",
    # A stopped run: before its first record on a disk, and both later moments on S3, stay.
    f"{STOPPED}[local-(epoch 1/3]",
    f"{STOPPED}[local-publishing tiny-p12.5]",
    # A real process that is killed and aged: the other two tests of live runs stay.
    "tests/unit/test_clean.py::test_a_killed_run_is_alive_until_nobody_hears_of_it",
    # One bomb of each kind of input stays.
    "tests/unit/test_bombs.py::test_every_bomb_is_refused_within_a_bounded_memory[others-12]",
    # A kill of every kind of victim stays; of the driver's four moments on one process, two.
    KILLS + r"[driver (local) at \u201cround 1/2: scoring\u201d]",
    KILLS + r"[driver (local) at \u201cround 2: fusing\u201d]",
)
"""A file, a test of it (with all its cases), or a single case, as pytest writes them."""


def covers(entry: str, nodeid: str) -> bool:
    """Whether an entry of the list means this test."""
    return nodeid == entry or nodeid.startswith((f"{entry}::", f"{entry}["))


def mark_slow(items: Iterable[pytest.Item], whole_files: bool) -> None:
    """Mark what the list names.

    Raises pytest.UsageError for an entry that names nothing: a test that was renamed would move
    back into the short run unnoticed. Only where whole files are collected can one be missing.
    """
    items = list(items)
    collected = {item.nodeid.partition("::")[0] for item in items}
    for entry in SLOW:
        found = [item for item in items if covers(entry, item.nodeid)]
        for item in found:
            item.add_marker(pytest.mark.slow)
        file = entry.partition("::")[0]
        gone = not (ROOT / file).exists() or (whole_files and file in collected and not found)
        if gone:
            raise pytest.UsageError(f"tests/slow.py names {entry}, and there is no such test")
