"""How a text was measured, in words. Light: commands that only look at what is published say it,
too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def described(protocol: Mapping[str, Any]) -> str:
    """A protocol in words. Older manifests lack parts; then no window began with the token."""
    windows, data = protocol.get("windows"), protocol.get("data")
    count = "windows" if windows is None else "1 window" if windows == 1 else f"{windows} windows"
    of = f" of {data}" if data else ""
    token = "with" if protocol.get("bos") else "without"
    return f"{count} of {protocol['length']} tokens{of}, {token} a beginning-of-sequence token"
