"""Groups that are cut by how far blocks change states (`heal.share_by: similarity`)."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from backwards import Backwards
from desk import LENGTH, Desk, text_of
from infirmary import TRAINED
from mistakes import Bad, check, table
from models import load_model
from safetensors.torch import load_file
from stopped_runs import Watching, published, recipe, run_folder
from test_healed_runs import StoppedInHealing
from torch.nn.functional import cosine_similarity

from fusegpt_ray.compressing.heal import sharing_of
from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.known import Known
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

Groups = list[tuple[int, ...]]
HEAL: dict[str, Any] = {
    "tokens": 8 * LENGTH,
    "batch": 4,
    "held_out": 4,
    "looks": 2,
    "train": "all",
    "learning_rate": 1e-3,
    "share": 2,
    "share_by": "similarity",
}
SAVED = {"cluster": {"engine": "local", "checkpoint_minutes": 0}}
ASKED: dict[str, Any] = {"method": "last", "sparsity": 0.2, "heal": HEAL} | SAVED
GROUPS = [(0,), (1, 2, 4)]
"""That come of the desk's text."""


def partitions(kept: list[int], count: int) -> list[Groups]:
    """All of adjacent groups."""
    cuts = combinations(range(1, len(kept)), count - 1)
    ends = [[0, *cut, len(kept)] for cut in cuts]
    return [[tuple(kept[a:b]) for a, b in pairwise(cut)] for cut in ends]


def moved(groups: Groups, changes: list[float]) -> float:
    """What changes in the blocks that take over another's matrices."""
    return sum(changes[number] for group in groups for number in group[1:])


@pytest.mark.parametrize(("blocks", "size"), [(4, 2), (8, 2), (9, 3), (12, 4), (6, 6)])
def test_no_other_partition_of_as_many_groups_changes_less(blocks: int, size: int) -> None:
    """Of all that there are, also where numbers are missing and changes are equal."""
    draw = random.Random(blocks)
    for _ in range(20):
        kept = sorted(draw.sample(range(2 * blocks), blocks))
        changes = [float(draw.randint(0, 9)) for _ in range(2 * blocks)]
        found = Sharing(size, tuple(changes)).groups(kept)
        every = partitions(kept, blocks // size)
        assert found in every
        assert moved(found, changes) == min(moved(groups, changes) for groups in every)


def test_of_equal_ones_the_first_begins_a_group() -> None:
    assert Sharing(2, (1.0,) * 6).groups(range(6)) == [(0,), (1,), (2, 3, 4, 5)]
    assert Sharing(2).groups(range(6)) == [(0, 1), (2, 3), (4, 5)]
    assert Sharing().groups(range(6)) == []


def changes_of(
    desk: Desk, kind: type[LocalWorkers], place: str, windows_WT: torch.Tensor = TRAINED
) -> tuple[float, ...]:
    source = Source.find(str(desk.model), None)
    dense = source.stack()
    output = {"uri": str(desk.folder / place), "name": "demo"}
    asked = recipe(desk, **ASKED, importance={"windows": 8, "batch": 3}, output=output)
    journal = Journal.of(asked)
    setup = Setup(source, dense, Cluster(engine="local"), importance=asked.importance)
    with kind(setup) as here:
        known = Known(journal, "sharing", "this run", Shared(), {}, print)
        return sharing_of(asked, here, known, dense, windows_WT.numpy(), Display()).changes


def test_changes_on_other_windows_are_measured_anew(desk: Desk) -> None:
    """Also where what an earlier run measured still lies in the folder."""
    first, other = TRAINED[:8], TRAINED[8:]
    found = changes_of(desk, LocalWorkers, "one", first)
    assert changes_of(desk, LocalWorkers, "one", other) != found
    assert changes_of(desk, LocalWorkers, "one", first) == found
    assert changes_of(desk, LocalWorkers, "fresh", other) == changes_of(
        desk, LocalWorkers, "one", other
    )


def test_changes_are_those_of_plain_torch_whatever_the_replicas(desk: Desk) -> None:
    model, states = load_model(desk.model), list[torch.Tensor]()
    model.model.layers[-1].register_forward_hook(
        lambda _module, _given, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        h = [*model(TRAINED, output_hidden_states=True).hidden_states[:-1], *states]
    expected = [(1 - cosine_similarity(a, b, dim=-1)).double().sum().item() for a, b in pairwise(h)]
    found = changes_of(desk, LocalWorkers, "one")
    assert found == pytest.approx(expected, rel=1e-4)
    assert changes_of(desk, Backwards, "several") == found


@pytest.fixture(name="undisturbed")
def _undisturbed(desk: Desk, tmp_path: Path) -> dict[str, bytes]:
    (done,) = compress(recipe(desk, **ASKED), Watching())
    kept = done.manifest["kept"]
    assert kept == [0, 1, 2, 4]
    groups = [tuple(group) for group in done.manifest["healing"]["groups"]]
    assert groups in partitions(kept, 2) and groups == GROUPS
    tensors = load_file(Path(done.uri) / "model.safetensors")
    first, second = (
        tensors[f"model.layers.{kept.index(group[-1])}.mlp.up_proj.weight"] for group in groups
    )
    assert not torch.equal(first, second)
    for group in groups:
        for name in ("mlp.up_proj.weight", "self_attn.o_proj.weight"):
            own = [tensors[f"model.layers.{kept.index(number)}.{name}"] for number in group]
            assert all(torch.equal(one, own[0]) for one in own)
    assert "in 2 groups of blocks that share weights" in (Path(done.uri) / "README.md").read_text()
    assert not run_folder(desk).exists()
    found = published(desk)
    desk.out.rename(tmp_path / "undisturbed")
    return found


def test_a_stopped_run_ends_with_the_same_bytes(desk: Desk, undisturbed: dict[str, bytes]) -> None:
    """What was measured is not measured again."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **ASKED), StoppedInHealing("demo-p20", 1))
    assert (run_folder(desk) / "sharing-000.json").exists()
    again = Staged()
    compress(recipe(desk, **ASKED), again)
    assert published(desk) == undisturbed
    assert "  going on after part 1 of 2" in again.said
    assert not any("share weights" in stage for stage in again.stages)


def test_another_text_makes_other_groups(desk: Desk) -> None:
    """Of a run of the same name, also after one that was stopped when it had measured its own."""
    (desk.folder / "other.txt").write_text(text_of(torch.full((200,), 50)))
    text = desk.recipe()["calibration"] | {"data": str(desk.folder / "other.txt")}
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **ASKED), StoppedInHealing("demo-p20", 1))
    (done,) = compress(recipe(desk, **ASKED, calibration=text), Watching(), restart=True)
    assert done.manifest["healing"]["groups"] == [[0, 1], [2, 4]], "and not GROUPS"
    assert not run_folder(desk).exists()


class Staged(Watching):
    def __init__(self) -> None:
        super().__init__()
        self.stages = list[str]()

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append(text)
        super().stage(text, total)


def test_its_walk_is_planned(desk: Desk) -> None:
    walked = []
    for way in ("place", "similarity"):
        asked = Recipe.parse(desk.recipe(**ASKED | {"heal": HEAL | {"share_by": way}}))
        stages = plan(asked, Display()).cost.stages
        walked.append({stage.name: stage.block_forwards for stage in stages}["healing"])
    assert walked[1] - walked[0] == 4 * 5  # windows that score, blocks


@table(
    [
        Bad(
            "no groups",
            lambda desk: ["compress", desk.write(heal={"share_by": "similarity"})],
            "heal.share_by",
            "similarity",
            "there are no groups",
            "give heal.share",
        )
    ]
)
def test_without_groups_it_is_refused(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
