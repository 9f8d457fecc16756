"""A name is a name on a local disk and in memory, too: what fsspec would take for a pattern or a
chain is read, written and removed as it stands, and a neighbour that it would match stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from desk import Desk
from left_behind import aged
from stopped_runs import contents

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.text.corpus import pieces, sources
from fusegpt_ray.uris import refuse_ambiguous

NAMES = ["run[1]", "r?n1", "r*", "a::b", "s3::b", "a b%20+#é", "local:run1", "data:run1"]
NEIGHBOURS = ["run1", "ran1", "r", "a", "b", "run", "run[1]x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run_in_a_local_folder_of_any_name(
    name: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its source, its text and its output; relative, as a user gives them."""
    place = desk.folder / name
    place.mkdir()
    for file in ("model", "calibration.txt"):
        shutil.move(desk.folder / file, place / file)
    for other in NEIGHBOURS:
        (desk.folder / other / "out/demo.run").mkdir(parents=True)
        (desk.folder / other / "out/demo.run/identity.json").write_text(other)
        (desk.folder / other / "calibration.txt").write_text("w3")
    before = {other: contents(desk.folder / other) for other in NEIGHBOURS}
    written = desk.write(
        model={"source": f"{name}/model"},
        calibration={"data": f"{name}/calibration.txt", "windows": 8, "length": 12},
        method="mi",
        output={"uri": f"{name}/out", "name": "demo"},
    )
    assert main(["compress", written]) == 0
    assert [path.name for path in (place / "out").iterdir()] == ["demo-p40"]
    assert main(["verify", f"{name}/out/demo-p40"]) == 0
    assert main(["pull", f"{name}/out/demo-p40", f"{name}/pulled"]) == 0
    assert contents(place / "pulled") == contents(place / "out/demo-p40")

    shutil.copytree(place / "out/demo-p40", place / "out/half-p40")
    (place / "out/half-p40/fusegpt.json").unlink()
    (place / "out/half.run/blocks").mkdir(parents=True)
    (place / "out/half.run/blocks/a").touch()
    (place / "out/half.run/begun-p40.json").touch()
    aged(place / "out")
    capsys.readouterr()
    assert main(["clean", f"{name}/out", "--yes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "removed",
        "removed",
    ]
    assert [path.name for path in (place / "out").iterdir()] == ["demo-p40"]
    assert {other: contents(desk.folder / other) for other in NEIGHBOURS} == before


@pytest.fixture
def memory() -> Iterator[Callable[[], dict[str, bytes]]]:
    """All files of the memory file system, which holds neighbours."""
    fs = fsspec.filesystem("memory")
    for name in [*NAMES, *NEIGHBOURS]:
        for file in ("m.run/identity.json", "m.run/blocks/a [1]*?", "m.run2/a"):
            fs.pipe_file(f"/names/{name}/{file}", f"{name}/{file}".encode())
    yield lambda: {path: fs.cat_file(path) for path in fs.find("/names")}
    storage.remove("memory://names", recursive=True)


@pytest.mark.parametrize("name", [name for name in NAMES if "::" not in name])
def test_a_removal_in_memory(name: str, memory: Callable[[], dict[str, bytes]]) -> None:
    before = memory()
    assert sorted(storage.below(f"memory://names/{name}/m.run")) == [
        "blocks/a [1]*?",
        "identity.json",
    ]
    storage.remove(f"memory://names/{name}/m.run", recursive=True)
    assert memory() == {
        path: data for path, data in before.items() if not path.startswith(f"/names/{name}/m.run/")
    }


def test_a_folder_of_text_that_datasets_would_take_for_a_pattern_is_refused(tmp_path: Path) -> None:
    for name in ("data[1]", "data1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(f'{{"text": "{name}"}}\n')
    with pytest.raises(UserError, match="would take for a pattern"):
        sources(Text(data=str(tmp_path / "data[1]")), "calibration.data")
    (found,) = sources(Text(data=str(tmp_path / "data[1]/train.jsonl")), "calibration.data")
    assert list(pieces(found, 1 << 20)) == ["data[1]"]


FINE = [
    "out",
    "/data/run[1]/a*b?",
    "../out",
    "./a//b",
    "a::b",
    "file:///a/run[1]/..",
    "s3://b",
    "s3://b/a b%20+#é/c:d",
    "gs://b/a/",
    "hdfs:///a",
    "~/x",
]
AMBIGUOUS = {
    "a\nb": "'\\n'",
    "/a\x00": "'\\x00'",
    "s3://b/a*": "'*'",
    "memory://a?": "'?'",
    "s3://b/[a": "'['",
    "gs://b/a]": "']'",
    "simplecache::s3://b/a": "chain",
    "s3://b/a::b": "chain",
    "s3://b/../a": "'..'",
    "s3://b/./a": "'.'",
    "s3://b//a": "''",
    "s3:////a": "''",
    "s3://b/\udcff": "Unicode",
}


@pytest.mark.parametrize("uri", FINE)
def test_names_of_places(uri: str) -> None:
    refuse_ambiguous("output.uri", uri)


@pytest.mark.parametrize("uri", AMBIGUOUS)
def test_names_that_could_mean_other_places(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        refuse_ambiguous("output.uri", uri)
    assert caught.value.key == "output.uri" and AMBIGUOUS[uri] in caught.value.problem
