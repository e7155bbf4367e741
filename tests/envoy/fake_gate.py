"""A gate without instances: `python -m tests.envoy.fake_gate PORT`. A word in the request says what it does."""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop
from grpc import StatusCode

from atserving.grpc_call import Call
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.v1 import edge_pb2, serving_pb2

POISON, NEVER, SLOW, REFUSED = b"poison", b"never", b"slow", b"refused"
SLOW_S = 5.0
SIZES = {b"large": 40 << 20, b"middle": 200 << 10}
"""How long the answers to these words are."""
ANSWER = b'{"code":0,"message":"","result":null}'


def _obey(call: Call) -> bool:
    """Do what a word in the request says; return whether the call waits for no answer."""
    message = bytes(call.message)
    if POISON in message:
        os._exit(1)
    return NEVER in message


def _edge(call: Call) -> None:
    start = bytes(call.message[:100])
    size = next((size for word, size in SIZES.items() if word in start), None)
    if not _obey(call):
        if size is None:
            call.respond(200, [("content-type", "application/json")], ANSWER)
        else:
            call.respond(200, [("content-type", "application/octet-stream")], bytes(size))


def _typed(call: Call) -> None:
    slow = SLOW in bytes(call.message)
    if slow:
        asyncio.get_running_loop().call_later(SLOW_S, call.finish, SLOW)
    elif REFUSED in bytes(call.message):
        call.abort(StatusCode.NOT_FOUND, "unknown")
    elif not _obey(call):
        call.finish(b"")


async def _serve(port: int) -> None:
    services = [
        serving_pb2.DESCRIPTOR.services_by_name["ServingService"],
        edge_pb2.DESCRIPTOR.services_by_name["EdgeService"],
    ]
    server = Server(services, 21 << 20, held=HeldBytes(8 << 30))
    for method in ("Eval", "Batch"):
        server.unary(f"/atserving.v1.EdgeService/{method}", _edge)
        server.unary(f"/atserving.v1.ServingService/{method}", _typed)
    await server.start(f"127.0.0.1:{port}")
    await server.set_serving(True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
