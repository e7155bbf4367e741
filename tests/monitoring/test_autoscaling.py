"""The queries of both autoscalers have the right values in a real Prometheus that scrapes a real gate and evaluator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml

from tests.k8s.manifests import K8S, evaluator
from tests.processes import Gate, Process, Registry, running_registry, start_evaluator
from tests.prometheus import Prometheus, program
from tests.waiting import PATIENCE_S, until_async

APP, CLOSED = "digits", "closed"
RULES = f"app/metadata/{CLOSED}"
HTTP = ("--http", "127.0.0.1:0")
LONG = f"{2 * PATIENCE_S:g}s"
pytestmark = pytest.mark.asyncio(loop_scope="module")

ADAPTER = yaml.safe_load((K8S / "components" / "autoscaling" / "prometheus-adapter.yaml").read_text())


def of_keda(version: str, name: str, app: str = APP) -> str:
    """Return the query of a trigger as KEDA sends it."""
    documents = evaluator(app, version, "--autoscaler", "keda", "--replicas", "0")
    (scaler,) = [each for each in documents if each["kind"] == "ScaledObject"]
    (trigger,) = [each for each in scaler["spec"]["triggers"] if each.get("name") == name]
    return str(trigger["metadata"]["query"])


def of_adapter(name: str, pod: str) -> str:
    """Return the query of a metric as prometheus-adapter fills it in for a pod."""
    (rule,) = [each for each in ADAPTER["rules"]["custom"] if each["name"]["as"] == name]
    series, _, matchers = rule["seriesQuery"].partition("{")
    assert matchers == 'namespace!="",pod!=""}'
    query = str(rule["metricsQuery"]).replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", f'namespace="atserving",pod=~"{pod}"')
    assert "<<" not in query
    return query


@dataclass
class Watched:
    """A gate, a registry and a Prometheus, which finds each pod by a file of its own."""

    registry: Registry
    gate: Gate
    prometheus: Prometheus

    async def until(self, query: str, value: float | None) -> None:
        """Wait until a query has one value; None: no series."""

        async def has() -> bool:
            return [each.value for each in await self.prometheus.query(query)] == ([] if value is None else [value])

        await until_async(has, what=f"{query} is {value}")


def target(process: Process, pod: str) -> dict[str, Any]:
    port = process.logged("http_port")["http_port"]
    return {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "atserving", "pod": pod}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    """Run a gate, evaluators of an open and a closed app, and a Prometheus. Versions in staging have no instance."""
    folder = tmp_path_factory.mktemp("watched")
    async with AsyncExitStack() as stack:
        registry = stack.enter_context(running_registry(folder / "registry"))
        # An idle engine waits for more, so requests stay in flight.
        registry.put(f"worker/app/{APP}/release/v1", {"max_concurrent": 8, "delay4batch": LONG, "timeout": LONG})
        registry.put(f"worker/app/{APP}/release/v3", {"wait_for_instance": LONG, "timeout": LONG})
        registry.put(RULES, {"public": False, "owner": {"uid": 7}})
        for app, version in ((APP, "v1"), (APP, "v2"), (APP, "v3"), (CLOSED, "v1")):
            registry.publish(app, version)
        instances = {app: start_evaluator(registry.address, app, "v1", *HTTP) for app in (APP, CLOSED)}
        gate = Gate([registry.address], *HTTP)
        for process in (gate, *instances.values()):
            stack.callback(process.kill)
        gate.start()
        for process in instances.values():
            process.wait_serving()
        targets = [target(gate, "gate-1"), *(target(each, f"{app}-v1-1") for app, each in instances.items())]
        prometheus = await stack.enter_async_context(Prometheus(folder / "prometheus", targets))
        await prometheus.until_all_up()
        yield Watched(registry, gate, prometheus)


async def test_the_load_follows_requests_in_flight(mesh: Watched) -> None:
    share = of_adapter("atserving_evaluator_load", f"{APP}-v1-1")
    in_flight = of_adapter("atserving_gate_in_flight", "gate-1")
    instances = of_keda("v1", "load")
    for query in (share, in_flight, instances):
        await mesh.until(query, 0)
    # A version without an instance has no load.
    await mesh.until(of_keda("v2", "load"), None)
    asking = [asyncio.create_task(mesh.gate.eval(APP, "v1")) for _ in range(4)]
    await mesh.until(share, 0.5)
    await mesh.until(instances, 0.5)
    await mesh.until(in_flight, 4)
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for query in (share, in_flight, instances):
        await mesh.until(query, 0)


def soon(query: str) -> str:
    """Return the query of the demand with a shorter memory."""
    assert "offset 2m" in query
    return query.replace("offset 2m", "offset 1s")


async def test_the_demand_follows_requests_for_a_version_without_an_instance(mesh: Watched) -> None:
    refused, held = of_keda("v2", "demand"), of_keda("v3", "demand")
    for query in (refused, held):
        await mesh.until(query, 0)
    assert await mesh.gate.status(APP, "v2") is grpc.StatusCode.UNAVAILABLE
    waiting = asyncio.create_task(mesh.gate.eval(APP, "v3"))
    await mesh.until(refused, 1)
    await mesh.until(held, 1)
    # A request counts as long as it waits, however long ago it came.
    await mesh.prometheus.until('atserving_gate_requests_waiting_for_instance{version="v3"} offset 2s == 1')
    await mesh.until(soon(held), 1)
    await mesh.until(soon(refused), 0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await mesh.until(soon(held), 0)
    await mesh.until(held, 1)


async def test_the_demand_follows_requests_that_are_served_but_no_strangers(mesh: Watched) -> None:
    demand = of_keda("v1", "demand", CLOSED)
    assert await mesh.gate.status(CLOSED, "v1") is grpc.StatusCode.UNAUTHENTICATED
    await mesh.prometheus.until(f'atserving_gate_requests_total{{app="{CLOSED}",version="v1",code="401"}}')
    await mesh.until(demand, 0)
    mesh.registry.delete(RULES)

    async def is_open() -> bool:
        return await mesh.gate.status(CLOSED, "v1") is grpc.StatusCode.OK

    await until_async(is_open, what="the app is open")
    await mesh.until(demand, 1)
    await mesh.until(soon(demand), 0)


_REFUSED = "atserving_gate_requests_without_instance_total"
_SERVED = "atserving_gate_requests_total"


@pytest.mark.parametrize(
    ("series", "demand"),
    [
        pytest.param({}, {"5m": 0}, id="no gate is watched"),
        pytest.param({_REFUSED: "0x20 1x80"}, {"5m": 0, "5m15s": 1, "7m": 1, "8m": 0}, id="a request"),
        pytest.param({_SERVED: "_x21 1x80"}, {"5m": 0, "5m15s": 1, "7m": 1, "8m": 0}, id="the first answer"),
        pytest.param(
            {_REFUSED: "7x20 stale stale stale 7x60"}, {"5m": 0, "6m30s": 0, "7m15s": 0, "8m": 0}, id="failed scrapes"
        ),
        pytest.param({_REFUSED: "7x20 stale 0x10 1x60"}, {"5m": 0, "7m45s": 0, "8m15s": 1, "11m": 0}, id="a restart"),
    ],
)
async def test_the_demand_is_a_change_of_counts(tmp_path: Path, series: dict[str, str], demand: dict[str, int]) -> None:
    labels = f'{{namespace="atserving",app="{APP}",version="v2",pod="gate-1"}}'
    query = of_keda("v2", "demand")
    samples = {at: [{"labels": "{}", "value": value}] for at, value in demand.items()}
    case = {
        "interval": "15s",
        "input_series": [{"series": name + labels, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": found} for at, found in samples.items()],
    }
    tests = tmp_path / "tests.yaml"
    tests.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    run = await asyncio.create_subprocess_exec(
        program("promtool"),
        "test",
        "rules",
        str(tests),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    text, _ = await run.communicate()
    assert run.returncode == 0, text.decode()
