"""Tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich import table


class Table(table.Table):
    """Cells are wrapped, never cut: what stands in them is copied, from a pipe or a log of 80
    columns, too.
    """

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        super().add_column(header, *args, **{"overflow": "fold", **options})
