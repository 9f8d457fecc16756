"""What the training workers of a group have to say to the driver, while Ray Train runs them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from fusegpt_ray.training.checkpoints import Say
from fusegpt_ray.workers.base import Epoch


@ray.remote(num_cpus=0)
class Progress:
    """Carries what workers have to say to the driver's display: epochs' losses and lines; and that the memory of one ran out."""

    def __init__(self) -> None:
        self.new: list[tuple[int, float] | str] = []
        self.out_of_memory = ""

    def add(self, news: tuple[int, float] | str) -> None:
        self.new.append(news)

    def take(self) -> list[tuple[int, float] | str]:
        taken, self.new = self.new, []
        return taken

    def ran_out(self, error: str) -> None:
        self.out_of_memory = error

    def has_run_out(self) -> str:
        return self.out_of_memory


@contextmanager
def watching(progress: Any, epoch: Epoch, say: Say) -> Iterator[None]:
    """Hand the workers' news to `epoch` and `say` every half second, and all that is left at the end."""
    over = threading.Event()

    def watch() -> None:
        finished = False
        while not finished:
            finished = over.wait(0.5)
            for news in ray.get(progress.take.remote()):
                if isinstance(news, str):
                    say(news)
                else:
                    epoch(*news)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
