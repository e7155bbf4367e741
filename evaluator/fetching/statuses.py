"""What the HTTP statuses of other hosts mean."""

from __future__ import annotations


def is_refusal(status: int) -> bool:
    """Whether a status blames the request: 4xx, or one of Kodo's own 6xx, such as 631 for an unknown bucket."""
    return 400 <= status < 500 or 600 <= status < 700
