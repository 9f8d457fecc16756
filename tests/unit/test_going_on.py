"""A run that stops, for whatever reason, and the same command again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk import Desk, random_text
from faults import full_disk
from models import load_model, open_stack
from safetensors.torch import load_file, save_file
from stopped_runs import (  # noqa: F401 - fixtures
    BeforeItsSecondModel,
    Watching,
    Weights,
    _undisturbed,
    contents,
    flip,
    published,
    recipe,
    rounds,
    run_folder,
    stopped,
)

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.evaluation import perplexity
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.methods import METHODS
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.identity import identity
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import Workers

# --- going on ---


@pytest.mark.parametrize(("stop", "fold"), [(2, "at_end"), (3, "at_end"), (3, "each_round")])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    stop: int, fold: str, desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    fusion = desk.recipe()["fusion"] | {"fold": fold}
    stopped(desk, stop, fusion=fusion)
    before = contents(run_folder(desk))
    assert sorted(name for name in before if name.startswith("round-")) == [
        f"round-{n:03d}.json" for n in range(1, stop)
    ]
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


def test_what_a_stopped_round_left_is_not_trusted(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
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
    """Whatever ends the writing of a record in its middle must not stand in the way of the next
    attempt.
    """
    journal, dense = Journal.of(recipe(desk)), open_stack(desk.model)
    this = identity(recipe(desk), "0" * 64, dense, torch.float32, {})
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


def test_a_published_model_that_was_removed_is_made_again(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    compress(recipe(desk), Watching())
    shutil.rmtree(desk.out / "demo-p60")
    shutil.rmtree(desk.out / "demo-p20")
    compress(recipe(desk), Watching())
    assert published(desk) == undisturbed["at_end"]


def test_a_finished_run_goes_on_to_a_higher_sparsity(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    compress(recipe(desk, sparsity=0.2), Watching())
    compress(recipe(desk, sparsity=0.6), Watching())
    assert published(desk) == undisturbed["at_end"]


def test_a_run_that_died_between_two_models_publishes_the_other(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), BeforeItsSecondModel())
    first = (desk.out / "demo-p20/fusegpt.json").read_bytes()
    show = Watching()
    models = compress(recipe(desk), show)
    assert show.rounds == [] and (desk.out / "demo-p20/fusegpt.json").read_bytes() == first
    assert [Path(model.uri).name for model in models] == ["demo-p20", "demo-p60"]
    assert published(desk) == undisturbed["at_end"]


@pytest.mark.parametrize("killed", ["before its folder went", "while it went", "after it"])
def test_a_run_killed_after_its_last_model_is_done(
    killed: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finds everything, by the identity that the manifests tell, and ends well."""

    def remove(journal: Journal) -> None:
        if killed != "before its folder went":
            storage.remove(journal.blocks_folder, recursive=True)
        if killed == "after it":
            storage.remove(journal.folder, recursive=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Journal, "remove", remove)
        compress(recipe(desk), Watching())
    before = {name: data for name, data in contents(desk.out).items() if ".run/" not in name}
    show = Watching()
    models = compress(recipe(desk), show)
    assert show.rounds == [] and any("nothing is left to do" in line for line in show.said)
    assert [Path(model.uri).name for model in models] == ["demo-p20", "demo-p60"]
    assert contents(desk.out) == before and not run_folder(desk).exists()


def test_after_its_end_only_the_very_same_command_ends_well(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2), Watching())
    before = contents(desk.out)
    compress(
        recipe(desk, sparsity=0.2, cluster={"engine": "local", "micro_batch": 2}), Watching()
    )  # which shapes nothing
    for changes in (
        {"seed": 1},
        {"evaluation": {"heldout": {"data": str(desk.heldout)}}},
        {"sparsity": [0.2, 0.6]},
    ):
        with pytest.raises(UserError, match="finished model is already at"):
            compress(recipe(desk, **{"sparsity": 0.2} | changes), Watching())
    (desk.folder / "calibration.txt").write_text(
        "other " + (desk.folder / "calibration.txt").read_text()
    )
    with pytest.raises(UserError, match="finished model is already at"):
        compress(recipe(desk, sparsity=0.2), Watching())
    assert contents(desk.out) == before


def test_a_model_of_another_run_is_not_taken_for_ones_own(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2, seed=1), Watching())
    stopped_at = [*desk.out.glob("*/fusegpt.json")]
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.6), Watching(2))
    with pytest.raises(UserError, match=r"finished model is already at .*demo-p20"):
        compress(recipe(desk, sparsity=[0.2, 0.6]), Watching())
    assert [*desk.out.glob("*/fusegpt.json")] == stopped_at


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
def test_another_recipe_is_refused_and_the_difference_shown(
    key: str, section: Any, desk: Desk
) -> None:
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
    [
        (other_text, "windows_sha256"),
        (other_config, "rms_norm_eps"),
        (other_dtype, "dtype"),
        (other_weights, "model"),
    ],
    ids=["text", "config", "dtype", "weights"],
)
def test_another_text_or_model_is_refused(
    change: Callable[[Desk], None], named: str, desk: Desk
) -> None:
    stopped(desk)
    change(desk)
    with pytest.raises(UserError, match=f"an unfinished run .*{named}"):
        compress(recipe(desk), Watching())


def test_what_does_not_shape_the_result_may_change(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
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


def test_all_differences_are_shown(desk: Desk) -> None:
    stopped(desk)
    fusion = desk.recipe()["fusion"] | {"rank": 3}
    with pytest.raises(
        UserError,
        match=r"recipe\.seed = 0, this one has 1; and recipe\.fusion\.rank = 2, this one has 3",
    ):
        compress(recipe(desk, seed=1, fusion=fusion), Watching())


# --- within a round, and anew ---


class DyingInTraining(Watching):
    """Killed after the first epoch of round `stop`."""

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        if self.rounds[-1] == self.stop:
            raise KeyboardInterrupt

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self.rounds.append(number)


class Counting:
    """Scores, and counts how often."""

    scored = 0

    def __call__(self, *arguments: Any) -> Any:
        self.scored += 1
        return score(*arguments)


def test_scores_are_not_done_again(
    desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    counting = Counting()
    counted = replace(METHODS["fusegpt"], choose=counting)
    monkeypatch.setitem(METHODS, "fusegpt", counted)
    compress(recipe(desk), Watching())
    assert counting.scored == 1, "of rounds 2 and 3, only round 3 was still to be scored"
    assert published(desk) == undisturbed["at_end"]


def test_damaged_scores_are_told_and_done_again(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    flip(run_folder(desk) / "scores-002.json")
    show = Watching()
    compress(recipe(desk), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "scores-002.json is damaged" in told
    assert published(desk) == undisturbed["at_end"]


class Measuring:
    """Perplexities, and how many blocks each measured model has."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def __call__(self, workers: Workers, stack: Stack, windows_WT: np.ndarray) -> float:
        self.depths.append(len(stack))
        return perplexity(workers, stack, windows_WT)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr("fusegpt_ray.evaluation.perplexity", found)
    return found


def held_out(desk: Desk, **changes: Any) -> dict[str, Any]:
    return {"evaluation": {"heldout": {"data": str(desk.heldout)} | changes}}


def perplexities(desk: Desk) -> dict[str, Any]:
    return {
        path.parent.name: json.loads(path.read_text())["perplexity"]["heldout"]
        for path in desk.out.glob("*/fusegpt.json")
    }


def test_perplexities_of_dense_blocks_are_measured_once(desk: Desk, measuring: Measuring) -> None:
    compress(recipe(desk, **held_out(desk)), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2], "dense; of each model the fused and the dropped one"
    expected = perplexities(desk)
    shutil.rmtree(desk.out)

    measuring.depths.clear()
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **held_out(desk)), Watching(2))
    assert measuring.depths == [5]
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **held_out(desk)), BeforeItsSecondModel())
    assert measuring.depths == [5, 4, 4]

    # Killed when the second model's dropped form was measured, and nothing of it published.
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:  # noqa: PT012
        patch.setattr("fusegpt_ray.publishing.publish.model_card", interrupt)
        compress(recipe(desk, **held_out(desk)), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2]
    compress(recipe(desk, **held_out(desk)), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2, 2], "only the published weights once more"
    assert perplexities(desk) == expected and len(expected) == 2


def interrupt(*_: Any) -> str:
    raise KeyboardInterrupt


def test_what_was_measured_counts_only_for_the_same_windows(
    desk: Desk, measuring: Measuring
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.6, **held_out(desk)), Watching(2))
    compress(recipe(desk, sparsity=0.6, **held_out(desk, windows=3)), Watching())
    assert measuring.depths == [5, 5, 2, 2]
    found = perplexities(desk)
    shutil.rmtree(desk.out)
    compress(recipe(desk, sparsity=0.6, **held_out(desk, windows=3)), Watching())
    assert perplexities(desk) == found


def test_damaged_perplexities_are_told_and_measured_again(desk: Desk, measuring: Measuring) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **held_out(desk)), Watching(2))
    flip(run_folder(desk) / "perplexities-000.json")
    show = Watching()
    compress(recipe(desk, **held_out(desk)), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "perplexities-000.json is damaged" in told
    assert measuring.depths == [5, 5, 4, 4, 2, 2]


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
