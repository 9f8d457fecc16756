"""While a run works, everybody hears of it who wants to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.store.retry import cleaned
from fusegpt_ray.terminal.display import Display, Listener
from fusegpt_ray.tracking.apart import Apart, TrackerFailed
from fusegpt_ray.tracking.trackers import About
from fusegpt_ray.tracking.values import measured, step

PATIENCE = 60.0
"""Seconds that the end of a run waits for trackers which still send."""
IMPATIENCE = 3.0
"""The same where an exception ends the run: the user may have pressed Ctrl-C."""


@contextmanager
def followed(
    show: Display,
    recipe: Recipe,
    run: str,
    facts: Mapping[str, Any],
    *listeners: Listener,
    saved: Callable[[], bool],
) -> Iterator[None]:
    """While the block lasts, the listeners and the recipe's trackers hear of the run.

    Args:
        run: its id, the same for a run that goes on.
        facts: what its first event tells.
        saved: whether something of the run stays if it is stopped now. Trackers hear of nothing
            before, so that a run which leaves nothing leaves no curves.
    """
    output = recipe.output
    about = _about(recipe, run)
    tracking = [Tracking(name, about, show.say, saved) for name in dict.fromkeys(output.track)]
    well = False
    with show.heard(*listeners, *tracking):
        show.tell("run", run=run, name=output.name, method=recipe.method, **facts)
        try:
            yield
            well = True
        except BaseException as error:
            show.tell("ended", error=type(error).__name__)
            raise
        finally:
            for item in tracking:
                item.ends(well)
            for item in tracking:
                item.wait(PATIENCE if well else IMPATIENCE)


def _about(recipe: Recipe, run: str) -> About:
    """A run's id leaves out where it writes, so the same recipe with another name has the same."""
    name, place = recipe.output.name, storage.absolute(recipe.output.uri)
    here = checksum({"run": run, "place": place, "name": name})[:16]
    return About(name, here, run, recipe.model_dump(mode="json"), place)


class Tracking:
    """One tracker, asked by a thread of its own, so that it holds up nothing, and what fails there
    costs lines of the log.
    """

    def __init__(
        self, name: str, about: About, say: Callable[[str], None], saved: Callable[[], bool]
    ) -> None:
        self.name, self._about, self._saved = name, about, saved
        self._say = lambda text: say(cleaned(text))
        self._queue: SimpleQueue[tuple[dict[str, float], int] | bool] = SimpleQueue()
        self._there: Apart | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        if found := {item.tag: item.value for item in measured(event, values)}:
            self._queue.put((found, step(event, values)))

    def ends(self, well: bool) -> None:
        """Nothing more comes; `well`: the run has come to its end."""
        self._queue.put(well)

    def wait(self, seconds: float) -> None:
        """For what is still to be sent; then it is given up."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed = True  # the thread need not tell as well
            self._say(f"WARNING: {self.name} still sends after {seconds:.0f} s: not waited for")
            if self._there:
                self._there.kill()

    def _work(self) -> None:
        begun = self._try(self._begin)
        if not (there := self._there):
            return
        if begun:
            self._hand_on(there)
        else:
            there.kill()
        there.wait()

    def _hand_on(self, there: Apart) -> None:
        """What the queue brings, up to the end."""
        held: list[tuple[dict[str, float], int]] = []
        while not isinstance(item := self._queue.get(), bool):
            held.append(item)
            while held and self._saved():
                self._try(partial(there.log, *held.pop(0)))
        self._try(partial(there.close, item))

    def _begin(self) -> None:
        self._there = Apart(self.name)
        where = self._there.begin(self._about).partition("\n")[0]
        self._say(f"tracked by {self.name}: {where}")

    def _try(self, action: Callable[[], None]) -> bool:
        """Whether it went well. The first failure is told."""
        try:
            action()
        except (TrackerFailed, OSError) as error:
            if not self._failed:
                what = str(error).partition("\n")[0]
                self._say(f"WARNING: {self.name} failed ({what}); the run goes on without it")
            self._failed = True
            return False
        return True
