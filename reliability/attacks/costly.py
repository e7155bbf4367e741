"""Requests that are made to cost much: millions of resources, images that unpack, a request that kills its gate."""

from __future__ import annotations

import asyncio
import re
import time

import aiohttp
import grpc
import grpc.aio
import orjson

from reliability.attacks import images
from reliability.callers import VICTIM
from reliability.mesh import Mesh
from reliability.parts import Part
from reliability.scenario import Scenario, Stage
from reliability.traffic import Stream

_MESSAGE = b"\x0a\x06digits" + b"\x1a\x00" * 10_400_000
_JSON_RESOURCES = 1_300_000
_PATIENCE_S = 60.0
_SAMPLES = 8
_MOST_KILLS = 4
_KILL_WITHIN_S = 10.0


def _unchanged(data: bytes) -> bytes:
    return data


async def _empty_resources(stage: Stage) -> None:
    for compression in (grpc.Compression.Gzip, grpc.Compression.NoCompression):
        began_s = time.monotonic()
        async with grpc.aio.insecure_channel(
            stage.mesh.edges[0].removeprefix("http://"),
            options=[("grpc.max_send_message_length", -1)],
            compression=compression,
        ) as channel:
            call = channel.unary_unary("/atserving.v1.ServingService/Eval", _unchanged, _unchanged)
            try:
                await call(_MESSAGE, timeout=_PATIENCE_S)
                said = "OK"
            except grpc.aio.AioRpcError as error:
                said = error.code().name
        stage.note(f"{compression.name}: {said} in {time.monotonic() - began_s:.1f} s")


async def _json_resources(stage: Stage) -> None:
    body = b'{"data":[' + b",".join([b'{"uri":"data:"}'] * _JSON_RESOURCES) + b"]}"
    stage.note(await _post(stage, "/v1/eval/digits", body, "application/json"))


async def _images(stage: Stage) -> None:
    for name, make in images.COSTLY.items():
        body = await asyncio.to_thread(make)
        said = await _post(stage, "/v1/eval/digits-segment", body, "application/octet-stream")
        stage.note(f"{name}, {len(body):,} bytes: {said}")


async def _post(stage: Stage, path: str, body: bytes, content_type: str) -> str:
    """Return what became of a request."""
    began_s = time.monotonic()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_PATIENCE_S)) as session,
            session.post(stage.mesh.edges[0] + path, data=body, headers={"content-type": content_type}) as response,
        ):
            answer = await response.read()
            said = str(response.status)
            if response.status != 200:
                said += f" {answer[:80].decode(errors='replace')}"
    except (aiohttp.ClientError, TimeoutError) as error:
        said = type(error).__name__
    return f"{said} in {time.monotonic() - began_s:.1f} s"


async def _killer(stage: Stage) -> None:
    """Kill each gate that has a certain request, as the kernel does when a request takes too much memory."""
    request = orjson.dumps({"data": {"uri": "data:a;base64,AA=="}, "params": {"do": "sleep", "s": 8}})
    asked = asyncio.create_task(_post(stage, "/v1/eval/drill", request, "application/json"))
    killed = 0
    try:
        while killed < _MOST_KILLS and (gate := await _with_the_request(stage.mesh, asked)):
            stage.broken.add(gate.name)
            gate.kill()
            killed += 1
            # Let Envoy have another gate to send it to, and others a gate while the next one dies.
            await stage.mesh.runs(gate, _PATIENCE_S)
            await stage.mesh.healthy(_PATIENCE_S)
        stage.note(f"{killed} gates killed; the request: {await asked}")
    finally:
        asked.cancel()


async def _with_the_request(mesh: Mesh, asked: asyncio.Task[str]) -> Part | None:
    """Return the gate that has had a request of the first Envoy in each of several samples."""
    until_s = time.monotonic() + _KILL_WITHIN_S
    while not asked.done() and time.monotonic() < until_s:
        samples = []
        for _ in range(_SAMPLES):
            clusters = await mesh.admin(0, "/clusters")
            samples.append(set(re.findall(r"^gate::[\d.]+:(\d+)::rq_active::[1-9]", clusters, re.MULTILINE)))
            await asyncio.sleep(0.05)
        if ports := set.intersection(*samples):
            return mesh.gate_at(int(ports.pop()))
    return None


_SEGMENT = Stream("segment", 2, app="digits-segment", version="v1", group="another caller of the app")


def costly_requests() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario("gRPC: 10.4 million empty resources", _empty_resources, VICTIM, 12),
        Scenario("JSON: 1.3 million resources", _json_resources, VICTIM, 10),
        Scenario("a request that kills its gates", _killer, VICTIM, 15),
        Scenario("costly images", _images, (*VICTIM, _SEGMENT), 20, others=(_SEGMENT.group,)),
    ]
