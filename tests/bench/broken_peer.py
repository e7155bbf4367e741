"""A server whose first answer is right and whose others are wrong."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from bench.peers.fastapi_server import inference as right_inference

app = FastAPI()
_answered: list[bytes] = []


@app.post("/inference")
async def inference(request: Request) -> Response:
    right = await right_inference(request)
    if _answered:
        return Response(b'{"index":3,"score":0.5}')
    _answered.append(bytes(right.body))
    return right
