"""``atserving release``: publish, promote, split and delete releases, and take changes back."""

from __future__ import annotations

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import pages
from atserving.cli.ops.compare import compare
from atserving.cli.ops.history import check_defaults, defaults_flag, history, watch
from atserving.cli.ops.options import Read, Write, flag, reading, writing
from atserving.cli.ops.put import put, sign
from atserving.cli.ops.waiting import wait_flags, wait_ready
from atserving.cli.tables import styled

_PROBLEMS = {
    admin_pb2.ListProblemsResponse.KIND_MALFORMED: "malformed",
    admin_pb2.ListProblemsResponse.KIND_UNKNOWN_FIELDS: "warning",
    admin_pb2.ListProblemsResponse.KIND_DELETION_HELD: "held back",
    admin_pb2.ListProblemsResponse.KIND_INEFFECTIVE: "no effect",
    admin_pb2.ListProblemsResponse.KIND_UNTRUSTED: "untrusted",
}


@click.group(help="Publish, promote, split and delete releases.")
def release() -> None:
    pass


release.add_command(put)
release.add_command(sign)
release.add_command(compare)
release.add_command(history)
release.add_command(watch)


@release.command("list", help="List the releases of all apps, or of APP, and what is wrong with their config.")
@completion.app(default="-", metavar="[APP]")
@flag("--phase", type=click.Choice(list(printing.PHASES)), help="List only this phase.")
@flag("--filter", "part", default="", metavar="TEXT", help="List only versions and descriptions with this part.")
@reading
def list_(read: Read, app: str, phase: str | None, part: str) -> None:
    request = admin_pb2.ListReleasesRequest(
        app=app, phase=printing.PHASES[phase] if phase else admin_pb2.PHASE_UNSPECIFIED, filter=part
    )
    found = [each for page in pages(read.servers, lambda stub: stub.ListReleases, request) for each in page.releases]
    if read.is_for_programs:
        read.print({"releases": [printing.as_dict(each) for each in found]})
    else:
        more = ("DIGEST", "FILE") if read.is_wide else ()
        printing.rows(
            ("APP", "VERSION", "PHASE", "WEIGHT", "INSTANCES", "ALIASES", "MODIFIED", "DESCRIPTION", *more),
            [
                (
                    each.app,
                    each.version,
                    printing.shown_phase(each.phase),
                    f"{each.weight:g}" if each.HasField("weight") else "-",
                    _instances(each),
                    ",".join(each.aliases) or "-",
                    printing.moment(each.lastmodified),
                    printing.text(each.desc),
                    *((each.digest, printing.text(each.file)) if read.is_wide else ()),
                )
                for each in found
            ],
        )
    problems = read.servers.read(lambda stub: stub.ListProblems, admin_pb2.ListProblemsRequest(app=app))
    for problem in problems.problems:
        line = f"{_PROBLEMS.get(problem.kind, 'problem')}: {problem.key}: {problem.reason}"
        click.echo(printing.text(line), err=True)


def _instances(each: admin_pb2.Release) -> str:
    return f"{each.instances}" + (styled(f" (+{each.outdated} outdated)", fg="yellow") if each.outdated else "")


@release.command(help="Show VERSION of APP: its content, instances and aliases.")
@completion.app()
@completion.version()
@reading
def show(read: Read, app: str, version: str) -> None:
    found = read.servers.read(lambda stub: stub.GetRelease, admin_pb2.GetReleaseRequest(app=app, version=version))
    if read.is_for_programs:
        read.print(found)
    else:
        # What has no value is absent.
        values = printing.as_dict(found)
        shown = {"phase": printing.shown_phase(found.phase), "instances": str(found.instances)}
        printing.fields((name.replace("_", " "), shown.get(name) or _shown(values.get(name, ""))) for name in _SHOWN)
    printing.warn(found)


_SHOWN = (
    *("app", "version", "phase", "desc", "weight", "aliases", "instances", "file", "custom_files", "custom_values"),
    *("model_params", "use_device", "batch_size", "image_width", "lastmodified", "digest", "signature", "etag"),
)


def _shown(value: object) -> str:
    return printing.text(value) if isinstance(value, str) else printing.compact(value)


@release.command(help="Move VERSION of APP to production.")
@completion.app()
@completion.version()
@flag("--exclusive", is_flag=True, help="Move the other versions to staging at the same time.")
@wait_flags("Wait for ready instances first.")
@writing
def promote(
    write: Write, app: str, version: str, exclusive: bool, wait: bool, instances: int | None, timeout: float
) -> None:
    if (wait or instances) and not write.validate_only:
        write.servers.read(lambda stub: stub.GetRelease, admin_pb2.GetReleaseRequest(app=app, version=version))
        wait_ready(write.servers, app, version, instances, timeout)
    request = admin_pb2.PromoteReleaseRequest(app=app, version=version, exclusive=exclusive)
    stored = write.call(lambda stub: stub.PromoteRelease, request)
    write.tell(f"{stored.app} {stored.version} is in {printing.phase(stored.phase)}")


@release.command(help="Move VERSION of APP to staging.")
@completion.app()
@completion.version()
@writing
def demote(write: Write, app: str, version: str) -> None:
    request = admin_pb2.DemoteReleaseRequest(app=app, version=version)
    stored = write.call(lambda stub: stub.DemoteRelease, request)
    write.tell(f"{stored.app} {stored.version} is in {printing.phase(stored.phase)}")


def _weights(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1
        if not name or not 0 <= weight <= 1e6 or name in weights:
            raise click.BadParameter(f"{value!r} should be VERSION=WEIGHT, each version once", context, parameter)
        weights[name] = weight
    return weights


@release.command(help="Split the requests without a version: atserving release split digits v1=9 v2=1")
@completion.app()
@completion.argument("weights", completion.weights, nargs=-1, callback=_weights, metavar="VERSION=WEIGHT...")
@flag("--exclusive", is_flag=True, help="Move the other versions to staging.")
@flag("--by-capacity", is_flag=True, help="Remove the weights: the shares follow the capacity of ready instances.")
@writing
def split(write: Write, app: str, weights: dict[str, float], exclusive: bool, by_capacity: bool) -> None:
    if bool(weights) == by_capacity:
        raise click.UsageError("name versions with weights, or --by-capacity")
    request = admin_pb2.SplitAppRequest(app=app, weights=weights, exclusive=exclusive, by_capacity=by_capacity)
    printing.shares(write.call(lambda stub: stub.SplitApp, request))
    write.tell(f"the requests of {app} are split")


@release.command(help="Take back the last change of APP, or all changes since REVISION with it.")
@completion.app(default="")
@flag("--to", "revision", default="", metavar="REVISION", help="A change: the app becomes what it was before it.")
@defaults_flag
@writing
def rollback(write: Write, app: str, revision: str, defaults: bool) -> None:
    check_defaults(app, defaults)
    request = admin_pb2.RollbackAppRequest(app=app, revision=revision)
    stored = write.call(lambda stub: stub.RollbackApp, request)
    if app:
        printing.shares(stored)
    what = f"{app} is" if app else "the defaults are"
    write.tell(f"{what} what {'it was' if app else 'they were'}{f' before change {revision}' if revision else ''}")


@release.command(help="Delete VERSION of APP, and its worker settings.")
@completion.app()
@completion.version()
@writing
def delete(write: Write, app: str, version: str) -> None:
    write.call(lambda stub: stub.DeleteRelease, admin_pb2.DeleteReleaseRequest(app=app, version=version))
    write.tell(f"{app} {version} is deleted")


@release.command(
    "accept-deletions", help="Take the deletions in etcd that are held back, for a minute the next ones, too."
)
@writing
def accept_deletions(write: Write) -> None:
    if write.validate_only:
        raise click.UsageError("accept-deletions has no --dry-run: atserving release list names what is held back")
    accepted = write.call(lambda stub: stub.AcceptDeletions, admin_pb2.AcceptDeletionsRequest())
    write.tell(f"deletions are taken at once for {accepted.ttl.seconds} s")
