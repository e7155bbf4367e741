"""Call the public API of a mesh over HTTP, as curl does."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from atserving.local import examples
from atserving.local.mesh import Mesh

IMAGES = examples.FOLDER / "digits" / "images"
JSON = {"content-type": "application/json"}
UNUSED_PORT = 1
"""A loopback port without a listener, from which digits v1 allows resources."""
BYTES = {"content-type": "application/octet-stream"}


def padded(picture: bytes, size: int) -> bytes:
    """Return a PNG of about ``size`` bytes with the same pixels: a chunk that decoders skip fills it."""
    data = bytes(size)
    chunk = struct.pack(">I", size) + b"teSt" + data + struct.pack(">I", zlib.crc32(b"teSt" + data))
    header = 33
    return picture[:header] + chunk + picture[header:]


@dataclass(frozen=True)
class Response:
    """An HTTP response with its whole body."""

    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def best(self) -> str:
        """The first class of a classification's result."""
        return str(self.json["result"]["confidences"][0]["class"])


class Client:
    """An HTTP client of one mesh."""

    def __init__(self, mesh: Mesh, session: aiohttp.ClientSession) -> None:
        self.mesh = mesh
        self._session = session

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> Response:
        async with self._session.post(self.mesh.url + path, data=body, headers=headers) as response:
            return await _read(response)

    async def get(self, path: str) -> Response:
        async with self._session.get(self.mesh.url + path) as response:
            return await _read(response)

    async def json(self, path: str, value: Any, **headers: str) -> Response:
        """Post a value as JSON."""
        return await self.post(path, orjson.dumps(value), {**JSON, **headers})

    async def bytes(self, path: str, body: bytes, **headers: str) -> Response:
        """Post an image or other bytes."""
        return await self.post(path, body, {**BYTES, **headers})

    def uri(self, name: str) -> dict[str, str]:
        """Return an image of a digit as a resource with an HTTP URL, served by the mesh's file server."""
        return {"uri": f"{self.mesh.files_url}/digits/images/{name}"}


async def _read(response: aiohttp.ClientResponse) -> Response:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Response(response.status, headers, await response.read())


def data_uri(name: str, media_type: str = "application/octet-stream") -> dict[str, str]:
    """Return an image of a digit as a resource with a data URI."""
    return {"uri": f"data:{media_type};base64,{base64.b64encode(image(name)).decode()}"}


def image(name: str) -> bytes:
    """Return the file of an image of a digit."""
    return (IMAGES / name).read_bytes()
