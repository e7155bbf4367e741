"""Reads ``labels.csv``, the names of a net's classes: one ``index,name`` in each line, without a header."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from atserving.errors import StartError

_FORM = "a class index and a name, such as 0,cat"


def read(path: str | Path | None) -> dict[int, str]:
    """Return the names by class index; without a file, none.

    A name with commas may be quoted. Raises StartError, which names the line.
    """
    if path is None:
        return {}
    labels: dict[int, str] = {}
    lines: dict[int, int] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    index, name = _parse(row, reader.line_num)
                    if index in labels:
                        raise StartError(
                            f"labels.csv: line {reader.line_num} names class {index} again, after line {lines[index]}"
                        )
                    labels[index], lines[index] = name, reader.line_num
    except UnicodeDecodeError:
        raise StartError("labels.csv is not UTF-8 text") from None
    except csv.Error as error:
        raise StartError(f"labels.csv: line {reader.line_num}: {error}") from None
    return labels


def _parse(row: list[str], line: int) -> tuple[int, str]:
    index = row[0].strip()
    if len(row) < 2 or not re.fullmatch("[0-9]{1,9}", index):
        shown = repr(",".join(row)[:80])
        if line == 1 and len(row) > 1 and not any(character.isdigit() for character in "".join(row)):
            raise StartError(f"labels.csv: line 1 is a header, {shown}: remove it; each line should be {_FORM}")
        raise StartError(f"labels.csv: line {line} is {shown}, should be {_FORM}")
    # Names with commas are often not quoted.
    return int(index), ",".join(row[1:]).strip()
