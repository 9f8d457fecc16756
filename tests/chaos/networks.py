"""Cut and slow links, nodes that come and go, and a head that is lost: Ray clusters of machines
with addresses of their own (`machines.py`), and whether a run ends with the bytes of an undisturbed
one.
`make chaos` runs this file; it needs the right to make namespaces (root).

Each machine has one CPU, so that the two replicas, or the two training workers, are on two of them.
Of Ray's own settings only the notice of preemption is changed, which must end within the training:
how soon Ray takes a silent node for lost is its default.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from clusters import NOTICE, Cluster, environment
from kills import hashes
from machines import Machine, Machines, problem

LIMIT = 1800.0
"""Seconds in which a run must end, whatever happens to it."""
REPLICA, WORKER = "ray::_Replica.run", "RayTrainWorker"
"""In the command line of a replica that is at a task, and of a training worker."""
ASKED = {"sparsity": 0.125, "fusion": {"epochs": 120}}
"""Of the recipe: one round, whose training takes long enough to be disturbed."""
CLUSTER = {"engine": "ray", "replicas": 2, "workers": 2, "checkpoint_minutes": 0.05}
SLOW = {"delay": 0.05, "rate": 20e6}
DRAIN = """
import subprocess, sys
import ray
uri, address, seconds = sys.argv[1:]
ray.init(uri, logging_level="error")
(node,) = [node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == address]
command = ["ray", "drain-node", f"--address={uri}", f"--node-id={node}"]
command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
subprocess.run([*command, f"--deadline-remaining-seconds={seconds}"], check=True)
"""


@dataclass
class Trial:
    """A run on a cluster, while something happens to it."""

    machines: Machines
    out: Path
    recipe: dict[str, Any]
    verb: str = "compress"
    runs: int = 0
    """How often the command was given."""
    cluster: Cluster = field(init=False)
    driver: subprocess.Popen[str] = field(init=False)
    said: list[str] = field(default_factory=list)
    """What the fault has to tell."""

    def begin(self, **link: float) -> Machine:
        """A cluster of two nodes, and the command; returns the one that is not the head."""
        self.cluster = Cluster(self.machines)
        other = self.cluster.join(**link)
        self.command()
        return other

    def command(self) -> None:
        self.out.mkdir(exist_ok=True)
        self.recipe["cluster"]["address"] = self.cluster.uri
        (self.out / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        program = [sys.executable, "-m", "fusegpt_ray.cli", self.verb]
        self.runs += 1
        with (self.out / "log").open("a") as log:
            program.append(str(self.out / "recipe.yaml"))
            self.driver = self.cluster.head.start(program, log, environment())

    @property
    def log(self) -> str:
        return (self.out / "log").read_text()

    def wait(self, due: Callable[[], bool]) -> None:
        """Until that, or until the run ends."""
        until = time.monotonic() + LIMIT
        while self.driver.poll() is None and not due():
            assert time.monotonic() < until, f"it never came to that:\n{self.log}"
            time.sleep(0.05)
        assert self.driver.poll() is None, f"the run ended before:\n{self.log}"

    def line(self, beginning: str, count: int = 1) -> Callable[[], bool]:
        """There are so many lines that begin with it."""
        return lambda: sum(line.startswith(beginning) for line in self.log.splitlines()) >= count

    @property
    def trains(self) -> Callable[[], bool]:
        """For some epochs by now; which of them are told is a question of time."""
        return self.line("  epoch ", 2)

    def end(self) -> int | None:
        """The exit code of the run; None where it did not end in time."""
        try:
            return self.driver.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return None


def runs_on(machine: Machine, title: str) -> bool:
    """Whether the machine has a process of this title."""
    for process in machine.processes():
        try:
            if title in " ".join(process.cmdline()):
                return True
        except psutil.NoSuchProcess:
            continue
    return False


# --- what happens ---


def nothing(trial: Trial) -> None:
    trial.begin()


def cut(trial: Trial, due: Callable[[], bool], title: str) -> None:
    """Cut the link of a node once that is so and the node has a process of that title; then another
    node joins, as an autoscaler would bring it.
    """
    other = trial.begin()
    trial.wait(due)
    trial.wait(lambda: runs_on(other, title))
    trial.machines.cut(other)
    began = time.monotonic()
    while runs_on(other, "raylet"):  # it finds out by itself that it is alone
        if trial.driver.poll() is not None:
            break
        if time.monotonic() > began + 1 and len(trial.machines.all) < 3:
            trial.cluster.join()
        time.sleep(0.2)


def cut_in_scoring(trial: Trial) -> None:
    cut(trial, trial.line("round 1/"), REPLICA)


def cut_in_training(trial: Trial) -> None:
    cut(trial, trial.trains, WORKER)


def cut_in_publishing(trial: Trial) -> None:
    cut(trial, trial.line("evaluating and publishing"), REPLICA)


def slow_link(trial: Trial) -> None:
    trial.begin(**SLOW)


def interrupted_link(trial: Trial) -> None:
    """It is mended after five seconds, before anybody can take the node for lost."""
    other = trial.begin()
    trial.wait(trial.trains)
    trial.machines.cut(other)
    time.sleep(5)
    trial.machines.mend(other)


def node_joins(trial: Trial) -> None:
    """After one was lost in scoring: it trains, and scores what is published."""
    other = trial.begin()
    trial.wait(lambda: runs_on(other, REPLICA))
    other.lose()
    trial.wait(trial.line("round 1: fusing"))
    new = trial.cluster.join()
    trial.wait(lambda: runs_on(new, WORKER))
    trial.wait(trial.line("evaluating and publishing"))
    trial.wait(lambda: runs_on(new, REPLICA))
    trial.said.append("the new node trained and published")


def head_lost(trial: Trial) -> None:
    """With the driver, while it trains; the same command is given on a new cluster. What is left of
    the old one does what it likes.
    """
    trial.begin()
    trial.wait(trial.line("  epoch ", 3))
    trial.cluster.head.lose()
    trial.driver.wait(60)
    trial.begin()


def node_drained(trial: Trial) -> None:
    """As a notice of preemption does it, while it trains; soon it is gone, and another joins."""
    other = trial.begin()
    trial.wait(trial.trains)
    command = [sys.executable, "-c", DRAIN, trial.cluster.uri, other.address, str(NOTICE)]
    with (trial.machines.folder / "drain.log").open("w+") as log:
        drained = trial.cluster.head.start(command, log, environment()).wait(LIMIT)
        log.seek(0)
        assert drained == 0, log.read()
    time.sleep(NOTICE)
    other.lose()
    trial.cluster.join()


def node_told_to_end(trial: Trial) -> None:
    """Its `ray start` gets SIGTERM while it trains, as Kubernetes sends it to a pod: Ray drains the
    node, and ends it. Another joins.
    """
    other = trial.begin()
    trial.wait(trial.trains)
    (started,) = [process for process in other.processes() if "--block" in process.cmdline()]
    started.terminate()
    trial.cluster.join()
    trial.wait(lambda: not runs_on(other, "raylet"))
    trial.said.append("the node has ended, and the run goes on")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "a node's link is cut in training": cut_in_training,
    "a node's link is cut in scoring": cut_in_scoring,
    "a node's link is cut in publishing": cut_in_publishing,
    "the head is lost, and a new cluster goes on": head_lost,
    "a node is lost, and another joins in the middle": node_joins,
    "a node is drained in training, then lost": node_drained,
    "a node gets SIGTERM in training": node_told_to_end,
    "a slow link (50 ms each way, 20 Mbit/s)": slow_link,
    "a node's link is cut for 5 s in training": interrupted_link,
}


@dataclass(frozen=True)
class Outcome:
    fault: str
    code: int | None
    runs: int
    seconds: float
    hashes: dict[str, str]
    log: str

    def line(self, expected: dict[str, str]) -> str:
        """Of the table."""
        survived = "yes" if self.code == 0 else "NO"
        identical = "yes" if self.code == 0 and self.hashes == expected else "NO"
        return f"{self.fault:<50}{self.runs:>6}{self.seconds:>9.0f}{survived:>10}{identical:>11}"


HEADING = f"{'fault':<50}{'runs':>6}{'seconds':>9}{'survived':>10}{'identical':>11}"


@contextmanager
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tried(
    fault: str,
    happens: Callable[[Trial], None],
    recipe: dict[str, Any],
    out: Path,
    cluster: dict[str, Any] = CLUSTER,
) -> Outcome:
    """What becomes of a run to which this happens."""
    recipe = recipe | {"cluster": recipe["cluster"] | cluster}
    began = time.monotonic()
    with short_folder() as folder, Machines(folder) as machines:
        trial = Trial(machines, out, recipe)
        happens(trial)
        code = trial.end()
    seconds = time.monotonic() - began
    said = "".join(f"{line}\n" for line in trial.said)
    return Outcome(fault, code, trial.runs, seconds, hashes(out), trial.log + said)


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb runs on links of their own.")
    parser.add_argument("--only", default="", help="faults whose names have this in them")
    parser.add_argument("--verbose", action="store_true", help="print what every run says")
    arguments = parser.parse_args()
    if why := problem():
        print(f"skipped: no namespaces can be made here ({why.strip()})")
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from material import make_material

    chosen = {name: happens for name, happens in FAULTS.items() if arguments.only in name}
    with short_folder() as folder:
        material = make_material(folder)

        def outcome(number: int, name: str, happens: Callable[[Trial], None]) -> Outcome:
            out = folder / f"out{number}"
            found = tried(name, happens, material.recipe(out, **ASKED), out)
            if arguments.verbose or found.code != 0:
                print(found.log, flush=True)
            return found

        undisturbed = outcome(0, "nothing", nothing)
        print(HEADING, undisturbed.line(undisturbed.hashes), sep="\n", flush=True)
        assert undisturbed.code == 0 and undisturbed.hashes
        outcomes = []
        for number, (name, happens) in enumerate(chosen.items(), 1):
            outcomes.append(outcome(number, name, happens))
            print(outcomes[-1].line(undisturbed.hashes), flush=True)
    survived = [one for one in outcomes if one.code == 0]
    identical = [one for one in survived if one.hashes == undisturbed.hashes]
    print(f"tried {len(outcomes)}, survived {len(survived)}, identical {len(identical)}")
    return int(len(identical) < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
