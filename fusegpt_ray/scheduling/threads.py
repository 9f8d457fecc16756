"""Threads that end with the block that started them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Threads:
    """Threads that are waited for at the end of the block. What ends it by an exception, such as
    Ctrl-C, ends them too, in the same way: each is raised KeyboardInterrupt in. Notes that it has
    there, such as what is kept of the work of that thread, become notes of what ends the block.
    """

    def __init__(self) -> None:
        self.started: list[threading.Thread] = []
        self._notes: list[str] = []

    def start(self, work: Callable[[int], None], numbers: range) -> None:
        for number in numbers:
            one = threading.Thread(target=self._until_stopped, args=(work, number), daemon=True)
            self.started.append(one)
            one.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        except BaseException as stop:
            self._stop(stop)
            raise
        if error is not None:
            self._stop(error)

    @property
    def alive(self) -> bool:
        """Whether any of them still works."""
        return any(one.is_alive() for one in self.started)

    def wait(self) -> None:
        """Until each has ended."""
        for one in self.started:
            one.join()

    def _stop(self, error: BaseException) -> None:
        for one in self.started:
            if one.ident is not None and one.is_alive():
                where, what = ctypes.c_ulong(one.ident), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(where, what)
        self.wait()
        for note in dict.fromkeys(self._notes):
            error.add_note(note)

    def _until_stopped(self, work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except KeyboardInterrupt as stop:  # the main thread tells of it
            self._notes += getattr(stop, "__notes__", ())
