"""``atserving release put`` and ``sign``: publish or sign a release, from flags or from the JSON that etcd has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import orjson
from google.protobuf.json_format import ParseDict, ParseError

from atserving import known_fields
from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import checking, completion, printing
from atserving.cli.ops.client import INVALID, NOT_FOUND, REFUSED, CommandError
from atserving.cli.ops.options import Write, flag, writing
from atserving.cli.ops.waiting import wait_flags, wait_ready
from atserving.config import MalformedConfig, Release, validate
from atserving.signatures import SigningKey

_MOST_EXACT = 1 << 53
_OUTPUT_ONLY = ("lastmodified",)
_VALUES = ("custom_values", "model_params")


def _text_of(context: click.Context, parameter: click.Parameter, value: str) -> bytes:
    if not value.startswith("@"):
        return value.encode()
    try:
        return Path(value[1:]).read_bytes()
    except OSError as error:
        raise click.BadParameter(f"can't read {value[1:]}: {error.strerror}", context, parameter) from None


def _json_object(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        fields = orjson.loads(_text_of(context, parameter, value))
    except orjson.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}", context, parameter) from None
    if not isinstance(fields, dict):
        raise click.BadParameter("not a JSON object", context, parameter)
    return fields


def _json_file(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any]:
    return _json_object(context, parameter, value and f"@{value}") or {}


def _file_pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(name and uri for name, _, uri in pairs):
        raise click.BadParameter("should be NAME=URI", context, parameter)
    return {name: uri for name, _, uri in pairs}


_KEY = click.Path(path_type=Path, dir_okay=False)


@click.command(
    help="Publish VERSION of APP. FILE is the URI of its tar (file://, http(s)://, qiniu://). With -f, the three are "
    "in the JSON; flags replace its fields. Before that, the files are fetched and the net is loaded here, and the "
    "digest of each file goes into the release."
)
@completion.app(required=False)
@completion.argument("version", required=False)
@click.argument("file", required=False)
@flag("-f", "--file", "fields", callback=_json_file, metavar="PATH", help="A release as JSON, as etcd has it.")
@flag(
    "--phase",
    type=click.Choice(list(printing.PHASES)),
    help="Default: staging for a new release, unchanged for a published one.",
)
@flag("--desc", help="A description for people.")
@flag("--device", "use_device", help="CPU, GPU or GPU:<index>. Default: CPU.")
@flag("--batch-size", type=click.IntRange(1, 4096), help="The largest batch of requests.")
@flag("--image-width", type=click.IntRange(1, 16384), help="The width, in pixels, to resize images to.")
@flag("--weight", type=click.FloatRange(0, 1e6), help="Scales this version's share of unversioned traffic.")
@flag("--custom-values", callback=_json_object, metavar="JSON|@PATH", help='A JSON object such as {"net": "classify"}.')
@flag("--model-params", callback=_json_object, metavar="JSON|@PATH", help="A JSON object with options of the engine.")
@flag("--custom-file", "custom_files", multiple=True, callback=_file_pairs, metavar="NAME=URI", help="Repeatable.")
@flag("--sign-key", type=_KEY, metavar="PATH", help="Sign the release with this private key.")
@flag("--no-check", is_flag=True, help="Publish it without fetching its files and loading its net here.")
@wait_flags("Wait until instances are ready.")
@writing
def put(
    write: Write,
    app: str | None,
    version: str | None,
    file: str | None,
    fields: dict[str, Any],
    wait: bool,
    instances: int | None,
    timeout: float,
    sign_key: Path | None,
    no_check: bool,
    **flags: Any,
) -> None:
    names = {"name": app, "version": version, "file": file}
    given = {name: value for name, value in (names | flags).items() if value is not None and value != {}}
    missing = [name for name in names if name not in fields | given]
    if missing:
        raise click.UsageError(f"{', '.join('app' if each == 'name' else each for each in missing)}: missing")
    fields = {name: value for name, value in (fields | given).items() if name not in _OUTPUT_ONLY}
    known = _stored(write, release_from(fields))
    fields = checking.with_digests(fields, known, check=not no_check)
    release = release_from(signed(fields, sign_key) if sign_key else fields)
    stored = write.call(lambda stub: stub.CreateRelease, admin_pb2.CreateReleaseRequest(release=release))
    write.tell(f"{stored.app} {stored.version} is published, in {printing.phase(stored.phase)}")
    if (wait or instances) and not write.validate_only:
        wait_ready(write.servers, stored.app, stored.version, instances, timeout)


@click.command(
    help="Sign the release of -f, whose files all have #sha256=, and print it for `release put -f`. It needs no mesh."
)
@flag("-f", "--file", "fields", required=True, callback=_json_file, metavar="PATH", help="A release as etcd has it.")
@flag("--sign-key", required=True, type=_KEY, metavar="PATH", help="Your private key: see atserving key generate.")
def sign(fields: dict[str, Any], sign_key: Path) -> None:
    release_from(fields)
    printing.document(signed(fields, sign_key), "json")


def signed(fields: dict[str, Any], key: Path) -> dict[str, Any]:
    """Return the fields of a release, as etcd has them, with a signature. Raises CommandError, StartError."""
    # The registry stores 1.0 as 1, and the digest of the two differs.
    exact = {name: printing.whole(value) if name in _VALUES else value for name, value in fields.items()}
    try:
        release = validate(Release, exact)
    except MalformedConfig as error:
        raise CommandError(str(error), INVALID) from None
    return {**exact, "signature": SigningKey(key).sign(release)}


def _stored(write: Write, release: admin_pb2.Release) -> admin_pb2.Release | None:
    """Return the version that is published under this name, if it is. Raises CommandError."""
    try:
        request = admin_pb2.GetReleaseRequest(app=release.app, version=release.version)
        return write.servers.read(lambda stub: stub.GetRelease, request)
    except CommandError as error:
        if error.exit_status in (NOT_FOUND, REFUSED):
            return None
        raise


def release_from(fields: dict[str, Any]) -> admin_pb2.Release:
    """Return the message of a release as etcd has it. Raises CommandError."""
    if unknown := sorted(fields.keys() - set(Release.__struct_fields__)):
        raise CommandError(known_fields.warning(unknown, Release.__struct_fields__), INVALID)
    wanted = dict(fields)
    wanted["app"] = wanted.pop("name", "")
    if "phase" in wanted:
        if wanted["phase"] not in printing.PHASES:
            raise CommandError(f"phase: should be {' or '.join(printing.PHASES)}", INVALID)
        wanted["phase"] = admin_pb2.Phase.Name(printing.PHASES[wanted["phase"]])
    for name in _VALUES:
        _check_exact(wanted.get(name), name)
    message = admin_pb2.Release()
    try:
        ParseDict(wanted, message)
    except ParseError as error:
        raise CommandError(" ".join(str(error).split()), INVALID) from None
    return message


def _check_exact(value: Any, where: str) -> None:
    """Refuse integers that the API's numbers, which are doubles, would change."""
    if isinstance(value, int) and abs(value) > _MOST_EXACT:
        raise CommandError(f"{where}: {value} has more than 53 bits", INVALID)
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_exact(each, where)
