"""Creating what must not be there yet, on a store whose answers get lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from desk import Desk
from forgetful import Forgetful, losing
from stopped_runs import Watching, recipe

from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.run.lease import OwnedByAnother
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import opened, sealed

FOLDER = "forgetful://out/demo.run"
DONE = Done({"removed": 1}, Stack({}, "p", {}, ()), {})


@pytest.fixture(name="lost", autouse=True)
def _lost() -> Iterator[list[str]]:
    with losing() as lost:
        yield lost


def test_a_file_whose_answer_was_lost_is_created_and_another_stays(lost: list[str]) -> None:
    uri = "forgetful://out/file"
    storage.create(uri, b"mine")
    assert lost == ["/out/file"]
    with pytest.raises(FileExistsError):
        storage.create(uri, b"another's")
    assert storage.read(uri) == b"mine"


def test_a_run_ends_well_though_every_answer_is_lost_once(desk: Desk, lost: list[str]) -> None:
    output = desk.recipe()["output"] | {"uri": "forgetful://out"}
    published = compress(recipe(desk, output=output), Watching())
    assert [done.uri.rsplit("/", 1)[-1] for done in published] == ["demo-p20", "demo-p60"]
    names = {path.rsplit("/", 1)[-1] for path in lost}
    assert {"lease-000001.json", "identity.json", "round-001.json", "fusegpt.json"} <= names
    assert storage.below(FOLDER) == {}


def test_what_another_run_wrote_is_no_reason_to_remove_it() -> None:
    """A run that was taken for dead writes a round's record while its name has a new owner."""

    def work() -> None:
        with Journal(FOLDER).owned(print, str, dict) as journal:
            journal.begin({"a": 1})
            storage.create(f"{FOLDER}/round-001.json", sealed(DONE.to_json() | {"by": "another"}))
            journal.commit(1, DONE)

    with pytest.raises(OwnedByAnother, match="wrote the same meanwhile"):
        work()
    assert {"identity.json", "round-001.json"} <= {*storage.names(FOLDER)}


def test_an_identity_that_another_run_was_faster_with_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It came after the identity of an earlier attempt was removed."""

    def removed(path: str) -> None:
        if path.endswith("identity.json"):
            storage.write(f"{FOLDER}/identity.json", sealed({"a": 3}))

    Journal(FOLDER).begin({"a": 1})
    with Journal(FOLDER).owned(print, str, dict) as journal:
        monkeypatch.setattr(Forgetful, "removed", staticmethod(removed))
        with pytest.raises(OwnedByAnother, match="wrote the same meanwhile"):
            journal.begin({"a": 2})
        monkeypatch.undo()
    assert opened(storage.read(f"{FOLDER}/identity.json")) == {"a": 3}
