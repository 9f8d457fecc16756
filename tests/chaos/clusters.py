"""Ray clusters of machines (`machines.py`), one node each."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from machines import Machine, Machines

BIN = Path(sys.executable).parent
HEAD = ["--head", "--include-dashboard=false"]
PORTS = ["--runtime-env-agent-port=50001", "--dashboard-agent-grpc-port=50002"]
PORTS += ["--dashboard-agent-listen-port=50003", "--metrics-export-port=50004"]
"""Each machine has its own; those that are not given, Ray waits for no longer than 15 seconds, in
which a busy machine may not have started what listens there."""

NOTICE = 10
"""Seconds from a notice of preemption to the end."""


class Cluster:
    """A Ray cluster of machines."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        self.head = machines.add()
        self.port = 6379
        self.uri = f"{self.head.address}:{self.port}"
        self._start(self.head, [*HEAD, f"--port={self.port}", f"--temp-dir={machines.shared}"])

    def join(self, **link: float) -> Machine:
        """A new node; `link`: as of `Machines.add`."""
        new = self.machines.add(**link)
        self._start(new, [f"--address={self.uri}"])
        return new

    def _start(self, machine: Machine, options: list[str]) -> None:
        here = [f"--node-ip-address={machine.address}", "--num-cpus=1", "--block"]
        store = ["--object-store-memory=100000000", "--disable-usage-stats"]
        log = self.machines.folder / f"{machine.name}.log"
        with log.open("w") as file:
            command = [str(BIN / "ray"), "start", *options, *here, *PORTS, *store]
            started = machine.start(command, file, environment())
        until = time.monotonic() + 600
        while "Ray runtime started" not in log.read_text():
            assert started.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)


def environment() -> dict[str, str]:
    """Of all processes on machines."""
    without = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    more = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    more["RAY_raylet_start_wait_time_s"] = "300"  # the machine may be busy
    more["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(NOTICE)
    return without | more | {"PATH": f"{BIN}:{os.environ['PATH']}"}
