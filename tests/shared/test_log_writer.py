"""A reader that reads no log, or a full disk, stops no process; what is dropped is counted and told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from atserving.log_writer import LogWriter

SETUP = """
import asyncio, logging, os, sys, threading, time, structlog
from atserving import telemetry
from atserving.telemetry import RequestLog, configure_logging

configure_logging("gate", threaded=True)
log = structlog.get_logger()
lines = RequestLog("gate")
"""
FLOOD = (
    SETUP
    + """
for number in range(20_000):
    log.info("request finished", number=number, filling="x" * 1000)
print(telemetry.lines_dropped(), flush=True)
sys.stdin.readline()
log.info("later")
"""
)


def started(program: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def parsed(text: str) -> list[Any]:
    return [json.loads(line) if line.startswith("{") else line for line in text.splitlines()]


def test_log_that_nobody_reads_stops_nothing_and_tells_what_is_missing() -> None:
    with started(FLOOD) as process:
        # It comes here without a reader of its log.
        dropped = int(said(process))
        _, text = process.communicate("on\n", timeout=60)
    *before, later = parsed(text)
    kept = [line for line in before if line["event"] == "request finished"]
    told = [line for line in before if line["event"] == "log lines dropped"]
    assert {(line["level"], line["service"]) for line in told} == {("warning", "gate")}
    assert sum(line["count"] for line in told) == dropped > 0
    # It is told where they are missing.
    number = 0
    for line in before:
        assert line.get("number", number) == number
        number += line.get("count", 1)
    assert number == 20_000
    assert later["event"] == "later"
    # Its memory is bounded; the pipe holds some, too.
    assert 3 << 20 < sum(len(json.dumps(line)) for line in kept) < 5 << 20


def test_request_lines_leave_room_for_rarer_ones() -> None:
    program = FLOOD.replace('log.info("request', 'lines.write("info", "request').replace(
        'number=number, filling="x" * 1000', '{"number": number, "filling": "x" * 1000}'
    )
    program = program.replace("print(", 'log.warning("instance lost")\nprint(')
    with started(program) as process:
        assert int(said(process)) > 0
        _, text = process.communicate("on\n", timeout=60)
    events = [line["event"] for line in parsed(text)]
    assert [event for event in events if event != "request finished"][-3:] == [
        "log lines dropped",
        "instance lost",
        "later",
    ]


def test_no_line_is_lost_at_a_normal_end_and_all_keep_their_order() -> None:
    program = (
        SETUP
        + """
for number in range(3000):
    log.info("one", n=4 * number)
    lines.write("info", "two", {"n": 4 * number + 1})
    logging.getLogger("three").error("%d", 4 * number + 2)
    print(4 * number + 3, file=sys.stderr)
print("ending", flush=True)
"""
    )
    with started(program) as process:
        assert said(process) == "ending"
        _, text = process.communicate(timeout=60)
    numbers = [line["n"] if isinstance(line, dict) else int(line.removeprefix("three: ")) for line in parsed(text)]
    assert numbers == list(range(12_000))
    assert process.returncode == 0


def test_error_that_ends_a_process_comes_after_its_lines() -> None:
    with started(SETUP + "log.info('one')\nraise KeyError('two')\n") as process:
        _, text = process.communicate(timeout=60)
    assert parsed(text)[0]["event"] == "one"
    assert text.endswith("KeyError: 'two'\n")


def test_last_lines_that_are_dropped_are_told_at_the_end() -> None:
    """The end waits for the line that tells it, however late the thread comes to it."""
    written: list[bytes] = []
    began, go = threading.Event(), threading.Event()

    def write(data: memoryview) -> int:
        began.set()
        go.wait(60)
        written.append(bytes(data))
        return len(data)

    class Late(LogWriter):
        def _pause(self, seconds: float) -> None:
            time.sleep(0.2)

    writer = Late(write, lambda count: b"dropped %d\n" % count)
    writer.write(b"one\n")
    began.wait(60)
    writer.write(b"two\n", most=1)
    threading.Timer(0.1, go.set).start()
    writer.flush()
    assert b"".join(written) == b"one\ndropped 1\n"


def test_closed_standard_error_leaves_files_alone(tmp_path: Path) -> None:
    program = (
        SETUP
        + f"""
with open({str(tmp_path / "file")!r}, "w") as file:
    log.info("one")
    print("two", file=sys.stderr)
    telemetry._writer.flush()
"""
    )
    line = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(line, timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_full_disk_does_not_keep_a_process_from_ending() -> None:
    with open("/dev/full", "w") as full, started(SETUP + "log.info('one')\n", full.fileno()) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_lines_wait_for_space_and_stay_whole(tmp_path: Path) -> None:
    program = (
        SETUP
        + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
log.info("one")
while os.fstat(2).st_size < 10: time.sleep(0.001)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("two")
"""
    )
    path = tmp_path / "log"
    with open(path, "a") as file, started(program, file.fileno()) as process:
        process.communicate(timeout=60)
    assert [line["event"] for line in parsed(path.read_text())] == ["one", "two"]


def test_standard_error_that_does_not_block_loses_nothing() -> None:
    program = (
        SETUP + "os.set_blocking(2, False)\nfor n in range(2000): log.info('x' * 500, n=n)\nprint('on', flush=True)\n"
    )
    with started(program) as process:
        assert said(process) == "on"
        _, text = process.communicate(timeout=60)
    assert [line["n"] for line in parsed(text)] == list(range(2000))


def test_log_of_a_thread_and_of_a_signal_handler_arrives(tmp_path: Path) -> None:
    program = (
        SETUP
        + """
import signal
signal.signal(signal.SIGALRM, lambda *_: log.info("signal"))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
threads = [threading.Thread(target=lambda: [log.info("thread") for _ in range(500)]) for _ in range(4)]
for each in threads: each.start()
for _ in range(3000): log.info("main")
for each in threads: each.join()
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    )
    path = tmp_path / "log"
    with open(path, "w") as file, started(program, file.fileno()) as process:
        process.communicate(timeout=60)
    events = [line["event"] for line in parsed(path.read_text())]
    assert (events.count("thread"), events.count("main")) == (2000, 3000)
    assert "signal" in events
    assert os.path.getsize(path) > 0


def test_all_loggers_follow_a_change_of_the_level() -> None:
    program = (
        SETUP
        + """
from atserving.telemetry import LogSettings, apply
bound = log.bind(app="a")
def all_log(step):
    for each in (log, bound, structlog.get_logger()):
        each.debug("debug", step=step)
        each.info("info", step=step)
        each.error("error", step=step)
    lines.write("info", "request finished", {"step": step})
all_log(1)
apply(LogSettings("debug"))
all_log(2)
apply(LogSettings("error"))
all_log(3)
"""
    )
    with started(program) as process:
        _, text = process.communicate(timeout=60)
    lines = [(line["step"], line["event"]) for line in parsed(text)]
    of_level = {"debug": ["debug", "info", "error"], "info": ["info", "error"], "error": ["error"]}
    assert lines == [
        *((1, event) for event in (*of_level["info"] * 3, "request finished")),
        *((2, event) for event in (*of_level["debug"] * 3, "request finished")),
        *((3, event) for event in of_level["error"] * 3),
    ]
