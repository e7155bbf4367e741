"""Draw the trace of one real request: python -m tests.e2e.trace_picture docs/trace.svg."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import aiohttp

from atserving.local import examples
from atserving.local.mesh import Mesh
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan

_TRACE = "0af7651916cd43dd8448eb211c80319c"
_SPANS = ("edge", "eval", "attempt", "infer", "fetch", "queue", "decode", "queue", "forward", "postprocess")
_WARM_UP = 200
_COLORS = {"atserving-envoy": "#4c78a8", "atserving-gate": "#f58518", "atserving-evaluator": "#54a24b"}
_ROW, _LEFT, _WIDTH, _RIGHT = 22, 150, 560, 80  # px


async def _trace() -> list[ReceivedSpan]:
    """Return the spans of one request for a picture that the evaluator fetches, in a mesh that is warm."""
    with OtlpReceiver() as receiver:
        environment = receiver.environment(OTEL_TRACES_SAMPLER="parentbased_always_off")
        async with (
            Mesh(serves=examples.DIGITS[:1], environment=environment) as mesh,
            aiohttp.ClientSession(raise_for_status=True) as session,
        ):
            request = {"data": {"uri": f"{mesh.files_url}/digits/images/7.png"}}
            url = f"{mesh.url}/v1/eval/digits"
            for _ in range(_WARM_UP):
                await session.post(url, json=request)
            await session.post(url, json=request, headers={"traceparent": f"00-{_TRACE}-b7ad6b7169203331-01"})
            return await receiver.traced(_TRACE, *_SPANS)


def draw(spans: list[ReceivedSpan]) -> str:
    """Return an SVG: a row for each span, below its parent, on one line of time."""
    parents = {span.span_id: span.parent_id for span in spans}
    first = min(span.start_ns for span in spans)
    scale = _WIDTH / (max(span.end_ns for span in spans) - first)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" '
            f'height="{_ROW * (len(spans) + 1)}" font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *_legend(),
            *(
                line
                for row, span in enumerate(sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)), 1)
                for line in _bar(span, row, _depth(span, parents), first, scale)
            ),
            "</svg>\n",
        ]
    )


def _legend() -> Iterator[str]:
    for number, (service, color) in enumerate(_COLORS.items()):
        x = _LEFT + number * 170
        yield f'<rect x="{x}" y="5" width="12" height="12" fill="{color}"/>'
        yield f'<text x="{x + 18}" y="15">{service}</text>'


def _bar(span: ReceivedSpan, row: int, depth: int, first: int, scale: float) -> Iterator[str]:
    x, width = _LEFT + (span.start_ns - first) * scale, max((span.end_ns - span.start_ns) * scale, 1)
    y = row * _ROW
    yield f'<text x="{8 + depth * 12}" y="{y + 15}">{escape(span.name)}</text>'
    yield (
        f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" '
        f'fill="{_COLORS.get(span.service, "gray")}"/>'
    )
    yield f'<text x="{x + width + 5:.1f}" y="{y + 15}">{(span.end_ns - span.start_ns) / 1e6:.2f} ms</text>'


def _depth(span: ReceivedSpan, parents: dict[str, str]) -> int:
    depth, above = 0, span.parent_id
    while above in parents:
        depth, above = depth + 1, parents[above]
    return depth


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(asyncio.run(_trace())))
