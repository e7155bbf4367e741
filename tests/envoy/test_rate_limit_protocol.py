"""The rate limit service of the tests, and so the messages of a gate, speak the protocol of the real Envoy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from atserving.local import commands
from atserving.local.ports import free_ports
from atserving.v1.ratelimit_pb2 import RateLimitUnit
from tests.gate.rate_limit_server import running_server
from tests.processes import Process
from tests.waiting import until_async

_FILTERS = "type.googleapis.com/envoy.extensions.filters"
_HTTP = f"{_FILTERS}.http"
ROUTER = {"name": "router", "typed_config": {"@type": f"{_HTTP}.router.v3.Router"}}


def bootstrap(ports: Sequence[int], service_port: int) -> dict[str, Any]:
    """Return the config of an Envoy that asks the service about each request, with a limit and 3 hits, and answers."""
    limit = {"requests_per_unit": 7, "unit": "HOUR"}
    filters = [
        {
            "name": "limit",
            "typed_config": {
                "@type": f"{_HTTP}.set_metadata.v3.Config",
                "metadata": [{"metadata_namespace": "limit", "value": {"of": limit}}],
            },
        },
        {
            "name": "hits",
            "typed_config": {
                "@type": f"{_HTTP}.set_filter_state.v3.Config",
                "on_request_headers": [
                    {
                        "object_key": "envoy.ratelimit.hits_addend",
                        "format_string": {"text_format_source": {"inline_string": "3"}},
                    }
                ],
            },
        },
        {
            "name": "ratelimit",
            "typed_config": {
                "@type": f"{_HTTP}.ratelimit.v3.RateLimit",
                "domain": "atserving",
                "timeout": "60s",
                "failure_mode_deny": True,
                "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
                "rate_limit_service": {
                    "transport_api_version": "V3",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "service"}},
                },
            },
        },
    ]
    entries = [("app", "digits"), ("limit", "requests"), ("uid", "42")]
    rate_limit = {
        "actions": [{"generic_key": {"descriptor_key": key, "descriptor_value": value}} for key, value in entries],
        "limit": {"dynamic_metadata": {"metadata_key": {"key": "limit", "path": [{"key": "of"}]}}},
    }
    to_itself = {"match": {"prefix": "/"}, "route": {"cluster": "answers", "rate_limits": [rate_limit]}}
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    listeners = [listener(ports[0], [*filters, ROUTER], to_itself), listener(ports[1], [ROUTER], answer)]
    options = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    service = {
        **cluster("service", service_port),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }
    return {"static_resources": {"listeners": listeners, "clusters": [service, cluster("answers", ports[1])]}}


def listener(port: int, filters: list[dict[str, Any]], route: dict[str, Any]) -> dict[str, Any]:
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "edge",
        "http_filters": filters,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    return {
        "address": address(port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def cluster(name: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": address(port)}}
    return {
        "name": name,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


async def test_envoy_understands_what_gates_say_and_hear(tmp_path: Path) -> None:
    ports = free_ports(2)
    path = tmp_path / "envoy.yaml"
    async with running_server() as server, aiohttp.ClientSession() as session:
        path.write_text(yaml.safe_dump(bootstrap(ports, server.port)))
        envoy = Process(commands.envoy(path))
        envoy.start()
        answers: list[tuple[int, str, str, str]] = []

        async def answered() -> bool:
            async with session.get(f"http://127.0.0.1:{ports[0]}/") as answer:
                found = (answer.headers.get(f"x-ratelimit-{name}", "") for name in ("limit", "remaining", "reset"))
                answers.append((answer.status, *found))  # type: ignore[arg-type] # three of them
                return True

        try:
            await until_async(answered, aiohttp.ClientError, what="Envoy answers")
            await answered()
            await answered()
        finally:
            envoy.kill()
    assert answers == [
        (200, "7, 7;w=3600", "4", "30"),
        (200, "7, 7;w=3600", "1", "30"),
        (429, "7, 7;w=3600", "0", "30"),
    ]
    assert server.counts == {("digits", "requests", "42"): 9}
    asked = server.requests[0]
    (descriptor,) = asked.descriptors
    assert (asked.domain, asked.hits_addend) == ("atserving", 3)
    assert [entry.key for entry in descriptor.entries] == ["app", "limit", "uid"]
    assert (descriptor.limit.requests_per_unit, descriptor.limit.unit) == (7, RateLimitUnit.HOUR)
