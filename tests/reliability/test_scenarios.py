"""Short forms of some scenarios: callers of a mesh of two of each lose nothing."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from reliability import attack, chaos, releases
from reliability.mesh import Mesh
from reliability.releases import Served
from reliability.scenario import play
from reliability.truth import Truth, learn

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCALE = 0.3
SCENARIOS = {each.name: each for each in (*chaos.scenarios(), *attack.scenarios())}


def serves(folder: Path) -> Sequence[Served]:
    return [releases.digits("v1", 2), releases.digits("v2", 1), releases.quick(1), releases.drill(folder, 1)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(serves) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def truth(mesh: Mesh) -> Truth:
    return await learn(mesh)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("etcd leader killed", ""),
        ("worker killed", ""),
        ("every registry frozen", "a publication meanwhile: (UNAVAILABLE|DEADLINE_EXCEEDED)"),
        ("etcd emptied", "[0-9]+ deletions held back"),
        ("etcd restored from a snapshot", ""),
        ("etcd compacted while a registry is frozen", ""),
        ("etcd out of space", "etcd refuses the registry"),
        ("evaluator cut off from the registries", r"its own requests: (\d+) of \1 answered"),
        ("a request that kills its gates", "2 gates killed; the request: 503"),
        ("odd requests", r"(9|10) of 10 answered as promised"),
    ],
)
async def test_callers_lose_nothing(name: str, note: str, mesh: Mesh, truth: Truth) -> None:
    row = await play(SCENARIOS[name], mesh, truth, SCALE)
    assert row.sent == row.answered > 0, row
    assert row.whole, row
    assert row.agreed_s is not None or not SCENARIOS[name].agrees
    assert re.search(note, "; ".join(row.notes))
    assert min(row.peak_mib[kind] for kind in ("envoy", "gate", "front", "worker", "registry", "etcd")) > 0


async def test_wrong_answers_are_counted(mesh: Mesh, truth: Truth) -> None:
    false = {"digits": {version: [score / 2 for score in scores] for version, scores in truth["digits"].items()}}
    row = await play(SCENARIOS["no fault"], mesh, {**truth, **false}, SCALE)
    assert row.failed["wrong answer"] > 0
    assert row.answered > 0
    assert row.sent == row.answered + row.lost
