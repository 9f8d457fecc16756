"""Machines on this one: each a set of Linux namespaces (network, host name, processes, mounts),
joined by a bridge in a namespace of its own, so that a link can be cut or be slow.

- A machine is a process that reads its standard input to the end, as process 1 of its namespace.
  When whoever made it is gone, however that came about, so is the machine with all that runs in it.
  Nothing has a name in the system, and nothing is left behind.
- All machines see the same files, but for Ray's own folder, of which each has one.
- A slow link is a wire in user space (`wire.py`): few kernels have `tc netem`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

NET = "10.77.0"
"""The first three numbers of all addresses; no other namespace sees them."""
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
UNSHARE += ["--mount-proc"]
BEGIN = """
read -r
hostname "$NAME"; mount --bind "$HOSTS" /etc/hosts; mount --bind "$OWN" "$SHARED"
ip link set lo up
cat > /dev/null
"""
"""What process 1 does, once it is told that its link is there."""


def problem() -> str:
    """Why machines cannot be made here; nothing where they can."""
    try:
        made = subprocess.run([*UNSHARE, "ip", "link"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return made.stderr if made.returncode else ""


class Machine:
    """One set of namespaces."""

    def __init__(self, name: str, address: str, own: Path, hosts: Path, shared: Path) -> None:
        self.name, self.address = name, address
        own.mkdir(parents=True, exist_ok=True)
        variables = {"NAME": name, "HOSTS": str(hosts), "OWN": str(own), "SHARED": str(shared)}
        self._unshare = subprocess.Popen(
            [*UNSHARE, "bash", "-c", BEGIN],
            stdin=subprocess.PIPE,
            env=os.environ | variables,
            start_new_session=True,
        )
        made = psutil.Process(self._unshare.pid)
        while not made.children():
            assert self._unshare.poll() is None, "no namespaces"
            time.sleep(0.01)
        self.pid = made.children()[0].pid
        """Of process 1, as it is called outside."""

    def begin(self) -> None:
        """Its link is there."""
        assert self._unshare.stdin is not None
        self._unshare.stdin.write(b"go\n")
        self._unshare.stdin.flush()
        while self.call("ip link show lo up").find("LOOPBACK") < 0:
            time.sleep(0.01)

    def start(self, command: list[str], log: IO[str], env: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(self._inside(command), stdout=log, stderr=log, env=env, text=True)

    def call(self, command: str) -> str:
        """What a short command prints."""
        return self.run(command.split())

    def run(self, command: list[str]) -> str:
        """As `call`, in words."""
        inside = self._inside(command)
        done = subprocess.run(inside, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All of them; those that `start` began are no children of its process 1."""
        found = []
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        for process in psutil.process_iter():
            with suppress(OSError):  # it has ended
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own:
                    found.append(process)
        return found

    def lose(self) -> None:
        """It is gone with all its processes, without a word to others."""
        self._unshare.kill()  # and process 1 with it (--kill-child), and so all others
        self._unshare.wait()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).wait(60)

    def _inside(self, command: list[str]) -> list[str]:
        target = ["--target", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        return ["nsenter", *target, "--", *command]


class Machines:
    """Machines on one bridge; while the block lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared = folder, folder / "r"
        """`shared`: the folder that is another one on each machine. Its path is short: those of
        Ray's sockets have at most 107 bytes."""
        self.shared.mkdir(parents=True)
        self._hosts = folder / "hosts"
        names = "".join(f"{NET}.{number} node{number}\n" for number in range(1, 100))
        self._hosts.write_text(f"127.0.0.1 localhost\n{names}")
        self._wires: list[subprocess.Popen[bytes]] = []
        self.all: list[Machine] = []

    def __enter__(self) -> Self:
        self._hub = Machine("hub", "", self.folder / "hub", self._hosts, self.shared)
        self._hub.begin()
        self._hub.call("ip link add bridge type bridge")
        self._hub.call("ip link set bridge up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for machine in [*self.all, self._hub]:
            machine.lose()
        for wire in self._wires:
            wire.wait()

    def add(self, delay: float = 0.0, rate: float = 0.0) -> Machine:
        """A new machine on the bridge.

        Args:
            delay: seconds that a frame takes on its link, each way; rate: bits a second that
                pass it, each way. Both or none.
        """
        number = len(self.all) + 1
        own = self.folder / f"n{number}"
        new = Machine(f"node{number}", f"{NET}.{number}", own, self._hosts, self.shared)
        self.all.append(new)
        here, there = self._port(new), "eth0"
        if rate:
            command = [sys.executable, str(Path(__file__).with_name("wire.py")), here, there]
            inside = self._hub._inside([*command, str(delay), str(rate)])
            self._wires.append(subprocess.Popen(inside, stdin=subprocess.DEVNULL))
            while f"{there}:" not in self._hub.call("ip link"):
                assert self._wires[-1].poll() is None, "no wire"
                time.sleep(0.05)
        else:
            self._hub.call(f"ip link add {here} type veth peer name {there}")
        # By the number that the process has outside, where namespaces of processes end.
        moved = ["nsenter", "--target", str(self._hub.pid), "--net", "--"]
        subprocess.run([*moved, *f"ip link set {there} netns {new.pid}".split()], check=True)
        self._hub.call(f"ip link set {here} master bridge up")
        new.begin()
        new.call(f"ip address add {new.address}/24 dev {there}")
        new.call(f"ip link set {there} up")
        return new

    def cut(self, machine: Machine) -> None:
        """Its link: nothing passes any more, and nobody is told."""
        self._hub.call(f"ip link set {self._port(machine)} down")

    def mend(self, machine: Machine) -> None:
        """What was cut."""
        self._hub.call(f"ip link set {self._port(machine)} up")

    def _port(self, machine: Machine) -> str:
        """The end of its link at the bridge."""
        return f"port{machine.name.removeprefix('node')}"
