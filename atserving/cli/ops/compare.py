"""``atserving release compare``: what gates have found of versions that get copies of requests."""

from __future__ import annotations

import click
from google.protobuf.duration_pb2 import Duration

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.options import Read, flag, reading
from atserving.cli.tables import styled

_SHOWN = 10


@click.command(help="Compare the versions of APP that get copies of requests, or VERSION, with those that answer.")
@completion.app()
@completion.version(required=False)
@flag("-n", "--most", type=click.IntRange(0), default=_SHOWN, show_default=True, help="How many differing requests.")
@reading
def compare(read: Read, app: str, version: str | None, most: int) -> None:
    request = admin_pb2.ListComparisonsRequest(app=app, version=version or "")
    found = read.servers.read(lambda stub: stub.ListComparisons, request)
    if read.is_for_programs:
        read.print({"comparisons": [printing.as_dict(each) for each in found.comparisons]})
        return
    printing.rows(
        ("VERSION", "BESIDE", "EQUAL", "DIFFERENT", "FAILED", "SLOWER", "DROPPED", "P50", "P99", "VERDICT"),
        [
            (
                each.version,
                each.baseline,
                str(each.equal),
                _marked(each.different),
                _marked(each.failed),
                str(each.slower),
                str(each.dropped),
                _times(each.p50, each.baseline_p50),
                _times(each.p99, each.baseline_p99),
                printing.text(each.verdict),
            )
            for each in found.comparisons
        ],
    )
    samples = [(each, sample) for each in found.comparisons for sample in each.samples][:most]
    if samples:
        click.echo()
        printing.rows(
            ("REQUEST", "VERSION", "BESIDE", "TIME", "DIFFERENCE"),
            [
                (
                    printing.text(sample.reqid),
                    each.version,
                    each.baseline,
                    printing.moment(sample.time),
                    printing.text(f"failed: {sample.reason}" if sample.failed else sample.reason),
                )
                for each, sample in samples
            ],
        )


def _marked(count: int) -> str:
    return styled(str(count), fg="yellow") if count else "0"


def _times(ours: Duration, theirs: Duration) -> str:
    """Return a quantile of the copies, beside that of the callers' own requests."""
    return f"{_ms(ours)} / {_ms(theirs)}"


def _ms(duration: Duration) -> str:
    return f"{duration.ToTimedelta().total_seconds() * 1e3:.3g} ms"
