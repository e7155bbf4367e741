"""Envoy's access log has every failed request, and the same share of the others as gates and evaluators choose."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import aiohttp
from grpc import StatusCode
from grpc.aio import AioRpcError

from atserving import transport
from atserving.telemetry import LogSettings, RequestLog, apply, settings
from atserving.v1.serving_pb2 import EvalRequest
from atserving.v1.serving_pb2_grpc import ServingServiceStub
from tests.envoy.rig import EVAL, Edge
from tests.waiting import PATIENCE_S, until

SHARE = 0.3

_numbers = count()


def log_a_share(bootstrap: Any) -> None:
    limits = bootstrap["layered_runtime"]["layers"][0]["static_layer"]
    limits["atserving.log_requests"] = round(SHARE * 1_000_000)
    # So that no request is slow on a busy machine.
    limits["atserving.slow_ms"] = 3_600_000


def lines(edge: Edge) -> list[dict[str, Any]]:
    return [line for text in edge.envoy.lines if text.startswith("{") and (line := json.loads(text)).get("path")]


async def typed(edge: Edge, app: str) -> StatusCode:
    """Call by gRPC; the request id begins with the name of the app."""
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        metadata = (("x-reqid", f"{app}-{next(_numbers)}"),)
        try:
            await ServingServiceStub(channel).Eval(EvalRequest(app=app), timeout=PATIENCE_S, metadata=metadata)
        except AioRpcError as error:
            return error.code()
        return StatusCode.OK


async def test_envoy_logs_the_share_that_gates_choose_and_all_failures() -> None:
    ids = []
    async with Edge(change=log_a_share) as edge, aiohttp.ClientSession() as session:
        for _ in range(100):
            async with session.post(
                edge.url + EVAL, data=b"x", headers={"content-type": "application/octet-stream"}
            ) as answer:
                assert answer.status == 200
                ids.append(answer.headers["x-reqid"])
        for _ in range(20):
            async with session.get(f"{edge.url}/nothing") as answer:
                assert answer.status == 404
        answers = [await typed(edge, app) for app in ["digits"] * 20 + ["refused"] * 20]
        assert answers == [StatusCode.OK] * 20 + [StatusCode.NOT_FOUND] * 20
        # Envoy writes lines some time later, in their order.
        await until(lambda: sum(line["code"] == 404 for line in lines(edge)) == 20)
        await until(lambda: sum("refused" in line["reqid"] for line in lines(edge)) == 20, what="failed calls of gRPC")
        assert sum("digits" in line["reqid"] for line in lines(edge)) < 20
        logged = {line["reqid"] for line in lines(edge) if line["path"] == EVAL}
    before = settings()
    apply(LogSettings(requests=SHARE, slow_s=3600))
    try:
        chosen = {each for each in ids if RequestLog("gate").wants(each, 0, 0.0)}
    finally:
        apply(before)
    assert logged == chosen
    assert 0 < len(chosen) < 100
