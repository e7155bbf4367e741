"""`atserving top` and `atserving logs` bear pages, lines and terminals that are not as they should be."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import orjson
import pytest

from atserving.cli.top import scraping, tables
from atserving.cli.top.changes import Changes, Reading, as_json
from atserving.cli.top.scraping import Scrape, Series, Target, scrape_all

CODE = """
from atserving.cli import service
from atserving.cli.{0} import {1} as command
service.run(command, "atserving")
"""
_ENDLESS_S = 20
PAGE = """# HELP atserving_gate_requests_total All.
atserving_gate_requests_total{app="a",version="v1",code="200"} 3
"""


@contextmanager
def serving(page: str, *, endless: bool = False) -> Iterator[str]:
    """Serve a page, and return its address; an endless one has a byte more every few milliseconds."""
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())
            stop_s = time.monotonic() + _ENDLESS_S
            try:
                while endless and not ended.wait(0.02) and time.monotonic() < stop_s:
                    self.wfile.write(b"#")
            except OSError:
                pass

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()


def read(page: str) -> Reading:
    """Return the second of two readings of a page."""
    changes = Changes()
    with serving(page) as address:
        changes.read(scrape_all([Target(address, "t")]), 0.0)
        found = changes.read(scrape_all([Target(address, "t")]), 1.0)
    assert found
    return found


@pytest.mark.parametrize(
    "line",
    [
        'atserving_gate_instances{app="a",version="v1",instance="i",state="connected"} NaN',
        'atserving_registry_instances{app="a",version="v1"} +Inf',
        'atserving_gate_requests_in_flight{app="a"} 1e308',
        'atserving_gate_requests_total{app="a",version="v1",code="abc"} 3',
        'atserving_gate_requests_total{app="a",version="v1",code="² "} 3',
        'atserving_gate_request_seconds_bucket{app="a",le="abc"} 3',
        'atserving_gate_request_seconds_bucket{app="a",le="NaN"} 3',
    ],
)
def test_values_that_no_process_has_are_left_out(line: str) -> None:
    found = json.loads(orjson.dumps(as_json(read(f"{PAGE}{line}\n"))))
    assert (found["processes"]["gate"], found["warnings"]) == (1, [])
    assert [(each["app"], each.get("version")) for each in found["loads"]] == [("a", None), ("a", "v1")]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (PAGE + 'atserving_gate_requests_total{app="a",\t="ev1",code="0"} 3\n', "answers something else than metrics"),
        ("up 1\n", "is no gate, evaluator or registry"),
    ],
)
def test_pages_of_others_are_told(page: str, reason: str) -> None:
    (warning,) = read(page).warnings
    assert warning.endswith(f"): it {reason}")


def test_control_characters_in_labels_do_not_reach_the_terminal() -> None:
    page = PAGE.replace('"a"', '"a\x1b]0;b\x07\x00"').replace('"v1"', '"v\x9b31m"')
    app, version = (cells for _, cells in tables.rows(read(page)))
    assert app[0] == "a\\x1b]0;b\\x07\\x00"
    assert version[1] == "v\\x9b31m"


def test_a_page_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "TIMEOUT_S", 0.3)
    with serving("", endless=True) as address:
        (found,) = scrape_all([Target(address, address)])
    assert found.failure == "no answer within 0.3 s"


def test_each_instance_of_many_apps_is_looked_at_once() -> None:
    looked = 0

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal looked
            looked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    def scrape(number: int, seen: float) -> Scrape:
        labels = (("app", Counted(f"a{number}")), ("code", "200"), ("version", Counted("v1")))
        values = {Series("atserving_evaluator_requests_total", labels): seen}
        return Scrape(Target(str(number), str(number)), "evaluator", values)

    def cost(apps: int) -> int:
        nonlocal looked
        changes = Changes()
        changes.read([scrape(number, 1.0) for number in range(apps)], 0.0)
        looked = 0
        reading = changes.read([scrape(number, 2.0) for number in range(apps)], 1.0)
        assert reading is not None
        assert len(reading.loads) == 3 * apps
        return looked

    assert cost(400) < 10 * cost(100)


def shown(terminal: str | None) -> tuple[int, str]:
    """Run ``atserving top`` on a terminal until it shows a table, then press q; return its status and output."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "TERM"}
    if terminal is not None:
        environment["TERM"] = terminal
    with serving(PAGE) as address:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE.format("top.command", "top"), "--target", address, "--interval", "0.2"],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
        )
        os.close(side)
        text = b""
        deadline_s = time.monotonic() + 60
        try:
            while time.monotonic() < deadline_s:
                text += os.read(main, 4096)
                if b"q: quit" in text:
                    os.write(main, b"q")
        except OSError:
            # It has ended.
            pass
        finally:
            os.close(main)
            if time.monotonic() >= deadline_s:
                process.kill()
        return process.wait(60), text.decode(errors="replace")


@pytest.mark.parametrize("terminal", ["vt100", "ansi"])
def test_terminals_without_colours_or_a_hidden_cursor_show_the_table(terminal: str) -> None:
    status, text = shown(terminal)
    assert status == 0, text
    assert "requests/s in the last" in text


@pytest.mark.parametrize("terminal", ["dumb", None])
def test_terminals_without_a_screen_are_refused(terminal: str | None) -> None:
    status, text = shown(terminal)
    assert status == 1
    assert "has no screen to draw on: --once prints a table" in text
    assert "Traceback" not in text


def test_screen_without_keys_waits_for_the_next_reading() -> None:
    program = """
import sys
from atserving.cli.top import screen

class Counted(screen._Screen):
    drawn = 0
    def _draw(self):
        Counted.drawn += 1
        super()._draw()

def read(times=[]):
    times.append(None)
    if len(times) == 5:
        sys.exit(0 if Counted.drawn < 20 else 3)

screen._Screen = Counted
screen.show(read, 0.1, "", instances=False)
"""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        assert process.wait(60) == 0
    os.close(main)


def logs(text: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "log"
    path.write_text(text)
    line = [sys.executable, "-c", CODE.format("logs", "logs"), "r", str(path), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_hostile_lines_neither_break_logs_nor_reach_the_terminal(tmp_path: Path) -> None:
    deep = "[" * 1000 + "]" * 1000
    lines = [
        '{"reqid":"r","event":"first","timestamp":"0001-01-01T00:00:00+23:00"}',
        '{"reqid":"r","event":"last","timestamp":"9999-12-31T23:59:59-23:00"}',
        '{"reqid":"r","event":"names","\\u001b]0;title\\u0007":1}',
        f'{{"reqid":"r","event":"deep","value":{deep}}}',
        '{"reqid":"r","event":"end"}',
    ]
    for format_ in ("text", "json"):
        ended = logs("\n".join(lines), tmp_path, "-o", format_)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.replace("\n", "").isprintable()
        assert [event in ended.stdout for event in ("first", "last", "names", "end")] == [True] * 4
