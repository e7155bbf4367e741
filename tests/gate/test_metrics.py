"""A gate's metrics: what it has found of shadowed versions, and its process."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gate.metrics import Metrics
from tests.gate.test_dispatch import Evaluator, Mesh, running_mesh
from tests.gate.test_shadow import ask, cast, counts
from tests.processes import Gate, running_registry
from tests.waiting import until

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OF_V2 = {"app": "app", "version": "v2", "baseline": "v1"}


async def samples(metrics: Metrics, accept: str = "") -> dict[tuple[str, ...], float]:
    """Return the values by name and by the labels that come after the three versions have."""
    text, content_type = await metrics.page(accept)
    read = parse_openmetrics if "openmetrics" in content_type else text_string_to_metric_families
    found: dict[tuple[str, ...], float] = {}
    for family in read(text.decode()):
        for sample in family.samples:
            if OF_V2.items() <= sample.labels.items():
                others = (value for name, value in sample.labels.items() if name not in OF_V2)
                found[sample.name.removeprefix("atserving_gate_shadow_"), *others] = sample.value
    return found


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
async def test_comparisons_are_metrics(accept: str) -> None:
    async with running_mesh() as mesh:
        metrics = Metrics(mesh.shadows, mesh.dispatcher.turns)
        assert await samples(metrics, accept) == {}
        await mesh.add(Evaluator("a"))
        copies = Evaluator("a")
        await mesh.add(copies, "v2")
        cast(mesh)
        await compared(mesh, (1, 0, 0, 0))
        copies.name = "b"
        await compared(mesh, (1, 1, 0, 0))
        found = await samples(metrics, accept)
        outcomes = ("equal", "different", "failed", "dropped")
        assert [found["copies_total", each] for each in outcomes] == [1, 1, 0, 0]
        assert found["slower_total",] <= 2
        for of in ("version", "baseline"):
            assert found["seconds_count", of] == found["seconds_bucket", "+Inf", of] == 2
            assert 0 < found["seconds_sum", of] < 20
            below = [value for (name, *labels), value in found.items() if name == "seconds_bucket" and of in labels]
            assert below == sorted(below)


async def compared(mesh: Mesh, wanted: tuple[int, int, int, int]) -> None:
    await ask(mesh)
    await until(lambda: counts(mesh) == wanted)


async def test_a_gate_serves_them(tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry:
        gate = Gate([registry.address], "--http", "127.0.0.1:0")
        gate.start()
        try:
            port = gate.logged(event="service ready")["http_port"]
            page = await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics", timeout=10)
            names = {family.name for family in text_string_to_metric_families(page.read().decode())}
            assert {"atserving_gate_process_resident_memory_bytes", "atserving_gate_shadow_copies"} <= names
            gate.terminate()
            assert gate.wait() == 0
        finally:
            gate.kill()
