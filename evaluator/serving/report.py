"""The times of a worker's work: a TIMES frame (:mod:`atserving.link`), for instances that trace requests."""

from __future__ import annotations

import struct

from atserving.link import Buffer, Malformed

_HEAD = struct.Struct("<d?")
_TIME = struct.Struct("<d")
# Far more than a worker has requests. The last report stays in memory.
_MOST_BYTES = 1 << 20


class Report:
    """The times of the replies that a worker sends together: those of one batch, or of requests that reached none.

    Times are seconds of the monotonic clock; 0: never. A script can write anything here. Most reports are never read.
    """

    __slots__ = ("_first", "_payload")

    def __init__(self, first: int, payload: Buffer) -> None:
        """``first``: how many replies of the worker came before these. Raises Malformed."""
        if not _HEAD.size <= len(payload) <= _MOST_BYTES or (len(payload) - _HEAD.size) % _TIME.size:
            raise Malformed("a TIMES frame has a wrong length")
        self._first = first
        self._payload = payload

    @property
    def began_s(self) -> float:
        """When the batch began."""
        return float(_HEAD.unpack_from(self._payload)[0])

    @property
    def again(self) -> bool:
        """Whether the requests run again, alone, since their batch failed as a whole."""
        return bool(_HEAD.unpack_from(self._payload)[1])

    def prepared_s(self, replies: int) -> float:
        """Return when the preparation of a request began; its reply is the last of ``replies``."""
        at = _HEAD.size + (replies - self._first - 1) * _TIME.size
        if not _HEAD.size <= at < len(self._payload):
            return 0.0
        return float(_TIME.unpack_from(self._payload, at)[0])
