"""Load on an evaluator: callers on one stream, like a gate's, each with one request in flight at all times."""

from __future__ import annotations

import asyncio
import time

from google.protobuf.message import Message

from atserving import transport
from atserving.v1 import evaluator_pb2, serving_pb2
from bench.measurement import Row, quantiles_ms
from bench.processes import Evaluator
from bench.workload import Workload

_EXCHANGE = "/atserving.v1.EvaluatorService/Exchange"
_TIMEOUT_US = 60_000_000


def measure(evaluator: Evaluator, workload: Workload, callers: int, seconds: float) -> Row:
    """Run ``callers`` for about ``seconds``; return their rate and latency, and the CPU of each process."""
    before, own_s = evaluator.cpu_s(), time.process_time()
    took_s, errors, wall_s = asyncio.run(_load(evaluator.address, workload.image, callers, seconds))
    cpu_s = {name: used - before[name] for name, used in evaluator.cpu_s().items()}
    cpu_s["load generator"] = time.process_time() - own_s
    cpu_ms = {name: round(used / len(took_s) * 1e3, 3) for name, used in cpu_s.items()}
    what = f"evaluator, {callers} callers"
    return Row(workload.name, what, len(took_s) / wall_s, *quantiles_ms(took_s), cpu_ms, errors)


class _Calls:
    """The calls of all callers, with the time of sending of each."""

    def __init__(self, image: bytes) -> None:
        self.sent_s: dict[int, float] = {}
        self._next_id = 0
        # All fields but the id, serialized once. Protobuf merges the concatenation of two serialized messages.
        request = evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=image)], reqid="bench")
        self._same = evaluator_pb2.Call(request=request, timeout_us=_TIMEOUT_US).SerializeToString()

    def frame(self, count: int) -> bytes:
        """Return a serialized ExchangeRequest with so many new calls."""
        parts = []
        for _ in range(count):
            self._next_id += 1
            self.sent_s[self._next_id] = time.perf_counter()
            own = evaluator_pb2.Call(id=self._next_id).SerializeToString()
            parts += [_delimited(1, len(own) + len(self._same)), own, self._same]
        return b"".join(parts)


async def _load(address: str, image: bytes, callers: int, seconds: float) -> tuple[list[float], int, float]:
    """Return how long each answer took, how many were errors, and the wall seconds."""
    calls = _Calls(image)
    took_s: list[float] = []
    errors = 0
    async with transport.channel(address) as channel:
        stream = channel.stream_stream(
            _EXCHANGE,
            request_serializer=None,
            response_deserializer=evaluator_pb2.ExchangeResponse.FromString,
        )()  # type: ignore[call-arg] # requests are written one by one
        await stream.wait_for_connection()
        await stream.write(calls.frame(callers))
        began_s = 0.0
        while not began_s or time.perf_counter() - began_s < seconds:
            response = await stream.read()
            assert isinstance(response, Message)
            replies = list(response.replies)  # type: ignore[attr-defined] # its type is the deserializer's
            now_s = time.perf_counter()
            # Count from the first answers on: by then every engine has work, and more is queued.
            began_s = began_s or now_s
            for reply in replies:
                took_s.append(now_s - calls.sent_s.pop(reply.id))
                errors += reply.response.HasField("error")
            await stream.write(calls.frame(len(replies)))
        wall_s = time.perf_counter() - began_s
        stream.cancel()
    return took_s, errors, wall_s


def _delimited(number: int, length: int) -> bytes:
    """Return the tag and the length of an embedded message."""
    out = [number << 3 | 2]
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])
