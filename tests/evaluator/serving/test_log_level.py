"""The worker of an instance logs what its front does, from its start and after a change."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from tests.evaluator.calling import DIGIT, infer
from tests.evaluator.digits import digits_tar
from tests.processes import Registry, evaluator, start_evaluator
from tests.waiting import until

SCRIPT = b"""
def net_init(cfg):
    return {"batch_size": 1}

def net_inference(model, args):
    for req in args["reqs"]:
        print((req.get("params") or {}).get("say"))
    return [{"code": 0, "result": {}} for _ in args["reqs"]]
"""


async def test_worker_follows_the_level_of_its_front(registry: Registry, tmp_path: Path) -> None:
    registry.publish("says", file=digits_tar(tmp_path / "release.tar", **{"net.py": SCRIPT}))
    with evaluator(registry, "says") as process:
        url = f"http://127.0.0.1:{process.logged(event='release loading')['http_port']}/log"
        async with aiohttp.ClientSession() as session:
            await infer(process, DIGIT, params_json='{"say": "one"}')
            process.logged(event="script printed", text="one")
            for level, say in (("warning", "two"), ("info", "three")):
                async with session.put(f"{url}?level={level}") as answer:
                    assert answer.status == 200
                await infer(process, DIGIT, params_json=f'{{"say": "{say}"}}')
            process.logged(event="script printed", text="three")
        assert '"text":"two"' not in process.log_text()


async def test_worker_begins_with_the_level_of_its_front(registry: Registry, tmp_path: Path) -> None:
    printing = SCRIPT.replace(b"def net_init(cfg):", b"def net_init(cfg):\n    print('begins')")
    registry.publish("begins", file=digits_tar(tmp_path / "release.tar", **{"net.py": printing}))
    process = start_evaluator(registry.address, "begins", "v1", "--log-level", "error")
    try:
        await until(lambda: registry.instances("begins"), what="the instance is registered")
        assert not process.lines
    finally:
        process.kill()
