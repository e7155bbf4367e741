"""`labels.csv`: the names of a net's classes, `index,name` a line."""

from __future__ import annotations

import csv
from pathlib import Path

from atserving.errors import StartError


def read(path: str | Path | None) -> dict[int, str]:
    """Names by index; empty without a file. A name may be quoted, with commas in it. Raises StartError."""
    if path is None:
        return {}
    labels: dict[int, str] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            for row in csv.reader(file):
                if row:
                    _add(labels, row)
    except (ValueError, csv.Error) as error:
        raise StartError(f"labels.csv: {error}") from None
    return labels


def _add(labels: dict[int, str], row: list[str]) -> None:
    index = row[0].strip()
    if len(row) < 2 or not (index.isascii() and index.isdigit()):
        raise ValueError(f"line {','.join(row)[:80]!r} should be index,name")
    if int(index) in labels:
        raise ValueError(f"index {index} is there twice")
    # A name with commas that nobody quoted is still one name.
    labels[int(index)] = ",".join(row[1:]).strip()
