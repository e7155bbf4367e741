"""Faults of callers and of nets: too many requests, hung and crashed scripts, hurried callers, large answers."""

from __future__ import annotations

from reliability.callers import EVERY_KIND
from reliability.report import Allowance
from reliability.scenario import Scenario, Stage
from reliability.traffic import CALLERS, Stream


async def _until_the_end(_: Stage) -> None:
    """Leave it to the callers."""


def _drill(per_s: float, group: str, timeout_s: float = 40.0, kind: str = "drill", **params: object) -> Stream:
    return Stream(kind, per_s, params=params, group=group, timeout_s=timeout_s)


# Two instances take 20 ms for each request: they answer 100 a second, fewer if they share two CPUs with all others.
_OVERLOAD = _drill(400, "overload", do="work", s=0.02)
_CPU_OVERLOAD = _drill(320, "overload", do="burn", s=0.02)
_FAST = Stream("octets", 25, app="quick")
_HANG = _drill(0.3, "hangs", 3, "typed_drill", do="hang")
_CRASH = _drill(0.5, "crashes", do="crash")
_HANG_UP = _drill(20, "hang-ups", 0.1, do="sleep", s=0.5)
_HURRIED = _drill(20, "deadlines of 50 ms", 0.05, "typed_drill", do="sleep", s=0.5)
_LARGE = _drill(0.5, "47 MiB", do="bytes", mib=47)
_INNOCENT = Stream("drill", 14)
# The script gets 20 requests a second and has room for 128. Both of its instances hang after 3 s at the earliest.
_BEHIND_A_HANG = Allowance(160, "of the app whose script hangs")


def load_faults() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario("a fast app alone", _until_the_end, (_FAST,), 6, others=(CALLERS,)),
        Scenario("overload beside a fast app", _until_the_end, (_OVERLOAD, _FAST), 15, others=(CALLERS, "overload")),
        Scenario(
            "overload of the CPUs beside a fast app",
            _until_the_end,
            (_CPU_OVERLOAD, _FAST),
            15,
            others=(CALLERS, "overload"),
        ),
        Scenario(
            "script hangs",
            _until_the_end,
            (*EVERY_KIND, _INNOCENT, _HANG),
            15,
            others=("hangs",),
            allowed=_BEHIND_A_HANG,
        ),
        Scenario("script crashes", _until_the_end, (*EVERY_KIND, _INNOCENT, _CRASH), 12, others=("crashes",)),
        Scenario(
            "callers hang up or have no time",
            _until_the_end,
            (*EVERY_KIND, _INNOCENT, _HANG_UP, _HURRIED),
            12,
            others=("hang-ups", "deadlines of 50 ms"),
        ),
        Scenario("47 MiB answers", _until_the_end, (*EVERY_KIND, _INNOCENT, _LARGE), 14, others=("47 MiB",)),
    ]
