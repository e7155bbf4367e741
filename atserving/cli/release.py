"""``atserving release``: publish releases, change their phase and list them, over the registry's API."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click
import grpc
import orjson
from google.protobuf.json_format import MessageToDict

from atserving import transport
from atserving.cli import service
from atserving.errors import StartError
from atserving.v1 import registry_pb2, registry_pb2_grpc

_PHASES = {"staging": registry_pb2.PHASE_STAGING, "production": registry_pb2.PHASE_PRODUCTION}
_PHASE_NAMES = {number: name for name, number in _PHASES.items()}
_CALL_TIMEOUT_S = 10.0

_T = TypeVar("_T")

_registry_option = service.addresses_option(
    "--registry", default="127.0.0.1:50053", show_default=True, help="The registries; the first that answers is used."
)


def _call(registries: list[str], call: Callable[[registry_pb2_grpc.ReleaseServiceStub], _T]) -> _T:
    """Call the registries in turn until one answers. Raises StartError with the last error."""
    reason = ""
    for address in registries:
        with grpc.insecure_channel(address, options=transport.CHANNEL_OPTIONS) as channel:
            try:
                return call(registry_pb2_grpc.ReleaseServiceStub(channel))
            except grpc.RpcError as error:
                failed = cast(grpc.Call, error)
                reason = f"registry {address}: {failed.details()}"
                if failed.code() is not grpc.StatusCode.UNAVAILABLE:
                    break
    raise StartError(reason)


def _json_object(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}", context, parameter) from None
    if not isinstance(fields, dict):
        raise click.BadParameter("not a JSON object", context, parameter)
    return value


def _file_pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(name and uri for name, _, uri in pairs):
        raise click.BadParameter("should be NAME=URI", context, parameter)
    return {name: uri for name, _, uri in pairs}


@click.group(help="Publish releases, change their phase, list them.")
def release() -> None:
    pass


@release.command(help="Publish VERSION of APP. FILE is the URI of its tar (file://, http(s)://, qiniu://).")
@click.argument("app")
@click.argument("version")
@click.argument("file")
@click.option(
    "--phase",
    type=click.Choice(list(_PHASES)),
    help="Default: staging for a new release, unchanged for a published one.",
)
@click.option("--desc", default="", help="A description for people.")
@click.option("--device", default="CPU", show_default=True, help="CPU, GPU or GPU:<index>.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="The largest batch of requests.")
@click.option("--image-width", type=click.IntRange(1, 16384), help="The width, in pixels, to resize images to.")
@click.option("--weight", type=click.FloatRange(0, 1e6), help="Scales this version's share of unversioned traffic.")
@click.option("--custom-values", default="{}", callback=_json_object, help='A JSON object such as {"net": "classify"}.')
@click.option("--model-params", default="{}", callback=_json_object, help="A JSON object with options of the engine.")
@click.option(
    "--custom-file", multiple=True, callback=_file_pairs, metavar="NAME=URI", help="An additional file; repeatable."
)
@_registry_option
def publish(
    registry: list[str], app: str, version: str, file: str, phase: str | None, desc: str, device: str, **options: Any
) -> None:
    wanted = registry_pb2.Release(
        name=app,
        version=version,
        file=file,
        phase=_PHASES[phase] if phase else registry_pb2.PHASE_UNSPECIFIED,
        desc=desc,
        use_device=device,
        batch_size=options["batch_size"],
        image_width=options["image_width"],
        weight=options["weight"],
        custom_files=options["custom_file"],
        custom_values_json=options["custom_values"],
        model_params_json=options["model_params"],
    )
    request = registry_pb2.PublishReleaseRequest(release=wanted)
    stored = _call(registry, lambda stub: stub.PublishRelease(request, timeout=_CALL_TIMEOUT_S)).release
    print(f"{stored.name} {stored.version} is published, in {_PHASE_NAMES[stored.phase]}")


@release.command(help="Move VERSION of APP to PHASE.")
@click.argument("app")
@click.argument("version")
@click.argument("phase", type=click.Choice(list(_PHASES)))
@_registry_option
def phase(registry: list[str], app: str, version: str, phase: str) -> None:
    request = registry_pb2.SetPhaseRequest(app=app, version=version, phase=_PHASES[phase])
    stored = _call(registry, lambda stub: stub.SetPhase(request, timeout=_CALL_TIMEOUT_S)).release
    print(f"{stored.name} {stored.version} is in {_PHASE_NAMES[stored.phase]}")


@release.command(
    "accept-deletions", help="Take the deletions in etcd that are held back, for a minute the next ones, too."
)
@_registry_option
def accept_deletions(registry: list[str]) -> None:
    request = registry_pb2.AcceptDeletionsRequest()
    accepted = _call(registry, lambda stub: stub.AcceptDeletions(request, timeout=_CALL_TIMEOUT_S))
    print(f"deletions are taken at once for {accepted.ttl_ms // 1000} s")


@release.command("list", help="List releases with their ready instances, and malformed keys in etcd.")
@click.option("--app", default="", help="List only this app.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_registry_option
def list_(registry: list[str], app: str, as_json: bool) -> None:
    request = registry_pb2.ListReleasesRequest(app=app)
    found = _call(registry, lambda stub: stub.ListReleases(request, timeout=_CALL_TIMEOUT_S))
    if as_json:
        print(orjson.dumps(MessageToDict(found, preserving_proto_field_name=True), option=orjson.OPT_INDENT_2).decode())
        return
    rows = [("APP", "VERSION", "PHASE", "INSTANCES", "MODIFIED", "DESCRIPTION")]
    for status in found.releases:
        each = status.release
        phase_name, outdated = _PHASE_NAMES.get(each.phase, "?"), len(status.outdated)
        instances = f"{len(status.instances) - outdated}" + (f" (+{outdated} outdated)" if outdated else "")
        rows.append((each.name, each.version, phase_name, instances, each.lastmodified, each.desc))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for malformed in found.malformed:
        print(f"malformed: {malformed.key}: {malformed.reason}", file=sys.stderr)
    for warning in found.warnings:
        print(f"warning: {warning.key}: {warning.reason}", file=sys.stderr)
    for key in found.held:
        print(f"held back: {key}: deleted in etcd with most releases, and still in use", file=sys.stderr)
