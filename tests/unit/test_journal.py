"""A run that stops, for whatever reason, and the same command again."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import full_disk
from models import load_model, open_stack
from safetensors.torch import load_file, save_file
from test_cli import Desk, random_text

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.local import LocalEngine
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.run.journal import Done, Journal, identity

Weights = dict[str, bytes]


class Watching(Display):
    """Keeps what it was told; the user presses Ctrl-C where round `stop` begins."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__()
        self.stop, self.said, self.rounds = stop, list[str](), list[int]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        if number == self.stop:
            raise KeyboardInterrupt
        self.rounds.append(number)
        super().round_begins(number, rounds, blocks)


@pytest.fixture
def desk(checkpoint: Callable[[str], Path], tmp_path: Path) -> Desk:
    return Desk.make(tmp_path, checkpoint("llama"))


def recipe(desk: Desk, **changes: Any) -> Recipe:
    return Recipe.parse(desk.recipe(**({"sparsity": [0.2, 0.6]} | changes)))


def stopped(desk: Desk, stop: int = 2, **changes: Any) -> None:
    """A run that was stopped where round `stop` began."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes), Watching(stop))
    assert not list(desk.out.glob("*/fusegpt.json"))


def run_folder(desk: Desk) -> Path:
    return desk.out / "demo.run"


def rounds(journal: Journal) -> list[Done]:
    """The rounds of a journal in which nothing is damaged."""
    complaints: list[str] = []
    found = journal.rounds([], complaints.append)
    assert complaints == []
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(desk: Desk) -> dict[str, bytes]:
    """The weights and configurations of all published models."""
    return {name: data for name, data in contents(desk.out).items() if name.endswith(("/model.safetensors", "/config.json"))}


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """By way of keeping a fused block's terms: what a run publishes that nobody disturbs."""
    found = {}
    for fold in ("at_end", "each_round"):
        desk = Desk.make(tmp_path_factory.mktemp(fold), checkpoint("llama"))
        fusion = desk.recipe()["fusion"] | {"fold": fold}
        compress(recipe(desk, fusion=fusion), Watching())
        found[fold] = published(desk)
    assert len(found["at_end"]) == 4 and found["at_end"] != found["each_round"]
    return found


# --- going on ---


@pytest.mark.parametrize(("stop", "fold"), [(2, "at_end"), (3, "at_end"), (3, "each_round")])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(stop: int, fold: str, desk: Desk, undisturbed: dict[str, Weights]) -> None:
    fusion = desk.recipe()["fusion"] | {"fold": fold}
    stopped(desk, stop, fusion=fusion)
    before = contents(run_folder(desk))
    assert sorted(name for name in before if name.startswith("round-")) == [f"round-{n:03d}.json" for n in range(1, stop)]
    show = Watching()
    compress(recipe(desk, fusion=fusion), show)

    assert show.rounds == list(range(stop, 4))
    assert f"going on after round {stop - 1} of 3 (found in {run_folder(desk)})" in show.said
    assert published(desk) == undisturbed[fold]
    assert not run_folder(desk).exists()


def test_a_failed_run_goes_on_by_the_same_command(
    desk: Desk, undisturbed: dict[str, Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    obstacle = run_folder(desk) / "blocks/round-002"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("where the second round wants its folder")
    command = ["compress", desk.write(sparsity=[0.2, 0.6])]
    assert main(command) == 1
    end = capsys.readouterr().err.splitlines()[-2:]
    assert end[0] == f"stopped in round 2 of 3; 1 are finished in {run_folder(desk)}"
    assert end[1] == "The same command goes on from what is saved."

    obstacle.unlink()
    assert main(command) == 0
    assert "going on after round 1 of 3" in capsys.readouterr().err
    assert published(desk) == undisturbed["at_end"]


def test_ctrl_c_exits_130_and_says_how_to_go_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusegpt_ray.pipeline.Display", lambda: Watching(stop=2))
    assert main(["compress", desk.write()]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from what is saved\n"


def test_what_a_stopped_round_left_is_not_trusted(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    """Blocks without the record of their round are written again."""
    stopped(desk, 3)
    (run_folder(desk) / "round-002.json").unlink()
    half = sorted((run_folder(desk) / "blocks/round-002").iterdir())
    for file in half:
        file.write_bytes(file.read_bytes()[:100])
    assert half
    compress(recipe(desk), Watching())
    assert published(desk) == undisturbed["at_end"]


def test_a_record_cut_off_by_a_full_disk_is_no_record(desk: Desk) -> None:
    """Whatever ends the writing of a record in its middle must not stand in the way of the next attempt."""
    journal, dense = Journal.of(recipe(desk)), open_stack(desk.model)
    this = identity(recipe(desk), "0" * 64, dense, torch.float32)
    with pytest.raises(OSError, match="too large"), full_disk(100):
        journal.begin(this)
    journal.begin(this)
    done = Done({"removed": 3}, dense.drop(3), {})
    with pytest.raises(OSError, match="too large"), full_disk(100):
        journal.commit(1, done)
    assert rounds(journal) == []
    journal.commit(1, done)
    assert rounds(journal) == [done]
    assert not [path for path in run_folder(desk).iterdir() if path.name.startswith(".")]


# --- the same command, and others, after the end ---


def test_a_published_model_that_was_removed_is_made_again(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    compress(recipe(desk), Watching())
    shutil.rmtree(desk.out / "demo-p60")
    shutil.rmtree(desk.out / "demo-p20")
    compress(recipe(desk), Watching())
    assert published(desk) == undisturbed["at_end"]


def test_a_finished_run_goes_on_to_a_higher_sparsity(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    compress(recipe(desk, sparsity=0.2), Watching())
    compress(recipe(desk, sparsity=0.6), Watching())
    assert published(desk) == undisturbed["at_end"]


# --- another recipe, text or model ---


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("recipe.seed", 1),
        ("recipe.method", "mi+ft"),
        ("recipe.fusion.rank", {"rank": 3}),
        ("recipe.calibration.seed", {"seed": 1}),
        ("recipe.importance.batch", {"batch": 4}),
        ("recipe.model.dtype", {"dtype": "bfloat16"}),
    ],
)
def test_another_recipe_is_refused_and_the_difference_shown(key: str, section: Any, desk: Desk) -> None:
    stopped(desk)
    before = contents(desk.folder)
    name = key.split(".")[1]
    changed = desk.recipe()[name] | section if isinstance(section, dict) else section
    with pytest.raises(UserError) as refused:
        compress(recipe(desk, **{name: changed}), Watching())
    assert (refused.value.key, refused.value.value) == ("output.name", "demo")
    assert f"an unfinished run in {run_folder(desk)} has {key} = " in refused.value.problem
    assert contents(desk.folder) == before


def other_text(desk: Desk) -> None:
    (desk.folder / "calibration.txt").write_text(random_text(200, seed=3))


def other_config(desk: Desk) -> None:
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def other_dtype(desk: Desk) -> None:
    load_model(desk.model).to(torch.bfloat16).save_pretrained(desk.model)


def other_weights(desk: Desk) -> None:
    tensors = load_file(desk.model / "model.safetensors")
    changed = {name: value * 1.5 for name, value in tensors.items()}
    save_file(changed, desk.model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_text, "windows_sha256"), (other_config, "rms_norm_eps"), (other_dtype, "dtype"), (other_weights, "model")],
    ids=["text", "config", "dtype", "weights"],
)
def test_another_text_or_model_is_refused(change: Callable[[Desk], None], named: str, desk: Desk) -> None:
    stopped(desk)
    change(desk)
    with pytest.raises(UserError, match=f"an unfinished run .*{named}"):
        compress(recipe(desk), Watching())


def test_what_does_not_shape_the_result_may_change(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    stopped(desk)
    changes = {
        "cluster": {"engine": "local", "workers": 2, "replicas": 3},
        "evaluation": {"held-out": {"data": str(desk.heldout)}},
        "output": {"uri": str(desk.out), "name": "demo", "shard_gb": 1.0},
    }
    show = Watching()
    compress(recipe(desk, **changes), show)
    assert show.rounds == [2, 3]
    assert published(desk) == undisturbed["at_end"]


# --- the records ---


def test_records_survive_json(desk: Desk) -> None:
    stopped(desk, 3)
    found = rounds(Journal.of(recipe(desk)))
    dense = open_stack(desk.model)
    assert [len(done.stack) for done in found] == [4, 3]
    for done in found:
        record, stack = done.record, done.stack
        assert Stack.from_json(json.loads(json.dumps(stack.to_json()))) == stack
        assert record["removed"] not in stack.kept and stack.trunk == dense.trunk
        assert set(record["group"]) - {record["removed"]} == {block.dense for block in stack.blocks if block.terms}
        assert record["loss_first"] == record["losses"][0] and record["loss_last"] == record["losses"][-1]
    last = {block.dense: block for block in found[-1].stack.blocks}
    terms = [len(block.terms.donors) for block in last.values() if block.terms]
    assert max(terms) == 2, "or no block was fused twice"

    elsewhere = Journal("memory://journal/test.run")
    elsewhere.begin({"a": [1, 2]})
    elsewhere.begin({"a": (1, 2)})  # the same in JSON
    for number, done in enumerate(found, 1):
        elsewhere.commit(number, done)
    assert rounds(elsewhere) == found


def test_the_manifest_holds_the_records(desk: Desk) -> None:
    stopped(desk, 3)
    records = [done.record for done in rounds(Journal.of(recipe(desk)))]
    compress(recipe(desk), Watching())
    manifest = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())
    assert manifest["rounds"][:2] == records and len(manifest["rounds"]) == 3
    assert manifest["removed"] == [record["removed"] for record in manifest["rounds"]]


def test_a_record_is_never_changed(desk: Desk) -> None:
    journal, dense = Journal.of(recipe(desk)), open_stack(desk.model)
    done = Done({"removed": 3}, dense.drop(3), {})
    journal.commit(1, done)
    with pytest.raises(FileExistsError):
        journal.commit(1, Done({"removed": 2}, dense.drop(2), {}))
    assert rounds(journal) == [done]


# --- damage ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def last_block(desk: Desk) -> Path:
    """A file of the second round that the next one needs."""
    return max((run_folder(desk) / "blocks/round-002").glob("*.learned.safetensors"))


def last_record(desk: Desk) -> Path:
    return run_folder(desk) / "round-002.json"


@pytest.mark.parametrize("which", [last_block, last_record])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_told_by_name_and_costs_only_its_own_round(
    which: Callable[[Desk], Path], damage: Callable[[Path], None], desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    stopped(desk, 3)
    file = which(desk)
    damage(file)
    show = Watching()
    compress(recipe(desk), show)
    told = [line for line in show.said if line.startswith("WARNING")]
    if (which, damage) == (last_record, Path.unlink):  # the same as a round that was never finished
        assert told == []
    else:
        assert len(told) == 1 and str(file) in told[0] and "going back to the end of round 1" in told[0]
    assert show.rounds == [2, 3]
    assert published(desk) == undisturbed["at_end"]


def test_a_missing_record_in_the_middle_is_told(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    stopped(desk, 3)
    (run_folder(desk) / "round-001.json").unlink()
    show = Watching()
    compress(recipe(desk), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "round-001.json is missing" in told and "round 0" in told
    assert published(desk) == undisturbed["at_end"]


def test_a_damaged_identity_is_no_reason_to_start_anew(desk: Desk) -> None:
    stopped(desk)
    flip(run_folder(desk) / "identity.json")
    before = contents(desk.out)
    with pytest.raises(UserError, match=r"identity\.json is damaged"):
        compress(recipe(desk), Watching())
    assert contents(desk.out) == before


def test_all_differences_are_shown(desk: Desk) -> None:
    stopped(desk)
    fusion = desk.recipe()["fusion"] | {"rank": 3}
    with pytest.raises(UserError, match=r"recipe\.seed = 0, this one has 1; and recipe\.fusion\.rank = 2, this one has 3"):
        compress(recipe(desk, seed=1, fusion=fusion), Watching())


def test_a_run_that_died_between_two_models_publishes_the_other(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    class Dying(Watching):
        def stage(self, text: str, total: int | None = None) -> None:
            if text == "evaluating and publishing demo-p60":
                raise KeyboardInterrupt
            super().stage(text, total)

    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), Dying())
    first = (desk.out / "demo-p20/fusegpt.json").read_bytes()
    show = Watching()
    models = compress(recipe(desk), show)
    assert show.rounds == [] and (desk.out / "demo-p20/fusegpt.json").read_bytes() == first
    assert [Path(model.uri).name for model in models] == ["demo-p20", "demo-p60"]
    assert published(desk) == undisturbed["at_end"]


def test_a_model_of_another_run_is_not_taken_for_ones_own(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2, seed=1), Watching())
    stopped_at = [*desk.out.glob("*/fusegpt.json")]
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.6), Watching(2))
    with pytest.raises(UserError, match=r"finished model is already at .*demo-p20"):
        compress(recipe(desk, sparsity=[0.2, 0.6]), Watching())
    assert [*desk.out.glob("*/fusegpt.json")] == stopped_at


# --- within a round, and anew ---


class DyingInTraining(Watching):
    """Killed after the first epoch of round `stop`."""

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        if self.rounds[-1] == self.stop:
            raise KeyboardInterrupt

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self.rounds.append(number)


class Counting(LocalEngine):
    scored = 0

    def score(self, *arguments: Any) -> Ranking:
        Counting.scored += 1
        return super().score(*arguments)


def test_scores_are_not_done_again(desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    monkeypatch.setattr("fusegpt_ray.local.LocalEngine", Counting)
    compress(recipe(desk), Watching())
    assert Counting.scored == 1, "of rounds 2 and 3, only round 3 was still to be scored"
    assert published(desk) == undisturbed["at_end"]


def test_damaged_scores_are_told_and_done_again(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    flip(run_folder(desk) / "scores-002.json")
    show = Watching()
    compress(recipe(desk), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "scores-002.json is damaged" in told
    assert published(desk) == undisturbed["at_end"]


def test_restart_forgets_the_unfinished_run(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    stopped(desk, 3, seed=1)
    show = Watching()
    compress(recipe(desk), show, restart=True)
    assert show.rounds == [1, 2, 3]
    assert published(desk) == undisturbed["at_end"]


def test_restart_leaves_finished_models_alone(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2), Watching())
    before = contents(desk.out)
    with pytest.raises(UserError, match="a finished model is already at"):
        compress(recipe(desk), Watching(), restart=True)
    assert contents(desk.out) == before


# --- two at once ---


def sign(desk: Desk, **changes: Any) -> dict[str, Any]:
    """A sign of life of another machine's process in the run's folder."""
    told = {"time": time.time(), "host": "elsewhere", "pid": 1, "doing": "round 2/3: scoring 4 blocks"} | changes
    new = run_folder(desk) / "heartbeat.new"
    new.write_text(json.dumps(told))
    new.replace(run_folder(desk) / "heartbeat.json")  # whole, whoever reads it meanwhile
    return told


def test_a_run_that_is_at_work_elsewhere_is_left_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusegpt_ray.run.heartbeat.EVERY", 1.5)
    stopped(desk)
    sign(desk)
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            sign(desk)

    elsewhere = threading.Thread(target=go_on)
    elsewhere.start()
    try:
        with pytest.raises(UserError, match=r"at work on elsewhere \(process 1\): round 2/3"):
            compress(recipe(desk), Watching(), restart=True)
    finally:
        over.set()
        elsewhere.join()
    assert (run_folder(desk) / "round-001.json").exists()


def test_a_run_that_died_elsewhere_is_waited_for_and_gone_on_with(
    desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusegpt_ray.run.heartbeat.EVERY", 0.2)
    stopped(desk)
    sign(desk)
    show = Watching()
    compress(recipe(desk), show)
    assert any("was alive on elsewhere" in line for line in show.said)
    assert published(desk) == undisturbed["at_end"]


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(desk: Desk) -> None:
    stopped(desk)
    dead = subprocess.Popen(["true"])
    dead.wait()
    sign(desk, host=socket.gethostname(), pid=dead.pid)
    show = Watching()
    compress(recipe(desk), show)
    assert not any("alive" in line for line in show.said)
