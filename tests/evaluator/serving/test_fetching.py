"""Requests whose resources come from slow hosts leave places and connections to those of other hosts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atserving import link
from atserving.held import HeldBytes
from atserving.local.ports import free_ports
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.resources import ResourceFetcher
from evaluator.serving.pipeline import Pipeline
from tests.evaluator.serving.fronts import pipeline
from tests.waiting import until

QUICK = "127.0.0.9"


class Host:
    """A server on every loopback address; only ``QUICK`` answers before ``unblocked`` is set."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: Counter[str] = Counter()
        self.unblocked = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            self.asked[line.decode().split()[1]] += 1
            if writer.get_extra_info("sockname")[0] != QUICK:
                await self.unblocked.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    def resource(self, address: str, rest: str = "/") -> Resource:
        return Resource(uri=f"http://{address}:{self.port}{rest}")


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    server = await asyncio.start_server(host, "0.0.0.0", 0, backlog=500)
    host.port = server.sockets[0].getsockname()[1]
    yield host
    host.unblocked.set()
    server.close()


@pytest.fixture
async def script(tmp_path: Path) -> AsyncIterator[Pipeline]:
    async with ResourceFetcher(1 << 20, AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])) as fetcher:
        yield pipeline(tmp_path, HeldBytes(1 << 30), capacity=8, fetcher=fetcher, net="")


class Replier:
    """Takes replies, which are errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.fetch_us: list[int] = []

    def hold(self, count: int) -> bool:
        return True

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        response = InferResponse.FromString(bytes(reply.response))
        self.errors.append(response.error.message)
        self.fetch_us.append(response.fetch_us)


async def test_no_spelling_of_a_slow_host_takes_the_places_of_others(script: Pipeline, host: Host) -> None:
    replier = Replier()
    slow = [
        Resource(uri=f"http://{spelling}")
        for each in range(4)
        for spelling in (
            f"127.0.0.1:{host.port}?{each}",
            f"user{each}@127.0.0.1:{host.port}",
            f"127.0.0.1:{host.port + each}/",
            f"[::ffff:127.0.0.1]:{host.port}/{each}",
        )
    ]
    begun = [script.begin(_call(each), replier) for each in slow]
    await until(lambda: len(replier.errors) == 12)
    assert set(replier.errors) == {"the instance fetches the resources of 4 requests from this host"}
    quick = script.begin(_call(host.resource(QUICK)), replier)
    await until(lambda: script.capacity.in_flight == 1)
    assert not quick.ended
    for request in (*begun, quick):
        request.abandon()
    await script.capacity.drained()


async def test_a_host_behind_a_quick_one_counts_too(script: Pipeline, host: Host) -> None:
    replier = Replier()
    groups = [(host.resource(f"127.0.1.{each}"), host.resource("127.0.0.1")) for each in range(1, 6)]
    begun = [script.begin(_call(*group), replier) for group in groups]
    await until(lambda: replier.errors == ["the instance fetches the resources of 4 requests from this host"])
    for request in begun:
        request.abandon()
    await script.capacity.drained()


async def test_large_groups_from_slow_hosts_leave_connections_to_others(script: Pipeline, host: Host) -> None:
    # The HTTP client is loaded.
    await script.fetch(InferRequest(data=[host.resource(QUICK)]), lambda _: None)
    groups = [
        InferRequest(data=[host.resource(f"127.0.{1 + group}.{1 + each}", f"/{group}") for each in range(64)])
        for group in range(20)
    ]
    fetching = [asyncio.create_task(script.fetch(group, lambda _: None)) for group in groups]
    await until(lambda: len(host.asked) > 4)
    quick = InferRequest(data=[host.resource(QUICK), host.resource(QUICK, "/more")])
    await script.fetch(quick, lambda _: None)
    assert [each.body for each in quick.data] == [b"ok", b"ok"]
    assert not any(each.done() for each in fetching)
    # Each group goes on.
    await until(lambda: len(host.asked) == 22)
    assert max(host.asked.values()) == 16
    host.unblocked.set()
    await asyncio.gather(*fetching)
    assert {each.body for group in groups for each in group.data} == {b"ok"}


async def test_a_reply_says_how_long_its_fetch_took_unless_it_is_long(script: Pipeline) -> None:
    replier = Replier()
    (port,) = free_ports(1)
    script.begin(_call(Resource(uri=f"http://127.0.0.1:{port}/")), replier)
    await until(lambda: replier.errors)
    assert replier.fetch_us[0] > 0
    short = link.Reply(1, link.RESULT, 0, 0, 0, 0, 1, 1, InferResponse(result_json="7").SerializeToString())
    assert InferResponse.FromString(bytes(link.with_fetch(short, 1 << 40).response)) == InferResponse(
        result_json="7", fetch_us=(1 << 32) - 1
    )
    long = short._replace(response=bytes(link.LONG_BYTES))
    assert link.with_fetch(long, 7) is long


def _call(*resources: Resource) -> link.Call:
    return link.Call(0, 0, link.FETCH, b"", b"", InferRequest(data=resources).SerializeToString())
