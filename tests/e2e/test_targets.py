"""The local mesh tells where the metrics of all its processes are."""

from __future__ import annotations

import aiohttp
import orjson
import pytest

from atserving.local.folders import TARGETS_FILE
from atserving.local.mesh import Mesh

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_file_of_targets_names_the_metrics_of_every_process(mesh: Mesh) -> None:
    targets = orjson.loads((mesh.directory / TARGETS_FILE).read_bytes())
    assert {each["labels"]["process"] for each in targets} == set(mesh.pids()) - {"files"}
    async with aiohttp.ClientSession() as session:
        for each in targets:
            labels = each["labels"]
            assert labels["process"].startswith(labels["job"])
            own = labels["job"] if labels["job"] in ("envoy", "etcd") else f"atserving_{labels['job']}"
            async with session.get(f"http://{each['targets'][0]}/metrics") as response:
                assert response.status == 200
                assert f"\n{own}_" in await response.text()
