"""gRPC between the processes of the mesh: the options of channels."""

from __future__ import annotations

import grpc.aio

from atserving.tls import REGISTRY, Tls

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
_OPTIONS = [
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
CHANNEL_OPTIONS = [*_KEEPALIVE, *_OPTIONS]


def channel(address: str, *, pings: bool = True, tls: Tls | None = None, role: str = REGISTRY) -> grpc.aio.Channel:
    """Return a channel to ``host:port`` that reconnects quickly, and detects a dead peer between calls by pings.

    With ``tls`` the other end should be of this role. The channel keeps the certificates of the moment.
    """
    options = CHANNEL_OPTIONS if pings else _OPTIONS
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials, options=[*options, *tls.options(role)])
