"""A model that somebody put where a run publishes its own: nothing writes over it or removes it,
whatever it looks like. And half models that are a run's own go on, or go.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from desk import Desk
from left_behind import Capture, aged, killed_in_publishing, names
from stopped_runs import Watching, contents, published, recipe, run_folder, stopped

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.begun import remove_half
from fusegpt_ray.run.housekeeping import clean
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.status import status
from fusegpt_ray.store import storage


def somebodys(desk: Desk, name: str) -> Path:
    """A whole checkpoint of the user's own, with notes, and without a manifest."""
    folder = Path(shutil.copytree(desk.model, desk.out / name))
    (folder / "README.md").write_text("# Mine\n")
    (folder / "notes.txt").write_text("weeks of work")
    return folder


def dies_before_the_manifest(desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The run of two models, ended where it would have written the manifest of this one."""
    create = storage.create

    def dies(uri: str, data: bytes) -> None:
        if uri.endswith(f"/{name}/fusegpt.json"):
            raise KeyboardInterrupt
        create(uri, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(storage, "create", dies)
        compress(recipe(desk, method="last"), Watching())
    assert (desk.out / name / "model.safetensors").exists()
    assert not (desk.out / name / "fusegpt.json").exists()


@pytest.mark.parametrize("command", ["validate", "compress", "compress --restart"])
def test_it_is_told_before_any_work(command: str, desk: Desk, capsys: Capture) -> None:
    somebodys(desk, "demo-p40")
    before = contents(desk.folder)
    verb, *more = command.split()
    asked = desk.write()
    assert main([verb, asked, *more]) == 2
    err = capsys.readouterr().err
    assert "error: output.name = 'demo': files that no run of this name has written are in " in err
    assert f"at {desk.out / 'demo-p40'}. Fix: choose another output.name" in err
    assert contents(desk.folder) == before | {"recipe.yaml": Path(asked).read_bytes()}


def test_one_that_came_during_the_run_is_not_written_over(desk: Desk, tmp_path: Path) -> None:
    """The run can go on once the user has moved it."""

    class Meanwhile(Watching):
        def round_begins(self, number: int, rounds: int, blocks: int) -> None:
            if number == 3:
                somebodys(desk, "demo-p60")
            super().round_begins(number, rounds, blocks)

    with pytest.raises(UserError, match=r"in the way at .*/demo-p60"):
        compress(recipe(desk, method="last"), Meanwhile())
    mine = desk.out / "demo-p60"
    assert contents(mine) == contents(desk.model) | {
        "README.md": b"# Mine\n",
        "notes.txt": b"weeks of work",
    }
    assert (desk.out / "demo-p20/fusegpt.json").exists() and run_folder(desk).exists()
    mine.rename(tmp_path / "moved")
    show = Watching()
    compress(recipe(desk, method="last"), show)
    assert show.rounds == [] and names(desk.out) == {"demo-p20", "demo-p60"}


@pytest.mark.parametrize("beside", ["a stopped run", "a finished model"])
def test_clean_leaves_it(beside: str, desk: Desk, capsys: Capture) -> None:
    """Also where a run of its name, or a finished model of its name, lies beside it."""
    if beside == "a stopped run":
        stopped(desk, 2)
        name = "demo-p20"  # the stopped run would have published it
    else:
        compress(recipe(desk, method="last", sparsity=0.2), Watching())
        name = "demo-p30"
    mine = somebodys(desk, name)
    (mine / "training_args.txt").write_text("rate = 1")
    aged(desk.out)
    before = contents(mine)
    for _ in range(2):  # also when the run is gone
        assert main(["clean", str(desk.out), "--yes", "--unfinished"]) == 0
        listed = [line for line in capsys.readouterr().out.splitlines() if name in line]
        assert [line.split()[0] for line in listed] == ["kept"] and "not ours" in listed[0]
        assert contents(mine) == before and not run_folder(desk).exists()


def test_a_killed_publish_goes_on_to_the_same_bytes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dies_before_the_manifest(desk, monkeypatch, "demo-p60")
    assert status(str(desk.out))["unfinished"] == ["demo-p60"]
    compress(recipe(desk, method="last"), Watching())
    assert names(desk.out) == {"demo-p20", "demo-p60"}
    found = published(desk)
    desk.out.rename(tmp_path / "went on")
    compress(recipe(desk, method="last"), Watching())
    assert published(desk) == found and len(found) == 4


def ends_without_it(desk: Desk) -> None:
    compress(recipe(desk, method="last", sparsity=0.6), Watching())


def begins_anew(desk: Desk) -> None:
    compress(recipe(desk, method="last", sparsity=0.6, seed=1), Watching(), restart=True)


def is_cleaned(desk: Desk) -> None:
    compressed = contents(desk.out / "demo.run")
    aged(desk.out)
    clean(str(desk.out))
    assert set(compressed) - set(contents(desk.out / "demo.run")) == {"begun-p20.json"}
    clean(str(desk.out), unfinished=True)


@pytest.mark.parametrize("way", [ends_without_it, begins_anew, is_cleaned])
def test_a_half_model_goes_with_its_run(
    way: Callable[[Desk], None], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none stays of which nobody knows whose it is."""
    dies_before_the_manifest(desk, monkeypatch, "demo-p20")
    way(desk)
    assert names(desk.out) == (set() if way is is_cleaned else {"demo-p60"})


def test_of_a_linked_folder_only_the_files_go(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demo-p20").symlink_to("elsewhere")
    with killed_in_publishing(str(tmp_path / "demo-p20")):
        (tmp_path / "demo-p20/model.safetensors").touch()
    Journal(str(tmp_path / "demo.run")).remove()
    assert names(tmp_path) == {"demo-p20", "elsewhere"}
    assert names(tmp_path / "elsewhere") == set()


def test_a_finished_model_is_no_half(tmp_path: Path) -> None:
    """Its run was killed between the manifest and the end of its note."""
    model = tmp_path / "demo-p20"
    with killed_in_publishing(str(model)):
        model.mkdir()
        (model / "fusegpt.json").touch()
    assert (tmp_path / "demo.run/begun-p20.json").exists()
    remove_half(str(model))
    assert names(model) == {"fusegpt.json"} and not names(tmp_path / "demo.run")
