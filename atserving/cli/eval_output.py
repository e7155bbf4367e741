"""Print the answers of ``atserving eval``, as a table or as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atserving.cli import results
from atserving.cli.edge_client import Answer

_UNLIMITED = 1 << 20  # columns


class Output(Protocol):
    """Takes the answers in their order."""

    def add(self, answer: Answer, saved: Path | None) -> None:
        """Take an answer; ``saved`` is the file with its stream."""

    def close(self) -> None:
        """Print what is not printed yet."""


class TableOutput:
    """Prints a table of all answers at the end."""

    def __init__(self) -> None:
        self._table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("FILE", "VERSION", "TIME", "RESULT"):
            self._table.add_column(column, overflow="fold")

    def add(self, answer: Answer, saved: Path | None) -> None:
        if answer.code == 0:
            shown = [f"saved to {saved}"] if saved else results.lines(answer.result)
            result = Text("\n".join(shown))
        else:
            result = Text("no answer" if answer.code is None else f"code {answer.code}", "red")
        cells = [answer.request.name, answer.version or "-", f"{answer.time_ms:.1f} ms"]
        self._table.add_row(*(Text(results.printable(cell)) for cell in cells), result)

    def close(self) -> None:
        if not self._table.row_count:
            return
        terminal = sys.stdout.isatty()
        styled = terminal and not os.environ.get("NO_COLOR")
        console = Console(color_system="auto" if styled else None, width=None if terminal else _UNLIMITED)
        with console.capture() as capture:
            console.print(self._table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


class JsonOutput:
    """Prints one object a line, as the answers come."""

    def add(self, answer: Answer, saved: Path | None) -> None:
        names = [source.name for source in answer.request.sources]
        fields: dict[str, Any] = {
            "file": names if answer.request.group else names[0],
            "version": answer.version or None,
            "code": answer.code,
            "message": answer.message,
            "reqid": answer.reqid,
            "time_ms": answer.time_ms,
        }
        if saved:
            fields["output"] = str(saved)
        elif answer.code == 0:
            fields["result"] = results.as_json(answer.result)
        print(results.dumps(fields), flush=True)

    def close(self) -> None:
        pass
