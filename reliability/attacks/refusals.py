"""Requests and rules that must be refused, one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import aiohttp

from reliability.attacks.door import Door, http1
from reliability.callers import VICTIM
from reliability.releases import PICTURES
from reliability.scenario import Scenario, Stage

_CLOSED_WITHIN_S = 5.0
_POLL_S = 0.1
MALFORMED_RULES = (
    '{"public": false',
    '{"public": false, "batch_size": 0}',
    '{"owner": 5}',
    '{"user_whitelist": ["a"]}',
    '{"owner": {}}',
    "[]",
    "false",
    '{"pubic": false}',
    '{"Public": false}',
)
_KEY = "app/metadata/quick"


async def _malformed_rules(stage: Stage) -> None:
    """Write each malformed rule, and see whether the app is closed before the next one."""
    open_with = []
    try:
        for rule in MALFORMED_RULES:
            await stage.mesh.put(_KEY, rule)
            if not await _answers(stage, 401):
                open_with.append(rule)
            await stage.mesh.delete(_KEY)
            if not await _answers(stage, 200):
                stage.note(f"still closed after {rule}")
    finally:
        await stage.mesh.delete(_KEY)
    stage.note(f"{len(MALFORMED_RULES) - len(open_with)} of {len(MALFORMED_RULES)} closed the app")
    if open_with:
        stage.note(f"open with {', '.join(open_with)}")


async def _answers(stage: Stage, status: int) -> bool:
    """Return whether both Envoys answer with a status in time."""
    until_s = time.monotonic() + _CLOSED_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until_s:
            said = set()
            for edge in stage.mesh.edges:
                headers = {"content-type": "application/octet-stream"}
                async with session.post(f"{edge}/v1/eval/quick", data=PICTURES[1], headers=headers) as response:
                    said.add(response.status)
            if said == {status}:
                return True
            await asyncio.sleep(_POLL_S)
    return False


def _json(body: bytes, path: str = "/v1/eval/drill") -> bytes:
    return http1(path, "application/json", len(body), b"connection: close") + body


_URI = b'"data": {"uri": "data:a;base64,AA=="}'
_OCTETS = b"POST /v1/eval/digits HTTP/1.1\r\nconnection: close\r\ncontent-length: 1\r\n"
_HEALTH = b"GET /health HTTP/1.1\r\n"
_HOST = b"host: localhost\r\n"
_ODD: Mapping[str, tuple[bytes, tuple[str, ...]]] = {
    # The local mesh refuses other hosts first, with a 421.
    "two Host headers": (_OCTETS + _HOST + _HOST + b"\r\nx", ("400", "421")),
    "two Host headers at /health": (_HEALTH + _HOST + _HOST + b"connection: close\r\n\r\n", ("400", "421")),
    "HTTP/0.9": (b"GET /health\r\n\r\n", ("400",)),
    "0xff in the content type": (_OCTETS + _HOST + b"content-type: \xff\r\n\r\nx", ("400", "415")),
    "NUL in the host of a URI": (_json(b'{"data": {"uri": "http://a\\u0000b/c"}}', "/v1/eval/digits"), ("400",)),
    "a byte order mark": (_json(b"\xef\xbb\xbf{" + _URI + b"}"), ("200", "400")),
    "NaN": (_json(b"{" + _URI + b', "params": {"x": NaN}}'), ("400",)),
    "a number of 100 digits": (_json(b"{" + _URI + b', "params": {"x": ' + b"7" * 100 + b"}}"), ("200",)),
    "a number of 5000 digits": (_json(b"{" + _URI + b', "params": {"x": ' + b"7" * 5000 + b"}}"), ("400",)),
    "100,000 brackets": (_json(b"[" * 100_000), ("400",)),
}
"""By name: the request, and the statuses that are promised."""


async def _odd_requests(stage: Stage) -> None:
    unexpected = []
    # At the same time, as Envoy closes the connection of a refused one after a second.
    answers = await asyncio.gather(*(Door(stage.mesh.edges[0]).raw(request) for request, _ in _ODD.values()))
    for (name, (_, promised)), answer in zip(_ODD.items(), answers, strict=True):
        status = answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP/1.") else "no answer"
        if status not in promised:
            unexpected.append(f"{name}: {status}")
        elif name == "a number of 100 digits" and b"7" * 100 not in answer:
            unexpected.append(f"{name}: changed")
    stage.note(f"{len(_ODD) - len(unexpected)} of {len(_ODD)} answered as promised")
    stage.notes += unexpected


def refusals() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario("malformed access rules", _malformed_rules, VICTIM, 10),
        Scenario("odd requests", _odd_requests, VICTIM, 6),
    ]
