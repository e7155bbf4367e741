"""The peer FastAPI, which runs the net in its threads.

BENCH_NET=... BENCH_SETTINGS=... uvicorn bench.peers.fastapi_server:app
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from bench.peers.settings import Settings
from bench.picture_net import PictureNet, PictureNetFile

_settings = Settings.from_environment()
_net = PictureNet(PictureNetFile.from_environment(), _settings.threads)


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    current_default_thread_limiter().total_tokens = _settings.requests
    yield


app = FastAPI(lifespan=_lifespan)


@app.post("/inference")
async def inference(request: Request) -> Response:
    """Classify the picture in the body."""
    # A synchronous endpoint with the body as its argument does the same, but FastAPI validates the bytes first.
    (answer,) = await run_in_threadpool(_net.answers, [await request.body()])
    return Response(answer, media_type="application/json")
