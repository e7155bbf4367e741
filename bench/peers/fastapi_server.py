"""The peer FastAPI: one process, which runs the net in its threads.

BENCH_NET=... uvicorn bench.peers.fastapi_server:app
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from bench.peers.picture_net import PictureNet, PictureNetFile

app = FastAPI()
_net = PictureNet(PictureNetFile.from_environment())


@app.post("/inference")
async def inference(request: Request) -> Response:
    """Classify the picture in the body."""
    (answer,) = await run_in_threadpool(_net.answers, [await request.body()])
    return Response(answer, media_type="application/json")
