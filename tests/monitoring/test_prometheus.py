"""The real Prometheus of the tests scrapes a real process, and tells what it has scraped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import running_registry
from tests.prometheus import Prometheus, program


def test_a_test_without_its_program_is_skipped_with_the_remedy() -> None:
    with pytest.raises(pytest.skip.Exception, match="`make prometheus`"):
        program("promtool-of-nobody")


async def test_it_scrapes_targets_and_answers_queries(tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry", "--http", "127.0.0.1:0") as registry:
        port = registry.logged("http_port")["http_port"]
        targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": "registry", "process": "registry"}}]
        async with Prometheus(tmp_path / "prometheus", targets) as prometheus:
            await prometheus.until_all_up()
            (stale,) = await prometheus.query("atserving_registry_mirror_stale")
            assert stale.value == 0
            assert stale.labels["job"] == "registry"
            with pytest.raises(AssertionError, match="parse error"):
                await prometheus.query("sum(")
    assert not prometheus.is_running
