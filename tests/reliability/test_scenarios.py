"""Short forms of some scenarios: callers of a mesh of two of each lose nothing but what is allowed."""

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
# Its heap's bound in envoy/envoy.yaml is 640 MiB.
MOST_ENVOY_MIB = 800
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
        ("odd requests", "10 of 10 answered as promised"),
    ],
)
async def test_callers_lose_nothing(name: str, note: str, mesh: Mesh, truth: Truth) -> None:
    await check(name, note, mesh, truth, SCALE)


@pytest.mark.parametrize(
    ("name", "note", "scale"),
    [
        ("60 uploads without end, one HTTP/2 connection", r"^0 of 60 answered, \d+ reset$", 0.25),
        ("eight callers with batches of 100", r"^\d+ batches: 100 x 200$", 0.15),
    ],
)
async def test_an_attack_costs_an_honest_caller_no_more_than_is_allowed(
    name: str, note: str, scale: float, mesh: Mesh, truth: Truth
) -> None:
    await check(name, note, mesh, truth, scale)


async def check(name: str, note: str, mesh: Mesh, truth: Truth, scale: float) -> None:
    row = await play(SCENARIOS[name], mesh, truth, scale)
    assert row.answered > 0, row
    assert not row.complaint, row
    assert row.agreed_s is not None or not SCENARIOS[name].agrees
    assert re.search(note, "; ".join(row.notes))
    assert row.peak_mib["envoy"] < MOST_ENVOY_MIB
    assert min(row.peak_mib[kind] for kind in ("envoy", "gate", "front", "worker", "registry", "etcd")) > 0


async def test_wrong_answers_are_counted(mesh: Mesh, truth: Truth) -> None:
    false = {"digits": {version: [score / 2 for score in scores] for version, scores in truth["digits"].items()}}
    row = await play(SCENARIOS["no fault"], mesh, {**truth, **false}, SCALE)
    assert row.failed["wrong answer"] > 0
    assert row.answered > 0
    assert row.sent == row.answered + row.lost
