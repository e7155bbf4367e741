"""Print the answers of ``atserving eval``, as a table or as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import click
from tabulate import tabulate

from atserving.cli import results
from atserving.cli.edge_client import Answer


class Output(Protocol):
    """Takes the answers in their order."""

    def add(self, answer: Answer, saved: Path | None) -> None:
        """Take an answer; ``saved`` is the file with its stream."""

    def close(self) -> None:
        """Print what is not printed yet."""


class TableOutput:
    """Prints a table of all answers at the end."""

    def __init__(self) -> None:
        self._rows: list[list[str]] = []

    def add(self, answer: Answer, saved: Path | None) -> None:
        if answer.code == 0:
            result = "\n".join([f"saved to {saved}"] if saved else results.lines(answer.result))
        else:
            result = _styled("no answer" if answer.code is None else f"code {answer.code}", fg="red")
        cells = [answer.request.name, answer.version or "-", f"{answer.time_ms:.1f} ms"]
        self._rows.append([*map(results.printable, cells), result])

    def close(self) -> None:
        if not self._rows:
            return
        headers = [_styled(name, bold=True) for name in ("FILE", "VERSION", "TIME", "RESULT")]
        table = tabulate(self._rows, headers, tablefmt="plain", disable_numparse=True)
        print("\n".join(line.rstrip() for line in table.splitlines()), flush=True)


def _styled(text: str, **style: Any) -> str:
    """Return a text in a style, if it is for a terminal that wants it."""
    return click.style(text, **style) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


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
