"""The hub's own client does not wait for ever.

By itself it gives most requests no time at all to end by: behind a proxy that takes connections and
says nothing, a command would hang at its first step, and never look into the hub's cache. Light:
the client is imported where it is needed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

SOON = 10.0
"""Seconds for a connection, and for the answer to a question about a model."""
LONGEST = 60.0
"""Seconds of silence within any other answer: what the hub does for a commit takes its time."""


@cache
def patient() -> None:
    """From now on, in this process, whatever asks the hub gives it so long: our code, and the
    libraries that read models and texts there.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(_client)


def _client() -> Any:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    # Not the client's own time-out: many of the library's calls pass their None over it.
    client.event_hooks["request"].append(_limit)
    return client


def _limit(request: Any) -> None:
    asked = request.extensions.get("timeout") or {}
    ours = {"connect": SOON, "pool": SOON, "read": LONGEST, "write": LONGEST}
    limits = {key: asked.get(key) or value for key, value in ours.items()}
    request.extensions = {**request.extensions, "timeout": limits}
