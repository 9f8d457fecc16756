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
FAULTS = "tests/integration/test_faults_in_a_run.py"
KILLED = "tests/integration/test_killed_workers.py"
JOB = "tests/integration/test_training_job.py"
S3 = "tests/integration/test_s3.py"
S3_RUNS = (
    "test_the_result_loads_once_downloaded",
    "test_the_manifest_comes_last",
    "test_nothing_is_written_elsewhere_and_nothing_temporary_stays",
    "test_no_credentials_are_written",
    "test_a_finished_name_is_refused",
)
KILLS = "tests/chaos/test_kills.py::test_a_killed_run_ends_with_the_same_bytes"
STOPPED = (
    "tests/integration/test_two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more"
)

SLOW = (
    # Runs on Ray with one training worker, with fine-tuning alone and without any: parts of the
    # run "ray, 2 workers", which stays.
    f"{ENGINES}::test_engines_make_the_same_model[local-ray-close0]",
    f"{ENGINES}::test_one_run_publishes_every_sparsity_on_its_way[ray]",
    f"{ENGINES}::test_the_manifest_is_true[ray]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray]",
    f"{ENGINES}::test_perplexities_are_those_of_real_models[ray]",
    f"{ENGINES}::test_engines_make_the_same_model[local mi+ft-ray mi+ft, 2 workers-close2]",
    f"{ENGINES}::test_engines_make_the_same_model[local mi-ray mi-close3]",
    f"{ENGINES}::test_the_manifest_is_true[ray mi+ft, 2 workers]",
    f"{ENGINES}::test_the_manifest_is_true[ray mi]",
    f"{ENGINES}::test_the_manifest_is_true[ray healed, 2 workers]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray healed, 2 workers]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray mi+ft, 2 workers]",
    f"{ENGINES}::test_what_is_published_loads_as_any_checkpoint[ray mi]",
    f"{ENGINES}::test_perplexities_are_those_of_real_models[ray mi]",
    # Credentials that expire: the last manifest stays.
    f"{FAULTS}::test_a_run_that_may_not_go_on[tiny-p12.5/model.safetensors]",
    f"{FAULTS}::test_a_run_that_may_not_go_on[blocks/round-002]",
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
    # Training workers that are lost: one that is killed at work stays, with a training checkpoint
    # to go on from; what the mailbox does in the other cases has unit tests.
    f"{KILLED}::test_without_checkpoints_all_is_learned_again",
    f"{KILLED}::test_a_worker_that_stops_is_given_up_and_costs_as_much",
    f"{KILLED}::test_a_run_that_was_given_up_goes_on",
    f"{JOB}::test_an_error_of_a_library_is_tried_again_and_then_raised",
    f"{JOB}::test_a_worker_that_is_killed_between_tasks_is_replaced",
    f"{JOB}::test_a_worker_that_is_killed_in_a_task_is_replaced",
    f"{JOB}::test_what_a_task_raises_reaches_the_driver_and_the_next_task_is_done[UserError]",
    # A run on Ray to S3: that of a submitted job stays.
    *(f"{S3}::{name}[ray]" for name in S3_RUNS),
    f"{S3}::test_both_engines_wrote_the_same_model",
    # A comparison on Ray: its cells are ordinary runs, and both engines make the same of those.
    "tests/integration/test_compare_on_ray.py",
    # A run on Ray that fails: what one that is killed leaves behind is looked through.
    "tests/integration/test_secrets.py::test_a_run_that_fails_with_a_trace",
    # Memory that really runs out in training workers: that the driver hears of it, and what comes
    # of it in one process, stays.
    "tests/integration/test_out_of_memory_on_ray.py"
    "::test_training_workers_that_run_out_of_memory_start_again_with_less",
    # All names of lm-eval take their time to be read: those of a folder stay.
    "tests/unit/test_tasks.py::test_an_unknown_task_is_told_with_names_like_it",
    # The code generator takes its time: the compiler before it stays.
    "tests/unit/test_compiled.py::test_real_code_computes_the_same",
    # A submitted job that fails: the same is looked for in a run that was not submitted.
    "tests/integration/test_submit.py::test_a_job_that_fails_with_a_trace_tells_no_secret",
    # Memory that runs out in training: one loss stays, and the last resort of a single window is a
    # unit test of `find_batch_size`.
    "tests/unit/test_out_of_memory.py"
    "::test_fine_tuning_that_runs_out_of_memory_goes_on_with_less[normalized_mse]",
    "tests/unit/test_out_of_memory.py::test_what_never_fits_says_so",
    # One bomb of each kind of input stays.
    "tests/unit/test_bombs.py::test_every_bomb_is_refused_within_a_bounded_memory[others-12]",
    # Kills of the driver and of a node stay; of the driver's four moments on one process, two. Lost
    # replicas and training workers have tests of their own (test_replicas, test_killed_workers).
    KILLS + r"[driver (local) at \u201cround 1/2: scoring\u201d]",
    KILLS + r"[driver (local) at \u201cround 2: fusing\u201d]",
    KILLS + r"[scoring worker (ray) at \u201cround 1/1: scoring\u201d]",
    KILLS + r"[training worker (ray) at \u201cround 1: fusing\u201d]",
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
