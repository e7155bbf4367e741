"""A real Prometheus with the rules watches a real mesh: what the rules read is there, and alerts come and go."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest
import pytest_asyncio

from atserving.local.examples import FOLDER
from atserving.local.mesh import PROMETHEUS_FILE, Mesh
from tests.monitoring.rules import RULES, Rule, rules
from tests.prometheus import Prometheus, program, shortened
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

ELSEWHERE = {
    "a GPU": "atserving_evaluator_gpu_",
    "TLS": ".*certificate",
    "a rate limit service": "atserving_gate_rate_limit_",
}
"""Parts that only some meshes have, with the beginnings of their metrics."""

ON_KUBERNETES = {"namespace", "pod"}
"""The labels that Prometheus adds there."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh() as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prometheus(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    short = directory / "rules.yaml"
    short.write_text(shortened(RULES.read_text()))
    async with Prometheus(directory, mesh.targets(), short) as prometheus:
        await prometheus.until_all_up()
        await evaluate(mesh, 20, 200)
        # Refusals of an app have series from the first one on.
        await evaluate(mesh, 1, 404, "digits/v9")
        await prometheus.until('atserving_gate_refusals_total{app="digits"}')
        yield prometheus


async def evaluate(mesh: Mesh, times: int, status: int, app: str = "digits") -> None:
    """Send requests that end with a status."""
    body = (FOLDER / "digits" / "images" / "7.png").read_bytes()
    headers = {"content-type": "application/octet-stream"}
    async with aiohttp.ClientSession() as session:
        for _ in range(times):
            async with session.post(f"{mesh.url}/v1/eval/{app}", data=body, headers=headers) as answer:
                assert answer.status == status


def is_elsewhere(name: str) -> bool:
    return any(re.match(pattern, name) for pattern in ELSEWHERE.values())


@pytest.mark.parametrize("rule", rules(), ids=lambda each: each.name)
async def test_a_rule_reads_metrics_and_labels_that_processes_have(prometheus: Prometheus, rule: Rule) -> None:
    seen: set[str] = set()
    names = rule.metrics()
    if any(is_elsewhere(name) for name in names):
        return
    for name, labels in names.items():
        # Also of a process that has just missed a scrape.
        found = await prometheus.query(f'last_over_time({{__name__=~"{name}"}}[1m])')
        assert found, name
        assert not labels - {label for each in found for label in each.labels}, name
        seen.update(label for each in found for label in each.labels)
    if names:
        assert not rule.labels_in_texts() - seen - ON_KUBERNETES
        assert not rule.grouped_by() - seen - ON_KUBERNETES


async def test_the_config_for_a_prometheus_beside_the_mesh_is_valid(mesh: Mesh) -> None:
    command = [program("promtool"), "check", "config", str(mesh.directory / PROMETHEUS_FILE)]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"SUCCESS: {len(rules())} rules found" in run.stdout


async def test_a_healthy_mesh_has_no_alert(prometheus: Prometheus) -> None:
    # Each group has seen the requests.
    await prometheus.until('app:atserving_slow_ratio:rate1d{app="digits"} == 0')
    await prometheus.until('app:atserving_request_seconds:quantile5m{app="digits", quantile="0.99"} > 0')

    async def is_silent() -> bool:
        return not await prometheus.alerts("pending") and not await prometheus.alerts()

    # One missed scrape makes an alert pending for a moment.
    await until_async(is_silent, what="no alert is pending or firing")


async def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    groups = (await prometheus.get("rules"))["groups"]
    broken = [
        f"{rule['name']}: {rule.get('lastError')}"
        for each in groups
        for rule in each["rules"]
        if rule["health"] != "ok"
    ]
    assert not broken


async def test_an_app_without_its_instance_pages_until_it_is_back(mesh: Mesh, prometheus: Prometheus) -> None:
    await mesh.stop_process("evaluator-digits-v1")

    async def fires(name: str) -> list[Mapping[str, str]]:
        return (await prometheus.alerts()).get(name, [])

    await until_async(lambda: fires("AtServingAppUnserved"), what="an alert for the app")

    async def has_paged() -> object:
        # More and more errors: Prometheus sees no growth in a counter that begins with the first ones.
        await evaluate(mesh, 5, 503)
        return await fires("AtServingErrorBudgetFast")

    await until_async(has_paged, what="an alert for its errors")
    (alert,) = await fires("AtServingErrorBudgetFast")
    assert (alert["app"], alert["severity"]) == ("digits", "page")
    texts = [each["annotations"] for each in (await prometheus.get("alerts"))["alerts"]]
    assert not [each for each in texts if "error" in str(each) and "expanding" in str(each)]
    assert any("of the requests of app digits fail" in each["summary"] for each in texts)
    mesh.start_process("evaluator-digits-v1")

    async def is_over() -> bool:
        return not await fires("AtServingAppUnserved")

    await until_async(is_over, what="the alert for the app is over")
