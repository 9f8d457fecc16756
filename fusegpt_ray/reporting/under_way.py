"""What the journal of a run tells that is not finished, in the words of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.reporting.prices import Spent
from fusegpt_ray.reporting.shapes import Other
from fusegpt_ray.run.budget import SPENT
from fusegpt_ray.run.outputs import IDENTITY, Run
from fusegpt_ray.store.manifest import KEY


def under_way(run: Run) -> dict[str, Any]:
    """
    Raises:
        UserError: nobody knows which run it is.
    """
    identity = run.body(IDENTITY)
    if identity is None:
        raise UserError(
            KEY,
            run.folder.uri,
            f"its {IDENTITY} is missing or damaged, so nobody knows which run this is",
            "give the folder of a run that has begun, or of a published model",
        )
    rounds = run.rounds
    recipe = identity["recipe"]
    done = f"{len(rounds)} of {run.heartbeat.get('rounds') or '?'} rounds done"
    state = f"stopped: {done}"
    if run.state() == "alive":
        state = f"at work: {done}, {run.heartbeat.get('doing') or 'starting'}"
    healed = (_healing(run, removed) for removed in range(len(rounds), 0, -1))
    known = (run.body("plan-000.json") or {}).get("note") or {}
    return {
        "gpu": identity.get("hardware", {}).get("gpu", ""),
        **known,
        "state": state,
        "source": {"name": recipe["model"]["source"], "revision": recipe["model"].get("revision")},
        "method": recipe["method"],
        "arithmetic": identity["arithmetic"],
        "recipe": recipe,
        "spent": Spent.told(run.heartbeat.get(SPENT)),
        "width": rounds[-1].get("width") if rounds else None,
        "rounds": [*rounds, *_begun(run, len(rounds) + 1)],
        "healing": next(filter(None, healed), None),
        "search": _search(run),
        "others": _published(run),
    }


def _published(run: Run) -> list[Other]:
    """The models that are there already; another hand's damage to one is no matter of this run."""
    found = []
    for name, told in run.published.items():
        with suppress(ValidationError):
            found.append(Other.model_validate({**told, "name": name}))
    return found


def _begun(run: Run, number: int) -> list[Mapping[str, Any]]:
    """What is known of a round that is not finished."""
    scored = (run.body(f"scores-{number:03d}.json") or {}).get("note")
    trained = _checkpoint(run, f"round-{number:03d}")
    if not scored and not trained:
        return []
    ranking = scored["ranking"] if scored else {}
    seconds = {"score": scored["seconds"]} if scored else {}
    return [{**ranking, "losses": trained["losses"] if trained else [], "seconds": seconds}]


def _healing(run: Run, removed: int) -> Mapping[str, Any] | None:
    """Of the model that lost so many blocks, as far as it has come."""
    name = f"heal-{removed:03d}"
    return (run.body(f"{name}.json") or {}).get("round") or _checkpoint(run, name)


def _checkpoint(run: Run, what: str) -> dict[str, Any] | None:
    """The losses that the last training checkpoint tells of, if there are any."""
    record = run.checkpoint(what)
    return {key: record[key] for key in ("losses", "held_out")} if record.get("losses") else None


def _search(run: Run) -> dict[str, Any] | None:
    note = (run.body("search-000.json") or {}).get("note") or {"entrants": []}
    tried = [{**one, "held_out": one["held_out"] or []} for one in note["entrants"]]
    return {"tried": tried, "seconds": note.get("seconds", 0.0)} if tried else None
