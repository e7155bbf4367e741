"""Resource URIs, as requests carry them: http, https, qiniu and base64 data URIs; nothing else is a resource."""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass

from atserving.errors import InvalidArgument

MAX_URI_CHARS = 8192
"""The longest URI that points somewhere; data URIs are bounded by the request's size."""

_DATA = re.compile(r"data:(?P<media>[^,;]*)(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_QINIU = re.compile(r"qiniu://(?:(?P<uid>[^@/]*)@)?(?P<zone>[^/@]+)/(?P<bucket>[^/]+)/(?P<key>.+)", re.DOTALL)


@dataclass(frozen=True)
class QiniuUri:
    """``qiniu://[uid@]zone/bucket/key``."""

    zone: str
    bucket: str
    key: str
    uid: int | None = None

    @staticmethod
    def parse(uri: str) -> QiniuUri:
        """Raises InvalidArgument where ``uri`` is none."""
        match = _QINIU.fullmatch(uri)
        uid = match["uid"] if match else None
        if not match or (uid and not (uid.isascii() and uid.isdigit())):
            raise InvalidArgument(f"bad uri {shown(uri)}: should be qiniu://[uid@]zone/bucket/key")
        return QiniuUri(match["zone"], match["bucket"], match["key"], int(uid) if uid else None)

    def __str__(self) -> str:
        uid = "" if self.uid is None else f"{self.uid}@"
        return f"qiniu://{uid}{self.zone}/{self.bucket}/{self.key}"


def scheme(uri: str) -> str:
    """``http``, ``https``, ``qiniu`` or ``data``. Raises InvalidArgument for all else, and for a URI too long."""
    name = uri.partition(":")[0].lower()
    if name == "data":
        return name
    if name not in ("http", "https", "qiniu"):
        raise InvalidArgument(f"unsupported uri {shown(uri)}: should be http, https, qiniu or a base64 data uri")
    if len(uri) > MAX_URI_CHARS:
        raise InvalidArgument(f"uri {shown(uri)} is longer than {MAX_URI_CHARS} characters")
    return name


def decode_data(uri: str) -> bytes:
    """The bytes of a ``data:<any media type>;base64,...`` URI. Raises InvalidArgument."""
    header = _DATA.match(uri[:512])
    if not header:
        raise InvalidArgument(f"bad uri {shown(uri)}: a data uri should start with data:<media type>;base64,")
    try:
        return binascii.a2b_base64(uri[header.end() :], strict_mode=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"bad uri {shown(uri)}: its data is not base64") from None


def with_caller(uri: str, uid: int | None) -> str:
    """The URI as the caller may use it: the uid of a ``qiniu://`` URI is the caller's, whatever it said."""
    if scheme(uri) != "qiniu":
        return uri
    given = QiniuUri.parse(uri)
    return str(QiniuUri(given.zone, given.bucket, given.key, uid))


def shown(uri: str) -> str:
    """The URI as messages and logs show it: short, without credentials, a query or a data URI's data."""
    head = uri[:512]
    if head[:5].lower() == "data:":
        head = head.partition(",")[0]
    head = re.sub(r"(://)[^/]*@", r"\1", head.partition("?")[0].partition("#")[0])
    return repr(head if len(head) <= 80 else head[:77] + "...")
