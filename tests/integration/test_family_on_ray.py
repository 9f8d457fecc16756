"""A family on Ray: members of different models at the same time, each on workers of its own, give
the bytes of one process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes
from test_compare_on_ray import PATIENCE, Watching

from fusegpt_ray.distributed import sets
from fusegpt_ray.errors import UserError
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Need, Room

pytestmark = pytest.mark.integration


def asked(
    material: Any, output: Path, other: Path, engine: str, where: Any = None, **section: Any
) -> Members:
    cluster = {"engine": engine, "wait_minutes": 0} | (where or {})
    recipe = material.recipe(output, sparsity=0.125, cluster=cluster, method="mi")
    recipe["output"]["report"] = False
    # Sets of workers that train beside each other: test_compare_on_ray.py.
    members = [
        {"name": "one", "methods": ["mi+linear"]},
        {"name": "two", "model": {"source": str(other)}, "methods": ["mi"]},
    ]
    return Members.parse(recipe | {"family": {"members": members, **section}})


def weights(output: Path) -> dict[str, str]:
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.glob("*/*.safetensors")
    }


@pytest.fixture
def other(material: Any, tmp_path: Path) -> Path:
    """The same weights as another model: so long as its folder is another one, so are workers."""
    source = Path(material.recipe(tmp_path)["model"]["source"])
    return shutil.copytree(source, tmp_path / "another")


def test_members_at_the_same_time_are_those_of_one_process(
    material: Any, tmp_path: Path, other: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    compress_family(asked(material, alone, other, "local"), Watching())
    assert len(weights(alone)) == 2
    show = Watching("] — ")  # both of them meet there
    family = asked(material, together, other, "ray", at_once=2)
    result = compress_family(family, show)
    assert result["state"] == "done" and "up to 2 runs at once" in show.said
    assert weights(together) == weights(alone)
    assert json.loads((Path(family.folder) / "family.json").read_text()) == result
    assert not [*Path(family.folder).glob("blocks")]


def test_sets_that_take_turns_and_put_off_publishing_make_the_same_models(
    material: Any, tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs in a room that claims two GPUs, one for each set: two work side by side, and the
    third waits for the GPU of the first one that has only to publish.
    """
    tuned = {"method": "mi+ft", "fusion": {"epochs": 1}}

    def family(output: Path, engine: str) -> Members:
        cluster = {"engine": engine, "wait_minutes": 0, "gpus_per_replica": 0}
        recipe = material.recipe(output, sparsity=0.125, cluster=cluster, **tuned)
        recipe["output"]["report"] = False
        members = [{"name": "one", "seed": 1}, {"name": "two", "seed": 2}, {"name": "three"}]
        members[2]["model"] = {"source": str(other)}
        return Members.parse(recipe | {"family": {"members": members}})

    compress_family(family(tmp_path / "alone", "local"), Watching())
    room = Room([Need(1)] * 3, 3, Need(2), publishers=[Need(0.5)] * 3)
    monkeypatch.setattr(sets.Nodes, "now", lambda place: room)
    show = Watching()
    assert compress_family(family(tmp_path / "beside", "ray"), show)["state"] == "done"
    waited = [line for line in show.said if line.endswith("waits to be published")]
    assert waited and weights(tmp_path / "beside") == weights(tmp_path / "alone")
    assert len(weights(tmp_path / "beside")) == 3 and "up to 2 runs at once" in show.said
    assert not list((tmp_path / "beside").glob("*.run"))


def test_a_node_that_joins_is_used_by_the_next_member(
    material: Any, tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that has a GPU, for one of two members, and another one as soon as that works:
    it does not go on before the second member works as well. The GPUs are claimed, in the nodes
    and in what a set of workers is counted with.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(sets, "gpus_of", lambda cluster: 1.0)
    room = {"num_cpus": 3, "num_gpus": 1, "object_store_memory": 100_000_000}
    nodes, working = Nodes(initialize_head=True, head_node_args=room), threading.Event()

    class Joining(Watching):
        def say(self, text: str) -> None:
            if self.where in text:
                working.set()
            super().say(text)

    try:
        where = {"address": nodes.address, "gpus_per_replica": 0}
        family = asked(material, tmp_path / "joined", other, "ray", where)
        show = Joining("] — ")
        with ThreadPoolExecutor() as pool:
            compressed = pool.submit(compress_family, family, show)
            assert working.wait(PATIENCE)
            nodes.add_node(**room)  # which Ray does in the main thread alone
            assert compressed.result()["state"] == "done"
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert "up to 2 runs at once" in show.said and not show.left
    compress_family(asked(material, tmp_path / "alone", other, "local"), Watching())
    assert weights(tmp_path / "joined") == weights(tmp_path / "alone")


def test_a_quota_decides_how_many_work_and_a_set_may_need_all_of_it() -> None:
    """Rooms on a Ray of a claimed number of GPUs, which nobody uses."""
    one, two = Cluster(replicas=1), Cluster(replicas=2, workers=2)
    setups = [Setup(None, None, cluster, trains=True) for cluster in (one, one, two)]  # type: ignore[arg-type]
    ray.init(address="local", num_cpus=32, num_gpus=8, include_dashboard=False)
    try:
        for asked, quota, number, gpus, roomy in (
            (None, None, 3, 8, True),  # 2 + 2 + 4, where they need not take turns
            (None, 5, 3, 5, False),
            (None, 3, 2, 3, False),
            (2, 5, 2, 5, False),
            (2, None, 2, float("inf"), True),
        ):
            with sets.joined(setups, asked, quota, "family.at_once") as place:
                room = place.now()
                assert [need.gpus for need in room.needs] == [1, 1, 2]
                assert (room.sets, room.total.gpus) == (number, gpus)
                assert room.roomy == roomy
                assert room.publishers == [None if asked else Need(1, 2)] * 3
        many = [Setup(None, None, Cluster(replicas=5, wait_minutes=0)) for _ in range(2)]  # type: ignore[arg-type]
        with (
            pytest.raises(UserError, match="10 GPUs are needed") as refused,
            sets.joined(many, 2, None, "family.at_once"),
        ):
            pass
        assert refused.value.key == "family.at_once"
    finally:
        ray.shutdown()
