"""An instance as a gate sees it: its connection, and its room for requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from atserving.config import Instance


class Connection(Protocol):
    """A connection to an instance."""

    @property
    def is_away(self) -> bool:
        """Whether the instance has said that others should be asked first."""

    @property
    def is_up(self) -> bool:
        """Whether the instance is connected, and has named itself."""


ConnectionT = TypeVar("ConnectionT", bound=Connection)


class Kind(NamedTuple):
    """The kind of a request, by which an instance has room for it."""

    batched: bool = False
    """It is a task of a batch: those leave a quarter of an instance to other callers."""
    fetches: bool = False
    """The instance has to fetch a resource."""


ALONE = Kind()
"""A request with all that the net needs."""

STATES = ("connected", "connecting", "away", "full", "unused", "outdated", "left")
"""The states of instances, as metrics have them. Those without requests for their version are unused; one that left the
registry is a last resort."""


@dataclass(eq=False, slots=True)
class Endpoint(Generic[ConnectionT]):
    """An instance as this gate sees it."""

    instance: Instance
    connect: Callable[[Instance], ConnectionT]
    """Returns a connection to an instance."""
    opened: ConnectionT | None = None
    """The connection, once it is needed."""
    requests: int = 0
    """How many it has had."""
    in_flight: int = 0
    fetching: int = 0
    """Requests in flight whose resources the instance has to fetch. They have room of their own: a slow host must not
    keep others from the net."""
    ejected_until: float = 0.0
    full_until: float = 0.0
    """It refused a request, as it is full with those of other gates; 0 once one of this gate's is done."""
    batches_full_until: float = 0.0
    """The same for a task of a batch: others may still have room."""
    left_at: float | None = field(default=None)
    """When the registry reported its departure; None while it is registered."""

    @property
    def connection(self) -> ConnectionT:
        """The connection, which is opened if it is not."""
        return self.opened or self.open()

    def open(self) -> ConnectionT:
        """Open the connection if it is not, and return it."""
        if self.opened is None:
            self.opened = self.connect(self.instance)
        return self.opened

    def take_connection(self) -> ConnectionT | None:
        """Return the connection, if there is one, for the caller to close. The next request opens another."""
        opened, self.opened = self.opened, None
        return opened

    @property
    def is_away(self) -> bool:
        """Whether others should be asked first, as far as is known."""
        return self.opened is not None and self.opened.is_away

    @property
    def is_up(self) -> bool:
        """Whether it is connected."""
        return self.opened is not None and self.opened.is_up

    def state(self, now_s: float) -> str:
        """Return which of the first five of ``STATES`` a registered instance is in."""
        if self.opened is None:
            return "unused"
        if not self.opened.is_up:
            return "connecting"
        if self.opened.is_away:
            return "away"
        return "connected" if self.room() and self.full_until <= now_s else "full"

    def room(self, kind: Kind = ALONE) -> int:
        """Return how many more requests of a kind this gate can send it."""
        capacity = self.instance.capacity
        return max((capacity - capacity // 4 if kind.batched else capacity) - self.used(kind), 0)

    def used(self, kind: Kind) -> int:
        """Return how many requests in flight share the room of a kind."""
        return self.fetching if kind.fetches else self.in_flight

    @contextmanager
    def hold(self, kind: Kind = ALONE) -> Iterator[None]:
        """Count one request in flight."""
        self.begin(kind)
        try:
            yield
        finally:
            self.end(kind)

    def begin(self, kind: Kind) -> None:
        """Count one more request in flight."""
        self.requests += 1
        if kind.fetches:
            self.fetching += 1
        else:
            self.in_flight += 1

    def end(self, kind: Kind) -> None:
        """Count one request less."""
        if kind.fetches:
            self.fetching -= 1
        else:
            self.in_flight -= 1
            self.full_until = self.batches_full_until = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it has no request in flight."""
        return not self.in_flight and not self.fetching
