"""Kill a run, again and again, and see whether the same command ends with the same bytes. `make
chaos` runs this file.

A case is a victim (driver, scoring worker, training worker, or a whole second node), an engine, and
a moment: when a line of the run's log appears, or a part of the time that the undisturbed run took,
from a seeded random generator. The victim gets SIGKILL. Whenever the driver ends with another code
than 0, the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

TESTS = Path(__file__).parents[1]
ATTEMPTS = 3
STAGES = (
    "starting the",
    "tokenising",
    "round 1/2: scoring",
    "round 1: fusing",
    "  epoch 1/3",
    "  epoch 2/3",
    "  epoch 3/3",
    "round 2/2: scoring",
    "round 2: fusing",
    "evaluating and publishing tiny-p12.5",
    "evaluating and publishing tiny-p25",
    "published ",  # all is done: the same command finds it
)
TITLES = {"scoring worker": "ray::_Replica", "training worker": "RayTrainWorker"}
"""What is in the command line of a victim's process. (Ray writes the name of the actor's class
there.)"""


@dataclass(frozen=True)
class Case:
    victim: str
    engine: str
    moment: str | float
    """The beginning of a line of the log, or a part of the undisturbed run's time, in (0, 1)."""

    def __str__(self) -> str:
        at = (
            f"at “{self.moment.strip()}”"
            if isinstance(self.moment, str)
            else f"after {self.moment:.0%} of the time"
        )
        return f"{self.victim} ({self.engine}) {at}"


@dataclass
class Outcome:
    case: Case
    killed: int = 0
    """Processes."""
    runs: int = 0
    """How often the command was given until it ended well."""
    identical: bool = False
    finished: bool = False
    log: str = ""


@dataclass
class Chaos:
    """Where runs are made: `recipe` as in a YAML file, without output and cluster."""

    folder: Path
    recipe: Callable[[Path], dict[str, Any]]
    expected: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def undisturbed(self, engine: str) -> None:
        """What a run gives that nobody disturbs, and how long it takes."""
        out = self.folder / f"undisturbed-{engine}"
        with self.cluster(engine) as address:
            began = time.monotonic()
            run = self._start(out, engine, address)
            assert run.wait() == 0, (out / "log").read_text()
            self.seconds[engine] = time.monotonic() - began
        found = hashes(out)
        assert found and self.expected in ({}, found), "engines differ"
        self.expected = found

    def run(self, case: Case, number: int) -> Outcome:
        outcome = Outcome(case)
        out = self.folder / f"case-{number}"
        with self.cluster(case.engine) as address:
            while not outcome.finished and outcome.runs < ATTEMPTS:
                run = self._start(out, case.engine, address)
                outcome.runs += 1
                if not outcome.killed:
                    outcome.killed = self._kill(case, run, out / "log", address)
                outcome.finished = run.wait() == 0
                _reap(run)
        outcome.identical = outcome.finished and hashes(out) == self.expected
        outcome.log = (out / "log").read_text()
        return outcome

    def _start(self, out: Path, engine: str, address: Address | None) -> psutil.Popen:
        out.mkdir(exist_ok=True)
        recipe = self.recipe(out)
        recipe["cluster"] = {
            "engine": engine if engine == "local" else "ray",
            "replicas": 2,
            "checkpoint_minutes": 0,
        }
        if address:
            recipe["cluster"]["address"] = address.uri
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("RAY_ADDRESS", None)
        with (out / "log").open("a") as log:
            log.write("--- the command is given\n")
            log.flush()
            command = [
                sys.executable,
                "-m",
                "fusegpt_ray.cli",
                "compress",
                str(out / "recipe.yaml"),
            ]
            return psutil.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _kill(self, case: Case, run: psutil.Popen, log: Path, address: Address | None) -> int:
        """Wait for the moment and the victim, and kill it. 0: the run ended before."""
        began = time.monotonic()
        while run.poll() is None:
            if isinstance(case.moment, str):
                due = any(line.startswith(case.moment) for line in log.read_text().splitlines())
            else:
                due = time.monotonic() - began >= case.moment * self.seconds[case.engine]
            if due:
                if case.victim == "driver":
                    run.kill()
                    return 1
                if case.victim == "node":
                    assert address is not None
                    address.replace_second_node()
                    return 1
                victims = (
                    [
                        process
                        for process in address.processes()
                        if TITLES[case.victim] in _title(process)
                    ]
                    if address
                    else [
                        process
                        for process in run.children(recursive=True)
                        if TITLES[case.victim] in _title(process)
                    ]
                )
                if victims:
                    _kill(victims[0])
                    return 1
            time.sleep(0.02)
        return 0

    @contextmanager
    def cluster(self, engine: str) -> Iterator[Address | None]:
        """Two nodes of their own for the engine "ray on two nodes"."""
        if "nodes" not in engine:
            yield None
            return
        address = Address()
        try:
            yield address
        finally:
            address.stop()


class Address:
    """A Ray cluster of two nodes on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200_000_000}
        )
        self._second = self._add()

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=2, object_store_memory=200_000_000)

    @property
    def uri(self) -> str:
        return str(self._cluster.address)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    def replace_second_node(self) -> None:
        """SIGKILL to the raylet and all on it; another node comes, as an autoscaler would bring
        it.
        """
        lost, self._second = self._second, self._add()
        self._cluster.remove_node(lost, allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _reap(run: psutil.Popen) -> None:
    """What a killed driver's Ray left (it ends by itself, later): the next attempt shall have the
    machine.
    """
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == run.pid:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every published weight file, which the manifests must tell too."""
    found = {}
    for manifest in sorted(out.glob("*/fusegpt.json")):
        told = json.loads(manifest.read_text())["files"]
        for file in sorted(manifest.parent.glob("*.safetensors")):
            name = f"{manifest.parent.name}/{file.name}"
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            assert told[file.name]["sha256"] == found[name], name
    return found


def random_cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    victims = [
        ("driver", "local"),
        ("driver", "ray"),
        ("scoring worker", "ray"),
        ("training worker", "ray"),
        ("node", "ray on two nodes"),
    ]
    return [Case(*victims[n % len(victims)], draw.uniform(0.05, 0.95)) for n in range(count)]


def summary(outcomes: list[Outcome]) -> str:
    """The table: a line a victim."""
    lines = [f"{'victim':<34}{'kills':>7}{'resumed':>9}{'identical':>11}{'lost':>6}"]
    for victim in dict.fromkeys(f"{o.case.victim} ({o.case.engine})" for o in outcomes):
        rows = [o for o in outcomes if f"{o.case.victim} ({o.case.engine})" == victim]
        kills, resumed = sum(o.killed for o in rows), sum(o.runs > 1 for o in rows)
        identical, lost = sum(o.identical for o in rows), sum(not o.finished for o in rows)
        lines.append(f"{victim:<34}{kills:>7}{resumed:>9}{identical:>11}{lost:>6}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill runs at every stage boundary and at random moments; print what became of "
        "them."
    )
    parser.add_argument(
        "--kills", type=int, default=30, help="random moments, besides the stage boundaries"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", type=int, default=0, help="cases to leave out: a long run in parts"
    )
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from material import make_material

    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    chaos = Chaos(folder, make_material(folder).recipe)
    for engine in ("local", "ray", "ray on two nodes"):
        chaos.undisturbed(engine)
        print(f"undisturbed, {engine}: {chaos.seconds[engine]:.0f} s", flush=True)
    cases = [Case("driver", engine, stage) for stage in STAGES for engine in ("local", "ray")]
    outcomes = []
    for number, case in list(enumerate([*cases, *random_cases(arguments.kills, arguments.seed)]))[
        arguments.skip :
    ]:
        outcomes.append(chaos.run(case, number))
        last = outcomes[-1]
        what = "identical" if last.identical else "DIFFERENT" if last.finished else "LOST"
        print(f"{number:>3}  {case}: {last.killed} killed, {last.runs} runs, {what}", flush=True)
        if not last.identical:
            print(last.log, flush=True)
    print(summary(outcomes))
    shutil.rmtree(folder)
    return 0 if all(outcome.identical for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
