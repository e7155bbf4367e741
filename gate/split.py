"""Splits an app's unversioned requests among its versions: exactly, by turns, or by a key of the caller.

A plain, synchronous class without instances: the router says which versions are ready and have room.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import structlog

log = structlog.get_logger()

MOST_OWED = 100
"""How many requests a version makes up for, at most, if it was full in its turns."""

# A proportion above this counts as this: quotients must be floats.
_MOST_TO_ONE = 10**250
# So that what is rounded is a millionth of a request.
_FINE = 1 << 20


class Split:
    """The turns of one app's versions.

    Each request gives every ready version a credit of its share, and the version that takes it pays one request. Among
    those with enough credit, the one whose next request is due first takes it. Since the first request, a version has
    got its share of them to less than one. In any run of requests it gets its share to one if two versions take turns,
    and to less than two if more do: most weights of three versions allow no order with less in every run. When other
    versions are ready, credits stay, so that a rare version gets its turn though another one comes and goes; runs from
    then on may differ by two. A version that is full in its turn keeps its credit, up to MOST_OWED requests, and takes
    the next requests once it has room.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """

    def __init__(self, app: str, weights: Mapping[str, float | None]) -> None:
        """``weights`` has those of the versions in production. If all are None, ready capacity takes their place."""
        self.weights = dict(weights)
        self._by_capacity = all(each is None for each in weights.values())
        self._app = app
        given = {version: 1.0 if weight is None else weight for version, weight in weights.items()}
        self.versions = tuple(version for version, weight in given.items() if weight)
        """The versions that may get requests, in the order of this split's lists."""
        self.unready: tuple[str, ...] = ()
        """The versions without a ready instance, whose share the others take."""
        self._weights = [given[version] for version in self.versions]
        self._whole = _integers(self._weights)
        self._capacities: list[int] = []
        self._present: list[int] = []
        # Those who have the credits. The shares, the price of a request, enough credit to take one, and the most credit
        # are in the same unit.
        self._turning: list[int] = []
        self._credits = [0] * len(self.versions)
        self._parts: list[int] = []
        self._price = self._enough = self._most = 0

    def take(self, capacities: list[int], rooms: Sequence[Collection[object]]) -> int:
        """Return the index of the version that takes a request; it has room, as at least one has.

        ``capacities`` are those of the ready instances of each version, 0 if none is ready; ``rooms`` the instances
        that have room.
        """
        if capacities != self._capacities:
            self._change(capacities)
        present, credits_, parts = self._present, self._credits, self._parts
        if len(present) < 2 or not any(map(rooms.__getitem__, present)):
            return self.due(rooms)
        enough, most = self._enough, self._most
        latest = self._price - enough
        chosen, least, surplus = -1, math.inf, 0
        for index in present:
            credit = credits_[index] = credits_[index] + parts[index]
            if credit > most:
                surplus += credit - most
                credits_[index] = most
            if credit >= enough and rooms[index]:
                due = (latest - credit) / parts[index]
                if due < least:
                    chosen, least = index, due
        if chosen < 0:
            chosen = self.due(rooms)
        if surplus:
            self._spread(surplus, rooms)
        credits_[chosen] -= self._price
        return chosen

    def shares(self) -> dict[str, float]:
        """Return the share of each version that should get requests."""
        found: Sequence[float] = self._capacities if self._by_capacity and any(self._capacities) else self._weights
        whole = sum(found)
        return {version: each / whole for version, each in zip(self.versions, found, strict=True)}

    def due(self, rooms: Sequence[Collection[object]]) -> int:
        """Return the index of the version with room whose next request is due first; it takes no turn."""
        ready = [index for index in self._present if rooms[index]]
        if len(ready) < 2:
            return ready[0] if ready else next(index for index, each in enumerate(rooms) if each)
        latest = self._price - self._enough
        return min(ready, key=lambda index: (latest - self._credits[index]) / self._parts[index])

    def move(self, due: str, served: str) -> None:
        """Give a turn back to a version that was full, for another one served the request."""
        if due in self.versions and served in self.versions:
            back, paid = self.versions.index(due), self.versions.index(served)
            if back in self._turning and paid in self._turning:
                self._credits[back] += self._price
                self._credits[paid] -= self._price

    def of_key(self, key: bytes) -> list[str]:
        """Return the versions in the order in which a key prefers them: the same in each process.

        This is weighted rendezvous hashing: the share of keys that prefer a version is that of its weight (1 for None),
        and a change of one weight moves keys only from or to its version.
        """
        scores = {}
        for version, weight in zip(self.versions, self._weights, strict=True):
            name = b"\0".join((self._app.encode(), version.encode(), key))
            number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 12
            scores[version] = -math.log((number + 0.5) / (1 << 52)) / weight
        return sorted(scores, key=scores.__getitem__)

    def _change(self, capacities: list[int]) -> None:
        """Use other capacities."""
        self._capacities = capacities
        self._present = [index for index, capacity in enumerate(capacities) if capacity]
        self._tell()
        if len(self._present) < 2:
            # It takes all requests. Turns with others go on once they are back.
            return
        before = self._price
        weights = capacities if self._by_capacity else self._whole
        scale = 2 * len(self._present) - 2
        self._parts = [
            weight * scale * _FINE if capacity else 0 for weight, capacity in zip(weights, capacities, strict=True)
        ]
        self._price = sum(self._parts)
        self._enough, self._most = self._price // scale, MOST_OWED * self._price
        self._turning = self._present
        if before:
            self._carry(before)

    def _carry(self, price: int) -> None:
        """Let credits keep their worth in requests, after another price. Those of the ready versions add up to 0."""
        credits_ = self._credits = [each * self._price // price for each in self._credits]
        for index, part in enumerate(self._parts):
            if not part:
                # What it has when it is back.
                credits_[index] = max(-self._price, min(credits_[index], self._price))
        surplus = sum(credits_[index] for index in self._present)
        for index in self._present:
            credits_[index] -= surplus * self._parts[index] // self._price
        # What was rounded.
        credits_[self._present[0]] -= sum(credits_[index] for index in self._present)

    def _tell(self) -> None:
        unready = tuple(version for version, each in zip(self.versions, self._capacities, strict=True) if not each)
        for version in unready:
            if version not in self.unready:
                log.warning("version unready", app=self._app, version=version)
        for version in self.unready:
            if version not in unready:
                log.info("version ready", app=self._app, version=version)
        self.unready = unready

    def _spread(self, surplus: int, rooms: Sequence[Collection[object]]) -> None:
        """Give the credit that full versions lose to those with room, by their shares."""
        first, *others = [index for index in self._present if rooms[index]]
        whole = sum(self._parts[index] for index in (first, *others))
        for index in others:
            part = surplus * self._parts[index] // whole
            self._credits[index] += part
            surplus -= part
            whole -= self._parts[index]
        self._credits[first] += surplus


def _integers(weights: Sequence[float]) -> list[int]:
    """Return integers in the exact proportion of the weights, as they are written."""
    written = [Fraction(repr(each)) for each in weights]
    unit = math.lcm(*(each.denominator for each in written))
    whole = [int(each * unit) for each in written]
    least = sum(whole) // _MOST_TO_ONE
    return [max(each, least) for each in whole]
