"""Etcd members and registries: some shared by tests, some for one test to break."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from registry.etcd import Connection, EtcdClient
from tests.processes import Etcd, Process, Registry, cluster
from tests.registry.cli import Cli

_numbers = itertools.count()


@pytest.fixture
def processes() -> Iterator[Callable[[Process], Process]]:
    """Return a function that starts a process. The test ends with the process killed, in whatever state it is."""
    started: list[Process] = []

    def start(process: Process) -> Process:
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
async def etcd(tmp_path: Path, processes: Callable[[Process], Process]) -> Etcd:
    """An etcd of the test's own, which the test may break."""
    (member,) = cluster(tmp_path, ["one"])
    processes(member)
    await member.ready()
    return member


@pytest.fixture
async def members(tmp_path: Path, processes: Callable[[Process], Process]) -> list[Etcd]:
    """Three members of one cluster."""
    three = cluster(tmp_path, ["one", "two", "three"])
    for member in three:
        processes(member)
    await asyncio.gather(*(member.ready() for member in three))
    return three


@pytest.fixture
async def client(etcd: Etcd) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(Connection([etcd.address])) as client:
        yield client


@pytest.fixture(scope="package")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """An etcd for tests that only read and write, each below an app of its own."""
    (member,) = cluster(tmp_path_factory.mktemp("etcd"), ["shared"])
    member.start()
    asyncio.run(member.ready())
    yield member
    member.kill()


@pytest.fixture(scope="package")
def registries(shared_etcd: Etcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Registry]]:
    """Two registries of one etcd, both serving."""
    directory = tmp_path_factory.mktemp("registries")
    both = [Registry(directory, [shared_etcd.address], "--lease-ttl", "2s") for _ in range(2)]
    for registry in both:
        registry.start()
    for registry in both:
        registry.wait_serving()
    yield both
    for registry in both:
        registry.kill()


@pytest.fixture(scope="package")
def lasting(shared_etcd: Etcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry where an instance stays registered without heartbeats for as long as a test needs."""
    # The tests delete most of what is in this etcd.
    flags = ["--lease-ttl", "10m", "--hold-deletions", "0"]
    registry = Registry(tmp_path_factory.mktemp("lasting"), [shared_etcd.address], *flags)
    registry.start()
    registry.wait_serving()
    yield registry
    registry.kill()


@pytest.fixture
def cli(lasting: Registry) -> Cli:
    """The command line, with an app of the test's own."""
    return Cli(lasting.address, f"cli-{next(_numbers)}")
