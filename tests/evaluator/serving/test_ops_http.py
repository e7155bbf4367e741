"""The operators' port shows metrics in the formats of Prometheus, and the status of the instance."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from tests.evaluator.calling import DIGIT, ask, connected, infer
from tests.evaluator.digits import digits_tar
from tests.processes import Process, Registry, evaluator, start_evaluator
from tests.waiting import until

STAGES = {"fetch", "decode", "queue", "forward", "postprocess", "total"}


@pytest.fixture
def digits(registry: Registry) -> Iterator[Process]:
    registry.publish("ops", custom_values={"net": "classify"})
    with evaluator(registry, "ops") as process:
        yield process


async def get(process: Process, path: str, **headers: str) -> tuple[int, str, str]:
    """Return the HTTP status, the content type and the text of a page."""
    url = f"http://127.0.0.1:{process.logged(event='release loading')['http_port']}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, response.headers["Content-Type"], await response.text()


async def samples(process: Process) -> dict[tuple[str, ...], float]:
    """Return the metrics by name and the values of their labels, without the app and version that all have."""
    _, _, text = await get(process, "/metrics")
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = [value for name, value in sample.labels.items() if name not in ("app", "version")]
            found[sample.name.removeprefix("atserving_evaluator_"), *own] = sample.value
    return found


def worker_pid(process: Process) -> int:
    (child,) = " ".join(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    return int(child)


async def test_metrics_count_requests_by_code_and_measure_their_stages(digits: Process) -> None:
    for _ in range(3):
        await infer(digits, DIGIT)
    await infer(digits, Resource(body=b"no image"))
    await infer(digits, DIGIT, params_json='{"limit": 0}')
    metrics = await samples(digits)
    assert (metrics["requests_total", "200"], metrics["requests_total", "400"]) == (3, 2)
    assert {stage: metrics["stage_seconds_count", stage] for stage in STAGES} == {
        "total": 5,
        "fetch": 5,
        "decode": 5,
        "queue": 3,
        "forward": 3,
        "postprocess": 3,
    }
    assert 0 < metrics["stage_seconds_sum", "forward"] < metrics["stage_seconds_sum", "total"]
    assert (metrics["batch_size_count",], metrics["batch_size_sum",]) == (3, 3)
    assert (metrics["requests_in_flight",], metrics["queue_length",], metrics["max_concurrent",]) == (0, 0, 64)
    # The memory of the front process and of the worker process.
    assert metrics["process_resident_memory_bytes",] > 1e6
    assert metrics["worker_process_resident_memory_bytes",] > 1e6


async def test_every_metric_has_the_app_and_the_version(digits: Process) -> None:
    await infer(digits, DIGIT)
    _, _, text = await get(digits, "/metrics")
    for family in text_string_to_metric_families(text):
        assert family.samples, family.name
        for sample in family.samples:
            assert (sample.labels["app"], sample.labels["version"]) == ("ops", "v1"), sample.name


async def test_buckets_reach_from_half_a_millisecond_to_half_a_minute(digits: Process) -> None:
    metrics = await samples(digits)
    bounds = sorted(float(key[1]) for key in metrics if (key[0], key[-1]) == ("stage_seconds_bucket", "total"))
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.0005, 30, float("inf"))


async def test_probes_of_a_serving_instance_succeed(digits: Process) -> None:
    digits.logged("address", event="service ready")
    assert await get(digits, "/live") == (200, "text/plain", "live\n")
    assert await get(digits, "/ready") == (200, "text/plain", "ready\n")


async def test_metrics_count_the_restarts_of_the_worker(digits: Process) -> None:
    assert (await samples(digits))["worker_restarts_total",] == 0
    worker = (await samples(digits))["worker_process_start_time_seconds",]
    os.kill(worker_pid(digits), signal.SIGKILL)
    assert not (await infer(digits, DIGIT)).HasField("error")
    metrics = await samples(digits)
    assert metrics["worker_restarts_total",] == 1
    assert metrics["worker_process_start_time_seconds",] > worker


async def test_metrics_have_the_format_that_the_scraper_accepts(digits: Process) -> None:
    _, plain, _ = await get(digits, "/metrics")
    _, rich, text = await get(digits, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert plain.startswith("text/plain")
    assert rich.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_status_has_the_address_the_state_and_the_plan(digits: Process) -> None:
    http_status, content_type, text = await get(digits, "/status")
    status = orjson.loads(text)
    assert (http_status, content_type) == (200, "application/json")
    assert (status["app"], status["version"], status["state"], status["reason"]) == ("ops", "v1", "serving", "")
    assert status["address"] == digits.logged(event="instance registered")["address"]
    assert status["plan"] == {name: digits.logged(event="net loaded")[name] for name in status["plan"]}
    assert status["device"] == "CPU"
    assert (await get(digits, "/other"))[0] == 404


async def test_a_loopback_port_answers_only_to_a_loopback_host(digits: Process) -> None:
    port = digits.logged(event="release loading")["http_port"]
    for host in ("127.0.0.1", f"localhost:{port}", f"LocalHost:{port}", f"[::1]:{port}"):
        assert (await get(digits, "/status", host=host))[0] == 200
    for host in (
        "attacker.test",
        f"127.0.0.1.attacker.test:{port}",
        f"localhost@attacker.test:{port}",
        "127.0.0.2",
        "",
    ):
        for page in ("/status", "/metrics"):
            status, _, text = await get(digits, page, host=host)
            assert (status, text) == (421, "this port answers only to a loopback host\n")


def test_other_ports_answer_to_every_host(registry: Registry) -> None:
    registry.publish("ops-open", custom_values={"net": "classify"})
    with evaluator(registry, "ops-open", "v1", "--http", "0.0.0.0:0") as process:
        assert asyncio.run(get(process, "/status", host="pod.test:1"))[0] == 200


def test_status_file_remains_after_the_process(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "status.json"

    def status() -> dict[str, Any]:
        return dict(orjson.loads(file.read_bytes()))

    registry.publish("unloadable", custom_values={"net": "guess"})
    failing = start_evaluator(registry.address, "unloadable", "v1", "--status-file", str(file))
    assert failing.wait() == 1
    assert status()["state"] == "failed"
    assert status()["reason"].startswith("custom_values.net is 'guess'; the built-in nets are")
    assert f"evaluator: {status()['reason']}" in failing.lines
    registry.publish("ended", custom_values={"net": "classify"})
    with evaluator(registry, "ended", "v1", "--status-file", str(file)) as process:
        assert status()["state"] == "serving"
        process.terminate()
        assert process.wait() == 0
        assert (status()["state"], status()["reason"]) == ("stopped", "")


def test_http_port_in_use_fails_to_start(registry: Registry, digits: Process) -> None:
    port = digits.logged(event="release loading")["http_port"]
    second = start_evaluator(registry.address, "ops", "v1", "--http", f"127.0.0.1:{port}")
    assert second.wait() == 1
    assert second.lines[-1].startswith(f"evaluator: cannot listen on 127.0.0.1:{port} for --http")


SCRIPT = b"""
import os
from pathlib import Path

def net_init(cfg):
    if Path("started").exists():
        return {"error": "the disk is full"}
    Path("started").touch()
    return {}

def net_inference(model, args):
    if any((req.get("params") or {}).get("die") for req in args["reqs"]):
        os._exit(1)
    return [{"code": 0, "result": {}} for _ in args["reqs"]]
"""


async def test_instance_ends_if_its_net_can_not_be_loaded_again(registry: Registry, tmp_path: Path) -> None:
    registry.publish("unstartable", file=digits_tar(tmp_path / "release.tar", **{"net.py": SCRIPT}))
    file = tmp_path / "status.json"
    with evaluator(registry, "unstartable", "v1", "--status-file", str(file)) as process:
        await until(lambda: registry.instances("unstartable"))
        async with connected(process) as gate:
            requests = [ask(gate, _request(die)) for die in ("true", "false")]
            died, other = await asyncio.gather(*requests)
        assert died.HasField("error")
        # A gate retries a refused request on another instance.
        assert not other.HasField("error") or other.error.refused
        assert await asyncio.to_thread(process.wait) == 1
        assert not registry.instances("unstartable")
        status = orjson.loads(file.read_bytes())
        assert (status["state"], status["reason"]) == ("failed", "the disk is full")


def _request(die: str) -> InferRequest:
    return InferRequest(data=[DIGIT], params_json=f'{{"die": {die}}}')
