"""A real browser without a window, and what it makes of a report."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_QUIET = ("background-networking", "component-update", "sync", "gpu")


def charts_drawn(page: Path, profile: Path) -> int:
    """How many charts it has, each of which was drawn, with nothing told on the console.

    Args:
        profile: a folder for the browser's files.
    """
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"),
            *(f"--disable-{name}" for name in _QUIET),
            f"--user-data-dir={profile}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    _, *charts = re.split(r'<div class="chart', done.stdout)
    for chart in charts:
        assert re.search(r"<svg\b.*?<path\b", chart.split("</figure>")[0], re.DOTALL)
    return len(charts)
