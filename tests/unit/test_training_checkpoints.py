"""Fine-tuning that is stopped goes on from its last training checkpoint, and ends with the same
bytes; what cannot be trusted is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_stack, token_windows

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import opened, sealed
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.local import LocalWorkers

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH, EPOCHS = 8, 7, 4, 4
WHOLE = WINDOWS // BATCH
"""Steps of an epoch."""


class Stopped(Exception):
    """Stands for a kill: nothing is tidied up after it."""


@dataclass
class Bench:
    """A group of a tiny model, fine-tuned by the local engine as often as asked; what it says,
    and the steps it makes.
    """

    model: Path
    folder: str
    said: list[str] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """The micro-batch of each."""
    fits: int = BATCH
    """Windows at once that the memory has room for, from the first step on; see `until`."""
    until: int = 0
    """Steps that have room for any number."""

    def tune(
        self, stop: int | None = None, origin: str = "these rounds", **cluster: Any
    ) -> Trained:
        """As one start of a run; `stop`: the epoch after which it is killed."""
        recipe = Recipe.parse(
            {
                "model": {"source": str(self.model)},
                "calibration": {"data": "unused", "windows": WINDOWS, "length": LENGTH},
                "importance": {"windows": WINDOWS, "batch": 4},
                "fusion": {
                    "group_size": 3,
                    "epochs": EPOCHS,
                    "batch": BATCH,
                    "rank": 4,
                    "lora_rank": 4,
                    "fold": "at_end",  # so that what was learned is saved, too
                },
                "cluster": {"engine": "local", "checkpoint_minutes": 0, **cluster},
                "output": {"uri": "unused", "name": "x"},
            }
        )
        dense = open_stack(self.model)
        job = GroupFusion(dense, dense, 2, recipe.fusion, True, 0, self.folder)
        self.said, self.heard, self.steps = [], [], []

        def news(item: News) -> None:
            if isinstance(item, str):
                self.said.append(item)
                return
            self.heard.append(item[0])
            if item[0] == stop:
                raise Stopped

        step = TorchStepper.step

        def counted(stepper: TorchStepper, batch: Any) -> torch.Tensor:
            rows = stepper.micro_batch or BATCH
            if rows > self.fits and len(self.steps) >= self.until:
                raise MemoryError("as if")
            self.steps.append(rows)
            return step(stepper, batch)

        with (
            pytest.MonkeyPatch.context() as patch,
            LocalWorkers(Setup.of(recipe, Source.find(str(self.model), None), dense)) as engine,
        ):
            patch.setattr(TorchStepper, "step", counted)
            windows_WT = token_windows(WINDOWS, LENGTH).numpy()
            return train_span(engine, job.task(windows_WT, recipe.cluster, origin, self.kept), news)

    def stopped(self, after: int, **changes: Any) -> None:
        with pytest.raises(Stopped):
            self.tune(after, **changes)

    @property
    def kept(self) -> str:
        return storage.join(self.folder, "checkpoints")

    def files(self) -> dict[str, bytes]:
        return {
            name: storage.read(storage.join(self.kept, name)) for name in storage.names(self.kept)
        }

    def state_file(self) -> str:
        (name,) = [name for name in self.files() if name != "checkpoint.json"]
        return storage.join(self.kept, name)


def result(tuned: Trained) -> tuple[dict[str, tuple[int, str]], list[float], int]:
    """What must not depend on being stopped: all files by name and checksum, the losses, and
    the windows at once.
    """
    files = {
        uri.rsplit("/", 1)[-1]: (record.size, record.sha256)
        for uri, record in tuned.saved.files.items()
    }
    assert len(files) == 6
    return files, tuned.losses, tuned.micro_batch


@pytest.fixture
def bench(request: Any, checkpoint: Callable[[str], Path], tmp_path: Path) -> Bench:
    store = getattr(request, "param", "")
    return Bench(checkpoint("llama"), f"{store}{tmp_path}/run")


@pytest.fixture
def undisturbed(bench: Bench, tmp_path: Path) -> Any:
    there = replace(bench, folder=str(tmp_path / "undisturbed"))
    return result(there.tune(checkpoint_minutes=1e6))


# --- going on ---


@pytest.mark.parametrize("bench", ["", "memory://"], indirect=True)
def test_whenever_it_is_stopped_only_what_is_left_is_done(bench: Bench, undisturbed: Any) -> None:
    for after in range(1, EPOCHS + 1):
        bench.stopped(after)
        assert bench.heard == [*range(1, after + 1)]
        assert result(bench.tune()) == undisturbed
        assert bench.said == [f"  going on after epoch {after} of {EPOCHS}"]
        assert bench.heard == [*range(after + 1, EPOCHS + 1)]
        assert len(bench.steps) == (EPOCHS - after) * WHOLE
        storage.remove(bench.folder, recursive=True)


def test_stopped_again_and_again(bench: Bench, undisturbed: Any) -> None:
    for after in (1, 2, 3):
        bench.stopped(after)
        assert bench.heard == [after]
    assert result(bench.tune()) == undisturbed
    assert len(bench.steps) == WHOLE


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
    now = [0.0]

    def later() -> float:  # a quarter of a minute at each look
        now[0] += 15
        return now[0]

    monkeypatch.setattr("fusegpt_ray.training.checkpoints.time.monotonic", later)
    bench.stopped(EPOCHS, checkpoint_minutes=0.7)
    losses = opened(bench.files()["checkpoint.json"])["losses"]
    assert 0 < len(losses) < EPOCHS


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
        assert line.endswith("; fine-tuning this group from its beginning")
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
        f"  a training checkpoint of another set-up is left aside ({named}); fine-tuning this group"
        " from its beginning"
    ]
    assert bench.files() == before
    bench.stopped(1, **changes)
    assert bench.heard == [1]
    assert not before.keys() & {name for name in bench.files() if name != "checkpoint.json"}


def test_what_recomputes_activations_may_change(bench: Bench, undisturbed: Any) -> None:
    bench.stopped(2)
    assert result(bench.tune(recompute_activations=True)) == undisturbed
    assert bench.heard == [3, 4]


# --- memory that ran out ---


@pytest.fixture
def cramped(bench: Bench, tmp_path: Path) -> Any:
    """A run whose memory is too small from its second epoch on, and that nobody disturbs."""
    there = replace(bench, folder=str(tmp_path / "cramped"), fits=2, until=WHOLE + 1)
    found = result(there.tune())
    assert there.heard == [1, 1, 2, 3, 4]
    assert found[2] == 2
    return found


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_took_fewer_windows_goes_on_with_as_few(
    after: int, bench: Bench, cramped: Any, undisturbed: Any
) -> None:
    assert cramped[0] != undisturbed[0]
    bench.fits = 2
    bench.stopped(after)
    bench.fits = (
        BATCH  # now there would be room, but the run is to end as if it had not been stopped
    )
    assert result(bench.tune()) == cramped
    assert bench.heard == [*range(after + 1, EPOCHS + 1)]
    assert set(bench.steps) == {2}


def test_that_memory_ran_out_is_known_before_the_first_checkpoint(
    bench: Bench, cramped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the attempt with more windows does not count, nor are they tried again."""
    bench.fits, bench.until = 2, WHOLE + 1
    calls = []

    def dies(stepper: TorchStepper, batch: Any) -> torch.Tensor:
        calls.append(stepper.micro_batch)
        if stepper.micro_batch == 2:
            raise Stopped
        return step(stepper, batch)

    step = TorchStepper.step
    monkeypatch.setattr(TorchStepper, "step", dies)
    with pytest.raises(Stopped):
        bench.tune()
    assert calls == [BATCH] * bench.until + [2]
    monkeypatch.undo()
    bench.fits = BATCH
    assert result(bench.tune()) == cramped
    assert bench.heard == [1, 2, 3, 4]
    assert set(bench.steps) == {2}


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
