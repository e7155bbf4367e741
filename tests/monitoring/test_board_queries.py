"""A real Prometheus beside a mesh with load runs every query of every board."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from atserving.local.mesh import Mesh
from monitoring import board_files, traffic
from monitoring.pictures import values_of
from tests.prometheus import Prometheus
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

WITHOUT_DATA = (
    # Only with a GPU, TLS, --rate-limit-service.
    "atserving_evaluator_gpu_",
    "_certificate_expires_seconds",
    "_ssl_certificate_expiration_",
    "atserving_gate_rate_limit_questions_total",
    # Nothing refuses, fails or waits in a mesh with this load.
    "atserving_gate_retries_total",
    'atserving_registry_calls_total{namespace=~".*", code!="200"}',
)
"""The parts of an expression that tell that it needs no data here."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prometheus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    async with Mesh(serves=traffic.SERVES) as mesh:
        await traffic.shadow(mesh, "v3")
        async with (
            Prometheus(folder, mesh.targets()) as prometheus,
            traffic.Traffic(mesh, traffic.callers(mesh, 60)),
        ):
            await prometheus.until_all_up()
            # A caller's mistake is the rarest of what is counted.
            await prometheus.until('sum(rate(atserving_gate_requests_total{app="digits",code="400"}[5s])) > 0')
            await prometheus.until("sum(rate(atserving_gate_shadow_copies_total[5s])) > 0")
            yield prometheus


def expressions(name: str) -> list[tuple[str, str]]:
    """Return each panel's title and expression, with values for all variables, without a last `> 0`, which hides."""
    return [
        (panel.title, re.sub(r" > 0(?=\)?$)", "", board_files.filled(target.expression, values_of(name))))
        for panel in board_files.panels(name)
        for target in panel.targets
    ]


@pytest.mark.parametrize("name", board_files.NAMES)
async def test_every_query_has_data_in_a_mesh_with_load(prometheus: Prometheus, name: str) -> None:
    empty = [
        f"{title}: {expression}"
        for title, expression in expressions(name)
        if not await prometheus.query(expression) and not any(each in expression for each in WITHOUT_DATA)
    ]
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize("name", board_files.NAMES)
async def test_every_variable_has_values(prometheus: Prometheus, name: str) -> None:
    board = json.loads((board_files.FOLDER / f"{name}.json").read_text())
    for variable in board["templating"]["list"]:
        if variable["type"] != "query" or variable["name"] == "namespace":
            continue
        query = variable["query"]["query"].removeprefix("label_values(").removesuffix(")")
        series, label = query.rsplit(", ", 1)
        found = await prometheus.query(f"count by ({label}) ({board_files.filled(series, values_of(name))})")
        assert {each.labels.get(label) for each in found} - {None}, variable["name"]


async def test_boards_show_what_is(prometheus: Prometheus) -> None:
    """Sums over all series, ratios of them, and joins have the values that they should."""
    of_app = dict(expressions("app"))
    (instances,) = await prometheus.query(of_app["Instances"])
    assert instances.value == 3
    (errors,) = await prometheus.query(of_app["Errors"])
    assert errors.value == 0

    async def shares_fit() -> bool:
        given = [expression for title, expression in expressions("app") if title == "Shares asked and given"][1]
        shares = {each.labels["version"]: each.value for each in await prometheus.query(given)}
        return abs(shares.get("v1", 0) - 0.5) < 0.1 and abs(sum(shares.values()) - 1) < 1e-6

    await until_async(shares_fit, what="v1 and v2 share the requests")
    (unserved,) = await prometheus.query(dict(expressions("mesh"))["Versions unserved"])
    assert unserved.value == 0
