"""The bounded part of `networks.py`: machines whose links are cut, and one run that loses a node so
(`make chaos` makes more). Skipped where nobody may make namespaces.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import Chaos
from machines import Machines, problem
from networks import CLUSTER, cut_in_scoring, short_folder, tried

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if why := problem():
        pytest.skip(f"no namespaces can be made here: {why}")


def test_links_are_cut_and_mended_and_nothing_is_left() -> None:
    with short_folder() as folder, Machines(folder) as machines:
        one, other = machines.add(), machines.add()
        listen = "import socket\nwith socket.create_server(('', 5000)) as s:\n while 1: s.accept()"
        with (folder / "log").open("w") as log:
            server = other.start([sys.executable, "-c", listen], log, {})
        ask = f"for n in $(seq 600); do : </dev/tcp/{other.name}/5000 && exit; sleep 0.1; done"
        assert one.call("hostname").strip() == "node1"
        one.run(["bash", "-c", ask])
        machines.cut(other)
        with pytest.raises(subprocess.CalledProcessError):
            one.run(["timeout", "1", "bash", "-c", ask])
        machines.mend(other)
        one.run(["bash", "-c", ask])
        left = [psutil.Process(machine.pid) for machine in machines.all]
    assert server.wait(60) != 0
    assert not any(process.is_running() for process in left)


def test_a_node_cut_off_in_scoring_changes_no_byte(material, tmp_path: Path) -> None:
    recipe = partial(material.recipe, sparsity=0.125)
    chaos = Chaos(tmp_path, recipe)
    chaos.undisturbed("local")
    out, one_worker = tmp_path / "cut", CLUSTER | {"workers": 1}
    found = tried("cut in scoring", cut_in_scoring, recipe(out), out, one_worker)
    assert found.code == 0, found.log
    assert found.runs == 1
    assert found.hashes == chaos.expected
