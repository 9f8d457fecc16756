"""Files of a model that lie in folders: pulled, gone on with, and never written through a link."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import failing
from pulling import (  # noqa: F401 - fixtures
    FILES,
    _at_once,
    _small_and_fast,
    _target,
    contents,
    manifest,
    part_of,
    write_model,
)

from fusegpt_ray import UserError, pull, verify
from fusegpt_ray.publishing import download
from fusegpt_ray.publishing.download import Incomplete

ONE = "additional_chat_templates/tool.jinja"
DEEP = FILES | {
    ONE: b"{{ tools }}" * 300,
    "additional_chat_templates/more/rag.jinja": b"{{ documents }}",
}
WHOLE = {**DEEP, "fusegpt.json": manifest(DEEP)}


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> str:
    return f"faulty://{write_model(tmp_path / 'source', DEEP)}"


def test_they_arrive_where_they_belong(source: str, target: Path) -> None:
    assert contents(pull(source, target)) == WHOLE
    assert pull(source, target) == target, "it is known as whole"


def test_an_interrupted_pull_goes_on(source: str, target: Path) -> None:
    def cut(name: str, begin: int, data: bytes) -> bytes:
        if name.endswith("tool.jinja") and begin >= 1000:
            raise OSError("the line is dead")
        return data

    with failing(cut), pytest.raises(Incomplete, match=r"tool\.jinja"):
        pull(source, target)
    assert (part_of(target) / ONE).stat().st_size == 1000
    (part_of(target) / "additional_chat_templates/of-another-version").write_bytes(b"old")
    with failing() as asked:
        pull(source, target)
    assert [begin for name, begin in asked if name.endswith("tool.jinja")] == [1000, 2000, 3000]
    assert contents(target) == WHOLE


def test_a_link_below_a_folder_is_in_the_way(source: str, target: Path) -> None:
    precious = target.parent / "precious"
    (part_of(target) / ONE).parent.mkdir(parents=True)
    (part_of(target) / ".fusegpt-pull").touch()
    (part_of(target) / ONE).symlink_to(precious)
    with pytest.raises(UserError, match="a pull never made"):
        pull(source, target)
    assert not precious.exists() and not target.exists()


@pytest.mark.parametrize("name", ["additional_chat_templates", "empty.txt"])
def test_a_link_planted_while_files_arrive_is_not_followed(
    name: str, source: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "WORKERS", 1)
    precious = target.parent / "precious"

    def plant(asked: str, begin: int, data: bytes) -> bytes:
        if asked == "config.json":
            precious.mkdir() if name in ONE else precious.write_bytes(b"precious")
            (part_of(target) / name).symlink_to(precious)
        return data

    with failing(plant), pytest.raises(OSError, match=r"directory|symbolic"):
        pull(source, target)
    assert list(precious.iterdir()) == [] if name in ONE else precious.read_bytes() == b"precious"
    assert not target.exists()


def test_verify_reads_them_and_names_the_damaged_one(source: str, target: Path) -> None:
    (pull(source, target) / ONE).write_bytes(b"other")
    assert ONE in [row["file"] for row in verify(str(target))["problems"]]
