"""The lines of a gate and an evaluator: nobody has to read them, a share of them is enough, and levels change."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from atserving import transport
from atserving.local import commands
from atserving.local.examples import FOLDER, ROOT
from atserving.local.ports import free_ports
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.processes import Evaluator, Gate, Process, Registry, evaluator, running_registry
from tests.waiting import PATIENCE_S, until, until_async

SEVEN = (FOLDER / "digits" / "images" / "7.png").read_bytes()
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        registry.publish("digits", phase="production", custom_values={"net": "classify"})
        yield registry


@contextmanager
def gate(registry: Registry, *flags: str) -> Iterator[Gate]:
    process = Gate([registry.address], *flags)
    process.start()
    try:
        process.logged(event="service ready")
        yield process
    finally:
        process.kill()


def unread(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process whose log is a pipe that nobody reads before its end."""
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


async def ask(address: str, ids: Sequence[str], app: str = "digits") -> None:
    """Ask for a digit under each request id, some at a time, whatever the answers are."""
    some = asyncio.Semaphore(16)
    request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=SEVEN)])
    async with transport.channel(address) as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)

        async def one(reqid: str) -> None:
            metadata = (("x-reqid", reqid), ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"))
            async with some:
                try:
                    await stub.Eval(request, wait_for_ready=True, timeout=PATIENCE_S, metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    assert error.code() == grpc.StatusCode.NOT_FOUND, error

        await asyncio.gather(*map(one, ids))


def finished(process: Process) -> dict[str, dict[str, Any]]:
    """Return the lines of requests by their ids."""
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    return {line["reqid"]: line for line in lines if line["event"] == "request finished"}


def logs_all(process: Process, ids: Sequence[str]) -> bool:
    return finished(process).keys() >= set(ids)


async def test_gate_whose_log_nobody_reads_goes_on_answering(registry: Registry) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = commands.gate(registry.address, address, "--drain", "0")
    with unread(command) as process:
        try:
            # Their lines are many times what a pipe holds.
            await ask(address, [f"{number:0100}" for number in range(2000)], app="unknown")
            process.terminate()
            _, text = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
        finally:
            process.kill()
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert (events.count("request finished"), events[-1]) == (2000, "service stopped")


async def test_evaluator_whose_log_nobody_reads_goes_on_answering(registry: Registry, tmp_path: Path) -> None:
    command = commands.evaluator(registry.address, "digits", "v1")
    with gate(registry) as asked, unread(command) as process:
        try:
            await until(lambda: registry.instances("digits"), what="the instance is registered")
            await until_found(asked)
            await ask(asked.address, [f"{number:0100}" for number in range(1000)])
            process.terminate()
            _, text = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
        finally:
            process.kill()
        assert {line["code"] for reqid, line in finished(asked).items() if len(reqid) == 100} == {0}
    lines = [json.loads(line) for line in text.splitlines()]
    assert len([line for line in lines if len(line.get("reqid", "")) == 100]) == 1000


async def until_found(asked: Gate) -> None:
    """Wait until the gate reaches the instance."""

    async def answers() -> bool:
        return await asked.status("digits") is grpc.StatusCode.OK

    await until_async(answers)


@pytest.fixture
async def pair(registry: Registry) -> AsyncIterator[tuple[Gate, Evaluator]]:
    """A gate and an evaluator that log the same share."""
    flags = ("--log-requests", "0.3", "--slow", "3600")
    with gate(registry, *flags) as asked, evaluator(registry, "digits", "v1", *flags) as instance:
        await until_found(asked)
        yield asked, instance


async def test_gate_and_evaluator_log_the_same_share_of_successes_and_all_failures(
    pair: tuple[Gate, Evaluator],
) -> None:
    asked, instance = pair
    successes = [f"success-{number}" for number in range(200)]
    await ask(asked.address, successes)
    await ask(asked.address, [f"failure-{number}" for number in range(50)], app="unknown")
    # Of ids as Envoy makes them, Envoy chooses by the first 8 digits.
    await ask(asked.address, [f"{number:08x}-0000-4000-8000-000000000000" for number in (299_999, 300_000)])
    asked.terminate()
    instance.terminate()
    asked.wait()
    instance.wait()
    of_gate, of_evaluator = finished(asked), finished(instance)
    chosen = {reqid for reqid in of_gate if reqid.startswith("success-")}
    assert 30 < len(chosen) < 90
    assert chosen == {reqid for reqid in of_evaluator if reqid.startswith("success-")}
    assert len([reqid for reqid in of_gate if reqid.startswith("failure-")]) == 50
    made = f"{299_999:08x}-0000-4000-8000-000000000000"
    assert [reqid for reqid in of_gate if reqid.endswith("-000000000000")] == [made]
    assert of_gate[made]["trace_id"] == of_evaluator[made]["trace_id"] == TRACE


async def test_level_share_and_slowness_change_at_run_time(pair: tuple[Gate, Evaluator]) -> None:
    for process, ready in zip(pair, ("service ready", "release loading"), strict=True):
        url = f"http://127.0.0.1:{process.logged(event=ready)['http_port']}/log"
        async with aiohttp.ClientSession() as session:

            async def call(
                method: str, query: str = "", url: str = url, session: aiohttp.ClientSession = session, **headers: str
            ) -> tuple[int, str]:
                async with session.request(method, url + query, headers=headers) as answer:
                    return answer.status, await answer.text()

            status, text = await call("GET")
            assert (status, json.loads(text)) == (200, {"level": "info", "requests": 0.3, "slow": 3600.0})
            for query, wrong in (
                ("", "changes what you name"),
                ("?level=loud", "level should be one of debug, info, warning, error"),
                ("?requests=1.5", "requests should be a number from 0 to 1"),
                ("?requests=nan", "requests should be a number from 0 to 1"),
                ("?slow=inf", "slow should be a number from 0 on"),
                ("?level=debug&colour=red", "'colour' is no setting"),
            ):
                status, text = await call("PUT", query)
                assert (status, wrong in text) == (400, True), text
            # Neither a name that leads here, nor a web page, nor another method changes anything.
            assert (await call("PUT", "?level=error", Host="page.example"))[0] == 421
            assert (await call("PUT", "?level=error", Origin="https://page.example"))[0] == 403
            assert (await call("POST", "?level=error"))[0] == 405
            assert json.loads((await call("GET"))[1])["level"] == "info"
            status, text = await call("PUT", "?level=error&slow=0")
            assert (status, json.loads(text)) == (200, {"level": "error", "requests": 0.3, "slow": 0.0})
            line = process.logged(event="log settings changed")
            assert line["address"] == "127.0.0.1"
            assert line["before"] == {"level": "info", "requests": 0.3, "slow": 3600.0}
            assert (line["level"], line["now"]) == ("info", {"level": "error", "requests": 0.3, "slow": 0.0})
    asked, _ = pair
    await ask(asked.address, ["silent"])
    for process, ready in zip(pair, ("service ready", "release loading"), strict=True):
        port = process.logged(event=ready)["http_port"]
        async with aiohttp.ClientSession() as session, session.put(f"http://127.0.0.1:{port}/log?level=info"):
            pass
    # All requests are slow now.
    ids = [f"slow-{number}" for number in range(20)]
    await ask(asked.address, ids)
    for process in pair:
        await until(partial(logs_all, process, ids))
        assert "silent" not in finished(process)


def own_address() -> str:
    """Return the address of this machine in a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # No packet leaves.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback ones")
        return str(probe.getsockname()[0])


async def test_others_than_this_machine_change_and_see_nothing(registry: Registry) -> None:
    address = own_address()
    with gate(registry, "--http", "0.0.0.0:0") as asked:
        port = asked.logged(event="service ready")["http_port"]
        async with aiohttp.ClientSession(headers={"host": "localhost"}) as session:
            for host, status in ((address, 403), ("127.0.0.1", 200)):
                async with session.put(f"http://{host}:{port}/log?level=info") as answer:
                    assert answer.status == status
                async with session.get(f"http://{host}:{port}/log") as answer:
                    assert answer.status == status
            # All other pages are for scrapers elsewhere, too.
            async with session.get(f"http://{address}:{port}/metrics") as answer:
                assert answer.status == 200
                assert "atserving_gate_log_lines_dropped_total 0.0" in await answer.text()


@pytest.mark.parametrize("flags", [("--log-requests", "1.5"), ("--log-requests", "nan"), ("--slow", "-1")])
def test_wrong_shares_and_times_end_the_start(flags: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "gate", "--listen", "127.0.0.1:0", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    (line,) = run.stderr.splitlines()
    assert (run.returncode, flags[0] in line) == (2, True), line
