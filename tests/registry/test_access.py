"""Access rules in etcd: none that is malformed or misspelt opens an app, as an operator and a caller see it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from atserving.config import PREFIX
from reliability.attacks.refusals import MALFORMED_RULES
from tests.processes import Etcd, Gate, Registry
from tests.registry.cli import Cli
from tests.waiting import until_async

pytestmark = pytest.mark.slow

CLOSED, OPEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE
"""An open app has no instance here."""

MALFORMED = [*MALFORMED_RULES, '{"private": true, "batch_size": 4}', ""]


@pytest.fixture(scope="module")
def gate(registries: list[Registry], shared_etcd: Etcd) -> Iterator[Gate]:
    # Without them a test that deletes its rule would delete most rules there are, which are held back.
    for number in range(60):
        registries[0].put(f"app/metadata/other-{number}", {"public": True})
    gate = Gate([registries[0].address])
    gate.start()
    yield gate
    gate.kill()
    shared_etcd.ctl("del", "--prefix", f"{PREFIX}app/")


def listed(registry: Registry, app: str) -> str:
    ended = Cli(registry.address, app).run("release", "list", app)
    assert ended.status == 0, ended.err
    return ended.err


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("value", MALFORMED)
async def test_malformed_rules_close_an_app_and_the_operator_sees_why(
    gate: Gate, registries: list[Registry], value: str, default: bool
) -> None:
    registry, app = registries[0], f"access-{MALFORMED.index(value)}-{default}"
    key = "app/default/metadata" if default else f"app/metadata/{app}"
    registry.publish(app, phase="production")

    async def answers(status: grpc.StatusCode) -> None:
        async def does() -> bool:
            return await gate.status(app) is status

        await until_async(does, what=f"{app} answers {status}")

    await answers(OPEN)
    registry.etcdctl("put", PREFIX + key, "--", value)
    await answers(CLOSED)
    assert await gate.status(app, "v9") is CLOSED
    assert f"malformed: {PREFIX}{key}: " in listed(registry, app)
    assert registry.logged("reason", event="config skipped", key=PREFIX + key)
    registry.put(key, {"public": True})
    await answers(OPEN)
    assert PREFIX + key not in listed(registry, app)
    registry.etcdctl("put", PREFIX + key, "--", value)
    await answers(CLOSED)
    registry.delete(key)
    await answers(OPEN)


@pytest.mark.parametrize("key", ["metadata/{}/", "{}", "default/metdata"])
async def test_rules_under_a_misspelt_key_close_an_app_and_the_operator_sees_why(
    gate: Gate, registries: list[Registry], key: str
) -> None:
    registry, app = registries[0], f"misplaced-{len(key)}"
    registry.publish(app, phase="production")
    key = f"{PREFIX}app/{key.format(app)}"
    whose = [] if "default" in key else [app]

    async def answers(status: grpc.StatusCode) -> None:
        async def does() -> bool:
            return await gate.status(app) is status

        await until_async(does, what=f"{app} answers {status}")

    await answers(OPEN)
    registry.etcdctl("put", key, "--", '{"public": false}')
    await answers(CLOSED)
    said = registry.logged("reason", event="config skipped", key=key)["reason"]
    assert "closed until you delete the key" in said
    assert f"malformed: {key}: {said}" in listed(registry, app)
    assert f"{key}: {said}" in Cli(registry.address, app).run("access", "show", *whose).err
    ended = Cli(registry.address, app).run("doctor")
    assert (ended.status, said in ended.out) == (1, True)
    registry.etcdctl("del", key)
    await answers(OPEN)
    assert key not in listed(registry, app)


async def test_an_unknown_key_of_another_kind_closes_nothing(gate: Gate, registries: list[Registry]) -> None:
    registry, app = registries[0], "quota"
    registry.publish(app, phase="production")
    registry.put(f"app/quota/{app}", {"per_s": 3})
    # The next write reaches the gate after this one.
    registry.put(f"app/metadata/{app}-closed", {"public": False})
    registry.publish(f"{app}-closed", phase="production")

    async def follows() -> bool:
        return await gate.status(f"{app}-closed") is CLOSED

    await until_async(follows, what="the gate follows the registry")
    assert await gate.status(app) is OPEN
    assert f"malformed: {PREFIX}app/quota/{app}: unknown key\n" in listed(registry, app)


async def test_unknown_fields_are_shown_with_the_nearest_known_name(registries: list[Registry]) -> None:
    registry = registries[0]
    registry.publish("unknown-fields", batchsize=4)
    registry.put("worker/app/unknown-fields/default", {"timout": "3s"})
    for key, field in (("eval/unknown-fields/v1", "batch_size"), ("worker/app/unknown-fields/default", "timeout")):
        said = registry.logged("reason", event="config fields unknown", key=PREFIX + key)["reason"]
        assert f"did you mean '{field}'?" in said
        assert f"warning: {PREFIX}{key}: {said}" in listed(registry, "unknown-fields")
