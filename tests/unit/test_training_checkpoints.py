"""Fine-tuning that is stopped goes on from its last training checkpoint, and ends with the same
bytes; what cannot be trusted is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (  # noqa: F401 - fixtures
    BATCH,
    CPU,
    EPOCHS,
    LENGTH,
    WHOLE,
    WINDOWS,
    Bench,
    _bench,
    _undisturbed,
    result,
)
from models import open_stack, token_windows

from fusegpt_ray.errors import Terminated
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import opened, sealed
from fusegpt_ray.training import pauses
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

# --- going on ---


@pytest.mark.parametrize("bench", ["", "memory://"], indirect=True)
def test_whenever_it_is_stopped_only_what_is_left_is_done(bench: Bench, undisturbed: Any) -> None:
    for after in range(1, EPOCHS + 1):
        bench.stopped(after)
        assert bench.heard == [*range(1, after + 1)]
        assert result(bench.tune()) == undisturbed
        assert bench.said == [f"  going on after part {after} of {EPOCHS}"]
        assert bench.heard == [*range(after + 1, EPOCHS + 1)]
        assert len(bench.steps) == (EPOCHS - after) * WHOLE
        storage.remove(bench.folder, recursive=True)


def test_stopped_again_and_again(bench: Bench, undisturbed: Any) -> None:
    for after in (1, 2, 3):
        bench.stopped(after)
        assert bench.heard == [after]
    assert result(bench.tune()) == undisturbed
    assert len(bench.steps) == WHOLE


def test_a_notice_makes_a_checkpoint_at_the_next_step(
    bench: Bench, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "ASK_SECONDS", 0.0)
    for step in range(1, EPOCHS * WHOLE + 1):
        with pytest.raises(Terminated):
            bench.tune(terminated=step, checkpoint_minutes=1e6)
        assert len(bench.steps) == step
        assert result(bench.tune(checkpoint_minutes=1e6)) == undisturbed
        assert len(bench.steps) == EPOCHS * WHOLE - step
        part, more = divmod(step, WHOLE)
        steps = f" and {more} step" if more else ""
        assert bench.said in (
            [f"  going on after part {part} of {EPOCHS}{steps}"],
            [f"  going on after part {part - 1} of {EPOCHS} and {WHOLE} steps"],
        )
        storage.remove(bench.folder, recursive=True)


def test_only_the_last_checkpoint_stays(bench: Bench) -> None:
    bench.stopped(1)
    first = bench.state_file()
    bench.stopped(3)
    assert bench.state_file() != first  # there is one, or it had failed


def test_checkpoints_are_as_far_apart_as_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tune(checkpoint_minutes=1e6)
    assert bench.files() == {}
    # A quarter of a minute a step.
    monkeypatch.setattr(
        "fusegpt_ray.training.checkpoints.time.monotonic", lambda: 15.0 * len(bench.steps)
    )
    bench.stopped(EPOCHS, checkpoint_minutes=1.2)
    losses = opened(bench.files()["checkpoint.json"])["losses"]
    assert len(losses) == 3


def test_the_time_before_counts(bench: Bench) -> None:
    bench.stopped(3)
    record = opened(bench.files()["checkpoint.json"])
    storage.write(storage.join(bench.kept, "checkpoint.json"), sealed(record | {"seconds": 1000.0}))
    bench.stopped(4)
    assert opened(bench.files()["checkpoint.json"])["seconds"] > 1000
    assert 1000 < bench.tune().train_seconds < 2000


# --- what is not gone on from ---


def cut(uri: str) -> None:
    storage.write(uri, storage.read(uri)[:-1])


def flip(uri: str) -> None:
    data = bytearray(storage.read(uri))
    data[-1] ^= 1
    storage.write(uri, bytes(data))


@pytest.mark.parametrize("which", ["checkpoint.json", "state"])
@pytest.mark.parametrize("damage", [cut, flip, storage.remove])
def test_damage_is_said_and_costs_the_group(
    which: str, damage: Callable[[str], None], bench: Bench, undisturbed: Any
) -> None:
    bench.stopped(2)
    uri = bench.state_file() if which == "state" else storage.join(bench.kept, which)
    damage(uri)
    bench.stopped(1)
    if (which, damage) == ("checkpoint.json", storage.remove):
        assert bench.said == []  # nothing tells that there was one
    else:
        (line,) = bench.said
        assert line.startswith(f"WARNING: {uri} is ")
        assert line.endswith("; training from the beginning")
    assert bench.heard == [1]
    assert result(bench.tune()) == undisturbed
    assert bench.heard == [2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"origin": "others"}, "after these rounds, not others"),
        ({"micro_batch": 2}, f"micro_batch_asked {BATCH}, not 2, micro_batch {BATCH}, not 2"),
        ({"torch": "0.1"}, f"torch {torch.__version__}, not 0.1"),
    ],
)
def test_another_set_up_begins_anew(
    changes: Mapping[str, Any], named: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.stopped(2)
    before = bench.files()
    if "torch" in changes:
        monkeypatch.setattr("fusegpt_ray.training.checkpoints.torch.__version__", changes["torch"])
        changes = {}
    bench.stopped(1, checkpoint_minutes=1e6, **changes)
    assert bench.said == [
        f"  a training checkpoint of another set-up is left aside ({named}); training from the"
        " beginning"
    ]
    assert bench.files() == before
    bench.stopped(1, **changes)
    assert bench.heard == [1]
    assert not before.keys() & {name for name in bench.files() if name != "checkpoint.json"}


def test_what_recomputes_activations_may_change(bench: Bench, undisturbed: Any) -> None:
    bench.stopped(2)
    assert result(bench.tune(recompute_activations=True)) == undisturbed
    assert bench.heard == [3, 4]


# --- the state ---


def stepper_of(folder: Path) -> tuple[TorchStepper, Callable[[], list[Any]]]:
    recipe = {
        "model": {"source": "x"},
        "calibration": {"data": "x"},
        "output": {"uri": "x", "name": "x"},
    }
    fusion = {"group_size": 3, "batch": BATCH, "rank": 4, "lora_rank": 4}
    settings, stack = Recipe.parse(recipe | {"fusion": fusion}).fusion, open_stack(folder)
    job = GroupFusion(stack, stack, 2, settings, True, 0, "nowhere")
    runner = Runner(stack, CPU, torch.float32, BATCH)
    trunk = runner.trunk
    contexts = trunk.contexts(BATCH, LENGTH)
    span = job.build(trunk.meta_blocks, contexts, CPU, torch.float32)
    states = States(*job.source.walk(runner, token_windows(WINDOWS, LENGTH)))
    config = TrainingConfig(settings.loss, BATCH, 1)
    stepper = TorchStepper.make(span, job.parameter_groups(span), config, 10, CPU)
    return stepper, lambda: list(states.batches(BATCH))


def test_a_loaded_state_is_the_same_to_the_bit(checkpoint: Callable[[str], Path]) -> None:
    (one, batches), (other, _) = stepper_of(checkpoint("llama")), stepper_of(checkpoint("llama"))
    for batch in batches() * 2:
        one.step(batch)
    other.load({name: value.clone() for name, value in one.state().items()})
    for _ in range(3):
        assert [group["lr"] for group in one.optimizer.param_groups] == [
            group["lr"] for group in other.optimizer.param_groups
        ]
        assert one.schedule.get_last_lr() == [group["lr"] for group in one.optimizer.param_groups]
        states = one.state(), other.state()
        assert states[0].keys() == states[1].keys()
        assert {"steps", "0.value", "0.exp_avg", "0.exp_avg_sq", "0.step"} <= states[0].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name
        losses = [stepper.step(batches()[0]) for stepper in (one, other)]
        assert torch.equal(*losses)


def test_the_record_tells_what_it_is(bench: Bench) -> None:
    bench.stopped(2)
    record = opened(bench.files()["checkpoint.json"])
    assert json.loads(json.dumps(record["owner"])) == {
        "after": "these rounds",
        "donor": 2,
        "micro_batch_asked": BATCH,
        "torch": torch.__version__,
        "engine": "local",
        "device": "cpu",
        "states_batch_size": 4,
    }
    (name,) = record["files"]
    assert record["files"][name]["bytes"] == len(bench.files()[name])
    assert len(record["losses"]) == 2
