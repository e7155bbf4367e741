"""One real mesh for the tests of the public API, and what they ask it with."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from atserving.cli.mesh import Mesh
from atserving.local import examples

IMAGES = examples.FOLDER / "digits" / "images"
JSON = {"content-type": "application/json"}
BYTES = {"content-type": "application/octet-stream"}


@dataclass(frozen=True)
class Response:
    """An HTTP response, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def best(self) -> str:
        """The class that a classification puts first."""
        return str(self.json["result"]["confidences"][0]["class"])


class Client:
    """Asks a mesh over HTTP, as curl would."""

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
        return await self.post(path, orjson.dumps(value), {**JSON, **headers})

    async def bytes(self, path: str, body: bytes, **headers: str) -> Response:
        return await self.post(path, body, {**BYTES, **headers})

    def uri(self, name: str) -> dict[str, str]:
        """A resource by http, from the mesh's own file server."""
        return {"uri": f"{self.mesh.files_url}/digits/images/{name}"}


async def _read(response: aiohttp.ClientResponse) -> Response:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Response(response.status, headers, await response.read())


def data_uri(name: str, media_type: str = "application/octet-stream") -> dict[str, str]:
    """A resource as a data URI."""
    return {"uri": f"data:{media_type};base64,{base64.b64encode(image(name)).decode()}"}


def image(name: str) -> bytes:
    return (IMAGES / name).read_bytes()


def etcdctl(mesh: Mesh, *arguments: str) -> str:
    """Runs etcdctl on the mesh's etcd, as an operator would."""
    command = [Path(sys.executable).parent / "etcdctl", "--endpoints", f"127.0.0.1:{mesh.ports.etcd}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 30.0) -> None:
    """Waits until a condition holds; asks again as soon as it has answered."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # asks anew: what it waits for is in other processes
    except TimeoutError:
        pytest.fail(f"not within {timeout_s:g} s: {what}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="session")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)
