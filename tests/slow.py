"""The tests that `make test` leaves to `make test-all`, and the rules that mark them.

A test belongs here if it takes long, seldom fails, and another test that `make test` runs guards
the same promise (see PROMISES.md). The lists live in one place so that a glance shows what a short
run does not cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHAOS = "tests/chaos/test_kills.py::test_a_killed_run_ends_with_the_same_bytes"
INTEGRATION = "tests/integration/test_"
UNIT = "tests/unit/test_"

SLOW = (
    # Kills of the driver: that of a local Ray while it trains stays (test_local_ray).
    CHAOS + r"[driver (local) at \u201cround 1/2: scoring\u201d]",
    CHAOS + r"[driver (local) at \u201cround 2: fusing\u201d]",
    CHAOS + r"[driver (local) at \u201cepoch 2/3\u201d]",
    CHAOS + r"[driver (local) at \u201cevaluating and publishing tiny-p12.5\u201d]",
    CHAOS + r"[driver (ray) at \u201cepoch 1/3\u201d]",
    CHAOS + r"[scoring worker (ray) at \u201cround 1/1: scoring\u201d]",
    CHAOS + r"[training worker (ray) at \u201cround 1: fusing\u201d]",
    CHAOS + r"[node (ray on two nodes) at \u201cround 1: fusing\u201d]",
    # Whole runs on Ray: one that is fused and healed stays (test_local_ray), and what two workers
    # train (test_training_job); of submitted jobs, one that is refused.
    f"{INTEGRATION}submit.py::test_a_job_compresses_from_its_folder_to_s3",
    f"{INTEGRATION}evaluate_on_ray.py",
    "tests/chaos/test_networks.py::test_a_node_cut_off_in_scoring_changes_no_byte",
    f"{INTEGRATION}sigterm.py::test_a_run_that_is_terminated_says_so_and_goes_on[ray]",
    f"{INTEGRATION}placement.py",  # which nodes count has unit tests
    f"{INTEGRATION}plan_of_a_cluster.py",  # so has what is missing
    f"{INTEGRATION}metrics_on_ray.py",
    f"{INTEGRATION}emulated.py",
    # The job of a cluster: what its files say, and the rights of its keys, stay.
    f"{INTEGRATION}entry_point.py::test_the_smoke_tests_command_line_runs_as_it_is_written",
    # GPUs: what an actor sees on the Ray of these tests, and where workers find they are, stays.
    f"{INTEGRATION}own_gpus.py::test_workers_that_lose_their_replicas_are_told_apart_again",
    f"{INTEGRATION}own_gpus.py::test_where_other_nodes_have_gpus_workers_have_whole_ones",
    f"{INTEGRATION}unseen_gpus.py::test_processes_that_asked_for_no_gpu_see_none",
    *(
        f"{INTEGRATION}engines.py::test_{name}"
        for name in (
            "engines_make_the_same_model[local-ray-close0]",
            "engines_make_the_same_model[local-ray, 2 workers-close1]",
            "engines_make_the_same_model[local mi+ft-ray mi+ft, 2 workers-close2]",
            "engines_make_the_same_model[local mi-ray mi-close3]",
            "engines_make_the_same_model[local healed-ray healed, 2 workers-close4]",
            "engines_make_the_same_model[local searched-ray searched, 2 workers-close5]",
            "engines_write_the_same_text",
            "one_run_publishes_every_sparsity_on_its_way[ray]",
            "perplexities_are_those_of_real_models[ray]",
            "perplexities_are_those_of_real_models[ray mi]",
        )
    ),
    *(
        f"{INTEGRATION}engines.py::test_{name}[{run}]"
        for name in ("the_manifest_is_true", "what_is_published_loads_as_any_checkpoint")
        for run in (
            *("ray", "ray, 2 workers", "ray mi+ft, 2 workers", "ray mi", "ray healed, 2 workers"),
            *("local searched", "ray searched, 2 workers"),
        )
    ),
    f"{INTEGRATION}compare_on_ray.py",
    f"{INTEGRATION}family_on_ray.py",
    f"{INTEGRATION}autoscaling.py",  # what is asked for, and who begins, has unit tests
    f"{INTEGRATION}mistakes_on_ray.py::test_nan_is_told_on_ray",
    f"{INTEGRATION}local_ray.py::test_a_run_that_fails_with_a_trace",
    f"{INTEGRATION}submit.py::test_a_job_that_fails_with_a_trace_tells_no_secret",
    # Putting off in one process, and two sets at once that need not take turns, stay.
    f"{INTEGRATION}family_on_ray.py::test_sets_that_take_turns_and_put_off_publishing"
    "_make_the_same_models",
    # The job's command line is tried with a single run, and families in one process.
    f"{INTEGRATION}submit.py::test_a_job_compresses_a_family",
    *(
        f"{INTEGRATION}s3.py::test_{name}[ray]"
        for name in (
            "the_result_loads_once_downloaded",
            "the_manifest_comes_last",
            "nothing_is_written_elsewhere_and_nothing_temporary_stays",
            "no_credentials_are_written",
            "a_finished_name_is_refused",
        )
    ),
    f"{INTEGRATION}s3.py::test_both_engines_wrote_the_same_model",
    # Images on Ray: their samples stay.
    f"{INTEGRATION}images_on_ray.py::test_a_run_is_that_of_one_process",
    # Training workers: one that is killed at work and replaced stays; checkpoints of one process
    # and what the mailbox and a meeting do in the other cases have tests that stay.
    f"{INTEGRATION}killed_workers.py",
    f"{INTEGRATION}checkpoints_on_workers.py",
    f"{INTEGRATION}healing_on_workers.py",
    f"{INTEGRATION}training.py",
    *(
        f"{INTEGRATION}training_job.py::test_{name}"
        for name in (
            "an_error_of_a_library_is_tried_again_and_then_raised",
            "a_worker_that_is_killed_between_tasks_is_replaced",
            "what_a_task_raises_reaches_the_driver_and_the_next_task_is_done",
        )
    ),
    *(
        f"{INTEGRATION}meeting.py::test_{name}"
        for name in (
            "slow_work_of_one_is_waited_for",
            "a_step_waits_no_longer_for_a_stopped_worker",
            "a_worker_that_lives_and_hangs_is_given_up_after_the_time_of_a_slow_store",
            "a_worker_that_never_joins_ends_the_group_within_the_bound",
        )
    ),
    # The order in which replicas answer, in one process, stays.
    f"{INTEGRATION}slicegpt_on_ray.py",
    # The ways of one process, and healing on workers, stay.
    f"{INTEGRATION}other_methods_on_ray.py",
    # Replicas: a lost one and a stopped one stay.
    f"{INTEGRATION}replicas.py::test_a_task_that_kills_every_replica_is_given_up",
    f"{INTEGRATION}replicas.py::test_every_task_is_done_once_and_both_work",
    f"{INTEGRATION}replicas.py::test_scores_do_not_depend_on_replicas_nor_on_how_they_hold_weights",
    f"{INTEGRATION}replicas.py::test_replicas_live_on_between_calls",
    # Ray Data: that the stream is that of one process stays.
    f"{INTEGRATION}data.py::test_reading_may_stop_early",
    f"{INTEGRATION}data.py::test_the_callers_settings_stay",
    # Memory that really runs out: fine-tuning in one process stays.
    f"{INTEGRATION}out_of_memory_on_ray.py"
    "::test_training_workers_that_run_out_of_memory_start_again_with_less",
    f"{UNIT}out_of_memory.py::test_fine_tuning_that_runs_out_of_memory_goes_on_with_less"
    "[normalized_mse]",
    f"{UNIT}out_of_memory.py::test_scoring_that_runs_out_of_memory_goes_on_with_less",
    f"{UNIT}out_of_memory.py::test_states_that_do_not_fit_lie_in_a_file",
    f"{UNIT}out_of_memory.py::test_what_never_fits_says_so",
    f"{UNIT}weights.py::test_a_limit_of_the_process_counts",
    f"{UNIT}bombs.py::test_every_bomb_is_refused_within_a_bounded_memory[others-21]",
    # A store that a run may no longer write to: one that fails for a while stays.
    f"{INTEGRATION}faults_in_a_run.py::test_a_run_that_may_not_go_on",
    # Several processes at once: on a disk they stay, and what one of them sees has unit tests.
    f"{INTEGRATION}two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more[s3-(epoch 1/3]",
    f"{INTEGRATION}two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more[s3-publishing tiny-p12.5]",
    f"{INTEGRATION}two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more[local-(epoch 1/3]",
    f"{INTEGRATION}two_runs.py"
    "::test_a_run_that_was_stopped_for_too_long_writes_nothing_more[local-publishing tiny-p12.5]",
    f"{INTEGRATION}two_runs.py::test_of_racing_processes_exactly_one_owns_each_name[s3]",
    f"{INTEGRATION}pull_s3.py::test_a_pulled_model_loads_and_only_reads_were_made",
    f"{INTEGRATION}names.py::test_a_source_is_read_literally",
    f"{INTEGRATION}cache_processes.py::test_who_waits_for_a_killed_process_goes_on",
    f"{INTEGRATION}advice_s3.py",
    f"{INTEGRATION}names.py::test_a_run_and_a_cleaning_leave_every_neighbour",
    f"{UNIT}live_runs.py::test_a_killed_run_is_alive_until_nobody_hears_of_it",
    f"{UNIT}two_at_once.py::test_a_run_that_died_elsewhere_is_waited_for_and_gone_on_with",
    # Files of a hub: the usual ones, and a network that is not there, stay.
    *(
        f"{UNIT}hub.py::test_{name}"
        for name in (
            "a_node_that_joins_later_fetches_the_same_commit",
            "a_name_of_one_word",
            "a_single_file_goes_before_an_old_index",
            "the_same_files_as_of_a_folder",
            "headers_alone_tell_the_stack",
        )
    ),
    f"{UNIT}published_texts.py::test_from_the_hub_and_then_from_its_cache",
    f"{UNIT}upload.py::test_what_was_sent_loads_and_can_be_pulled",
    # Whole runs in one process that are stopped, damaged or followed by another: for each of them
    # some cases stay.
    *(
        f"{UNIT}{name}"
        for name in (
            "advice.py::test_another_recipe_may_follow_one_that_was_killed_before_its_first_round",
            "after_the_end.py::test_a_finished_run_goes_on_to_a_higher_sparsity",
            "after_the_end.py::test_a_published_model_that_was_removed_is_made_again",
            "another_recipe.py::test_what_does_not_shape_the_result_may_change",
            "compare_again.py::test_a_finished_cell_stays_where_more_sparsities_are_asked_for",
            "compare.py::test_another_runs_model_is_not_shown_as_the_cells",
            "compare.py::test_several_models_stand_apart",
            "compare.py::test_stopped_between_cells_it_does_what_is_missing",
            "compare.py::test_what_cells_have_in_common_is_done_once",
            "family.py::test_a_text_too_short_for_one_member_is_its_own_failure",
            "family.py::test_workers_are_opened_once_for_all_methods_of_a_member",
            "formats.py::test_one_text_has_one_perplexity",
            "generated_runs.py::test_a_whole_run_on_a_mixture_with_it",
            "generated_runs.py::test_clean_removes_it_where_no_run_needs_it",
            "generated_runs.py::test_fewer_rows_at_once_where_memory_runs_out",
            "healed_runs.py::test_what_is_healed_is_not_healed_again",
            "journal.py::test_a_model_asked_for_too_late_costs_no_round",
            "measured_once.py::test_damaged_perplexities_are_told_and_measured_again",
            "measured_once.py::test_what_was_measured_counts_only_for_the_same_windows",
            "runs_on_images.py::test_auto_starts_from_nothing",
            "side_by_side.py::test_workers_are_opened_once_a_model",
            "beside.py::test_the_last_of_several_shows_perplexity_over_sparsity",
            "budget.py::test_the_same_budget_is_refused_before_workers_start",
            "ctrl_c.py::test_a_process_ends_and_says_what_is_kept[family]",
            "checkpoints_in_little_memory.py"
            "::test_that_memory_ran_out_is_known_before_the_first_checkpoint",
            "mi_linear.py::test_a_start_makes_the_first_loss_smaller",
            "processors.py::test_too_few_blocks_behind_which_nothing_is_added",
            "report_under_way.py::test_a_run_stopped_in_healing",
            "report_under_way.py::test_a_run_stopped_in_its_tournament",
            "samples_about_images.py::test_text_samples_stay_where_images_cannot_be_asked_about",
            "tournament.py::test_a_run_removes_what_won_and_goes_on_after_any_trial",
            "tournament.py::test_a_set_whose_healing_diverges_loses",
            "tournament.py::test_a_set_that_was_found_is_not_looked_for_again",
        )
    ),
    # Numbers of tasks that are kept: for text alone, and read by the same process, they stay.
    f"{UNIT}tasks.py::test_a_damaged_record_is_told_and_measured_again",
    f"{UNIT}tasks_with_images.py::test_a_number_is_measured_again_for_other_images",
    f"{UNIT}task_processes.py::test_memory_that_runs_out_is_one_message",
    # All names of lm-eval take their time to be read: those of a folder stay.
    f"{UNIT}tasks.py::test_an_unknown_task_is_told_with_names_like_it",
    f"{INTEGRATION}tasks_on_ray.py",
    # The code generator takes its time: the compiler before it stays.
    f"{UNIT}compiled.py::test_real_code_computes_the_same",
    f"{UNIT}benchmarks.py::test_saving_in_three_ways",
    # Its parts one by one stay, not compiled.
    f"{UNIT}gpu_benchmark.py::test_one_device_with_random_weights",
    f"{UNIT}gpu_benchmark.py::test_blocks_are_compiled_on_a_cpu_if_wanted",
)
"""A file, a test of it (with all its cases), or a single case, as pytest writes them."""

THINNED = {
    f"{INTEGRATION}held_by_deepspeed.py::test_a_backward_pass_holds_what_is_counted": 1,
    f"{INTEGRATION}data.py::test_the_stream_is_that_of_one_process": 1,
    f"{INTEGRATION}faults.py::test_a_large_upload_survives": 2,
    f"{INTEGRATION}faults.py::test_looking_survives": 1,
    f"{INTEGRATION}faults.py::test_reading_survives": 2,
    f"{INTEGRATION}faults.py::test_writing_survives": 2,
    f"{INTEGRATION}images_on_ray.py::test_samples_are_those_of_one_process": 1,
    f"{INTEGRATION}meeting.py::test_a_stopped_worker_is_given_up_within_the_bound": 1,
    "tests/sweep/test_classes.py::test_exact_or_refused": 5,
    f"{UNIT}after_the_end.py::test_a_run_killed_after_its_last_model_is_done": 1,
    f"{UNIT}budget.py::test_a_run_stops_at_the_next_thing_saved_and_goes_on_to_the_same_bytes": 1,
    f"{UNIT}samples_about_images.py::test_answers_are_those_of_transformers": 1,
    f"{UNIT}sharing.py::test_whatever_the_method_a_group_is_published_with_the_same_matrices": 2,
    f"{UNIT}slicegpt_healed.py::test_healing_is_adam_on_the_sliced_model": 1,
    f"{UNIT}slicegpt_healed.py::test_a_stopped_one_ends_with_the_same_bytes": 1,
    f"{UNIT}another_recipe.py::test_a_run_begun_on_a_gpu_is_not_gone_on_with_elsewhere": 1,
    f"{UNIT}another_recipe.py::test_another_recipe_is_refused_and_the_difference_shown": 2,
    f"{UNIT}another_recipe.py::test_another_text_or_model_is_refused": 1,
    f"{UNIT}architecture.py::test_rows_at_once_change_only_the_last_bits": 4,
    f"{UNIT}architecture.py::test_states_and_logits_are_the_real_models_to_the_bit": 14,
    f"{UNIT}arrived_as_sent.py::test_what_did_not_arrive_as_sent_fails_the_run": 2,
    f"{UNIT}checkpoint_of_a_run.py::test_a_stopped_run_goes_on_within_its_round": 1,
    f"{UNIT}checkpoints_in_little_memory.py"
    "::test_a_run_that_took_fewer_windows_goes_on_with_as_few": 1,
    f"{UNIT}compared_methods.py::test_a_stopped_run_ends_with_the_same_bytes": 2,
    f"{UNIT}deeper.py::test_the_deeper_model_starts_as_the_old_one_bit_for_bit": 8,
    f"{UNIT}deeper.py::test_up_scaling_is_published_as_the_library_would_build_it": 4,
    f"{UNIT}deeper_runs.py::test_a_run_that_is_stopped_ends_with_the_same_bytes": 2,
    f"{UNIT}compiled.py::test_compiling_does_not_grow_with_depth_or_rounds": 1,
    f"{UNIT}experts.py::test_blocks_are_removed_exactly": 4,
    f"{UNIT}experts.py::test_what_was_trained_is_published_as_the_model_was": 2,
    f"{UNIT}fused_experts.py::test_parameters_are_stored_as_the_tensors_they_were_made_of": 11,
    f"{UNIT}generated_text.py::test_it_is_what_the_library_generates": 4,
    f"{UNIT}generated_text.py::test_other_settings_are_another_text": 1,
    f"{UNIT}generated_text.py::test_prompts_that_are_none": 2,
    f"{UNIT}going_on.py::test_a_stopped_run_goes_on_and_ends_with_the_same_bytes": 1,
    f"{UNIT}healed_runs.py::test_a_damaged_healed_model_is_healed_again": 1,
    f"{UNIT}healed_runs.py::test_a_run_that_is_stopped_in_healing_ends_with_the_same_bytes": 1,
    f"{UNIT}healing.py::test_loss_and_gradients_are_those_of_the_real_models": 9,
    f"{UNIT}healing.py::test_stopped_after_any_part_it_ends_with_the_same_bytes": 1,
    f"{UNIT}images.py::test_scores_are_those_of_whole_passes": 6,
    f"{UNIT}journal.py::test_blocks_of_earlier_rounds_go_unless_a_model_is_made_of_them": 1,
    f"{UNIT}journal.py::test_damage_costs_the_last_round_or_as_many_as_need_its_files": 1,
    f"{UNIT}journal.py::test_damage_is_told_by_name_and_costs_only_its_own_round": 2,
    f"{UNIT}metrics.py::test_a_run_and_its_card_name_the_metric_and_the_cost_is_known_before": 1,
    f"{UNIT}metrics.py::test_block_forwards_are_counted_truly": 6,
    f"{UNIT}metrics.py::test_chooses_what_the_full_table_chooses_round_after_round": 4,
    f"{UNIT}metrics.py::test_equals_the_formula_on_full_forward_passes": 12,
    f"{UNIT}metrics.py::test_score_names_the_metric": 1,
    f"{UNIT}mi_linear.py::test_a_run_that_is_killed_ends_with_the_same_bytes": 1,
    f"{UNIT}mi_linear.py::test_fine_tuning_starts_from_the_repaired_block": 1,
    f"{UNIT}mi_linear.py::test_the_published_model_is_the_dense_one_with_one_layer_changed": 1,
    f"{UNIT}naming.py::test_a_whole_run_in_a_local_folder_of_any_name": 1,
    f"{UNIT}not_finite.py::test_compress_names_the_tensor_and_leaves_nothing": 3,
    f"{UNIT}proof.py::test_an_honest_model_is_proven_exactly": 5,
    f"{UNIT}processors.py::test_a_run_on_images": 1,
    f"{UNIT}publish.py::test_from_pretrained_gives_the_dense_model_without_the_blocks": 5,
    f"{UNIT}rounds.py::test_every_architecture_starts_learns_folds_and_reloads": 4,
    f"{UNIT}images_mixed.py::test_a_run_on_a_mixture": 1,
    f"{UNIT}images_mixed.py::test_scores_are_those_of_whole_passes": 2,
    f"{UNIT}removable.py::test_no_other_block_goes": 1,
    f"{UNIT}removable.py::test_one_attention_block_stays_however_blocks_are_chosen": 2,
    f"{UNIT}runs_on_images.py::test_a_run_on_images": 1,
    f"{UNIT}same_weights.py::test_ties_as_from_pretrained_makes_them": 2,
    f"{UNIT}scoring.py::test_the_number_of_replicas_changes_no_bit": 6,
    f"{UNIT}slicegpt.py::test_a_run_that_is_killed_ends_with_the_same_bytes": 1,
    f"{UNIT}slicegpt.py::test_what_is_published_is_the_dense_model_on_projected_states": 1,
    f"{UNIT}sweep.py::test_chooses_what_the_full_table_chooses_round_after_round": 4,
    f"{UNIT}tasks_with_images.py::test_answers_are_those_of_plain_generate": 1,
    f"{UNIT}other_processors.py::test_a_run_on_images": 1,
    f"{UNIT}traffic.py::test_a_run_reads_no_more_than_was_planned": 5,
    f"{UNIT}training_checkpoints.py::test_damage_is_said_and_costs_the_group": 2,
    f"{UNIT}training_checkpoints.py::test_another_set_up_begins_anew": 1,
    f"{UNIT}training_checkpoints.py::test_whenever_it_is_stopped_only_what_is_left_is_done": 1,
    f"{UNIT}training_on_images.py::test_healing_has_the_gradients_of_the_real_model": 4,
    f"{UNIT}unusual_models.py::test_published_is_the_dense_model_without_the_blocks": 4,
    f"{UNIT}valid_models.py::test_what_builds_nothing_is_no_reason": 3,
    f"{UNIT}walks.py::test_a_walk_holds_one_set_of_states_and_training_a_second": 1,
    f"{UNIT}walks.py::test_a_window_depends_on_its_batch_alone": 3,
}
"""Tests of many cases of one kind: how many of them, evenly spread, `make test` runs."""


def covers(entry: str, nodeid: str) -> bool:
    """Whether an entry of a list means this test."""
    return nodeid == entry or nodeid.startswith((f"{entry}::", f"{entry}["))


def spread(count: int, kept: int) -> set[int]:
    """So many of the numbers below `count`, evenly spread, the first among them."""
    return {index * count // kept for index in range(kept)}


def mark_slow(items: Iterable[pytest.Item], whole_files: bool) -> None:
    """Mark what the lists name.

    Raises pytest.UsageError for an entry that names nothing: a test that was renamed would move
    back into the short run unnoticed. Only where whole files are collected can one be missing, and
    only there are cases counted.
    """
    items = list(items)
    collected = {item.nodeid.partition("::")[0] for item in items}

    def named(entry: str) -> list[pytest.Item]:
        found = [item for item in items if covers(entry, item.nodeid)]
        file = entry.partition("::")[0]
        if not (ROOT / file).exists() or (whole_files and file in collected and not found):
            raise pytest.UsageError(f"tests/slow.py names {entry}, and there is no such test")
        return found

    for item in (item for entry in SLOW for item in named(entry)):
        item.add_marker(pytest.mark.slow)
    for entry, kept in THINNED.items():
        cases = named(entry)
        if not whole_files or not cases:
            continue
        if kept >= len(cases):
            raise pytest.UsageError(f"tests/slow.py keeps {kept} of {len(cases)} cases: {entry}")
        stay = spread(len(cases), kept)
        for index, item in enumerate(cases):
            if index not in stay:
                item.add_marker(pytest.mark.slow)
