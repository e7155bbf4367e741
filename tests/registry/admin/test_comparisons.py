"""What gates report of shadowed versions, as operators read it."""

from __future__ import annotations

from typing import Any

import pytest

from atserving.admin.v1 import admin_pb2
from atserving.errors import InvalidArgument, NotFound
from atserving.v1 import registry_pb2
from registry import comparisons
from registry.comparisons import Comparisons
from tests.registry.admin.conftest import CONTEXT, Operator
from tests.registry.admin.test_releases import PRODUCTION

FAST, SLOW = {24: 50}, {40: 49, 60: 1}
"""1 ms, and 4.5 or 30 ms."""


async def report(operator: Operator, gate: str = "g", **fields: Any) -> None:
    """Report what a gate has found of v2 beside v1."""
    digests = {
        each.version: each.digest
        for each in (
            await operator.service.list_releases(admin_pb2.ListReleasesRequest(app=operator.app), CONTEXT)
        ).releases
    }
    known = {"digest": digests["v2"], "baseline_digest": digests["v1"], "since_ms": 5000, **fields}
    one = registry_pb2.Comparison(app=operator.app, version="v2", baseline="v1", **known)
    operator.comparisons.take(registry_pb2.ReportComparisonsRequest(gate=gate, comparisons=[one]))


async def listed(operator: Operator, version: str = "") -> list[admin_pb2.Comparison]:
    request = admin_pb2.ListComparisonsRequest(app=operator.app, version=version)
    return list((await operator.service.list_comparisons(request, CONTEXT)).comparisons)


async def two(operator: Operator) -> None:
    await operator.publish("v1", phase=PRODUCTION)
    await operator.publish("v2")


async def test_the_reports_of_gates_are_added(operator: Operator) -> None:
    await two(operator)
    assert await listed(operator) == []
    sample = [registry_pb2.Difference(reqid=f"r{number}", reason="a", time_ms=number) for number in range(40)]
    await report(operator, "one", equal=7, times=FAST, baseline_times=FAST, samples=sample, since_ms=9000)
    await report(operator, "two", equal=40, different=3, failed=2, dropped=1, slower=5, times=SLOW, baseline_times=FAST)
    # A later report of a gate takes the place of its earlier one.
    await report(operator, "one", equal=47, times=FAST, baseline_times=FAST, samples=sample, since_ms=9000)
    (one,) = await listed(operator)
    assert (one.version, one.baseline, one.gates, one.since.ToMilliseconds()) == ("v2", "v1", 2, 5000)
    assert (one.equal, one.different, one.failed, one.dropped, one.slower) == (87, 3, 2, 1, 5)
    assert [each.reqid for each in one.samples] == [f"r{number}" for number in reversed(range(40))]
    p50, p99, b50 = (each.ToMicroseconds() / 1e3 for each in (one.p50, one.p99, one.baseline_p50))
    assert (p50, p99, b50) == pytest.approx((0.985, 4.526, 0.985), abs=0.01)
    assert one.verdict == "2 of 92 failed (2.2%), 3 of 90 different (3.3%)"
    assert await listed(operator, "v2") == [one]
    assert await listed(operator, "v1") == []
    with pytest.raises(NotFound):
        await listed(operator, "v3")


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"equal": 29}, "too few answers to say: 29 of 30"),
        ({"equal": 50, "times": FAST, "baseline_times": FAST}, "the same answers"),
        ({"equal": 50, "times": SLOW, "baseline_times": FAST}, "the same answers, 4.6 times as long"),
        ({"equal": 50, "times": FAST, "baseline_times": SLOW}, "the same answers, 0.2 times as long"),
        ({"failed": 50}, "50 of 50 failed (100.0%), the same answers"),
    ],
)
async def test_a_verdict(operator: Operator, fields: dict[str, Any], verdict: str) -> None:
    await two(operator)
    await report(operator, **fields)
    (one,) = await listed(operator)
    assert one.verdict == verdict


async def test_only_what_was_found_of_the_present_contents_counts(operator: Operator) -> None:
    await two(operator)
    await report(operator, digest="other", equal=50)
    await report(operator, "two", baseline_digest="other", equal=50)
    assert await listed(operator) == []


async def test_only_what_was_found_under_the_present_settings_counts(operator: Operator) -> None:
    await two(operator)
    await report(operator, "ended", different=500, settings="5.0 0.01 2.0", since_ms=1000)
    await report(operator, "one", equal=50, settings="6.0 0.01 2.0", since_ms=2000)
    assert [(each.equal, each.different) for each in await listed(operator)] == [(50, 0)]
    shadow = admin_pb2.Shadow(version="v2", percent=5)
    update = admin_pb2.UpdateAppRequest(app=admin_pb2.App(name=operator.app, shadow=shadow))
    await operator.service.update_app(update, CONTEXT)
    assert [(each.equal, each.different) for each in await listed(operator)] == [(0, 500)]
    update.app.shadow.percent = 7
    await operator.service.update_app(update, CONTEXT)
    assert await listed(operator) == []


async def test_a_shadow_is_set_and_removed(operator: Operator) -> None:
    await two(operator)
    shadow = admin_pb2.Shadow(version="v2", percent=5, box_tolerance=0)
    update = admin_pb2.UpdateAppRequest(app=admin_pb2.App(name=operator.app, shadow=shadow))
    found = (await operator.service.update_app(update, CONTEXT)).shadow
    assert (found.percent, found.score_tolerance, found.box_tolerance) == (5, 0.01, 0)
    update.app.shadow.percent = 101
    with pytest.raises(InvalidArgument, match="percent"):
        await operator.service.update_app(update, CONTEXT)


def test_reports_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "MOST_GATES", 2)
    kept = Comparisons()
    for gate in ("a", "b", "a", "c"):
        one = registry_pb2.Comparison(app="app", version=gate, baseline="v1", digest="d", baseline_digest="d")
        kept.take(registry_pb2.ReportComparisonsRequest(gate=gate, comparisons=[one]))
    assert [each.version for each in kept.of("app", lambda _: "d")] == ["a", "c"]
    for wrong in (registry_pb2.ReportComparisonsRequest(), registry_pb2.ReportComparisonsRequest(gate="g" * 65)):
        with pytest.raises(InvalidArgument):
            kept.take(wrong)
