"""A host with resources, and names that lead to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

from tests.evaluator.fetching.site import ALLOWED, FORBIDDEN, Site
from tests.name_server import ScriptedNames, scripted_names


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    site.runner = web.AppRunner(app, shutdown_timeout=0.1)
    await site.runner.setup()
    await site.listen(ALLOWED)
    await site.listen(FORBIDDEN)
    yield site
    site.gate.set()
    await site.runner.cleanup()


@pytest.fixture
def names() -> Iterator[ScriptedNames]:
    with scripted_names() as names:
        names.addresses = {"good.test": [[ALLOWED]], "bad.test": [[FORBIDDEN]], "both.test": [[ALLOWED, FORBIDDEN]]}
        yield names
