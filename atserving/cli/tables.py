"""Tables and styles for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click
from tabulate import tabulate


def printable(text: str) -> str:
    """Return the text with escapes in place of control characters, which a terminal would obey."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def styled(text: str, **style: Any) -> str:
    """Return a text in a style, if it is for a terminal that wants it."""
    return click.style(text, **style) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows below bold headers, or without headers if there are none. The cells are printable already."""
    bold = [styled(name, bold=True) for name in headers]
    text = tabulate(rows, bold, tablefmt="plain", disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())
