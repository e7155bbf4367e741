"""``atserving instance`` and ``atserving ps``: the registered evaluators, and what they do now."""

from __future__ import annotations

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import pages
from atserving.cli.ops.options import Read, flag, reading
from atserving.cli.tables import styled


@click.group(help="List the instances.")
def instance() -> None:
    pass


@click.command("list", help="List the instances of all apps, or of VERSION of APP, with their load.")
@completion.app(default="-", metavar="[APP]")
@completion.version(default="")
@flag("--load/--no-load", default=True, show_default=True, help="Ask each instance for its requests in flight.")
@reading
def list_(read: Read, app: str, version: str, load: bool) -> None:
    request = admin_pb2.ListInstancesRequest(app=app, version=version, load=load)
    found = [each for page in pages(read.servers, lambda stub: stub.ListInstances, request) for each in page.instances]
    _warn_of_untrusted(read, app)
    if read.is_for_programs:
        read.print({"instances": [printing.as_dict(each) for each in found]})
        return
    more = ("DIGEST",) if read.is_wide else ()
    printing.rows(
        ("APP", "VERSION", "ID", "ADDRESS", "CAPACITY", "LOAD", "SINCE", "PLAN", *more),
        [
            (
                each.app,
                each.version,
                each.id,
                printing.text(each.address),
                str(each.capacity),
                _load(each),
                printing.moment(each.since),
                _plan(each),
                *((printing.text(each.digest or "-"),) if read.is_wide else ()),
            )
            for each in found
        ],
    )


def _warn_of_untrusted(read: Read, app: str) -> None:
    """Name the releases that no evaluator starts for want of a signature."""
    found = read.servers.read(lambda stub: stub.ListProblems, admin_pb2.ListProblemsRequest(app=app)).problems
    for each in found:
        if each.kind == admin_pb2.ListProblemsResponse.KIND_UNTRUSTED:
            click.echo(printing.text(f"untrusted: {each.key}: {each.reason}"), err=True)


def _load(each: admin_pb2.InstanceStatus) -> str:
    if each.outdated:
        return styled("outdated", fg="yellow")
    if each.unreachable:
        return styled(f"unreachable: {printing.text(each.unreachable)}", fg="red")
    if not each.HasField("load"):
        return "-"
    if each.load.away:
        return styled("away", fg="red")
    return f"{each.load.in_flight}"


def _plan(each: admin_pb2.InstanceStatus) -> str:
    if not each.HasField("plan"):
        return "-"
    plan = each.plan
    return printing.text(f"{plan.device}, batch {plan.batch_size}, engines {plan.engines}, preparers {plan.preparers}")


instance.add_command(list_)
ps = click.Command(
    "ps", params=list(list_.params), callback=list_.callback, help=list_.help, short_help="List the instances."
)
