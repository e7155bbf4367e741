"""Counts what callers ask at a rate limit service, so that limits are exact over all gates.

The service speaks Envoy's rate limit protocol, as https://github.com/envoyproxy/ratelimit does. It counts in windows of
a second, a minute, an hour or a day. A limit travels with each question, so it follows the app's metadata. While the
service is away, each gate's own limits go on alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from atserving.errors import ResourceExhausted
from atserving.transport import channel
from atserving.v1.ratelimit_pb2 import RateLimitDescriptor, RateLimitRequest, RateLimitResponse, RateLimitUnit
from gate.limits import Limits, Use, Window

log = structlog.get_logger()

DOMAIN = "atserving"
"""The domain, which the service has to know."""
METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
# After so many failures in a row the service is not asked for a while.
_FAILURES, _PAUSE_S = 5, 1.0
# At a start there is time for a connection.
_START_S = 1.0
# Its loss is logged once in this time.
_QUIET_S = 60.0
# The service counts in 32 bits, and adds before it compares.
_MOST_HITS = 1 << 30
_SECONDS = {RateLimitUnit.SECOND: 1, RateLimitUnit.MINUTE: 60, RateLimitUnit.HOUR: 3600, RateLimitUnit.DAY: 86400}
# A uid is a number.
_ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class _Quota:
    """So many hits in a unit of time, and those of one request."""

    kind: str
    """``requests`` or ``bytes``."""
    hits: int
    per_unit: int
    unit: RateLimitUnit.ValueType
    scale: int = 1
    """The bytes of a hit."""


class RateLimitService:
    """A rate limit service, over one connection that stays open."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """``timeout_s`` is how long a request waits for the answer."""
        self._address = address
        self._timeout_s = timeout_s
        # Servers in Go break off a connection with pings more often than once in five minutes.
        self._channel = channel(address, pings=False)
        # Answers in bytes: grpc.aio would make None of a malformed one.
        self._should_limit = self._channel.unary_unary(METHOD, RateLimitRequest.SerializeToString, None)
        self._failures = 0
        self._paused_until_s = 0.0
        self._told_s = -math.inf
        self._is_lost = False
        self.asked: Counter[str] = Counter()
        """How many questions had which outcome: ``allowed``, ``refused`` or ``failed``; ``skipped`` ones were not
        asked, as it is away."""

    async def check(self) -> None:
        """Open the connection, and log what is wrong with the service."""
        limit = RateLimitDescriptor.RateLimitOverride(requests_per_unit=_MOST_HITS, unit=RateLimitUnit.SECOND)
        await self._ask(RateLimitRequest(domain=DOMAIN, descriptors=[_descriptor("start", "gate", limit)]), _START_S)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def count(self, app: str, uid: int | None, limits: Limits, use: Use, size: Callable[[], int]) -> None:
        """Count a request of a caller, and its bytes; ``size`` returns them. Raises ResourceExhausted."""
        # Those of these limits: a change of them begins others, also while the service is asked.
        windows = use.windows = {} if use.windows is None else use.windows
        for quota in _quotas(limits, size):
            window = windows.setdefault(quota.kind, Window())
            now_s = time.monotonic()
            if window.full_until_s > now_s:
                raise _over(app, quota, window.ends_s - now_s)
            if window.ends_s <= now_s:
                window.unused = 0
            if window.unused >= quota.hits:
                window.unused -= quota.hits
                continue
            limit = RateLimitDescriptor.RateLimitOverride(requests_per_unit=quota.per_unit, unit=quota.unit)
            descriptor = _descriptor(app, _ANONYMOUS if uid is None else str(uid), limit, quota.kind)
            request = RateLimitRequest(domain=DOMAIN, descriptors=[descriptor], hits_addend=quota.hits)
            status = await self._ask(request, self._timeout_s)
            if status is None:
                continue
            left_s = max(0, min(status.duration_until_reset.seconds, _SECONDS[quota.unit]))
            window.ends_s = time.monotonic() + left_s
            if status.code == RateLimitResponse.OVER_LIMIT:
                # The answer is in whole seconds, so the next window may begin up to one earlier.
                window.full_until_s = window.ends_s - 1
                raise _over(app, quota, left_s)

    @staticmethod
    def give_back(limits: Limits, use: Use, size: Callable[[], int]) -> None:
        """Let the next request of this window have what one has cost that is tried again."""
        for quota in _quotas(limits, size):
            if use.windows and (window := use.windows.get(quota.kind)):
                window.unused += quota.hits

    async def _ask(self, request: RateLimitRequest, timeout_s: float) -> RateLimitResponse.DescriptorStatus | None:
        """Return the answer; None if there is none."""
        if self._failures >= _FAILURES and time.monotonic() < self._paused_until_s:
            self.asked["skipped"] += 1
            return None
        try:
            response = RateLimitResponse.FromString(await self._should_limit(request, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            self._failed(f"no answer within {timeout_s:g} s" if is_late else error.details() or error.code().name)
            return None
        except DecodeError:
            self._failed("its answer is malformed")
            return None
        status = response.statuses[0] if response.statuses else None
        if status is None or not status.HasField("current_limit"):
            self._failed(f"it counts nothing: its config needs a file with the line 'domain: {DOMAIN}'")
            return None
        self._failures = 0
        if self._is_lost:
            self._is_lost = False
            log.info("rate limit service back", address=self._address)
        self.asked["refused" if status.code == RateLimitResponse.OVER_LIMIT else "allowed"] += 1
        return status

    def _failed(self, reason: str) -> None:
        self.asked["failed"] += 1
        self._failures += 1
        now_s = time.monotonic()
        self._paused_until_s = now_s + _PAUSE_S
        if now_s - self._told_s >= _QUIET_S:
            self._is_lost = True
            self._told_s = now_s
            log.warning("rate limit service lost", address=self._address, reason=reason)


def in_unit(per_second: float) -> tuple[int, RateLimitUnit.ValueType]:
    """Return a rate as a whole number in a unit of time, the shortest in which it is one, to a thousandth."""
    for unit, seconds in _SECONDS.items():
        count = round(per_second * seconds)
        if count and abs(per_second * seconds - count) <= count / 1000:
            return count, unit
    return max(1, round(per_second * _SECONDS[RateLimitUnit.DAY])), RateLimitUnit.DAY


def _quotas(limits: Limits, size: Callable[[], int]) -> Iterator[_Quota]:
    if limits.requests_per_second:
        yield _Quota("requests", 1, *in_unit(limits.requests_per_second))
    if most := limits.bytes_per_minute:
        scale = 1
        while most // scale > _MOST_HITS:
            scale <<= 10
        # A larger request may come alone.
        hits = max(1, min(-(-size() // scale), most // scale))
        yield _Quota("bytes", hits, most // scale, RateLimitUnit.MINUTE, scale)


def _descriptor(
    app: str, uid: str, limit: RateLimitDescriptor.RateLimitOverride, kind: str = "requests"
) -> RateLimitDescriptor:
    entries = [RateLimitDescriptor.Entry(key=k, value=v) for k, v in (("app", app), ("limit", kind), ("uid", uid))]
    return RateLimitDescriptor(entries=entries, limit=limit)


def _over(app: str, quota: _Quota, left_s: float) -> ResourceExhausted:
    most, unit = quota.per_unit * quota.scale, RateLimitUnit.Name(quota.unit).lower()
    message = (
        f"this caller sends app {app!r} more than {most} {quota.kind} {'an' if unit == 'hour' else 'a'} {unit}, which "
        "is its limit over all gates"
    )
    policy = f'"{quota.kind}";q={most};w={_SECONDS[quota.unit]}'
    return ResourceExhausted(message, retry_after_s=max(left_s, 0.1), limit=policy)
