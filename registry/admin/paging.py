"""Pages of lists: a token names the last item of the page before, so pages stay right while items come and go."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from atserving.errors import InvalidArgument

DEFAULT_SIZE, MOST = 100, 1000

T = TypeVar("T")


def size_of(page_size: int) -> int:
    """Return the size of a page. Raises InvalidArgument."""
    if page_size < 0:
        raise InvalidArgument("page_size should not be negative", fields={"page_size": "should not be negative"})
    return min(page_size or DEFAULT_SIZE, MOST)


def page(items: Sequence[T], key: Callable[[T], str], page_size: int, token: str) -> tuple[Sequence[T], str]:
    """Return the page of sorted items after a token, and the token of the next one. Raises InvalidArgument."""
    size = size_of(page_size)
    after = read(token)
    rest = [each for each in items if not after or key(each) > after]
    found = rest[:size]
    return found, write(key(found[-1])) if len(rest) > size else ""


def write(text: str) -> str:
    """Return a token."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read(token: str) -> str:
    """Return what a token names; empty for an empty one. Raises InvalidArgument."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidArgument("page_token is no token", fields={"page_token": "is no token"}) from None
