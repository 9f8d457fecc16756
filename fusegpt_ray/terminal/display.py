"""What a person sees while a run goes on: one live display on a terminal, plain lines elsewhere.
Always on stderr. What is shown is told to listeners as well, in numbers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from fusegpt_ray.store.retry import retries
from fusegpt_ray.terminal.table import Table
from fusegpt_ray.text.protocol import described, stages, undone, warnings

SHOWN = 12
"""Names that a line shows."""
Listener = Callable[[str, Mapping[str, Any]], None]
"""Hears of each event in a run: its name, and JSON values that tell of it. It never raises."""


class _Live:
    """A bar that moves on a terminal, and lines that stay."""

    console: Console
    _moves: Any  # a Progress, or what draws it

    def __enter__(self) -> Self:
        self._moves.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._moves.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One that whoever has to act upon it will look for."""
        self.say(f"WARNING: {text}")


class Display(_Live):
    """Progress of one run. Everything it says is also true of a log file: no bar, no colour, one
    line an event there.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = self._moves = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._swapping = threading.Lock()  # cells of a comparison come from several threads
        self._stage, self._note = "starting", ""
        self._round_seconds: list[float] = []
        self._round_began = 0.0
        self._listeners: tuple[Listener, ...] = ()
        self._about: Mapping[str, Any] = {}
        self._tokens, self._since, self._retries = 0, time.monotonic(), retries()

    def of_run(self, name: str) -> Display:
        """For what is said and told of one run, in a command that may have several. A person is
        shown all of it in one place; `LogLines` keeps runs apart.
        """
        return self

    def beside(self, title: str) -> Display:
        """For a run at work, while others are at work, too. Each has its own listeners."""
        return OneOfSeveral(self, title)

    @contextmanager
    def heard(self, *listeners: Listener) -> Iterator[None]:
        """While the block lasts, these hear of all that happens."""
        before, self._listeners = self._listeners, (*self._listeners, *listeners)
        try:
            yield
        finally:
            self._listeners = before

    def tell(self, event: str, **values: Any) -> None:
        """To whoever listens; a person is not shown it."""
        for listener in self._listeners:
            listener(event, values)

    def stage(self, text: str, total: int | None = None) -> None:
        """What is being done now."""
        self._stage, self._note, self._since = text, "", time.monotonic()
        self.tell("stage", doing=text)
        with self._swapping:
            self._bar.remove_task(self._task)  # a total once set cannot be unset
            self._task = self._bar.add_task(text, total=total, note="")
        if not self.console.is_terminal:
            self.say(text)

    @property
    def doing(self) -> str:
        """What is being done now, in words: for whoever looks from elsewhere."""
        return self._stage + self._note

    def calibration(self, protocol: Mapping[str, Any]) -> None:
        """What all numbers of scoring and fine-tuning rest on; see `Windows.protocol`."""
        self.say(f"calibration: {described(protocol)}")
        for warning in warnings(protocol):
            self.say(f"warning: calibration: {warning}")

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        """`blocks`: how many are scored; 0 where none is."""
        self._round_began = time.monotonic()
        scoring = f": scoring {blocks} blocks" if blocks else ""
        self.stage(f"round {number}/{rounds}{scoring}")

    def training(self, tokens: int, **about: Any) -> None:
        """What the epochs that follow belong to, and how many tokens each of them passes."""
        self._tokens, self._about = tokens, about

    def epoch(
        self,
        number: int,
        epochs: int,
        loss: float,
        what: str = "epoch",
        held_out: float | None = None,
    ) -> None:
        """The seconds that are told of the first one include the states before it."""
        now = time.monotonic()
        seconds, self._since = max(now - self._since, 1e-9), now
        self.tell(
            what,
            **self._about,
            **{what: number, f"{what}s": epochs, "loss": loss},
            **({} if held_out is None else {"held_out": held_out}),
            seconds=round(seconds, 3),
            tokens_per_second=round(self._tokens / seconds, 1),
        )
        self._note = f" ({what} {number}/{epochs}, loss {loss:.4g})"
        note = f"{what} {number}/{epochs}  loss {loss:.4g}"
        with self._swapping:
            self._bar.update(self._task, completed=number, total=epochs, note=note)
        if not self.console.is_terminal and (
            number in (1, epochs) or number % max(1, epochs // 5) == 0
        ):
            self.say(f"  {note}")

    def part(self, number: int, parts: int) -> None:
        """So many of the equal parts of what is being done are done."""
        self._note = f" ({number}/{parts})"
        with self._swapping:
            self._bar.update(self._task, completed=number, total=parts, note=f"{number}/{parts}")
        if not self.console.is_terminal and number % max(1, parts // 5) == 0:
            self.say(f"  {number}/{parts}")

    def round_ends(
        self, number: int, rounds: int, record: Mapping[str, Any], bytes_written: int
    ) -> None:
        """`record`: what the manifest will tell of it; see `rounds.py`."""
        told = ("removed", "width", "group", "losses", "states_bytes_read", "seconds")
        self.tell(
            "round",
            round=number,
            rounds=rounds,
            **{key: record[key] for key in told if key in record},
            bytes_written=bytes_written,
            retries=self._new_retries(),
        )
        losses = record["losses"]
        self._round_seconds.append(time.monotonic() - self._round_began)
        left = (rounds - number) * sum(self._round_seconds) / len(self._round_seconds)
        ends = [f"{loss:.4g}" for loss in (*losses[:1], *losses[1:][-1:])]  # of one epoch one
        trend = f"loss {' → '.join(ends)}, " if ends else ""
        rest = f", about {duration(left)} of rounds left" if number < rounds else ""
        self.say(f"  {trend}{duration(self._round_seconds[-1])}{rest}")

    def _new_retries(self) -> int:
        """How often this process has tried something again with a store since it was last asked."""
        before, self._retries = self._retries, retries()
        return self._retries - before

    def published(self, model: str, removed: int, publishing: Mapping[str, Any]) -> None:
        """How fast a model's shards were written; see a manifest's "publishing"."""
        about = {"model": model, "removed": removed, **publishing}
        self.tell("published", **about, retries=self._new_retries())
        size, rate = byte_count(publishing["bytes"]), publishing["gb_per_second"]
        self.say(f"  {size} written and read back, {rate:.2g} GB/s")

    def results(self, rows: Iterable[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> None:
        """The last table: for each published model its perplexity at each stage on each text, and
        below it what was measured.
        """
        found = list(rows)
        table = perplexity_table(found)
        if table.row_count:
            self.console.print(table)
        # Of several models mostly the same.
        told = (f"{data}: {described(row)}" for _, texts in found for data, row in texts.items())
        for protocol in dict.fromkeys(told):
            self.say(protocol)

    def left_out(self, source: str, names: Sequence[str]) -> None:
        """What of a source no published model holds; the manifest has all the names."""
        if names:
            more = (
                f" and {len(names) - SHOWN} more (see fusegpt.json)" if len(names) > SHOWN else ""
            )
            self.say(f"not taken over from {source}: {', '.join(names[:SHOWN])}{more}")


def perplexity_table(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> Table:
    """Of models by name, on each text at each stage."""
    measured = [row for _, perplexity in rows for row in perplexity.values()]
    shown, mended = stages(measured), any(undone(row) is not None for row in measured)
    table = Table("model", "text", *shown, *["damage undone"] * mended, title="perplexity")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, perplexity in rows:
        for data, row in perplexity.items():
            values = [f"{row[stage]:.2f}" if stage in row else "–" for stage in shown]
            share = undone(row)
            values += ["–" if share is None else f"{share:.0%}"] * mended
            table.add_row(*map(Text, (name, data)), *values)
    return table


class OneOfSeveral(Display):
    """Of a run beside others: the lines that stay, in the display of all, with its title before
    them.
    """

    def __init__(self, whole: Display, title: str) -> None:
        super().__init__(whole.console)  # its bar is never started
        self._whole, self._title = whole, title

    def say(self, text: str) -> None:
        self._whole.say(f"[{self._title}] {text}")

    def warn(self, text: str) -> None:
        self._whole.warn(f"[{self._title}] {text}")


class WarningsAlone(Display):
    """Of all that is said the warnings, each once: for a command that only looks, or is quiet."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True, quiet=True))
        self._loud = Console(stderr=True, highlight=False, soft_wrap=True)
        self._warned: set[str] = set()

    def warn(self, text: str) -> None:
        if text not in self._warned:
            self._loud.print(f"WARNING: {text}", markup=False)
        self._warned.add(text)


class Transfer(_Live):
    """Bytes of many files going by, from several threads: one bar on a terminal, a line a file
    elsewhere. Always on stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = self._moves = Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self._task = self._bar.add_task("looking", total=None)
        self._at: dict[str, int] = {}
        self._files = self._finished = 0

    def begins(self, text: str, files: int, size: int) -> None:
        """What is done with so many files, of so many bytes together."""
        self._files = files
        self._bar.reset(self._task, description=text, total=size)
        self.say(f"{text}: {files} files, {byte_count(size)}")

    def at(self, name: str, done: int) -> None:
        """So many bytes of one file are done; fewer than before if it begins again."""
        self._at[name] = done
        self._bar.update(self._task, completed=sum(list(self._at.values())))

    def ends(self, name: str, outcome: str) -> None:
        """One file is done, well or not."""
        self._finished += 1
        if not self.console.is_terminal:
            self.say(f"  {self._finished}/{self._files}  {name}  {outcome}")


def byte_count(size: int) -> str:
    """13.5 GB, 2.1 MB, 700 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def flop_count(flops: float) -> str:
    """With three digits at most: "12.3 TFLOP"."""
    units = ["MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]
    value = flops / 1e6
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
