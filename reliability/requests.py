"""Every kind of request, and the check of its answer for content and for version."""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp
import grpc.aio
import orjson

from atserving.transport import MAX_MESSAGE_BYTES
from atserving.v1 import serving_pb2, serving_pb2_grpc
from reliability.releases import PICTURES, SCENE
from reliability.traffic import Stream
from reliability.truth import Truth, versions_that_say

_TASKS = 20
_OCTETS = {"content-type": "application/octet-stream"}
_GRPC = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_reconnect_backoff_ms", 500)]
_LONGEST_CAUSE = 80


class _Failed(Exception):  # noqa: N818
    """A request got no right answer; the text is the cause."""


class Requests:
    """Sends requests to a mesh. An async context manager."""

    def __init__(self, edges: Sequence[str], files_url: str, truth: Truth) -> None:
        self._edges = edges
        self._files_url = files_url
        self._truth = truth
        self._numbers = itertools.count(random.randrange(1 << 40))

    async def __aenter__(self) -> Requests:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._channels = [
            grpc.aio.insecure_channel(edge.removeprefix("http://"), options=_GRPC) for edge in self._edges
        ]
        self._stubs = [serving_pb2_grpc.ServingServiceStub(channel) for channel in self._channels]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        for channel in self._channels:
            await channel.close(None)

    async def send(self, stream: Stream, edge: int) -> str:
        """Send one request to an Envoy; return the cause of its failure, or an empty text."""
        try:
            await getattr(self, stream.kind)(stream, edge)
        except _Failed as failed:
            return str(failed)
        except TimeoutError:
            return f"no answer in {stream.timeout_s:g} s"
        except aiohttp.ClientError as error:
            return f"connection: {type(error).__name__}"
        except grpc.aio.AioRpcError as error:
            return _cause(error.code().name, error.details() or "")
        return ""

    async def octets(self, stream: Stream, edge: int) -> None:
        """Send a picture as the body."""
        digit = self._digit()
        body, version = await self._post(stream, edge, _path(stream.app, stream.version), PICTURES[digit], _OCTETS)
        self._check(stream.app, stream.version, digit, orjson.loads(body), version)

    async def segment(self, stream: Stream, edge: int) -> None:
        """Send a picture whose pixels get labels."""
        body, _ = await self._post(stream, edge, _path(stream.app, stream.version), SCENE, _OCTETS)
        if orjson.loads(body)["code"]:
            raise _Failed("wrong answer")

    async def data_uri(self, stream: Stream, edge: int) -> None:
        """Send a picture in JSON."""
        await self._json(stream, edge, self._digit(), inline=True)

    async def http_uri(self, stream: Stream, edge: int) -> None:
        """Send the URL of a picture."""
        await self._json(stream, edge, self._digit(), inline=False)

    async def batch(self, stream: Stream, edge: int) -> None:
        """Send a batch: its tasks name no version, and each version, in turn."""
        digits = [self._digit() for _ in range(_TASKS)]
        versions = [version for version, _ in zip(self._versions(stream.app), digits, strict=False)]
        tasks = [
            {"op": _path(stream.app, version), "data": _inline(digit)}
            for version, digit in zip(versions, digits, strict=True)
        ]
        body, _ = await self._post(stream, edge, "/v1/batch", orjson.dumps(tasks), _JSON)
        items = orjson.loads(body)
        if len(items) != _TASKS:
            raise _Failed("a batch with other than its answers")
        for version, digit, item in zip(versions, digits, items, strict=True):
            if item["code"]:
                raise _Failed(_cause(f"in a batch {item['code']}", item["message"]))
            self._check(stream.app, version, digit, item, "")

    async def typed(self, stream: Stream, edge: int) -> None:
        """Call Eval over gRPC."""
        digit = self._digit()
        request = self._eval(stream.app, stream.version, digit)
        self._check_typed(request, digit, await self._stubs[edge].Eval(request, timeout=stream.timeout_s))

    async def typed_batch(self, stream: Stream, edge: int) -> None:
        """Call Batch over gRPC."""
        digits = [self._digit() for _ in range(_TASKS)]
        tasks = [
            self._eval(stream.app, version, digit)
            for version, digit in zip(self._versions(stream.app), digits, strict=False)
        ]
        answer = await self._stubs[edge].Batch(serving_pb2.BatchRequest(tasks=tasks), timeout=stream.timeout_s)
        if len(answer.results) != _TASKS:
            raise _Failed("a batch with other than its answers")
        for task, digit, result in zip(tasks, digits, answer.results, strict=True):
            self._check_typed(task, digit, result)

    async def drill(self, stream: Stream, edge: int) -> None:
        """Send params to the drill's net, and look for them in the answer."""
        params = {**stream.params, "number": next(self._numbers)}
        request = orjson.dumps({"data": {"uri": "data:a;base64,AA=="}, "params": params})
        body, _ = await self._post(stream, edge, "/v1/eval/drill", request, _JSON)
        if params.get("do") == "bytes":
            if body != b"drill..." * (params["mib"] << 17):
                raise _Failed("wrong answer")
        elif orjson.loads(body)["result"] != {"echo": params}:
            raise _Failed("wrong answer")

    async def typed_drill(self, stream: Stream, edge: int) -> None:
        """Call the drill's net over gRPC, with the caller's patience as the deadline."""
        params = {**stream.params, "number": next(self._numbers)}
        data = [serving_pb2.Resource(body=b"x")]
        request = serving_pb2.EvalRequest(app="drill", data=data, params_json=orjson.dumps(params).decode())
        answer = await self._stubs[edge].Eval(request, timeout=stream.timeout_s)
        if orjson.loads(answer.result_json) != {"echo": params}:
            raise _Failed("wrong answer")

    def _digit(self) -> int:
        return random.randrange(len(PICTURES))

    def _versions(self, app: str) -> itertools.cycle[str]:
        return itertools.cycle(["", *self._truth[app]])

    async def _json(self, stream: Stream, edge: int, digit: int, *, inline: bool) -> None:
        data = _inline(digit) if inline else {"uri": f"{self._files_url}/digits/images/{digit}.png"}
        body, version = await self._post(
            stream, edge, _path(stream.app, stream.version), orjson.dumps({"data": data}), _JSON
        )
        self._check(stream.app, stream.version, digit, orjson.loads(body), version)

    async def _post(
        self, stream: Stream, edge: int, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[bytes, str]:
        """Return the body of the answer and its version."""
        async with (
            asyncio.timeout(stream.timeout_s),
            self._session.post(self._edges[edge] + path, data=body, headers=headers) as response,
        ):
            answer = await response.read()
        if response.status != 200:
            raise _Failed(_cause(str(response.status), _message(answer)))
        return answer, response.headers.get("x-serving-version", "")

    def _eval(self, app: str, version: str, digit: int) -> serving_pb2.EvalRequest:
        return serving_pb2.EvalRequest(app=app, version=version, data=[serving_pb2.Resource(body=PICTURES[digit])])

    def _check_typed(self, task: serving_pb2.EvalRequest, digit: int, answer: serving_pb2.EvalResponse) -> None:
        if answer.code:
            raise _Failed(_cause(f"in a batch {answer.code}", answer.message))
        self._check(task.app, task.version, digit, {"result": orjson.loads(answer.result_json)}, answer.version)

    def _check(self, app: str, wanted: str, digit: int, answer: Any, named: str) -> None:
        """Check that the versions of this answer, the one it names and the one wanted are the same."""
        said = versions_that_say(self._truth, app, digit, answer.get("result"))
        if not said:
            raise _Failed("wrong answer")
        if (wanted and wanted not in said) or (named and named not in said) or (wanted and named and wanted != named):
            raise _Failed("wrong version")


_JSON = {"content-type": "application/json"}


def _path(app: str, version: str) -> str:
    return f"/v1/eval/{app}/{version}" if version else f"/v1/eval/{app}"


def _inline(digit: int) -> dict[str, str]:
    return {"uri": "data:image/png;base64," + base64.b64encode(PICTURES[digit]).decode()}


def _message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:_LONGEST_CAUSE].decode(errors="replace")


def _cause(status: str, message: str) -> str:
    """Return a cause that is the same for all requests that failed for it."""
    text = f"{status} {message.partition(';')[0]}".strip()
    # Ids differ, and the fractions of seconds.
    return re.sub(r"[0-9a-f]{8,}|(?<=\d)\.\d+", "", text)[:_LONGEST_CAUSE]
