"""A version has one content, and an app only its own answers, whoever runs at an instance's address."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from atserving.local import commands
from atserving.local.ports import free_ports
from tests.evaluator.digits import digits_tar
from tests.processes import Evaluator, Gate, Registry, evaluator, running_registry, start_evaluator
from tests.waiting import until, until_async

pytestmark = pytest.mark.slow

CLASSES, FEATURES = {"net": "classify"}, {"net": "feature"}
"""Two contents of a release, whose answers differ in kind."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def gate(registry: Registry) -> Iterator[Gate]:
    gate = Gate([registry.address])
    gate.start()
    yield gate
    gate.kill()


async def kind(gate: Gate, app: str) -> str:
    """Ask version v1 of an app; return the kind of its answer, or the status."""
    try:
        answer = await gate.eval(app, "v1")
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "features" if answer.stream else "classes"


async def until_kind(gate: Gate, app: str, expected: str) -> None:
    async def answers() -> bool:
        return await kind(gate, app) == expected

    await until_async(answers, what=f"{app} answers {expected}")


async def kinds(gate: Gate, app: str, count: int = 40) -> dict[str, int]:
    return Counter(await asyncio.gather(*(kind(gate, app) for _ in range(count))))


def listed(registry: Registry, app: str) -> str:
    """Return the column of the instances in the list of releases."""
    command = [str(commands.BIN / "atserving"), "release", "list", app, "--server", registry.address]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, row = output.splitlines()
    at = head.index("INSTANCES")
    return row[at : head.index("ALIASES")].strip()


@pytest.mark.parametrize("deleted", [True, False], ids=["published again", "written over"])
async def test_a_version_with_new_content_never_gives_an_answer_of_the_old_one(
    registry: Registry, gate: Gate, deleted: bool
) -> None:
    def write(values: dict[str, str], **fields: str) -> None:
        if deleted:
            registry.delete("eval/app/v1")
        registry.publish("app", custom_values=values, **fields)

    write(CLASSES)
    with evaluator(registry, "app") as old:
        await until_kind(gate, "app", "classes")
        write(CLASSES, phase="production", desc="the same content")
        write(FEATURES)
        old.logged("version", event="instance outdated")
        await until_kind(gate, "app", "UNAVAILABLE")
        assert listed(registry, "app") == "0 (+1 outdated)"
        with evaluator(registry, "app"):
            await until_kind(gate, "app", "features")
            assert await kinds(gate, "app") == {"features": 40}
            assert listed(registry, "app") == "1 (+1 outdated)"
            write(CLASSES)
            old.logged("version", event="instance current")
            await until_kind(gate, "app", "classes")
            assert await kinds(gate, "app") == {"classes": 40}


async def test_a_version_whose_tar_was_replaced_keeps_to_the_old_one(
    registry: Registry, gate: Gate, tmp_path: Path
) -> None:
    labels = tmp_path / "digits.tar"
    registry.publish("app", custom_values=CLASSES, file=digits_tar(labels))
    with evaluator(registry, "app") as old:
        await until_kind(gate, "app", "classes")
        digits_tar(labels, **{"labels.csv": None})
        new = Evaluator(registry.address, "app")
        new.start()
        try:
            failed = new.logged(event="registration failed")
            assert "has loaded other files of app/v1" in failed["reason"]
            assert len(registry.instances("app")) == 1
            old.terminate()
            new.wait_serving()
        finally:
            new.kill()


async def test_an_instance_from_a_time_without_digests_serves_on(registry: Registry, gate: Gate) -> None:
    registry.publish("app", custom_values=CLASSES)
    with evaluator(registry, "app"):
        await until_kind(gate, "app", "classes")
        (instance,) = registry.instances("app")
        assert len(instance.pop("digest")) == 64
        registry.put(f"instance/app/v1/{instance['id']}", instance)
        assert await kinds(gate, "app") == {"classes": 40}
        restarted = Gate([registry.address])
        restarted.start()
        try:
            await until_kind(restarted, "app", "classes")
        finally:
            restarted.kill()


class Asked:
    """The kinds of answers that callers of an app have had."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    async def more(self, count: int = 100) -> None:
        enough = self.kinds.total() + count
        await until(lambda: self.kinds.total() >= enough, what=f"{count} more answers")

    async def ask(self, gate: Gate, app: str) -> None:
        while True:
            self.kinds[await kind(gate, app)] += 1


@asynccontextmanager
async def asking(gate: Gate, app: str) -> AsyncIterator[Asked]:
    """Let callers ask for an app during the block."""
    asked = Asked()
    callers = [asyncio.create_task(asked.ask(gate, app)) for _ in range(4)]
    yield asked
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


@pytest.mark.parametrize("registry_runs", [True, False])
async def test_no_caller_gets_the_answer_of_another_app_at_a_reused_port(
    registry: Registry, gate: Gate, tmp_path: Path, registry_runs: bool
) -> None:
    registry.publish("app", custom_values=CLASSES)
    registry.publish("thief", custom_values=FEATURES)
    (port,) = free_ports(1)
    cache = ("--config-cache", str(tmp_path / "thief.json"))
    with evaluator(registry, "thief", "v1", *cache):
        await until((tmp_path / "thief.json").exists, what="the thief has saved its config")
        await until_kind(gate, "thief", "features")
    at_port = ("--listen", f"127.0.0.1:{port}", "--wait", "0")
    victim = start_evaluator(registry.address, "app", "v1", *at_port)
    thief = Evaluator(registry.address, "thief", "v1", *at_port, *cache)
    try:
        victim.wait_serving()
        await until_kind(gate, "app", "classes")
        async with asking(gate, "app") as asked:
            await asked.more()
            if not registry_runs:
                registry.kill()
            victim.kill()
            thief.start()
            await until(lambda: any("this is instance" in line for line in gate.lines), what="the thief is refused")
            await asked.more()
        assert asked.kinds.keys() == {"classes", "UNAVAILABLE"}, asked.kinds
        if registry_runs:
            await until_kind(gate, "thief", "features")
    finally:
        victim.kill()
        thief.kill()
