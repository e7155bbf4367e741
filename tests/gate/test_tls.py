"""Links over TLS: a gate takes only the evaluators of the app, and an instance only gates."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from atserving.local.authority import Authority
from atserving.tls import ENVOY, EVALUATOR, GATE, REGISTRY, Tls
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from gate.answers import TransportError
from gate.connection import EvaluatorConnection
from tests.instance import ScriptedInstance
from tests.waiting import PATIENCE_S, until, until_async

OWN = f"{EVALUATOR}/digits"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def echo(request: InferRequest) -> InferResponse:
    return InferResponse(result_json=request.params_json)


@asynccontextmanager
async def linked(instance: Tls | None, gate: Tls | None) -> AsyncIterator[EvaluatorConnection]:
    """Run an instance of the app `digits` and a gate's connection to it."""
    server = ScriptedInstance(echo, app="digits", tls=instance)
    connection = EvaluatorConnection(await server.start(), PATIENCE_S, tls=gate)
    try:
        yield connection
    finally:
        await connection.close()
        await server.stop()


async def failure(connection: EvaluatorConnection, reason: str) -> None:
    """Wait until calls fail for a reason."""

    async def fails() -> bool:
        try:
            await connection.ask(InferRequest(), time.monotonic() + PATIENCE_S, "r", None)
        except TransportError as error:
            return reason in str(error)
        return False

    await until_async(fails, what=f"calls fail: {reason}")


@pytest.mark.parametrize("size", [10, 300_000, 3_000_000])
async def test_calls_of_any_size_travel_over_tls(authority: Authority, size: int) -> None:
    async with linked(Tls(authority.issue(OWN), OWN), Tls(authority.issue(GATE), GATE)) as connection:
        await until(lambda: connection.is_up)
        text = "a" * size
        answer = await connection.ask(InferRequest(params_json=text), time.monotonic() + PATIENCE_S, "r", None)
        result = answer.result_json.encode() if isinstance(answer, InferResponse) else bytes(answer.result)
        assert result == text.encode()


@pytest.mark.parametrize("role", [f"{EVALUATOR}/other", f"{EVALUATOR}/digits2", GATE, REGISTRY])
async def test_a_gate_sends_nothing_to_another_than_an_evaluator_of_the_app(authority: Authority, role: str) -> None:
    async with linked(Tls(authority.issue(role)), Tls(authority.issue(GATE), GATE)) as connection:
        name = f"spiffe://atserving/{role}"
        wanted = f"not spiffe://atserving/{OWN}"
        await failure(connection, f"the certificate at its address is for {name}, {wanted}")


@pytest.mark.parametrize("role", [OWN, ENVOY, REGISTRY])
async def test_an_instance_takes_links_of_gates_alone(authority: Authority, role: str) -> None:
    with capture_logs() as lines:
        async with linked(Tls(authority.issue(OWN), OWN), Tls(authority.issue(role))) as connection:
            await until(lambda: any("is no gate" in line.get("reason", "") for line in lines))
            assert not connection.is_up
    (line, *_) = (each for each in lines if each["event"] == "connection refused")
    assert line["reason"] == f"spiffe://atserving/{role} is no gate: spiffe://atserving/gate"


async def test_a_gate_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    async with linked(Tls(authority.issue(OWN), OWN), Tls(stranger.issue(GATE))) as connection:
        await failure(connection, "self-signed certificate in certificate chain")


async def test_plain_text_at_one_end_is_refused_with_the_reason(authority: Authority) -> None:
    instance, gate = Tls(authority.issue(OWN), OWN), Tls(authority.issue(GATE), GATE)
    for ends, reason in (
        ((instance, None), "it speaks plain text, and this port TLS"),
        ((None, gate), "it speaks TLS, and this port plain text"),
    ):
        with capture_logs() as lines:
            async with linked(*ends) as connection:
                await failure(connection, "")
                assert not connection.is_up
        assert reason in [line.get("reason") for line in lines]
