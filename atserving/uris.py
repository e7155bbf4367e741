"""The URIs of resources in requests: http, https, qiniu and base64 data URIs. Any other scheme is refused."""

from __future__ import annotations

import binascii
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from atserving.errors import InvalidArgument
from atserving.wire import Buffer

MAX_URI_CHARS = 8192
"""The maximum length of http, https and qiniu URIs. The size of the request bounds data URIs."""
# DNS has no longer names, and those that are not ASCII take long to encode.
_MAX_HOST_CHARS = 253

_DATA = re.compile(rb"data:(?P<media>[^,;]*)(?:;[^,;]*)*?;base64,", re.IGNORECASE)
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
        """Parse a qiniu URI. Raises InvalidArgument if it is malformed."""
        match = _QINIU.fullmatch(uri)
        uid = match["uid"] if match else None
        if not match or (uid and not (uid.isascii() and uid.isdigit())):
            raise InvalidArgument(f"bad uri {redacted(uri)}: should be qiniu://[uid@]zone/bucket/key")
        return QiniuUri(match["zone"], match["bucket"], match["key"], int(uid) if uid else None)

    def __str__(self) -> str:
        uid = "" if self.uid is None else f"{self.uid}@"
        return f"qiniu://{uid}{self.zone}/{self.bucket}/{self.key}"


def scheme(uri: str) -> str:
    """Return ``http``, ``https``, ``qiniu`` or ``data``. Raises InvalidArgument for other schemes and for long URIs."""
    name = uri.partition(":")[0].lower()
    if name == "data":
        return name
    if name not in ("http", "https", "qiniu"):
        raise InvalidArgument(f"unsupported uri {redacted(uri)}: should be http, https, qiniu or a base64 data uri")
    if len(uri) > MAX_URI_CHARS:
        raise InvalidArgument(f"uri {redacted(uri)} is longer than {MAX_URI_CHARS} characters")
    return name


def host(uri: str) -> str:
    """Return the host of an http or https URI, always in the same spelling, or the bucket of a qiniu URI.

    Empty if the URI is malformed. Raises InvalidArgument as :func:`scheme` does, and for long hosts.
    """
    if scheme(uri) == "qiniu":
        return "".join(uri.split("/", 4)[3:4])
    try:
        name = urlsplit(uri).hostname or ""
        if len(name) > _MAX_HOST_CHARS:
            raise InvalidArgument(f"bad uri {redacted(uri)}: its host is longer than {_MAX_HOST_CHARS} characters")
        if ":" in name:
            address = ipaddress.IPv6Address(name)
            return str(address.ipv4_mapped or address)
        if not name.isascii():
            # Imported here: few need it. There are several ways to encode such names, and the fetcher's is yarl's.
            from yarl import URL

            name = URL(uri).raw_host or ""
        return name.rstrip(".")
    except (ValueError, IndexError):
        return ""


def decode_data(uri: str | Buffer) -> bytes:
    """Return the bytes of a ``data:<any media type>;base64,...`` URI, a text or its UTF-8. Raises InvalidArgument."""
    encoded = memoryview(uri.encode(errors="replace") if isinstance(uri, str) else uri)
    header = _DATA.match(encoded[:512])
    if not header:
        raise InvalidArgument(f"bad uri {_shown(encoded)}: a data uri should start with data:<media type>;base64,")
    try:
        return binascii.a2b_base64(encoded[header.end() :], strict_mode=True)
    except binascii.Error:
        raise InvalidArgument(f"bad uri {_shown(encoded)}: its data is not base64") from None


def _shown(encoded: memoryview) -> str:
    return redacted(bytes(encoded[:512]).decode(errors="replace"))


def with_caller(uri: str, uid: int | None) -> str:
    """Return the URI with the caller's uid: a ``qiniu://`` URI can't claim another one."""
    if scheme(uri) != "qiniu":
        return uri
    given = QiniuUri.parse(uri)
    return str(QiniuUri(given.zone, given.bucket, given.key, uid))


def redacted(uri: str) -> str:
    """Return the URI for messages and logs: short, quoted, without credentials, query, fragment and data."""
    head = uri[:512]
    if head[:5].lower() == "data:":
        head = head.partition(",")[0]
    head = re.sub(r"(://)[^/]*@", r"\1", head.partition("?")[0].partition("#")[0])
    return repr(head if len(head) <= 80 else head[:77] + "...")
