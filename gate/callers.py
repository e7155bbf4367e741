"""Tells callers apart by the headers that Envoy sets, if it shows the key that gates and Envoys share.

Envoy removes these headers from what callers send, and sets them by the credentials that it has checked. A caller that
reaches a gate directly does not know the key, so its headers say nothing. With TLS nobody but Envoy reaches a gate.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from atserving.errors import StartError
from atserving.http2_stream import Headers
from gate.admission import Caller

UID, GROUPS, KEY = "x-serving-uid", "x-serving-groups", "x-serving-edge"

BEARER, QINIU = "Bearer", "Qiniu"
"""Schemes of the header ``authorization``."""

_LEAST_KEY_CHARS = 32


class Callers:
    """Tells callers apart."""

    def __init__(
        self, keys: Sequence[bytes] = (), schemes: Sequence[str] = (BEARER,), *, only_envoy: bool = False
    ) -> None:
        """``keys`` are those of which Envoy shows one. Without any, nobody is known, unless ``only_envoy`` calls.

        ``schemes`` are those that a caller without credentials is told of.
        """
        self._keys = tuple(keys)
        self._knows = bool(keys) or only_envoy
        self._nobody = Caller(challenge=", ".join(schemes))

    def of(self, headers: Headers) -> Caller:
        """Return the caller of a request."""
        if not self._knows:
            return self._nobody
        uid, groups = headers.get(UID), headers.get(GROUPS)
        if (uid is None and groups is None) or not self.is_edge(headers):
            return self._nobody
        return Caller(int(uid) if uid and uid.isdigit() and len(uid) < 19 else None, groups or b"", proven=True)

    def is_edge(self, headers: Headers) -> bool:
        """Return whether a request comes from Envoy: it shows a key, or there are none and only Envoy calls."""
        if not self._keys:
            return self._knows
        shown = headers.get(KEY) or b""
        return any(hmac.compare_digest(shown, key) for key in self._keys)


def read_keys(path: Path) -> list[bytes]:
    """Read the keys of the edge, one in each line: the present one, and the one before or after it.

    Raises StartError.
    """
    try:
        keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise StartError(f"can't read {path} for --edge-key: {error.strerror}") from None
    if not keys or any(len(key) < _LEAST_KEY_CHARS for key in keys):
        raise StartError(f"{path}: a key of the edge should have at least {_LEAST_KEY_CHARS} characters")
    return keys
