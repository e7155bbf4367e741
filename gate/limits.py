"""How much each caller may ask of an app: requests a second, requests in flight, and bytes a minute.

The counts are those of this gate; ``gate.rate_limit_service`` counts over all gates. Callers without an identity count
as one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from atserving.config import AppMetadata
from atserving.errors import ResourceExhausted

_FULL_S = 0.1
_MINUTE_S = 60.0
_FEW = 10_000


class Limits(NamedTuple):
    """The limits of an app, for each of its callers; 0: none."""

    requests_per_second: float = 0.0
    in_flight: int = 0
    bytes_per_minute: int = 0

    @staticmethod
    def of(own: AppMetadata, default: AppMetadata) -> Limits | None:
        """Return the limits in the metadata of an app, and else in that of all apps; None if there are none."""
        found = Limits(
            own.max_requests_per_second or default.max_requests_per_second or 0.0,
            own.max_in_flight or default.max_in_flight or 0,
            own.max_bytes_per_minute or default.max_bytes_per_minute or 0,
        )
        return found if any(found) else None


@dataclass(slots=True)
class Window:
    """The present window of one limit at a rate limit service, as far as this gate knows it."""

    ends_s: float = 0.0
    full_until_s: float = 0.0
    """The service has refused a request, and would refuse others until then."""
    unused: int = 0
    """What the service has counted for requests that are tried again."""


class Use:
    """The use that one caller makes of one app.

    Its rates are those of the generic cell rate algorithm (ITU-T I.371): each keeps the time at which all that was
    taken is paid, and lets it be ahead by what may come at once.
    """

    __slots__ = ("bytes_paid_s", "in_flight", "limits", "requests_paid_s", "windows")

    def __init__(self, limits: Limits) -> None:
        self.in_flight = 0
        self.begin(limits)

    def begin(self, limits: Limits) -> None:
        """Follow these limits, and forget what is owed by others."""
        self.limits = limits
        self.requests_paid_s = self.bytes_paid_s = 0.0
        self.windows: dict[str, Window] | None = None


class CallerLimits:
    """Counts the requests of callers in flight, and refuses those above the limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, int | None], Use] = {}
        self._most = _FEW

    def __len__(self) -> int:
        """Return how many callers of apps are known."""
        return len(self._uses)

    def enter(self, app: str, uid: int | None, limits: Limits, size: Callable[[], int]) -> Use:
        """Count a request, which the caller of this method takes out of those in flight when it ends.

        ``size`` returns its bytes. Raises ResourceExhausted.
        """
        use = self._uses.get((app, uid))
        if use is None:
            use = self._uses[app, uid] = self._new(limits)
        elif use.limits != limits:
            use.begin(limits)
        now_s = self._clock()
        if limits.in_flight and use.in_flight >= limits.in_flight:
            message = f"this caller has {use.in_flight} requests to app {app!r} in flight, which is its limit"
            raise ResourceExhausted(message, retry_after_s=_FULL_S, limit=f'"in-flight";q={limits.in_flight}')
        requests_s = bytes_s = 0.0
        if rate := limits.requests_per_second:
            # A second's requests may come at once, and one at least.
            requests_s = _paid(use.requests_paid_s, now_s, 1 / rate, max(1.0, 1 / rate))
            if requests_s < 0:
                message = f"this caller sends app {app!r} more than {rate:g} requests a second, which is its limit"
                policy = f'"requests";q={max(1, int(rate))};w={max(1, math.ceil(1 / rate))}'
                raise ResourceExhausted(message, retry_after_s=-requests_s, limit=policy)
        if most := limits.bytes_per_minute:
            bytes_s = _paid(use.bytes_paid_s, now_s, min(size() / most, 1.0) * _MINUTE_S, _MINUTE_S)
            if bytes_s < 0:
                message = f"this caller sends app {app!r} more than {most} bytes a minute, which is its limit"
                raise ResourceExhausted(message, retry_after_s=-bytes_s, limit=f'"bytes";q={most};w=60')
        use.requests_paid_s, use.bytes_paid_s = requests_s, bytes_s
        use.in_flight += 1
        return use

    @staticmethod
    def refund(use: Use, limits: Limits, size: Callable[[], int]) -> None:
        """Take back what a request has cost that is tried again."""
        if limits.requests_per_second:
            use.requests_paid_s -= 1 / limits.requests_per_second
        if limits.bytes_per_minute:
            use.bytes_paid_s -= min(size() / limits.bytes_per_minute, 1.0) * _MINUTE_S

    def _new(self, limits: Limits) -> Use:
        """Return a new use, after others were forgotten that are paid, if there are many."""
        if len(self._uses) >= self._most:
            now_s = self._clock()
            self._uses = {
                key: use
                for key, use in self._uses.items()
                if use.in_flight or max(use.requests_paid_s, use.bytes_paid_s) > now_s
            }
            # So that this is rare, however many callers there are at a time.
            self._most = max(_FEW, 2 * len(self._uses))
        return Use(limits)


def _paid(paid_s: float, now_s: float, cost_s: float, ahead_s: float) -> float:
    """Return when all is paid with one more cost, or minus the time to wait if that is too far ahead."""
    after_s = max(paid_s, now_s) + cost_s
    wait_s = after_s - now_s - ahead_s
    return after_s if wait_s <= 1e-9 else -wait_s
