"""An instance inside the test's process: the test scripts its answers, the link to it is real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from atserving import link
from atserving.config import Instance, validate
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.tls import Tls
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from evaluator.serving.link_server import LinkServer, Replier
from evaluator.serving.listener import Listener

Infer = Callable[[InferRequest], Awaitable[InferResponse]]


class ScriptedInstance:
    """Answers each call by a task of ``infer``, which is cancelled if the caller leaves or the deadline passes."""

    def __init__(
        self,
        infer: Infer,
        app: str = "a",
        version: str = "v",
        name: str = "i",
        *,
        built_in: bool = False,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self.links = LinkServer(HeldBytes(1 << 30))
        self.flags: list[int] = []
        """The flags of all calls."""
        self._built_in = built_in
        self._infer = infer
        self._fields = {"app": app, "version": version, "id": name, "capacity": 8}
        # A test may give it other links.
        self._listener = Listener(lambda: self.links.connect(), Server([]).connect, tls)

    async def start(self, port: int = 0) -> Instance:
        """Listen on a port of the loopback; 0: any."""
        address = f"127.0.0.1:{await self._listener.start(f'127.0.0.1:{port}')}"
        instance = validate(Instance, {**self._fields, "address": address})
        self.links.serve(instance, self, built_in=self._built_in)
        return instance

    async def stop(self) -> None:
        """Break off all connections, and listen no more."""
        self._listener.close()
        self.links.abort()

    def admit(self, id_: int, length: int, replier: Replier) -> bool:
        return self.links.held.take(length, large=True)

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> ScriptedRequest:
        self.links.held.give(held or 0)
        self.flags.append(call.flags)
        return ScriptedRequest(call, self._infer, replier)


class ScriptedRequest:
    """A call that runs as a task."""

    def __init__(self, call: link.Call, infer: Infer, replier: Replier) -> None:
        self.ended = False
        self._task = asyncio.ensure_future(self._run(call, infer, replier))

    async def _run(self, call: link.Call, infer: Infer, replier: Replier) -> None:
        response = await infer(InferRequest.FromString(bytes(call.request)))
        outcome = link.ERROR if response.HasField("error") else link.RESULT
        replier.reply(link.Reply(call.id, outcome, 0, 0, 0, 0, 0, 0, response.SerializeToString()))

    def abandon(self) -> None:
        self._task.cancel()

    def expire(self) -> None:
        self._task.cancel()
