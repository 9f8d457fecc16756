"""While a run works, everybody hears of it who wants to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display, Listener
from fusegpt_ray.store import storage
from fusegpt_ray.store.retry import cleaned
from fusegpt_ray.tracking.trackers import TRACKERS, About, Tracker
from fusegpt_ray.tracking.values import measured, step

PATIENCE = 60.0
"""Seconds that the end of a run waits for trackers which still send."""
IMPATIENCE = 3.0
"""The same where an exception ends the run: the user may have pressed Ctrl-C."""


@contextmanager
def followed(
    show: Display, recipe: Recipe, run: str, facts: Mapping[str, Any], *listeners: Listener
) -> Iterator[None]:
    """While the block lasts, the listeners and the recipe's trackers hear of the run.

    Args:
        run: its id, the same for a run that goes on.
        facts: what its first event tells.
    """
    output = recipe.output
    config, place = recipe.model_dump(mode="json"), storage.absolute(output.uri)
    about = About(output.name, run[:16], config, place)
    tracking = [Tracking(name, about, show.say) for name in dict.fromkeys(output.track)]
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


class Tracking:
    """One tracker in a thread of its own, so that it holds up nothing, and what fails there costs
    lines of the log.
    """

    def __init__(self, name: str, about: About, say: Callable[[str], None]) -> None:
        self.name, self._about, self._say = name, about, say
        self._queue: SimpleQueue[tuple[dict[str, float], int] | bool] = SimpleQueue()
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
        """For what is still to be sent."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"WARNING: {self.name} still sends after {seconds:.0f} s: not waited for")

    def _work(self) -> None:
        tracker: list[Tracker] = []
        if not self._try(lambda: tracker.append(TRACKERS[self.name](self._about))):
            return
        (own,) = tracker
        self._say(f"tracked by {self.name}: {own.where}")
        while not isinstance(item := self._queue.get(), bool):
            self._try(partial(own.log, *item))
        self._try(partial(own.close, item))

    def _try(self, action: Callable[[], None]) -> bool:
        """Whether it went well. The first failure is told, whatever the library raises."""
        try:
            action()
        except Exception as error:
            if not self._failed:
                what = cleaned(f"{type(error).__name__}: {error}").partition("\n")[0]
                self._say(f"WARNING: {self.name} failed ({what}); the run goes on without it")
            self._failed = True
            return False
        return True
