"""The metrics of all processes of a mesh have one style, are documented, and stay few whatever callers send."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import orjson
import pytest
import pytest_asyncio
from prometheus_client import Metric

from atserving.errors import ServingError
from atserving.local.folders import TARGETS_FILE
from atserving.local.mesh import Mesh
from atserving.transport import channel
from atserving.v1 import evaluator_pb2
from tests.e2e.client import IMAGES, JSON, Client
from tests.metric_text import OPENMETRICS, families

pytestmark = pytest.mark.asyncio(loop_scope="session")

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
SECTIONS = {"evaluator": "An instance", "gate": "A gate", "registry": "A registry"}
LABELS = {
    *("app", "version", "instance_id", "code", "reason", "cause", "state", "stage", "outcome", "kind", "method"),
    *("baseline", "of", "gpu", "le"),
}
MADE_UP = 10_000
BATCH = 1000
HOSTILE_NAMES = ['"} 1\n# EOF\n', "a\nb", "\\", "é" * 40, "x" * 5000, "", "__proto__", "digits ", "../digits"]
HOSTILE_PATHS = ["/v1/eval/%22%7D%201%0A", "/v1/eval/digits/%0A%22", f"/v1/eval/{'x' * 3000}", "/v1/eval/%ff%00", "/x"]


def targets(mesh: Mesh) -> list[dict[str, Any]]:
    """Return where all metrics of a mesh are, as Prometheus reads it."""
    return list(orjson.loads((mesh.directory / TARGETS_FILE).read_bytes()))


class Pages:
    """The metrics of the processes of a mesh that are this project's."""

    def __init__(self, mesh: Mesh, session: aiohttp.ClientSession) -> None:
        self._mesh = mesh
        self._session = session

    async def read(self, accept: str = OPENMETRICS) -> dict[str, list[Metric]]:
        """Return the families of each job's processes. Raises ValueError if a page is not in its format."""
        found: dict[str, list[Metric]] = {job: [] for job in SECTIONS}
        for each in targets(self._mesh):
            (address,), job = each["targets"], each["labels"]["job"]
            if job in found:
                async with self._session.get(f"http://{address}/metrics", headers={"accept": accept}) as page:
                    content_type = page.headers["content-type"]
                    assert content_type.partition(";")[0] == (accept.partition(";")[0] or "text/plain")
                    found[job] += families(await page.text(), content_type)
        return found


@pytest_asyncio.fixture(loop_scope="session")
async def pages(mesh: Mesh) -> AsyncIterator[Pages]:
    async with aiohttp.ClientSession() as session:
        yield Pages(mesh, session)


def documented(job: str) -> Iterator[tuple[str, set[str], bool]]:
    """Yield the name and the labels of each metric in the docs of a process, and whether some processes lack it."""
    (section,) = re.findall(rf"^## {SECTIONS[job]}\n(.*?)^## ", METRICS.read_text(), re.MULTILINE | re.DOTALL)
    for table in re.findall(r"^\| metric \|.*\n\|.*\n((?:\|.*\n)+)", section, re.MULTILINE):
        for row in table.splitlines():
            _, names, text, _ = re.split(r"(?<!\\)\|", row, maxsplit=3)
            for name, labels in re.findall(r"`([a-z_*]+)(?:\{([a-z_,]+)\})?`", names):
                yield name, set(labels.split(",")) - {""}, "only with" in text.lower()


def shown(found: list[Metric], job: str) -> dict[str, set[str]]:
    """Return the labels of each metric by its name in Prometheus' text, without the prefix."""
    labels: dict[str, set[str]] = {}
    for family in found:
        name = family.name.removeprefix(f"atserving_{job}_") + ("_total" if family.type == "counter" else "")
        mine = labels.setdefault(name, set())
        for sample in family.samples:
            mine |= sample.labels.keys() - {"le"}
    return labels


async def test_every_metric_is_in_the_docs_and_the_other_way_round(client: Client, pages: Pages) -> None:
    await client.bytes("/v1/eval/digits", (IMAGES / "7.png").read_bytes())
    everywhere = {"evaluator": {"app", "version"}}
    for job, found in (await pages.read()).items():
        labels, rows = shown(found, job), list(documented(job))
        for name, own in labels.items():
            wanted = [labels for pattern, labels, _ in rows if fnmatch(name, pattern)]
            assert wanted or name == "certificate_expires_seconds", f"{job}: {name} is not in docs/metrics.md"
            # A metric without samples shows no labels.
            assert own in ([set()] if job != "evaluator" else []) or own == wanted[0] | everywhere.get(job, set()), name
        for pattern, _, sometimes in rows:
            assert sometimes or any(fnmatch(name, pattern) for name in labels), f"{job}: {pattern} is only in the docs"


async def test_every_metric_has_a_prefix_a_help_text_and_plain_units(pages: Pages) -> None:
    for job, found in (await pages.read()).items():
        assert found
        for family in found:
            assert family.name.startswith(f"atserving_{job}_"), family.name
            assert family.documentation.endswith("."), f"{family.name}: {family.documentation!r}"
            assert family.type in ("counter", "gauge", "histogram"), family.name
            assert not re.search(r"_(ms|us|ns|mib|kib|mb|kb|percent|minutes|hours)(_|$)", family.name), family.name
            for unit in ("seconds", "bytes", "ratio"):
                assert f"_{unit}" not in family.name or family.name.endswith(f"_{unit}"), family.name
            assert {label for sample in family.samples for label in sample.labels} <= LABELS, family.name


async def test_both_formats_have_the_same_metrics(pages: Pages) -> None:
    plain, rich = await pages.read(""), await pages.read()
    for job in SECTIONS:
        names = [each.name for each in plain[job] if not each.name.endswith("_created")]
        assert names == [each.name for each in rich[job]]


async def flood(client: Client) -> None:
    """Send what nobody would by mistake: to Envoy, and to the ports behind it."""
    mesh = client.mesh
    for path in HOSTILE_PATHS:
        await client.bytes(path, b"x")
    for version in ("v9", "%22", "x" * 300):
        await client.bytes(f"/v1/eval/digits/{version}", b"x")
    for start in range(0, MADE_UP, BATCH):
        tasks = [{"op": f"/v1/eval/made-up-{start + number}", "data": {"uri": "x"}} for number in range(BATCH)]
        assert (await client.json("/v1/batch", tasks)).status == 200
    for name in HOSTILE_NAMES:
        await client.json("/v1/batch", [{"op": f"/v1/eval/{name}", "data": {"uri": "x"}}])
        await client.post("/v1/eval/digits", b"{", {**JSON, "x-reqid": "r", "traceparent": repr(name)[:200]})
    async with aiohttp.ClientSession() as session:
        for method in ("BREW", "PUT", "DELETE", "OPTIONS"):
            async with session.request(method, f"{mesh.url}/v1/eval/digits"):
                pass
        for each in targets(mesh):
            (address,) = each["targets"]
            async with session.get(f"http://{address}/made-up"):
                pass
    (evaluator, *_) = re.findall(r'"address": ?"(127\.0\.0\.1:\d+)"', mesh.log("evaluator-digits-v1"))
    for server in (f"127.0.0.1:{mesh.ports.gates[0]}", mesh.registry, evaluator):
        async with channel(server) as connection:
            for number in range(100):
                with suppress(grpc.aio.AioRpcError):
                    await connection.unary_unary(f"/atserving.v1.Made{number}/Up", None, None)(b"\xff")


def series(found: dict[str, list[Metric]]) -> set[tuple[tuple[str, str], ...]]:
    """Return all series, as their name and labels."""
    return {
        (("", sample.name), *sorted(sample.labels.items()))
        for each in found.values()
        for family in each
        for sample in family.samples
    }


async def test_hostile_requests_add_no_series(client: Client, pages: Pages) -> None:
    await client.bytes("/v1/eval/digits", (IMAGES / "7.png").read_bytes())
    before = series(await pages.read())
    await flood(client)
    after = series(await pages.read())
    known = {label for each in before for label in each}
    for label, value in {label for each in after for label in each} - known:
        # Callers choose none of these.
        assert (label == "code" and re.fullmatch(r"[1-5]\d\d", value)) or not value, (label, value)
    await flood(client)
    assert series(await pages.read()) == after


@pytest.mark.parametrize("status", [-(1 << 31), -1, 0, 1, 200, 399, 600, (1 << 31) - 1])
async def test_an_instance_can_not_make_up_codes(status: int) -> None:
    assert ServingError.from_proto(evaluator_pb2.Error(status=status)).status == 500
