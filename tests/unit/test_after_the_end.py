"""The same command, and others, when some or all models of a run are published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from desk import Desk
from stopped_runs import (  # noqa: F401 - fixtures
    BeforeItsSecondModel,
    Watching,
    Weights,
    _undisturbed,
    contents,
    published,
    recipe,
    run_folder,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.store import storage


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
