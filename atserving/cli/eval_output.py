"""Print the answers of ``atserving eval``, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from atserving.cli import results
from atserving.cli.edge_client import Answer
from atserving.cli.tables import printable, styled, table


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
            result = styled("no answer" if answer.code is None else f"code {answer.code}", fg="red")
        cells = [answer.request.name, answer.version or "-", f"{answer.time_ms:.1f} ms"]
        self._rows.append([*map(printable, cells), result])

    def close(self) -> None:
        if not self._rows:
            return
        print(table(("FILE", "VERSION", "TIME", "RESULT"), self._rows), flush=True)


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
