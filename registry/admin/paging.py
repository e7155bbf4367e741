"""Pages of lists: a token names the last item of the page before, so pages stay right while items come and go."""

from __future__ import annotations

import base64
import binascii
from typing import Generic, TypeVar

from google.protobuf.message import Message

from atserving.errors import InvalidArgument

DEFAULT_SIZE, MOST = 100, 1000
MOST_BYTES = 2 << 20
"""The items of a page after the first have no more bytes: a client of gRPC takes 4 MiB if nobody tells it more."""

T = TypeVar("T", bound=Message)


class Page(Generic[T]):
    """A page that is filled with messages in the order of their names."""

    def __init__(self, page_size: int, token: str) -> None:
        """Begin a page of so many items, 0 for a usual number. Raises InvalidArgument."""
        if page_size < 0:
            raise InvalidArgument("page_size should not be negative", fields={"page_size": "should not be negative"})
        self._size = min(page_size or DEFAULT_SIZE, MOST)
        self._last = self.after = read(token)
        """The name of the last item of the page before."""
        self._bytes = 0
        self.items: list[T] = []
        self.token = ""
        """The token of the next page; empty if there is none."""

    def add(self, item: T, name: str) -> bool:
        """Add an item, and return whether it found room. If not, the next page begins with it."""
        length = item.ByteSize()
        if len(self.items) == self._size or (self.items and self._bytes + length > MOST_BYTES):
            self.token = write(self._last)
            return False
        self.items.append(item)
        self._last = name
        self._bytes += length
        return True


def write(text: str) -> str:
    """Return a token."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read(token: str) -> str:
    """Return what a token names; empty for an empty one. Raises InvalidArgument."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidArgument("page_token is no token", fields={"page_token": "is no token"}) from None
