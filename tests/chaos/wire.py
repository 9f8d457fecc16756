"""A slow wire between two network interfaces that it makes: every frame arrives so much later, and
so many bits pass a second, each way. Runs until it is killed.

    python wire.py NAME NAME SECONDS BITS
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

IFF_TAP, IFF_NO_PI, TUNSETIFF = 0x0002, 0x1000, 0x400454CA
LONGEST = 0.5
"""Seconds of frames that wait to be sent; a router drops what comes then."""


@dataclass
class Way:
    """From one interface to the other."""

    out: int
    delay: float
    rate: float
    free: float = 0.0
    """When the last frame has been sent."""
    frames: deque[tuple[float, bytes]] = field(default_factory=deque)
    """With the time at which each arrives."""

    def take(self, frame: bytes, now: float) -> None:
        begins = max(now, self.free)
        if begins < now + LONGEST:
            self.free = begins + 8 * len(frame) / self.rate
            self.frames.append((self.free + self.delay, frame))

    def deliver(self, now: float) -> None:
        while self.frames and self.frames[0][0] <= now:
            try:
                os.write(self.out, self.frames.popleft()[1])
            except OSError:  # the interface is down: the frame is lost
                continue


def tap(name: str) -> int:
    """A new interface; what is sent through it can be read from the file, and the reverse."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def main(names: list[str], delay: float, rate: float) -> None:
    one, other = map(tap, names)
    ways = {one: Way(other, delay, rate), other: Way(one, delay, rate)}
    while True:
        due = [way.frames[0][0] for way in ways.values() if way.frames]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        for file in select.select(list(ways), [], [], wait)[0]:
            try:
                frame = os.read(file, 65536)
            except OSError:  # it is down
                time.sleep(0.01)
                continue
            ways[file].take(frame, time.monotonic())
        for way in ways.values():
            way.deliver(time.monotonic())


if __name__ == "__main__":
    main(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
