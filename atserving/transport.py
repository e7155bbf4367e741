"""gRPC between the processes of the mesh: channel options, and a server with health and reflection."""

from __future__ import annotations

from collections.abc import Iterable

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from atserving.errors import StartError
from atserving.sockets import listening_socket

MAX_MESSAGE_BYTES = 64 << 20
"""The size limit of one message. The edge accepts bodies up to 20 MiB; a net may return more."""

LIVE = "live"
"""The health service name for liveness checks: SERVING for as long as the process answers.

For readiness, check the empty name.
"""

# Keepalive detects a dead peer (a frozen process, a lost host) within 5 + 3 s. The C core waits for
# http2.ping_timeout_ms, so grpc.keepalive_timeout_ms alone sets no bound.
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
    # A peer restarts within a second or two, so reconnect soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this is the timeout of one connection attempt; a busy peer needs more than 100 ms.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    # Connect to peers directly, even if the environment configures an HTTP proxy.
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Without this, a second process on the same port would silently share its connections.
    ("grpc.so_reuseport", 0),
    # The edge's own limit: a large cookie that passes the edge must not fail the call here.
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.absolute_max_metadata_size", 128 << 10),
]


def channel(address: str) -> grpc.aio.Channel:
    """Return a channel to ``host:port`` that detects a dead peer and reconnects quickly."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class Server:
    """A gRPC server with the standard health service and reflection.

    The health of every service is NOT_SERVING until :meth:`set_serving`; ``LIVE`` is SERVING from the start. The server
    rejects a message larger than ``max_receive_bytes`` with RESOURCE_EXHAUSTED.
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
        """Listen on ``host:port`` (port 0: any free port) and return the port. Raises StartError."""
        await self.set_serving(False)
        await self.health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        try:
            port = self.grpc.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if not port:
            # gRPC does not tell the reason, but this does.
            (await listening_socket(listen)).close()
            raise StartError(f"cannot listen on {listen}")
        await self.grpc.start()
        return int(port)

    async def set_serving(self, serving: bool) -> None:
        """Report by the health service whether this server accepts calls."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, let the calls in flight finish within ``grace_s``, and cancel the rest."""
        await self.grpc.stop(grace_s)
