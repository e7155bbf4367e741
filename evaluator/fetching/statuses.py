"""What the HTTP statuses of other hosts mean."""

from __future__ import annotations

REDIRECTS = (301, 302, 303, 307, 308)


def is_refusal(status: int) -> bool:
    """Whether a status blames the request: 4xx, or one of Kodo's own 6xx, such as 631 for an unknown bucket.

    A 407 is a proxy's, which does not take our credentials.
    """
    return (400 <= status < 500 and status != 407) or 600 <= status < 700
