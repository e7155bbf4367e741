"""The comparison with other servers checks every answer, reports ratios, and notices a busy machine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atserving.local.examples import ROOT
from bench import callers
from bench.peers import __main__ as peers

ROW = peers.Row("tiny", 32, peers.OURS, 100.0, 2.0, 3.0, 0, {"gate": 60.0, "load generator": 9.0}, 0.0)


@pytest.mark.timeout(300)
def test_a_short_run_compares_the_mesh_with_its_peers(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    flags = ["--net", "tiny", "--seconds", "0.05", "--rounds", "1", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "bench.peers", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr + run.stdout
    figures = json.loads(file.read_text())
    assert {name: set(ratios) for name, ratios in figures["tiny"].items()} == {
        "c1": {"p50_to_fastapi"},
        "c32": {"rate_to_mosec", "rate_to_fastapi"},
    }
    assert all(value > 0 for ratios in figures["tiny"].values() for value in ratios.values())
    assert set(figures["cpu_us"]["tiny"]["c32"]) == {"ours", "mosec", "fastapi"}
    ours = figures["cpu_us"]["tiny"]["c32"]["ours"]
    assert {"envoy", "gate", "evaluator-digits-v1", "evaluator-digits-v1 worker"} <= set(ours)
    assert figures["errors"] == 0
    table = run.stdout[run.stdout.index("| net, callers |") :].splitlines()
    assert table[1] == "|---" * 6 + "|"
    assert [line.split(" | ")[1] for line in table[2:7]] == ["ours", "fastapi", "ours", "mosec", "fastapi"]


def bench(measured: list[peers.Row]) -> peers.Bench:
    """A run whose measurements give these rows."""

    class Scripted(peers.Bench):
        def _measure(self, net: str, callers: int, server: str) -> peers.Row:
            return measured.pop(0)

    return Scripted(replace(peers.SHORT, cases=(("tiny", 32, (peers.OURS, peers.MOSEC)),)), {}, {}, {})


def test_ratios_are_of_rows_in_one_round() -> None:
    run = bench(
        [
            ROW,
            replace(ROW, server=peers.MOSEC, per_s=200.0),
            # The second round goes backwards, on a machine that is three times as fast.
            replace(ROW, server=peers.MOSEC, per_s=500.0),
            replace(ROW, per_s=300.0, errors=1),
        ]
    )
    run.round(backwards=False)
    run.round(backwards=True)
    figures = run.figures()
    assert figures["tiny"] == {"c32": {"rate_to_mosec": 0.55}}
    assert figures["spread"] == {"tiny.c32.rate_to_mosec": [0.5, 0.6]}
    assert figures["cpu_us"]["tiny"]["c32"]["mosec"]["sum"] == 60
    assert (figures["errors"], figures["repeated"]) == (1, 0)


def test_a_disturbed_row_is_measured_again_and_reported() -> None:
    run = bench([replace(ROW, others=0.5), replace(ROW, others=0.05), replace(ROW, others=0.9), replace(ROW, others=1)])
    assert run.measure("tiny", 32, peers.OURS).others == 0.05
    run.rows.append([run.measure("tiny", 32, peers.OURS), replace(ROW, server=peers.MOSEC)])
    figures = run.figures()
    assert (figures["repeated"], [row["others"] for row in figures["disturbed"]]) == (2, [0.9])


@asynccontextmanager
async def answering(answer: Callable[[int], bytes]) -> AsyncIterator[str]:
    """A server that gives the answer of a request's number, and closes the connection on an empty one."""
    numbers = iter(range(1_000_000))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            assert b"content-length: 2\r\n" in head
            await reader.readexactly(2)
            response = answer(next(numbers))
            if not response:
                writer.close()
                return
            writer.write(response)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


def load(url: str, **fields: Any) -> callers.Load:
    with callers.Running(callers.Job(url, b"xy", 2, 0.05, 0.0, expected=b'"index":7', **fields)) as running:
        running.begun()
        return running.ended()


async def test_refused_and_wrong_answers_are_counted() -> None:
    right = response(200, b'{"index":7}')
    kinds = [right, response(200, b'{"index":8}'), response(429, b"")]
    async with answering(lambda number: kinds[number % 3] if number < 300 else right) as url:
        seen = await asyncio.to_thread(load, url)
    assert seen.requests > 10
    assert seen.wrong > 0
    assert seen.refused == seen.statuses["429"] > 0
    assert seen.errors == seen.wrong + seen.refused < seen.requests


async def test_a_broken_connection_is_no_measurement() -> None:
    async with answering(lambda number: b"" if number > 5 else response(200, b'{"index":7}')) as url:
        with pytest.raises(OSError, match="ended early"):
            await asyncio.to_thread(load, url)
