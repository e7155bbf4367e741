"""gRPC as every process of the mesh speaks it: the options of a channel, and a server with health and reflection."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from atserving.errors import StartError

MAX_MESSAGE_BYTES = 64 << 20
"""The most one message holds: the edge takes bodies up to 20 MiB, nets may answer with more."""

LIVE = "live"
"""What the health service is asked for by those who would restart a process: SERVING for as long as it answers at all.

Whether calls are welcome is another question, the one for the empty name.
"""

_RESOLVE_S = 2.0

# A dead peer (a frozen process, a lost host) is found within 5 + 3 s. grpc.keepalive_timeout_ms alone does not bound
# it: http2.ping_timeout_ms is what the C core waits for.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Reconnect soon: what restarts is back in a second or two.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name this bounds a connection attempt: 100 ms are too few for a busy peer.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    # Peers of the mesh are reached directly, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # A second process on the same port is a mistake to report, not a peer to share with.
    ("grpc.so_reuseport", 0),
    # As much as the edge lets through: a caller's large cookie is no reason to fail its call.
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.absolute_max_metadata_size", 128 << 10),
]


def channel(address: str) -> grpc.aio.Channel:
    """A channel to ``host:port``, which finds a dead peer and reconnects soon."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class Addresses:
    """Some ``host:port``, each as all the addresses that its name stands for."""

    def __init__(self, addresses: Sequence[str]) -> None:
        # A name that was never resolved stands for itself.
        self._known = {address: [address] for address in addresses}
        self._lookups: dict[str, asyncio.Future[list[str]]] = {}

    async def resolve(self) -> list[str]:
        """All of them, those of one name in a random order, so that many spread over them.

        A name that can't be resolved now stands for what it last did: a name server that is away stops nobody.
        """
        for address in self._known:
            # One at a time: where the name server says nothing, each takes long.
            lookup = self._lookups.get(address) or _lookup(address)
            self._lookups[address] = lookup
            await asyncio.wait({lookup}, timeout=_RESOLVE_S)
            if lookup.done():
                del self._lookups[address]
                self._known[address] = lookup.result() or self._known[address]
            random.shuffle(self._known[address])
        return [each for known in self._known.values() for each in known]


def _lookup(address: str) -> asyncio.Future[list[str]]:
    """The addresses of a name, or none, by a thread that holds up nobody's end, as the loop's own would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str]] = loop.create_future()

    def look_up() -> None:
        host, _, port = address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        hosts = list(dict.fromkeys(str(target[0]) for *_, target in found))
        # The loop may have ended meanwhile.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(
                future.set_result, [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]
            )

    threading.Thread(target=look_up, name="lookup", daemon=True).start()
    return future


class Server:
    """A gRPC server with the standard health service and reflection.

    Every service answers NOT_SERVING until :meth:`set_serving`; ``LIVE`` is SERVING from the start. A message larger
    than ``max_receive_bytes`` is refused with RESOURCE_EXHAUSTED.
    """

    def __init__(self, services: Iterable[ServiceDescriptor], max_receive_bytes: int = MAX_MESSAGE_BYTES) -> None:
        sizes = [("grpc.max_receive_message_length", max_receive_bytes)]
        self.grpc = grpc.aio.server(options=[*SERVER_OPTIONS, *sizes])
        self.health = HealthServicer()
        self._names = ["", *(service.full_name for service in services)]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection([*self._names[1:], health, reflection.SERVICE_NAME], self.grpc)

    async def start(self, listen: str) -> int:
        """Listens on ``host:port`` (port 0: any free one) and returns the port. Raises StartError."""
        await self.set_serving(False)
        await self.health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        try:
            port = self.grpc.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if not port:
            raise StartError(f"cannot listen on {listen}: the address is in use or not this machine's")
        await self.grpc.start()
        return int(port)

    async def set_serving(self, serving: bool) -> None:
        """Says by the health service whether calls are welcome."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those in flight end within ``grace_s``, and cancels the rest."""
        await self.grpc.stop(grace_s)


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, event.set)
    return event


async def until_stopped(stop: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Returns when ``stop`` comes. Raises what a background task raised, or that it ended, which none should."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
            raise RuntimeError("a background task ended by itself")
    finally:
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
