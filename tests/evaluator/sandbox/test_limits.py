"""A hostile net.py takes what it can get, in a real evaluator: memory, processes, files."""

from __future__ import annotations

import errno

from atserving.local import proc
from tests.evaluator.calling import ask, connected
from tests.evaluator.sandbox.attacks import request
from tests.evaluator.sandbox.conftest import MOST_FILE_MIB, MOST_TASKS, Host
from tests.waiting import until


async def test_script_can_not_lift_its_limits(host: Host) -> None:
    code = """
    found = []
    for name in ("CORE", "NOFILE", "FSIZE", "DATA"):
        of = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(of)
        assert hard != resource.RLIM_INFINITY, name
        try:
            resource.setrlimit(of, (hard + 1, hard + 1))
        except (ValueError, OSError):
            found.append(name)
    """
    assert await host.hostile.run(code) == {"found": ["CORE", "NOFILE", "FSIZE", "DATA"]}


async def test_script_can_not_write_a_large_file(host: Host) -> None:
    code = f"""
    try:
        with open("large", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, {MOST_FILE_MIB << 20})
            os.posix_fallocate(file.fileno(), 0, {(MOST_FILE_MIB << 20) + 1})
    finally:
        os.unlink("large")
    """
    assert await host.hostile.run(code) == {"refused": errno.EFBIG}


async def test_script_can_not_open_files_without_end(host: Host) -> None:
    code = """
    held = []
    while len(held) < 100_000:
        held.append(open(os.devnull))
    """
    assert await host.hostile.run(code) == {"refused": errno.EMFILE}


async def test_script_that_takes_memory_without_end_fails_and_its_instance_serves_on(host: Host) -> None:
    # What is mapped counts, so that nothing has to be taken.
    code = """
    held = []
    try:
        while len(held) < 4096:
            held.append(mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    finally:
        for each in held:
            each.close()
    """
    assert await host.hostile.run(code) == {"refused": errno.ENOMEM}
    assert await host.hostile.run("found = 1") == {"found": 1}


BOMB = """
held = []
for _ in range(3000):
    held.append(os.fork())
    if not held[-1]:
        time.sleep(1000)
time.sleep(1000)
"""


async def test_script_that_forks_without_end_ends_with_all_its_processes(host: Host) -> None:
    process = host.hostile.process
    (worker,) = workers(process.pid)
    async with connected(process) as connection:
        bombed = await ask(connection, request(BOMB))
        assert bombed.error.message == "the net's process died"
    reason = f"it has more than {MOST_TASKS} processes and threads"
    assert process.logged(event="worker killed", reason=reason)
    await until(lambda: not [each for each in proc.every_process() if each.session == worker and each.is_alive])
    assert await host.hostile.run("found = 1") == {"found": 1}


def workers(front: int) -> list[int]:
    return [each.pid for each in proc.every_process() if each.parent == front and each.is_alive]
