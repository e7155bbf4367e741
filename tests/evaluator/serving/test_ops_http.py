"""What an operator sees of an instance: metrics that Prometheus can read, and its status."""

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
from tests.evaluator.calling import DIGIT, connected, infer
from tests.evaluator.digits import digits_tar
from tests.processes import Process, Registry, evaluator, start_evaluator
from tests.waiting import until

STAGES = {"fetch", "decode", "queue", "forward", "postprocess", "total"}


@pytest.fixture
def digits(registry: Registry) -> Iterator[Process]:
    registry.publish("seen", custom_values={"net": "classify"})
    with evaluator(registry, "seen") as process:
        yield process


async def get(process: Process, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, content type and text."""
    url = f"http://127.0.0.1:{process.logged(event='release loading')['http_port']}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, response.headers["Content-Type"], await response.text()


async def samples(process: Process) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels."""
    _, _, text = await get(process, "/metrics")
    return {
        (sample.name.removeprefix("atserving_evaluator_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def worker_pid(process: Process) -> int:
    (child,) = " ".join(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    return int(child)


async def test_requests_are_counted_by_outcome_and_their_stages_measured(digits: Process) -> None:
    for _ in range(3):
        await infer(digits, DIGIT)
    await infer(digits, Resource(body=b"no image"))
    await infer(digits, DIGIT, params_json='{"limit": 0}')
    seen = await samples(digits)
    assert (seen["requests_total", "200"], seen["requests_total", "400"]) == (3, 2)
    assert {stage: seen["stage_seconds_count", stage] for stage in STAGES} == {
        "total": 5,
        "fetch": 5,
        "decode": 5,
        "queue": 3,
        "forward": 3,
        "postprocess": 3,
    }
    assert 0 < seen["stage_seconds_sum", "forward"] < seen["stage_seconds_sum", "total"]
    assert (seen["batch_size_count",], seen["batch_size_sum",]) == (3, 3)
    assert (seen["requests_held",], seen["queue_length",], seen["max_concurrent",]) == (0, 0, 64)
    # The front's memory, and the worker's.
    assert seen["process_resident_memory_bytes",] > 1e6
    assert seen["worker_process_resident_memory_bytes",] > 1e6


async def test_buckets_reach_from_half_a_millisecond_to_half_a_minute(digits: Process) -> None:
    seen = await samples(digits)
    bounds = sorted(float(key[1]) for key in seen if (key[0], key[-1]) == ("stage_seconds_bucket", "total"))
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.0005, 30, float("inf"))


async def test_a_worker_that_dies_is_counted(digits: Process) -> None:
    assert (await samples(digits))["worker_restarts_total",] == 0
    worker = (await samples(digits))["worker_process_start_time_seconds",]
    os.kill(worker_pid(digits), signal.SIGKILL)
    assert not (await infer(digits, DIGIT)).HasField("error")
    seen = await samples(digits)
    assert seen["worker_restarts_total",] == 1
    assert seen["worker_process_start_time_seconds",] > worker


async def test_prometheus_own_format_is_spoken_where_it_is_asked_for(digits: Process) -> None:
    _, plain, _ = await get(digits, "/metrics")
    _, rich, text = await get(digits, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert plain.startswith("text/plain")
    assert rich.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_the_status_says_where_it_is_and_how_it_runs(digits: Process) -> None:
    status, kind, text = await get(digits, "/status")
    said = orjson.loads(text)
    assert (status, kind) == (200, "application/json")
    assert (said["app"], said["version"], said["state"], said["reason"]) == ("seen", "v1", "serving", "")
    assert said["address"] == digits.logged(event="instance registered")["address"]
    assert said["plan"] == {name: digits.logged(event="net loaded")[name] for name in said["plan"]}
    assert said["device"] == "CPU"
    assert (await get(digits, "/other"))[0] == 404


def test_a_status_file_outlives_its_process(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "status.json"

    def said() -> dict[str, Any]:
        return dict(orjson.loads(file.read_bytes()))

    registry.publish("gone", custom_values={"net": "guess"})
    failing = start_evaluator(registry.address, "gone", "v1", "--status-file", str(file))
    assert failing.wait() == 1
    assert said()["state"] == "failed"
    assert said()["reason"].startswith("custom_values.net is 'guess'; the built-in nets are")
    assert f"evaluator: {said()['reason']}" in failing.lines
    registry.publish("well", custom_values={"net": "classify"})
    with evaluator(registry, "well", "v1", "--status-file", str(file)) as process:
        assert said()["state"] == "serving"
        process.terminate()
        assert process.wait() == 0
        assert (said()["state"], said()["reason"]) == ("stopped", "")


def test_a_port_that_is_taken_stops_the_start(registry: Registry, digits: Process) -> None:
    port = digits.logged(event="release loading")["http_port"]
    second = start_evaluator(registry.address, "seen", "v1", "--http", f"127.0.0.1:{port}")
    assert second.wait() == 1
    assert second.lines[-1].startswith(f"evaluator: cannot listen on 127.0.0.1:{port} for --http")


SCRIPT = b"""
import os
from pathlib import Path

def net_init(cfg):
    if Path("started").exists():
        return {"error": "the disk is gone"}
    Path("started").touch()
    return {}

def net_inference(model, args):
    if any((req.get("params") or {}).get("die") for req in args["reqs"]):
        os._exit(1)
    return [{"code": 0, "result": {}} for _ in args["reqs"]]
"""


async def test_an_instance_whose_net_can_not_be_started_again_leaves(registry: Registry, tmp_path: Path) -> None:
    registry.publish("lost", file=digits_tar(tmp_path / "release.tar", **{"net.py": SCRIPT}))
    file = tmp_path / "status.json"
    with evaluator(registry, "lost", "v1", "--status-file", str(file)) as process:
        await until(lambda: registry.instances("lost"))
        async with connected(process) as gate:
            requests = [gate.infer(_request(die), 30, None) for die in ("true", "false")]
            died, other = await asyncio.gather(*requests)
        assert died.HasField("error")
        # A gate takes it to another instance.
        assert not other.HasField("error") or other.error.refused
        assert await asyncio.to_thread(process.wait) == 1
        assert not registry.instances("lost")
        said = orjson.loads(file.read_bytes())
        assert (said["state"], said["reason"]) == ("failed", "the disk is gone")


def _request(die: str) -> InferRequest:
    return InferRequest(data=[DIGIT], params_json=f'{{"die": {die}}}')
