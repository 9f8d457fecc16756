"""A proxy in front of a real S3 server that makes requests fail as networks, servers and
accounts do, by rule; and a full disk.
"""

from __future__ import annotations

import re
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FOREVER = 1_000_000


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass
class Fault:
    """What happens to some of the requests of a method whose path (with its query) matches."""

    happens: Callable[[Exchange], None]
    method: str
    path: str
    times: int = 1
    skip: int = 0
    """Matching requests that pass before the first one that does not."""
    seen: int = 0
    hit: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        if self.seen <= self.skip or self.hit >= self.times:
            return False
        self.hit += 1
        return True


class Exchange(BaseHTTPRequestHandler):
    """One request, its body read, and how it may be answered."""

    protocol_version = "HTTP/1.1"
    server: Proxy
    body: bytes

    def handle_request(self) -> None:
        self.body = self._read_body()
        fault = self.server.fault_for(self.command, self.path)
        try:
            fault.happens(self) if fault else self.pass_on()
        except OSError:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def upstream(self) -> tuple[HTTPResponse, bytes]:
        """What the server answers; it has done what was asked then."""
        connection = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "expect")
        }
        connection.request(
            self.command, self.path, self.body, headers | {"Content-Length": str(len(self.body))}
        )
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response, data

    def send(self, response: HTTPResponse, data: bytes) -> None:
        """The answer's head as it is, and these bytes of its body."""
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = response.getheader("Content-Length")
        self.send_header("Content-Length", length if length is not None else str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def pass_on(self) -> None:
        self.send(*self.upstream())

    def reset(self) -> None:
        """The connection ends by RST, not in order."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def answers(status: int, code: str, message: str = "injected") -> Callable[[Exchange], None]:
    """The server answers with an error."""

    def happens(exchange: Exchange) -> None:
        error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        xml = f"<?xml version='1.0'?>{error}".encode()
        exchange.send_response_only(status)
        exchange.send_header("Content-Type", "application/xml")
        exchange.send_header("Content-Length", "0" if exchange.command == "HEAD" else str(len(xml)))
        exchange.end_headers()
        if exchange.command != "HEAD":
            exchange.wfile.write(xml)

    return happens


def reset(exchange: Exchange) -> None:
    """The connection breaks before the server sees the request."""
    exchange.reset()


def lost(exchange: Exchange) -> None:
    """The server does what was asked, and nobody hears of it."""
    exchange.upstream()
    exchange.reset()


def reset_halfway(exchange: Exchange) -> None:
    """The connection breaks in the middle of the answer."""
    response, data = exchange.upstream()
    exchange.send(response, data[: len(data) // 2])
    exchange.reset()


def truncated(exchange: Exchange) -> None:
    """Half of the answer, under the length of the whole, and an orderly end."""
    response, data = exchange.upstream()
    exchange.send(response, data[: len(data) // 2])
    exchange.connection.shutdown(socket.SHUT_WR)
    exchange.hang_up()


def stalled(exchange: Exchange) -> None:
    """Half of the answer, and then silence for as long as the client waits."""
    response, data = exchange.upstream()
    exchange.send(response, data[: len(data) // 2])
    exchange.server.over.wait(60)
    exchange.hang_up()


@dataclass
class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server on port `upstream` of this machine, but for those that a
    fault strikes.
    """

    upstream: int
    faults: Sequence[Fault] = ()
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: list[tuple[str, str]] = field(default_factory=list)

    daemon_threads = True

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    __hash__ = object.__hash__

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)

    def inject(self, *faults: Fault) -> None:
        """From now on these faults, and no others."""
        with self.lock:
            self.faults = faults

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up, as it should."""
