"""What a family's recipe asks for, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from mistakes import MESSAGE, tree

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.recipe.yaml_text import read_yaml


def asked(desk: Desk, members: Any, **section: Any) -> dict[str, Any]:
    base = desk.recipe(evaluation={"heldout": {"data": str(desk.heldout)}}, method="last")
    return base | {"family": {"members": members, **section}}


def names(members: Members) -> list[str]:
    return [run.recipe.output.name for member in members.members for run in member.runs]


def test_members_are_the_base_with_what_differs(desk: Desk) -> None:
    big = {"name": "Big 13B", "model": {"source": "org/big", "dtype": "bfloat16"}, "priority": 3}
    members = [
        "org/small-7b",
        big | {"cluster": {"workers": 2}, "sparsities": 0.5},
        {"name": "again", "seed": 3, "methods": ["mi"], "sparsity": 0.3},
    ]
    family = Members.parse(
        asked(desk, members, methods=["last", {"name": "tuned", "method": "mi+ft"}])
    )
    assert names(family) == [
        "demo-small-7b-last",
        "demo-small-7b-tuned",
        "demo-big-13b-last",
        "demo-big-13b-tuned",
        "demo-again-mi",
    ]
    small, large, again = (member.runs[0].recipe for member in family.members)
    assert (small.model.source, large.model.source) == ("org/small-7b", "org/big")
    assert again.model.source == str(desk.model) and again.seed == 3
    assert (large.cluster.workers, small.cluster.workers) == (2, 1)
    assert large.cluster.engine == "local", "what a member leaves out is the base's"
    assert [one.sparsity for one in (small, large, again)] == [(0.4,), (0.5,), (0.3,)]
    assert [member.priority for member in family.members] == [0, 3, 0]
    assert family.folder == f"{desk.out}/family/demo"


def test_without_methods_it_is_the_bases_and_has_no_part_in_names(desk: Desk) -> None:
    family = Members.parse(asked(desk, ["a", "b"], sparsities=[0.2, 0.4]))
    assert names(family) == ["demo-a", "demo-b"]
    assert {run.method for member in family.members for run in member.runs} == {"last"}
    assert family.members[0].runs[0].recipe.sparsity == (0.2, 0.4)


def test_another_model_has_no_revision_of_the_base(desk: Desk) -> None:
    base = asked(desk, ["a", {"name": "b", "seed": 1}])
    base["model"] = {"source": "c", "revision": "abc"}
    found = [member.runs[0].recipe.model.revision for member in Members.parse(base).members]
    assert found == [None, "abc"]


def test_a_method_that_makes_models_deeper_has_no_sparsity(desk: Desk) -> None:
    methods = ["mi", {"method": "tli", "depth": "+50%"}]
    family = Members.parse(asked(desk, ["a"], methods=methods, sparsities=[0.2]))
    shallow, deep = (run.recipe for run in family.members[0].runs)
    assert (shallow.sparsity, deep.sparsity, deep.depth) == ((0.2,), (), 0.5)


def test_a_method_that_chooses_anew_has_a_run_for_each_sparsity(desk: Desk) -> None:
    family = Members.parse(asked(desk, ["a"], methods=["angular"], sparsities=[0.2, 0.4]))
    assert names(family) == ["demo-a-angular-20", "demo-a-angular-40"]


BAD: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "none": ([], {}, "family.members", "fewer than 1 of them"),
    "one name twice": (["x/a", "y/a"], {}, "family.members", "two of them have this name"),
    "one folder twice": (
        [{"name": "a"}, {"name": "a-mi", "methods": ["mi"]}],
        {"methods": [{"name": "mi-mi", "method": "mi"}]},
        "family.members", "both would be called demo-a-mi-mi",
    ),
    "unknown key of the family": (["a"], {"gpu": 3}, "family.gpu", "unknown key"),
    "unknown key of a member": ([{"name": "a", "sed": 1}], {}, "sed", "of the member a"),
    "unknown method": (["a"], {"methods": ["nonsense"]}, "method", "of the member a"),
    "none at once": (["a"], {"at_once": 0}, "family.at_once", "not 1 or more"),
    "no GPUs": (["a"], {"gpus": 0}, "family.gpus", "not above 0"),
    "a priority that is none": (
        [{"name": "a", "priority": "high"}], {}, "family.members.a.priority", "not a whole number",
    ),
    "no methods": ([{"name": "a", "methods": []}], {}, "family.members.a.methods", "fewer than 1"),
    "a sparsity twice": (["a"], {"sparsities": [0.2, 0.2]}, "family.sparsities", "twice"),
    "another place": (
        [{"name": "a", "output": {"uri": "elsewhere"}}], {}, "family.members.a.output.uri", "same",
    ),
    "a model that is none": ([{"name": "a", "model": 5}], {}, "model", "of the member a"),
    "a secret": (["s3://KEY:SECRET@b/m"], {}, "model.source", "of the member"),
    "a small quota": (
        [{"name": "a", "cluster": {"engine": "ray", "replicas": 3}}],
        {"gpus": 2}, "family.gpus", "the member a needs 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told_by_key(desk: Desk, name: str) -> None:
    members, section, key, problem = BAD[name]
    with pytest.raises(UserError) as refused:
        Members.parse(asked(desk, members, **section))
    assert refused.value.key == key and problem in str(refused.value)
    assert "SECRET" not in str(refused.value)


def test_a_model_that_is_not_there_ends_it_before_any_weights_are_read(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    members = [{"name": "here"}, {"name": "gone", "model": {"source": "./gone"}}]
    with pytest.raises(UserError, match="of the member gone, last"):
        compress_family(Members.parse(asked(desk, members)))
    assert weight_reads == [] and not desk.out.exists()
    path = desk.write(family={"members": []})
    before = tree(desk.folder)
    assert main(["family", path, "--quiet", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and MESSAGE.fullmatch(err.rstrip("\n")) and tree(desk.folder) == before


def test_the_example_is_one() -> None:
    root = Path(__file__).resolve().parents[2]
    family = Members.parse(read_yaml(root / "examples/family.yaml"))
    assert len(family.members) == 2 and len({*names(family)}) == 4
