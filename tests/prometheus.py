"""A real Prometheus for tests: the two programs, and a server that scrapes processes and evaluates rules."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import orjson
import pytest

from atserving.local.ports import free_ports
from tests.processes import Process
from tests.waiting import until_async

_UNPACKED = Path(__file__).resolve().parents[1] / "build" / "prometheus" / "usr" / "bin"
_UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`. Skips the test where it is neither on PATH nor unpacked."""
    found = shutil.which(name) or shutil.which(name, path=_UNPACKED)
    if not found:
        pytest.skip(f"{name} is not on PATH; on Debian and Ubuntu, `make prometheus` unpacks it")
    return found


@dataclass(frozen=True)
class Sample:
    """One series of the answer to a query."""

    labels: Mapping[str, str]
    value: float


class Prometheus(Process):
    """A Prometheus on a loopback port. An async context manager: entering waits until it is ready; leaving stops it."""

    def __init__(
        self,
        directory: Path,
        targets: Sequence[Mapping[str, object]] | Path,
        rules: Path | None = None,
        interval: str = "500ms",
    ) -> None:
        """Write its config into ``directory``.

        ``targets`` are those of :meth:`Mesh.targets`, or a file with them, which may change. It scrapes them, and
        evaluates the ``rules``, each ``interval``.
        """
        directory.mkdir(exist_ok=True, parents=True)
        if not isinstance(targets, Path):
            file = directory / "targets.json"
            file.write_bytes(orjson.dumps(targets))
            targets = file
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(rules)] if rules else [],
            "scrape_configs": [{"job_name": "mesh", "file_sd_configs": [{"files": [str(targets)]}]}],
        }
        # YAML is a superset of JSON.
        (directory / "prometheus.yml").write_bytes(orjson.dumps(config))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        flags = {
            "config.file": directory / "prometheus.yml",
            "storage.tsdb.path": directory / "data",
            "web.listen-address": self.url.removeprefix("http://"),
            "enable-feature": "exemplar-storage",
            "log.level": "warn",
        }
        command = [program("prometheus"), *(f"--{name}={value}" for name, value in flags.items())]
        super().__init__(command, directory / "prometheus.log")

    async def __aenter__(self) -> Prometheus:
        self.start()
        try:
            await until_async(self._is_ready, aiohttp.ClientError, what="Prometheus is ready")
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    async def _is_ready(self) -> bool:
        assert self.is_running, self.log_text()
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/-/ready") as response:
            return response.status == 200

    async def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API: a path below `/api/v1/`. Raises AssertionError with its error."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/api/v1/{path}", params=parameters) as response,
        ):
            answer = orjson.loads(await response.read())
            assert answer["status"] == "success", f"{path} {parameters}: {answer.get('error')}"
            return answer["data"]

    async def query(self, expression: str) -> list[Sample]:
        """Return the series that a PromQL expression has now. A scalar is one without labels."""
        data = await self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(each["metric"], float(each["value"][1])) for each in data["result"]]

    async def alerts(self, state: str = "firing") -> dict[str, list[Mapping[str, str]]]:
        """Return the labels of the alerts in a state, `pending` or `firing`, by the alert's name."""
        found: dict[str, list[Mapping[str, str]]] = {}
        for each in (await self.get("alerts"))["alerts"]:
            if each["state"] == state:
                found.setdefault(each["labels"]["alertname"], []).append(each["labels"])
        return found

    async def until(self, expression: str) -> list[Sample]:
        """Wait until an expression has series; return them."""
        await until_async(lambda: self.query(expression), what=f"Prometheus has {expression}")
        return await self.query(expression)

    async def until_all_up(self) -> None:
        """Wait until it has scraped all of its targets."""

        async def up() -> bool:
            targets = (await self.get("targets", state="active"))["activeTargets"]
            return bool(targets) and all(each["health"] == "up" for each in targets)

        await until_async(up, what="all targets are up")


def shortened(rules: str, factor: int = 60) -> str:
    """Return the text of rules with all their times divided, so that an hour passes in a minute."""

    def divided(time: re.Match[str]) -> str:
        milliseconds = int(time[2]) * _UNITS_MS[time[3]] // factor
        return f"{time[1]}{max(milliseconds, 1)}ms"

    rules = re.sub(r"(\[|\bfor: |\binterval: |\boffset )(\d+)([smhd])\b", divided, rules)
    # The counts of a window, and a least rate, depend on the intervals.
    rules = re.sub(r"\b(\d+) \* sum_over_time", lambda found: f"{int(found[1]) / factor:g} * sum_over_time", rules)
    return re.sub(r"\b10 / (\d+)", lambda found: f"10 / {int(found[1]) / factor:g}", rules)
