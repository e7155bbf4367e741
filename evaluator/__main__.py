"""``python -m evaluator`` serves a release as one instance; ``python -m evaluator check`` checks one without a mesh."""

from __future__ import annotations

import asyncio
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from atserving import lifecycle
from atserving.cli import service
from atserving.config import is_name
from atserving.hosts import Hosts
from atserving.telemetry import configure_logging
from atserving.tls import TlsFiles

try:
    from evaluator.fetching.addresses import AllowedNetwork
    from evaluator.fetching.proxy import checked_url, read_proxy
    from evaluator.sandbox.decision import Mode, SandboxSettings
    from evaluator.sandbox.enter import protect_front
    from evaluator.serving.instance import InstanceSettings, run

    # The instance imports them when it needs them.
    for each in ("aiohttp", "numpy", "onnx"):
        if not find_spec(each):
            raise ModuleNotFoundError(name=each)
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"evaluator: {missing.name} is not installed: pip install '.[cpu]' in a checkout, or '.[gpu]' for a GPU"
    ) from None

if TYPE_CHECKING:
    from atserving.signatures import TrustedKeys
    from evaluator.fetching.qiniu import QiniuConfig


def _name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_name(value):
        raise click.BadParameter(
            f"{value!r} should match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}", ctx=context, param=parameter
        )
    return value


def _networks(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[AllowedNetwork]:
    try:
        return [AllowedNetwork.parse(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=context, param=parameter) from None


def _proxy_url(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return checked_url(value) if value else None
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=context, param=parameter) from None


def _hosts(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        Hosts(values)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=context, param=parameter) from None
    return values


def _json(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    try:
        return None if value is None else orjson.loads(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not JSON", ctx=context, param=parameter) from None


def _named_files(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse ``name=path`` values to URIs by name."""
    files = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not Path(path).is_file():
            raise click.BadParameter(f"{value!r} is not NAME=PATH of a file", ctx=context, param=parameter)
        files[name] = Path(path).resolve().as_uri()
    return files


def _keys(path: Path) -> QiniuConfig:
    # Import it here: only an instance with keys needs it.
    from evaluator.fetching.qiniu import read_config

    return read_config(path)


def _trusted(path: Path | None) -> TrustedKeys | None:
    # Import it here: only an instance with keys needs it.
    from atserving.signatures import TrustedKeys

    return TrustedKeys(path) if path else None


_network_option = click.option(
    "--allow-script-network",
    is_flag=True,
    help="Give the network to a net.py whose model_params.network is true.",
)


@click.command(epilog="To try a release without a mesh: evaluator check RELEASE.TAR; see evaluator check --help.")
@click.option("--app", required=True, callback=_name, help="The app to serve.")
@click.option("--version", required=True, callback=_name, help="Its version.")
@service.addresses_option("--registry", required=True, help="The registries; the instance uses any one of them.")
@service.listen_option("127.0.0.1:0")
@service.insecure_option
@click.option(
    "--advertise",
    callback=service.host_and_port,
    metavar="HOST:PORT",
    help="The address at which gates reach this instance; port 0: the port of --listen.",
)
@click.option(
    "--workspace", type=click.Path(path_type=Path, file_okay=False), help="The folder for the files of the release."
)
@service.wait_option("Seconds to wait for a registry and for the release to be published.")
@service.seconds_option("--grace", 30.0, "Seconds for requests in flight to finish after SIGTERM.")
@click.option(
    "--allow-network",
    "allow_networks",
    multiple=True,
    callback=_networks,
    metavar="NETWORK[:PORT]",
    help="A private network or address that resources may come from, on one port or on all; repeatable.",
)
@click.option(
    "--qiniu",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The app owner's keys for qiniu:// resources, and the buckets requests may read, in JSON.",
)
@click.option(
    "--proxy",
    callback=_proxy_url,
    metavar="URL",
    help="The HTTP proxy to fetch resources and releases through: http://host:port. The environment's are not used.",
)
@click.option(
    "--proxy-auth",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The credentials for the proxy, in one line: user:password.",
)
@click.option(
    "--no-proxy",
    "no_proxies",
    multiple=True,
    callback=_hosts,
    metavar="HOST",
    help="A host to fetch from without the proxy: a name, *.example.com, an address or a network; repeatable.",
)
@service.http_option("/metrics, /status, /live, /ready and /log")
@click.option(
    "--status-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file that holds what /status answers, also after this process has ended.",
)
@click.option(
    "--max-held",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="MIB",
    help="The most MiB of requests and answers that the process holds; it refuses what is over it.",
)
@service.trusted_keys_option
@service.tls_options
@click.option(
    "--local-files",
    "local_files",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="A folder whose files a release may name by file://; repeatable. The default is all folders.",
)
@click.option(
    "--sandbox",
    type=click.Choice([each.value for each in Mode]),
    default=Mode.AUTO.value,
    show_default=True,
    help="How a net is confined: as far as this host can; a net.py fully, or not at all; or without, to debug.",
)
@click.option(
    "--scripts",
    type=click.Choice(["allow", "forbid"]),
    default="allow",
    show_default=True,
    help="Whether a release with a net.py may start.",
)
@_network_option
@click.option(
    "--script-processes",
    type=click.IntRange(16),
    default=SandboxSettings.processes,
    metavar="N",
    help="The most processes and threads of a net.py.  [default: 256, and 16 for each CPU]",
)
@click.option(
    "--script-file",
    type=click.IntRange(1),
    default=SandboxSettings.file_bytes >> 20,
    show_default=True,
    metavar="MIB",
    help="The most MiB of a file that a net.py writes.",
)
@service.cache_option
@service.log_level_option
@service.log_requests_option
@service.slow_option
def main(
    app: str,
    version: str,
    registry: list[str],
    listen: str,
    insecure: bool,
    advertise: str | None,
    workspace: Path | None,
    wait: float,
    grace: float,
    allow_networks: list[AllowedNetwork],
    qiniu: Path | None,
    proxy: str | None,
    proxy_auth: Path | None,
    no_proxies: tuple[str, ...],
    http: str,
    status_file: Path | None,
    max_held: int,
    trusted_keys: Path | None,
    tls: TlsFiles | None,
    local_files: tuple[Path, ...],
    sandbox: str,
    scripts: str,
    allow_script_network: bool,
    script_processes: int,
    script_file: int,
    config_cache: Path | None,
    log_level: str,
    log_requests: float,
    slow: float,
) -> None:
    """Serve one version of one app, as one instance of the mesh."""
    configure_logging("evaluator", log_level, requests=log_requests, slow_s=slow, threaded=True)
    if not proxy and (proxy_auth or no_proxies):
        raise click.UsageError("--proxy-auth and --no-proxy go with --proxy")
    if sandbox != Mode.OFF:
        protect_front()
    keys = _keys(qiniu) if qiniu else None
    settings = InstanceSettings(
        app=app,
        version=version,
        registries=registry,
        listen=listen,
        insecure=insecure,
        advertise=advertise,
        workspace=workspace,
        wait_s=wait,
        grace_s=grace,
        allow_networks=allow_networks,
        qiniu=keys,
        proxy=read_proxy(proxy, proxy_auth, no_proxies) if proxy else None,
        http=http,
        status_file=status_file,
        config_cache=config_cache,
        max_held_bytes=max_held << 20,
        trusted_keys=_trusted(trusted_keys),
        tls=tls,
        local_files=local_files,
        own_files=[each for each in (qiniu, proxy_auth, trusted_keys, config_cache, tls and tls.key) if each],
        sandbox=SandboxSettings(
            Mode(sandbox), allow_script_network, scripts == "allow", script_processes, script_file << 20
        ),
    )
    lifecycle.run(run(settings))


@click.command()
@click.argument("tar", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="RELEASE.TAR")
@click.option("--net", help="The built-in net to run if the tar has no net.py.  [default: classify]")
@click.option("--custom-values", callback=_json, metavar="JSON", help="The release's custom_values.")
@click.option("--image-width", type=click.IntRange(1), help="The release's image_width.")
@click.option("--batch-size", type=click.IntRange(1), help="The release's batch_size.")
@click.option("--use-device", metavar="DEVICE", default="CPU", show_default=True, help="CPU, GPU or GPU:<index>.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An image to run it on; repeatable. The default is a made-up image.",
)
@click.option("--group", is_flag=True, help="Send all images as one request.")
@click.option("--params", callback=_json, metavar="JSON", help="The requests' params.")
@click.option("--model-params", callback=_json, metavar="JSON", help="The release's model_params.")
@click.option(
    "--custom-file",
    "custom_files",
    multiple=True,
    callback=_named_files,
    metavar="NAME=PATH",
    help="One of the release's custom_files; repeatable.",
)
@_network_option
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def check_release(
    tar: Path,
    net: str | None,
    custom_values: Any,
    image_width: int | None,
    batch_size: int | None,
    use_device: str,
    images: tuple[Path, ...],
    group: bool,
    params: Any,
    model_params: Any,
    custom_files: dict[str, str],
    allow_script_network: bool,
    as_json: bool,
) -> None:
    """Check a release without a mesh: load it, run it on images, and report its results, speed and memory.

    The exit status is 1 if it does not load or fails on a request; the last line says why.
    """
    # Import it here: an instance needs none of its modules.
    from evaluator import check

    configure_logging("evaluator", "warning")
    for flag, given in (("--custom-values", custom_values), ("--model-params", model_params)):
        if given is not None and not isinstance(given, dict):
            raise click.BadParameter(f"{flag} should be a JSON object")
    protect_front()
    # A termination then ends the worker too, and removes the workspace.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    values = (custom_values or {}) | ({"net": net} if net else {})
    fields = {"custom_values": values, "use_device": use_device, "image_width": image_width, "batch_size": batch_size}
    fields |= {"model_params": model_params or {}, "custom_files": custom_files}
    report = asyncio.run(check.check(check.CheckOptions(tar, fields, images, group, params, allow_script_network)))
    click.echo(report.to_json() if as_json else report.to_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        del sys.argv[1]
        service.run(check_release, "evaluator check")
    service.run(main, "evaluator")
