"""Call a net at the edge over HTTP with local images or URLs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import stat
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

from atserving import lifecycle
from atserving.errors import StartError

MAX_BODY = 20 << 20
"""The most bytes of a request's body at the edge."""
_AT_A_TIME = 4
_CONNECT_S = 5.0
_STREAM = "application/octet-stream"
_DATA = b'"data:application/octet-stream;base64,%s"'
_URL = re.compile(r"(?:https?|qiniu)://", re.IGNORECASE)


class Unreachable(Exception):  # noqa: N818 - it names the edge's state
    """No connection to the edge could be made."""


@dataclass(frozen=True)
class Source:
    """An image: a URL for the evaluator to fetch, a file to read when it is sent, or bytes."""

    name: str
    size: int
    is_url: bool = False
    body: bytes | None = None

    @staticmethod
    def of(name: str) -> Source:
        """Find the image; read it at once if it comes from standard input (``-``) or a pipe. Raises OSError."""
        if _URL.match(name):
            return Source(name, 0, is_url=True)
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            status = os.fstat(file.fileno())
            if name != "-" and stat.S_ISREG(status.st_mode):
                return Source(name, status.st_size)
            body = file.read(MAX_BODY + 1)
            return Source(name, len(body), body=body)

    def read(self) -> bytes:
        """Return the image's bytes. Raises StartError if the file cannot be read any more."""
        if self.body is not None:
            return self.body
        try:
            with open(self.name, "rb") as file:
                body = file.read(self.size + 1)
        except OSError as error:
            raise StartError(f"{self.name}: {error.strerror}") from None
        if len(body) != self.size:
            raise StartError(f"{self.name}: it changed while it was read")
        return body


@dataclass(frozen=True)
class Request:
    """One request: the image, or all images of a group. ``params`` and ``attribute`` are JSON, empty if not given."""

    sources: tuple[Source, ...]
    group: bool = False
    params: str = ""
    attribute: str = ""

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def is_plain(self) -> bool:
        """Whether the body is the image itself, not JSON."""
        return not (self.group or self.params or self.attribute or self.sources[0].is_url)

    @property
    def size(self) -> int:
        """The length of the body in bytes, without a look at the images."""
        if self.is_plain:
            return self.sources[0].size
        encoded = sum(-(-source.size // 3) * 4 for source in self.sources)
        return len(self._json([b""] * len(self.sources))) + encoded

    def body(self) -> bytes:
        """Read the images and return the body. Raises StartError."""
        images = [b"" if source.is_url else source.read() for source in self.sources]
        return images[0] if self.is_plain else self._json(map(base64.b64encode, images))

    def _json(self, images: Iterable[bytes]) -> bytes:
        attribute = b',"attribute":' + self.attribute.encode() if self.attribute else b""
        resources = []
        for source, image in zip(self.sources, images, strict=True):
            uri = (
                json.dumps(source.name).encode()
                if source.is_url
                else b'"data:%s;base64,%s"' % (_STREAM.encode(), image)
            )
            resources.append(b'{"uri":%s%s}' % (uri, attribute))
        data = b"[%s]" % b",".join(resources) if self.group else resources[0]
        params = b',"params":' + self.params.encode() if self.params else b""
        return b'{"data":%s%s}' % (data, params)


@dataclass(frozen=True)
class Answer:
    """What came back for a request. ``code`` is 0 for a success and None if no answer of a mesh came."""

    request: Request
    reqid: str
    time_ms: float
    code: int | None
    message: str
    version: str = ""
    """The version that answered; empty if no instance was asked."""
    result: Any = None
    """A JSON value, or bytes: a stream."""

    @property
    def not_found(self) -> bool:
        """Whether the mesh has no such app or version. A net's own code 404 names a version."""
        return self.code == HTTPStatus.NOT_FOUND and not self.version


class EdgeClient:
    """Sends requests to one net; use it as a context manager."""

    def __init__(self, edge: str, net: str, timeout_s: float) -> None:
        """``edge`` is the edge's URL, ``net`` is ``app[/version]``. A ``timeout_s`` of 0 is none."""
        self._edge = edge
        self._url = f"{edge.rstrip('/')}/v1/eval/{net}"
        self._timeout_s = timeout_s

    async def __aenter__(self) -> EdgeClient:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s or None, sock_connect=_CONNECT_S)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask_all(self, requests: Iterable[Request]) -> AsyncGenerator[Answer]:
        """Send the requests, a few at a time, and yield the answers in order. Raises Unreachable and StartError."""
        sent: deque[asyncio.Task[Answer]] = deque()
        try:
            for request in requests:
                if len(sent) == _AT_A_TIME:
                    yield await sent[0]
                    sent.popleft()
                sent.append(asyncio.create_task(self._ask(request)))
            while sent:
                yield await sent[0]
                sent.popleft()
        finally:
            await lifecycle.end(sent)

    async def _ask(self, request: Request) -> Answer:
        reqid, body = uuid.uuid4().hex, request.body()
        headers = {"content-type": _STREAM if request.is_plain else "application/json", "x-reqid": reqid}
        began_s = time.perf_counter()

        def answer(code: int | None, message: str, version: str = "", result: Any = None) -> Answer:
            time_ms = (time.perf_counter() - began_s) * 1000
            return Answer(request, reqid, round(time_ms, 1), code, message, version, result)

        try:
            call = self._session.post(self._url, data=io.BytesIO(body), headers=headers, allow_redirects=False)
            async with call as response:
                payload = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise self._unreachable(error.os_error.strerror or str(error)) from None
        except aiohttp.ConnectionTimeoutError:
            raise self._unreachable(f"no connection within {_CONNECT_S:g} s") from None
        except TimeoutError:
            return answer(None, f"no answer within {self._timeout_s:g} s")
        except aiohttp.ClientError as error:
            return answer(None, f"the connection to the edge broke: {error}")
        version = response.headers.get("x-serving-version", "")
        # aiohttp's content_type would take an answer without one for a stream.
        if response.status == HTTPStatus.OK and response.headers.get("content-type") == _STREAM:
            return answer(0, "", version, payload)
        match _json(payload):
            case {"code": int(code), "message": str(message), **rest} if code or response.status == HTTPStatus.OK:
                return answer(code, message, version, rest.get("result"))
        return answer(None, f"HTTP {response.status} without an answer of a mesh: is {self._edge} an edge?")

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(f"the edge {self._edge} cannot be reached: {reason}")


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None
