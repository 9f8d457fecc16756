"""A server that speaks the hub's protocol for one file of one dataset, on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fusegpt_ray.recipe.specs import PublishedSpec


@dataclass
class TextHub:
    address: str
    home: Path
    """Of the hub's cache."""
    downloads: list[str] = field(default_factory=list)

    def evaluate(self, *arguments: str, offline: str = "0") -> dict[str, Any]:
        """What `fusegpt evaluate --json` prints where the hub is this server."""
        environment = os.environ | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "fusegpt_ray.cli", "evaluate", *arguments, "--json"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextmanager
def text_hub(spec: PublishedSpec, file: Path, home: Path) -> Iterator[TextHub]:
    """Serves the file as the dataset's at the pinned commit, and nothing else."""
    data = file.read_bytes()
    wanted = f"/datasets/{spec.repository}/resolve/{spec.revision}/{spec.file}"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path != wanted:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", spec.revision)
            self.end_headers()
            if self.command == "GET":
                hub.downloads.append(self.path)
                self.wfile.write(data)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = TextHub(f"http://127.0.0.1:{server.server_port}", home)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
