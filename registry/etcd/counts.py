"""Counts of the calls to etcd, in plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from registry.etcd.errors import EtcdError

OK = "ok"


class CallCounts:
    """Every try of a call, by the method and its outcome: ``ok``, or the kind of the error."""

    def __init__(self) -> None:
        self.tries: Counter[tuple[str, str]] = Counter()
        self.switches = 0
        """How often the calls moved to another member, as one had failed."""

    def count(self, method: str, outcome: str = OK) -> None:
        """Count a try."""
        self.tries[method, outcome] += 1

    @contextmanager
    def counted(self, method: str) -> Iterator[None]:
        """Count the block as a try. A cancelled one does not count."""
        try:
            yield
        except EtcdError as error:
            self.count(method, error.kind)
            raise
        self.count(method)
