"""The edge's bootstrap for the local mesh, made from ``envoy/envoy.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from atserving.local.ports import Ports


def local_bootstrap(folder: Path, ports: Ports) -> str:
    """Return the bootstrap in ``folder`` with the paths of the checkout and the ports of the local mesh."""
    text = (folder / "envoy.yaml").read_text().replace("/etc/envoy/", f"{folder}/")
    bootstrap = yaml.safe_load(text)
    _set_address(bootstrap["admin"], ports.admin)
    resources = bootstrap["static_resources"]
    for listener in resources["listeners"]:
        _set_address(listener, {"edge": ports.edge, "ops": ports.ops}[listener["name"]])
    for cluster in resources["clusters"]:
        upstreams = {"gate": ports.gates, "admin": (ports.admin,)}[cluster["name"]]
        endpoints = cluster["load_assignment"]["endpoints"][0]
        endpoints["lb_endpoints"] = [{"endpoint": _set_address({}, port)} for port in upstreams]
    return yaml.safe_dump(bootstrap)


def _set_address(holder: dict[str, Any], port: int) -> dict[str, Any]:
    holder["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return holder
