"""The edge's bootstrap for the local mesh, made from ``envoy/envoy.yaml``."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml

from atserving.local.envoy_tracing import CLUSTER, Export, with_tracing
from atserving.local.ports import Ports
from atserving.loopback import HOSTS

_FOLDER, _TLS_FOLDER = "/etc/envoy", "/etc/mesh-tls"

TLS_FILE = "edge-tls.yaml"
"""Names the edge's certificate. In a folder of callers' files, it makes the edge of the local mesh offer TLS, too."""

CALLER_KEYS_FILE = "caller-keys.json"
"""The keys of callers for the gates, in a folder of callers' files."""

KEY_FILE = "edge.key"
"""The file with the key for the gates, beside Envoy's own files."""

_KEY = """resources:
  - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
    name: edge-key
    generic_secret: {secret: {inline_string: "%s"}}
"""

ADMIN_SOCKET = "envoy-admin.sock"
"""The socket of Envoy's admin interface, in the folder where Envoy runs. Only its user can connect to it."""


def lay_out(source: Path, folder: Path, callers: Path | None, certificates: Path | None = None) -> None:
    """Copy the files of Envoy into a folder, those in ``callers`` over them, and make a key for it and the gates.

    ``certificates`` is the folder with Envoy's own.
    """
    shutil.copytree(source, folder)
    if callers:
        shutil.copytree(callers, folder, dirs_exist_ok=True)
    for path in (*folder.glob("callers-*.yaml"), *folder.glob("edge-*.yaml")):
        path.write_text(path.read_text().replace(_FOLDER, str(folder)))
    if certificates:
        for path in folder.glob("tls-*.yaml"):
            path.write_text(path.read_text().replace(_TLS_FOLDER, str(certificates)))
    key = secrets.token_urlsafe(32)
    for path, text in ((folder / "edge-key.yaml", _KEY % key), (folder / KEY_FILE, f"{key}\n")):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)


def local_bootstrap(
    folder: Path, ports: Ports, *, tls: bool = False, mesh_tls: bool = False, export: Export | None = None
) -> str:
    """Return the bootstrap in ``folder`` with the paths of the checkout and the ports of the local mesh.

    ``tls``: with the port for TLS, for which there is a certificate. ``mesh_tls``: Envoy speaks TLS with gates and
    registries. ``export``: where Envoy's spans go.
    """
    text = (folder / ("envoy-tls.yaml" if mesh_tls else "envoy.yaml")).read_text().replace(_FOLDER, str(folder))
    if export:
        text = with_tracing(text, export)
    bootstrap = yaml.safe_load(text)
    # Any web page could send a POST to a port, and stop the process.
    admin = {"pipe": {"path": ADMIN_SOCKET}}
    bootstrap["admin"]["address"] = {"pipe": {**admin["pipe"], "mode": 0o600}}
    resources = bootstrap["static_resources"]
    for listener in resources["listeners"]:
        # Two meshes must not share a port.
        listener["enable_reuse_port"] = False
        port = {"edge": ports.edge, "ops": ports.ops, "operators": ports.operators}[listener["name"]]
        listener["address"] = _loopback(port)
        if "additional_addresses" in listener:
            _set_tls(listener, ports.edge_tls if tls else None)
        # All chains of a listener have the same filters.
        for each in listener["filter_chains"][0]["filters"]:
            _answer_only_loopback(each["typed_config"]["route_config"])
    for cluster in (each for each in resources["clusters"] if each["name"] != CLUSTER):
        gates = [_loopback(port) for port in ports.gates]
        upstreams = {"gate": gates, "admin": [admin], "registry": [_loopback(ports.registry)]}[cluster["name"]]
        endpoints = cluster["load_assignment"]["endpoints"][0]
        endpoints["lb_endpoints"] = [{"endpoint": {"address": address}} for address in upstreams]
    return yaml.safe_dump(bootstrap)


def _loopback(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _set_tls(listener: dict[str, Any], port: int | None) -> None:
    """Let the edge offer TLS on this port, or not at all."""
    plain, tls = listener["filter_chains"]
    if port is None:
        del listener["additional_addresses"]
        listener["filter_chains"] = [plain]
    else:
        listener["additional_addresses"] = [{"address": _loopback(port)}]
        tls["filter_chain_match"]["destination_port"] = port


def _answer_only_loopback(routes: dict[str, Any]) -> None:
    """Refuse the requests for other hosts, see :mod:`atserving.loopback`."""
    for host in routes["virtual_hosts"]:
        host["domains"] = list(HOSTS)
    refusal = {"status": 421, "body": {"inline_string": f"this mesh answers only to {', '.join(HOSTS)}"}}
    matches: list[dict[str, Any]] = [{"connect_matcher": {}}, {"prefix": "/"}]
    refusals = [{"match": match, "direct_response": refusal} for match in matches]
    routes["virtual_hosts"].append({"name": "others", "domains": ["*"], "routes": refusals})
    routes["ignore_port_in_host_matching"] = True
