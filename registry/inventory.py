"""Counts of a view's entries, kept with each change: a scrape does not visit all entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from atserving.config import Instance, Release

if TYPE_CHECKING:
    from registry.view import Entry

MOST_VERSIONS = 1000
"""How many versions are counted one by one."""

_Version = tuple[str, str]


class Inventory:
    """The size of the values, the published versions, and the instances of each."""

    def __init__(self) -> None:
        self.size = 0
        """The bytes of all values."""
        self.gone = 0
        """Instances that have left since the start: deregistered, or their leases expired."""
        self._published: Counter[_Version] = Counter()
        self._production: Counter[_Version] = Counter()
        self._instances: Counter[_Version] = Counter()

    def change(self, before: Entry | None, after: Entry | None) -> None:
        """Take the change of one entry; None: it was not there, or is gone."""
        if after:
            self._add(after, 1)
        if before:
            self._add(before, -1)
            self.gone += after is None and isinstance(before.value, Instance)

    def instances(self, most: int = MOST_VERSIONS) -> Iterator[tuple[str, str, int]]:
        """Yield the app, the version and the number of instances of each published version.

        Beyond ``most`` versions, those published last count as one without a name.
        """
        unpublished = (version for version in self._instances if version not in self._published)
        shown = list(islice(chain(self._published, unpublished), most))
        for app, version in shown:
            yield app, version, self._instances[app, version]
        others = len(self._published | self._instances) - len(shown)
        if others:
            yield "", "", self._instances.total() - sum(self._instances[each] for each in shown)

    def production(self, most: int = MOST_VERSIONS) -> Iterator[tuple[str, str]]:
        """Yield the app and the version of each release that gets requests without a version; ``most`` at most."""
        return islice(iter(self._production), most)

    def _add(self, entry: Entry, number: int) -> None:
        text = entry.value_json
        self.size += number * (len(text) if text.isascii() else len(text.encode()))
        match entry.value:
            case Instance(app=app, version=version):
                _add(self._instances, (app, version), number)
            case Release(name=app, version=version, phase=phase, weight=weight):
                _add(self._published, (app, version), number)
                if phase == "production" and weight != 0:
                    _add(self._production, (app, version), number)


def _add(counter: Counter[_Version], version: _Version, number: int) -> None:
    counter[version] += number
    if not counter[version]:
        del counter[version]
