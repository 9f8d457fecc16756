"""A store at which nothing answers: who only looks at an output tries again, and says so in one
line.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from fusegpt_ray.cli import main


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "0.5")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of nobody")
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("verb", ["status", "clean", "report"])
def test_it_is_asked_again_and_told_in_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "s3://bucket/models"]) == 1
    stdout, stderr = capsys.readouterr()
    (line,) = stderr.splitlines()
    assert line.startswith("failed: s3://bucket/models: EndpointConnectionError: ") and not stdout
    tries = re.search(r"given up after (\d+) tries", line)
    assert tries and int(tries[1]) > 1
    assert not [*tmp_path.iterdir()]
