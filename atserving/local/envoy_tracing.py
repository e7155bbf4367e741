"""Let Envoy export spans: change a bootstrap's text by the standard ``OTEL_*`` variables.

python -m atserving.local.envoy_tracing < envoy.yaml > envoy-tracing.yaml    # by those of the environment
python -m atserving.local.envoy_tracing --kubernetes                         # the files of k8s/components/tracing
"""

from __future__ import annotations

import os
import ssl
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from atserving import otlp_variables as variables
from atserving import tracing
from atserving.errors import StartError
from atserving.local.examples import ROOT

_SOURCES = ROOT / "envoy"
COMPONENT = ROOT / "k8s" / "components" / "tracing"
NAMES = ("envoy.yaml", "envoy-tls.yaml")
"""The bootstraps that the component for Kubernetes has a variant of."""
KUBERNETES = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://traces:4317",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.01",
    # Envoy reads them itself.
    "OTEL_RESOURCE_ATTRIBUTES": "...",
}
"""The variables of this component."""

_HEAD = "# Made of envoy/{name} by `make envoy`: the same edge, which exports spans, see docs/traces.md.\n#\n"
_LISTENERS = ("edge", "operators")
_MANAGER = "                stat_prefix: {name}\n"
_CLUSTERS = "\n  clusters:\n"
_RUNTIME = "\n      static_layer:\n"

CLUSTER = "traces"
"""The name of the collector's cluster."""

# A collector that takes exports and answers none holds so many. Envoy drops the spans that come after.
_MOST_EXPORTS = 16
_TIMEOUT = "10s"

_TYPE = "type.googleapis.com/envoy."
_OPENTELEMETRY = "extensions.tracers.opentelemetry."


@dataclass(frozen=True)
class Export:
    """The settings of Envoy's tracer."""

    service: str
    url: str
    """Of the collector; with the path for HTTP."""
    http: bool
    headers: Mapping[str, str]
    authority: str | None
    """The file with the authorities of a collector with TLS."""
    own: tuple[str, str] | None
    """The files with the certificate and its key that Envoy shows the collector."""
    share: float
    """The share of requests to sample, from 0 to 1."""
    honours_parent: bool
    """Whether the caller's flag decides, where there is one."""
    with_resource: bool
    """Whether Envoy adds the attributes in ``OTEL_RESOURCE_ATTRIBUTES``."""
    delay_ms: int
    batch: int
    queue: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Export | None:
        """Read the settings, None if they switch tracing off. Raises StartError."""
        if not tracing.is_wanted(environ):
            return None
        http = variables.protocol(environ) != "grpc"
        honours_parent, share = tracing.sampler(environ)
        return cls(
            service=environ.get("OTEL_SERVICE_NAME") or "atserving-envoy",
            url=variables.endpoint(environ),
            http=http,
            headers=variables.headers(environ),
            authority=variables.setting("CERTIFICATE", environ)[1] or None,
            own=variables.own_certificate(environ),
            share=share,
            honours_parent=honours_parent,
            with_resource=bool(environ.get("OTEL_RESOURCE_ATTRIBUTES")),
            delay_ms=variables.number("OTEL_BSP_SCHEDULE_DELAY", 5000, environ),
            batch=variables.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, environ),
            queue=variables.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, environ),
        )


def with_tracing(bootstrap: str, export: Export) -> str:
    """Return the text of the bootstrap, with tracing."""
    for name in _LISTENERS:
        bootstrap = _after(bootstrap, _MANAGER.format(name=name), {"tracing": _tracing(name, export)}, 16)
    bootstrap = _after(bootstrap, _CLUSTERS, [_cluster(export)], 4)
    runtime = {
        "tracing.opentelemetry.flush_interval_ms": export.delay_ms,
        "tracing.opentelemetry.min_flush_spans": export.batch,
    }
    return _after(bootstrap, _RUNTIME, runtime, 8)


def _after(text: str, line: str, added: Any, indent: int) -> str:
    before, found, after = text.partition(line)
    assert found, f"the bootstrap has no line {line.strip()}"
    more = yaml.safe_dump(added, sort_keys=False, width=200)
    return before + found + textwrap.indent(more, " " * indent) + after


def _tracing(listener: str, export: Export) -> dict[str, Any]:
    """Return the ``tracing`` of a connection manager: one span for each request, which gates' spans are below."""
    return {
        "operation": listener,
        # Callers may put secrets into a path, and more so behind its `?`.
        "max_path_tag_length": 0,
        "custom_tags": [{"tag": "atserving.reqid", "request_header": {"name": "x-reqid"}}],
        # A caller decides by `traceparent` alone, if at all.
        "client_sampling": {"value": 0},
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": _tracer(export)},
    }


def _tracer(export: Export) -> dict[str, Any]:
    tracer: dict[str, Any] = {
        "@type": f"{_TYPE}config.trace.v3.OpenTelemetryConfig",
        "service_name": export.service,
        "max_cache_size": export.queue,
    }
    if export.http:
        tracer["http_service"] = {
            "http_uri": {"uri": export.url, "cluster": CLUSTER, "timeout": _TIMEOUT},
            # A percent sign stands for itself only twice. In the metadata it does so alone.
            "request_headers_to_add": [
                {"header": {"key": key, "value": value.replace("%", "%%")}} for key, value in export.headers.items()
            ],
        }
    else:
        tracer["grpc_service"] = {
            "envoy_grpc": {"cluster_name": CLUSTER},
            "timeout": _TIMEOUT,
            "initial_metadata": [{"key": key, "value": value} for key, value in export.headers.items()],
        }
    if export.with_resource:
        kind = f"{_TYPE}{_OPENTELEMETRY}resource_detectors.v3.EnvironmentResourceDetectorConfig"
        name = "envoy.tracers.opentelemetry.resource_detectors.environment"
        tracer["resource_detectors"] = [{"name": name, "typed_config": {"@type": kind}}]
    ratio = {"numerator": round(export.share * 1_000_000), "denominator": "MILLION"}
    sampler = _sampler_config("TraceIdRatioBased", "trace_id_ratio_based", sampling_percentage=ratio)
    if export.honours_parent:
        sampler = _sampler_config("ParentBased", "parent_based", wrapped_sampler=sampler)
    tracer["sampler"] = sampler
    return tracer


def _sampler_config(kind: str, name: str, **settings: Any) -> dict[str, Any]:
    config = {"@type": f"{_TYPE}{_OPENTELEMETRY}samplers.v3.{kind}SamplerConfig", **settings}
    return {"name": f"envoy.tracers.opentelemetry.samplers.{name}", "typed_config": config}


def _cluster(export: Export) -> dict[str, Any]:
    """Return the cluster of the collector. Envoy starts and serves without it."""
    parts = urlsplit(export.url)
    port = parts.port or variables.PORTS["http/protobuf" if export.http else "grpc"]
    address = {"socket_address": {"address": parts.hostname, "port_value": port}}
    cluster: dict[str, Any] = {
        "name": CLUSTER,
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        "wait_for_warm_on_init": False,
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [{"max_requests": _MOST_EXPORTS, "max_pending_requests": _MOST_EXPORTS}]},
    }
    if not export.http:
        options = f"{_TYPE}extensions.upstreams.http.v3.HttpProtocolOptions"
        # Notices a collector's machine that has vanished.
        http2 = {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
        cluster["typed_extension_protocol_options"] = {
            options.partition("/")[2]: {"@type": options, "explicit_http_config": {"http2_protocol_options": http2}}
        }
    if parts.scheme == "https":
        cluster["transport_socket"] = _tls(export, str(parts.hostname))
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {**cluster, "load_assignment": {"cluster_name": CLUSTER, "endpoints": endpoints}}


def _tls(export: Export, host: str) -> dict[str, Any]:
    authority = export.authority or ssl.get_default_verify_paths().cafile
    if not authority:
        raise StartError("this machine has no file of public authorities: set OTEL_EXPORTER_OTLP_CERTIFICATE")
    names = [{"san_type": "DNS", "matcher": {"exact": host}}, {"san_type": "IP_ADDRESS", "matcher": {"exact": host}}]
    context: dict[str, Any] = {
        "validation_context": {"trusted_ca": {"filename": authority}, "match_typed_subject_alt_names": names}
    }
    if not export.http:
        context["alpn_protocols"] = ["h2"]
    if export.own:
        certificate, key = export.own
        shown = {"certificate_chain": {"filename": certificate}, "private_key": {"filename": key}}
        context["tls_certificates"] = [shown]
    kind = f"{_TYPE}extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    config = {"@type": kind, "sni": host, "common_tls_context": context}
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def for_kubernetes(name: str) -> str:
    """Return a bootstrap of ``envoy/``, with tracing, for the component."""
    return _HEAD.format(name=name) + _changed((_SOURCES / name).read_text(), KUBERNETES)


def _changed(text: str, environ: Mapping[str, str]) -> str:
    export = Export.from_environment(environ)
    if export is None:
        raise StartError("tracing is off: set OTEL_EXPORTER_OTLP_ENDPOINT")
    return with_tracing(text, export)


def _main(*arguments: str) -> None:
    if arguments == ("--kubernetes",):
        for name in NAMES:
            (COMPONENT / name).write_text(for_kubernetes(name))
    elif arguments:
        raise StartError("takes no arguments but --kubernetes")
    else:
        sys.stdout.write(_changed(sys.stdin.read(), os.environ))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except StartError as error:
        raise SystemExit(f"envoy_tracing: {error}") from None
