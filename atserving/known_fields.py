"""Unknown fields of a config value, each with the known field that its writer may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

_MOST_SHOWN, _SHOWN_CHARS = 10, 64

# Comparing costs the square of the length, and no longer name is near to one of at most 14 letters.
_COMPARED_CHARS = 32


def meant(name: str, known: Collection[str]) -> str:
    """Return the known field whose name is nearest to ``name``; empty if none is near."""
    near = difflib.get_close_matches(name.lower(), known, n=1) if len(name) <= _COMPARED_CHARS else []
    return near[0] if near else ""


def warning(unknown: Sequence[str], known: Collection[str]) -> str:
    """Return one line about unknown fields, of which it names the first ten; empty if there are none."""
    said = []
    for name in unknown[:_MOST_SHOWN]:
        near = meant(name, known)
        said.append(f"unknown field {name[:_SHOWN_CHARS]!r}" + (f", did you mean {near!r}?" if near else ""))
    if len(unknown) > _MOST_SHOWN:
        said.append(f"{len(unknown) - _MOST_SHOWN} more unknown fields")
    return "; ".join(said)
