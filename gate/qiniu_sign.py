"""Qiniu's signatures of requests.

Source: https://developer.qiniu.com/kodo/1201/access-token
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping

_PREFIX = "x-qiniu-"
_BYTES = "application/octet-stream"


def sign(secret_key: str, method: str, path: str, host: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the signature of a request.

    ``path`` has the query, too, and ``headers`` have names in lower case. Of the headers, the content type and those of
    Qiniu are signed; the body is unless it is of type application/octet-stream, or has no type.
    """
    content_type = headers.get("content-type", "")
    lines = [f"{method} {path}", f"Host: {host}"]
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    own = {_canonical(name): value for name, value in headers.items() if name.startswith(_PREFIX) and name != _PREFIX}
    lines += [f"{name}: {own[name]}" for name in sorted(own)]
    signed = hmac.new(secret_key.encode(), ("\n".join(lines) + "\n\n").encode(), "sha1")
    if content_type not in ("", _BYTES):
        signed.update(body)
    return base64.urlsafe_b64encode(signed.digest())


def _canonical(name: str) -> str:
    return "-".join(word.capitalize() for word in name.split("-"))
