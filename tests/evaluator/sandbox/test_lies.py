"""A hostile net.py writes to the socket of its worker itself, or says what no net would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from atserving import link
from tests.evaluator.calling import ask, connected
from tests.evaluator.sandbox.attacks import hostile, publish, request
from tests.evaluator.sandbox.test_settings import refused_start
from tests.processes import Registry

SOCKET = """
import os, socket, time
def front():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                return socket.socket(fileno=os.dup(int(name)))
        except OSError:
            pass
"""
PLAN = {"engines": 1, "threads": 0, "batch_size": 1}
ENDED = "evaluator: the net's process ended while the net was loaded: it broke the protocol: "
MALFORMED, IMPOSSIBLE = "the start reply is malformed", "the start reply has an impossible plan"


def loading(body: str) -> bytes:
    return f"{SOCKET}\ndef net_init(cfg):\n    {body}\ndef net_inference(model, args): ...\n".encode()


@pytest.mark.parametrize(
    ("name", "reply", "reason"),
    [
        ("list", [], MALFORMED),
        ("text", {"plan": {**PLAN, "batch_size": "8"}, "longest_s": [0, 0]}, MALFORMED),
        ("unmeasured", {"plan": PLAN, "longest_s": [None, 0]}, MALFORMED),
        ("huge", {"plan": {**PLAN, "batch_size": 10**15}, "longest_s": [0, 0]}, IMPOSSIBLE),
        ("negative", {"plan": {**PLAN, "engines": -1}, "longest_s": [0, 0]}, IMPOSSIBLE),
        ("long", {"plan": {**PLAN, "measured": {"x" * 1000: 1}}, "longest_s": [0, 0]}, IMPOSSIBLE),
    ],
)
def test_lies_about_the_plan_of_a_net_stop_its_start(
    registry: Registry, tmp_path: Path, name: str, reply: Any, reason: str
) -> None:
    frame = link.frame(link.START, orjson.dumps(reply))
    publish(registry, f"lying-{name}", tmp_path, loading(f"front().sendall({frame!r}); time.sleep(1000)"))
    assert refused_start(registry, f"lying-{name}") == ENDED + reason


def test_error_of_a_script_is_one_line_of_some_length(registry: Registry, tmp_path: Path) -> None:
    error = "first\nevaluator: second\x1b[31m"
    publish(registry, "lines", tmp_path, loading(f"return {{'error': {error!r} + 'x' * 10_000_000}}"))
    expected = f"evaluator: {error[:1024]}".replace("\n", " ").replace("\x1b", " ")
    said = refused_start(registry, "lines")
    assert said.startswith(expected)
    assert len(said) == len("evaluator: ") + 1024


async def test_log_tells_why_a_worker_that_breaks_the_protocol_is_killed(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "breaking", tmp_path)
    with hostile(registry, "breaking") as one:
        code = f"{SOCKET}\nfront().sendall({link.frame(link.SETTINGS)!r}); time.sleep(1000)"
        async with connected(one.process) as connection:
            died = await ask(connection, request(code))
        assert died.error.message == "the net's process died"
        reason = f"it broke the protocol: a frame of kind {link.SETTINGS}"
        assert one.process.logged(event="worker killed", reason=reason)
        assert await one.run("found = 1") == {"found": 1}
