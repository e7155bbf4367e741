"""The comparisons that gates report of versions with copies of requests: in memory, while the process lives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from atserving.config import Shadow
from atserving.errors import InvalidArgument
from atserving.v1 import registry_pb2

MOST_GATES = 1000
"""How many gates' reports are kept; those that were silent for the longest time go first."""

MOST_COMPARISONS = 1000
"""How many comparisons a report has at most."""

MOST_SAMPLES = 50
"""How many differing requests are kept of a comparison of all gates."""

ENOUGH = 30
"""With fewer answers there is no verdict."""

_STEP, _UNIT_S = 1.1, 1e-4
_SLOWER, _FASTER = 1.2, 0.8
_Key = tuple[str, str, str]


@dataclass
class Comparison:
    """The sums of all gates, for the present contents of two versions."""

    app: str
    version: str
    baseline: str
    since_ms: int
    gates: int = 0
    equal: int = 0
    different: int = 0
    failed: int = 0
    slower: int = 0
    dropped: int = 0
    times: Counter[int] = field(default_factory=Counter)
    baseline_times: Counter[int] = field(default_factory=Counter)
    samples: list[registry_pb2.Difference] = field(default_factory=list)

    def add(self, one: registry_pb2.Comparison) -> None:
        self.gates += 1
        self.since_ms = min(self.since_ms, one.since_ms)
        for name in ("equal", "different", "failed", "slower", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(one, name))
        self.times.update(one.times)
        self.baseline_times.update(one.baseline_times)
        self.samples = sorted([*self.samples, *one.samples], key=lambda each: -each.time_ms)[:MOST_SAMPLES]

    @property
    def verdict(self) -> str:
        """What an operator may conclude, in one line."""
        answered = self.equal + self.different
        if answered + self.failed < ENOUGH:
            return f"too few answers to say: {answered + self.failed} of {ENOUGH}"
        said = [_share("failed", self.failed, answered + self.failed)] if self.failed else []
        said += [_share("different", self.different, answered)] if self.different else ["the same answers"]
        ours, theirs = quantile_s(self.times, 0.5), quantile_s(self.baseline_times, 0.5)
        if answered and theirs and not _FASTER <= ours / theirs <= _SLOWER:
            said.append(f"{ours / theirs:.1f} times as long")
        return ", ".join(said)


def quantile_s(times: Counter[int], share: float) -> float:
    """Return the upper bound of the bucket that holds a quantile, in seconds; 0 if there are no times."""
    left = share * times.total()
    for bucket, count in sorted(times.items()):
        left -= count
        if left <= 0:
            return float(_UNIT_S * _STEP**bucket)
    return 0.0


def _share(what: str, part: int, whole: int) -> str:
    return f"{part} of {whole} {what} ({part / whole:.1%})"


class Comparisons:
    """The last report of each gate."""

    def __init__(self) -> None:
        self._reports: dict[str, list[registry_pb2.Comparison]] = {}

    def take(self, request: registry_pb2.ReportComparisonsRequest) -> None:
        """Keep a report. Raises InvalidArgument."""
        if not 0 < len(request.gate) <= 64 or len(request.comparisons) > MOST_COMPARISONS:
            raise InvalidArgument("a report should name its gate, and at most 1000 comparisons")
        self._reports.pop(request.gate, None)
        self._reports[request.gate] = list(request.comparisons)
        while len(self._reports) > MOST_GATES:
            del self._reports[next(iter(self._reports))]

    def of(self, app: str, digest_of: Callable[[str], str], shadow: Shadow | None = None) -> Iterable[Comparison]:
        """Return the comparisons of an app's versions, sorted: what was found of the contents that they have now.

        Of the version that is the ``shadow``, with its present settings; of others, with the last ones.
        """
        current: dict[_Key, list[registry_pb2.Comparison]] = {}
        for report in self._reports.values():
            for one in report:
                digests = (digest_of(one.version), digest_of(one.baseline))
                if one.app == app and (one.digest, one.baseline_digest) == digests:
                    current.setdefault((one.app, one.version, one.baseline), []).append(one)
        found = []
        for key, reports in sorted(current.items()):
            # A gate reports what it found under earlier settings until it copies again, or has ended with them.
            last = max(reports, key=lambda one: one.since_ms).settings
            settings = shadow.settings if shadow and shadow.version == key[1] else last
            if chosen := [one for one in reports if one.settings == settings]:
                found.append(Comparison(*key, chosen[0].since_ms))
                for one in chosen:
                    found[-1].add(one)
        return found
