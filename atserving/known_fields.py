"""Unknown fields of a config value, each with the known field that its writer may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

_MOST, _MOST_CHARS = 10, 64


def meant(name: str, known: Collection[str]) -> str:
    """Return the known field whose name is nearest to ``name``; empty if none is near."""
    # Comparing costs the square of the length.
    near = difflib.get_close_matches(name[:_MOST_CHARS].lower(), known, n=1)
    return near[0] if near else ""


def warning(names: Iterable[str], known: Collection[str]) -> str:
    """Return one line about the names that are not known; empty if all are."""
    unknown = [name for name in names if name not in known]
    said = []
    for name in unknown[:_MOST]:
        near = meant(name, known)
        said.append(f"unknown field {name[:_MOST_CHARS]!r}" + (f", did you mean {near!r}?" if near else ""))
    if len(unknown) > _MOST:
        said.append(f"{len(unknown) - _MOST} more unknown fields")
    return "; ".join(said)
