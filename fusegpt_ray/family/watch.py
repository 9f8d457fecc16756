"""A table that is kept up to date on a terminal, over the bar of what is being done."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.live import Live

from fusegpt_ray.terminal.display import Display


class TableDisplay(Display):
    """Where there is no terminal it is an ordinary display: lines that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Callable[[], RenderableType] | None = None
        """Makes what is shown over the bar."""
        live = Live(
            console=self.console,
            get_renderable=self._whole,
            transient=True,
            refresh_per_second=2,
        )
        if self.console.is_terminal:  # it draws the bar, too, which is never started
            self._moves = live

    def _whole(self) -> RenderableType:
        bar = self._bar.get_renderable()
        return Group(self.table(), bar) if self.table else bar
