"""The front of an instance inside the test's process, without a worker: calls that it takes wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from atserving.config import Instance
from atserving.held import HeldBytes
from evaluator.fetching.resources import ResourceFetcher
from evaluator.net_config import SCRIPT, NetConfig
from evaluator.options import Options
from evaluator.serving.capacity import Capacity
from evaluator.serving.link_server import LinkServer
from evaluator.serving.metrics import Metrics
from evaluator.serving.pipeline import Pipeline
from evaluator.serving.supervisor import WorkerSupervisor


def pipeline(
    folder: Path, held: HeldBytes, capacity: int = 64, *, fetcher: ResourceFetcher | None = None, net: str = "classify"
) -> Pipeline:
    """Return a pipeline whose worker never starts. Without a net it is that of a script, which takes groups."""
    files = {} if net else {SCRIPT: folder / SCRIPT}
    values = Options("custom_values", {"net": net} if net else {})
    config = NetConfig(files, custom_values=values, workspace=folder)
    return Pipeline(
        "app",
        "v1",
        config,
        worker=WorkerSupervisor(config),
        fetcher=cast(Any, fetcher),
        capacity=Capacity(capacity),
        metrics=Metrics("app", "v1"),
        held=held,
    )


@asynccontextmanager
async def front(folder: Path, held: HeldBytes) -> AsyncIterator[tuple[Pipeline, Instance]]:
    """Serve such a pipeline on a port."""
    links = LinkServer(held)
    server = await asyncio.get_running_loop().create_server(links.connect, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    instance = Instance(app="a", version="v", id="i", address=address, capacity=1)
    served = pipeline(folder, held)
    links.serve(instance, served)
    try:
        yield served, instance
    finally:
        server.close()
        links.abort()
