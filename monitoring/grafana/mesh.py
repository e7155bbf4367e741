"""The board of a mesh: is anything wrong, and with which app or process."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.grafana.panels import (
    Panel,
    Query,
    board,
    heat,
    lines,
    number,
    p99,
    quantiles,
    ratio,
    rows,
    to_app,
    to_row,
    variable,
)

_REQUESTS = "atserving_gate_requests_total"
_SECONDS = "atserving_gate_request_seconds_bucket{APPS}"
_EXPIRES = '{MESH, __name__=~"atserving_(gate|evaluator|registry)_certificate_expires_seconds"}'
_ENVOY_EXPIRES = '{MESH, __name__=~"envoy_(cluster|listener)_ssl_certificate_expiration_unix_time_seconds"}'
# Those of the port of callers, of several listeners.
_EDGE = '{MESH, job="envoy", envoy_http_conn_manager_prefix="edge"}'
_GATES = '{MESH, job="envoy", envoy_cluster_name="gate"}'


def make() -> Dashboard:
    return board(
        "mesh",
        "Begin here: the first row says whether something is wrong in the mesh, and the table with which app.",
        [variable("app", "App", "The apps to show", "atserving_gate_requests_total{MESH}, app", several=True)],
        [
            ("Now", _now()),
            ("Apps", _apps()),
            ("Gates", _gates()),
            ("Instances", _instances()),
            ("Envoy", _envoy()),
            ("Certificates and logs", _certificates()),
        ],
    )


def _now() -> list[Panel]:
    alerts = 'count(ALERTS{MESH, alertname=~"AtServing.+", alertstate="firing"}) or vector(0)'
    errors = ratio(_REQUESTS + '{APPS, code=~"5..", code!="502"}', _REQUESTS + "{APPS}")
    return [
        number(
            "Alerts",
            "Alerts of the mesh that fire. Red marks in all panels show when.",
            alerts,
            limits=[(1, "red")],
        ),
        number(
            "Requests",
            "Requests a second, tasks of batches included. A sudden fall means that callers or Envoy fail.",
            f"sum(rate({_REQUESTS}{{APPS}}[RATE]))",
            unit="reqps",
        ),
        number(
            "Errors",
            "The share of 5xx, without 502: those are the fault of a host that the caller named.",
            errors,
            unit="percentunit",
            limits=[(0.001, "orange"), (0.01, "red")],
        ),
        number(
            "p99",
            "99 % of the requests take less, from their arrival at a gate to their outcome.",
            p99(_SECONDS),
            unit="s",
            limits=[(1, "orange"), (5, "red")],
        ),
        number("In flight", "Requests without an answer yet.", "sum(atserving_gate_requests_in_flight{APPS})"),
        number(
            "Gates down",
            "Gates that Prometheus does not reach.",
            'count(up{MESH, job="gate"} == 0) or vector(0)',
            limits=[(1, "red")],
        ),
        number(
            "Registries behind",
            "Registries that Prometheus does not reach, or that have lost etcd.",
            'count((up{MESH, job="registry"} == 0) or (atserving_registry_mirror_stale{MESH} == 1)) or vector(0)',
            limits=[(1, "red")],
        ),
        number(
            "Versions unserved",
            "Versions in production without a registered instance.",
            "count(max by (namespace, app, version) (atserving_registry_instances{APPS}) == 0"
            " and on (namespace, app, version) atserving_registry_in_production{APPS}) or vector(0)",
            limits=[(1, "red")],
        ),
    ]


def _apps() -> list[Panel]:
    by_app = "sum by (app) (rate(" + _REQUESTS + "{APPS}[RATE]))"
    slow = f"histogram_quantile(0.99, sum by (app, le) (rate({_SECONDS}[RATE])))"
    utilisation = (
        "sum by (app) (atserving_evaluator_requests_in_flight{APPS})"
        " / sum by (app) (atserving_evaluator_max_concurrent{APPS})"
    )
    errors = _REQUESTS + '{APPS, code=~"5..", code!="502"}'
    failed = f"(sum by (app) (rate({errors}[RATE])) or 0 * {by_app}) / ({by_app} > 0)"
    return [
        rows(
            "Apps",
            "All apps, the busiest first. Sort by errors or p99 to find the one that hurts; its name opens its board.",
            "app",
            [
                ("requests/s", "reqps", by_app),
                ("errors", "percentunit", failed),
                ("p50", "s", slow.replace("0.99", "0.5") + " > 0"),
                ("p99", "s", slow + " > 0"),
                ("in flight", "short", "sum by (app) (atserving_gate_requests_in_flight{APPS})"),
                ("refused/s", "reqps", "sum by (app) (rate(atserving_gate_refusals_total{APPS}[RATE]))"),
                ("instances full", "percentunit", utilisation),
            ],
            to_row(),
        ),
        lines(
            "Requests by app",
            "The ten busiest apps. One that falls to nothing has lost its callers or its instances.",
            Query(f"topk(10, {by_app})", "{{app}}"),
            unit="reqps",
            link=to_app(),
        ),
        lines(
            "Errors by app and code",
            "Outcomes other than 200. 500: the net fails. 503: no instance is ready. 504: the deadline passed."
            " 429: all is full, or a caller is above its limit. 4xx: callers. 499: the caller has left.",
            Query(
                f'topk(10, sum by (app, code) (rate({_REQUESTS}{{APPS, code!="200"}}[RATE])) > 0)', "{{app}} {{code}}"
            ),
            unit="reqps",
            link=to_app(),
        ),
        lines(
            "Refusals by reason",
            "Requests that the gates refuse at once. full: start more instances. turns: start more gates."
            " unready: nothing serves the app. memory: gates hold too many bytes.",
            Query("sum by (reason) (rate(atserving_gate_refusals_total{APPS}[RATE])) > 0", "{{reason}}"),
            unit="reqps",
            stack=True,
        ),
        lines(
            "Latency of all apps",
            "Three quantiles. A p99 that rises alone comes from few requests: one app or one instance.",
            *quantiles(_SECONDS),
            unit="s",
        ),
        lines(
            "p99 by app",
            "The ten slowest apps. The dashed line is the usual objective of 1 s.",
            Query(f"topk(10, {slow})", "{{app}}", exemplars=True),
            unit="s",
            limit=1,
            link=to_app(),
        ),
        heat(
            "Requests by latency",
            "Two bands are two kinds of requests, such as two apps. A dot is a trace.",
            f"sum by (le) (rate({_SECONDS}[RATE]))",
        ),
    ]


def _gates() -> list[Panel]:
    return [
        lines(
            "Requests by gate",
            "All gates should get alike. One with less is new, or Envoy considers it unhealthy.",
            Query("sum by (instance) (rate(atserving_gate_requests_total{APPS}[RATE]))", "{{instance}}"),
            unit="reqps",
        ),
        lines(
            "In flight by gate",
            "Requests without an answer yet. It grows when instances slow down.",
            Query("sum by (instance) (atserving_gate_requests_in_flight{APPS})", "{{instance}}"),
        ),
        lines(
            "Waiting",
            "turn: the gates have more than they can pass on. instance: no instance of the version is ready yet.",
            Query("sum(atserving_gate_requests_waiting{MESH})", "for their turn"),
            Query("sum(atserving_gate_requests_waiting_for_instance{APPS})", "for an instance"),
            Query("sum(rate(atserving_gate_turns_total{MESH, outcome='refused'}[RATE]))", "refused a second"),
        ),
        lines(
            "Retries by cause",
            "Attempts beyond the first. lost, unreachable: instances or their network break. full: they are busy.",
            Query("sum by (cause) (rate(atserving_gate_retries_total{APPS}[RATE])) > 0", "{{cause}}"),
            unit="reqps",
            stack=True,
        ),
        lines(
            "Held bytes against the most",
            "At 100 % a gate refuses requests for want of memory: slow apps with large requests.",
            Query("atserving_gate_held_bytes{MESH} / atserving_gate_max_held_bytes{MESH}", "{{instance}}"),
            unit="percentunit",
            top=1,
            limit=0.9,
        ),
        lines(
            "Connections",
            "Connections of Envoys at the gates, and those that were above the bound.",
            Query("atserving_gate_connections{MESH}", "{{instance}}"),
            Query("sum(rate(atserving_gate_connections_refused_total{MESH}[RATE]))", "refused a second"),
        ),
        lines(
            "Config revision by gate",
            "The lines of all gates lie on each other. A gate that stays below misses changes.",
            Query("atserving_gate_config_revision{MESH}", "{{instance}}"),
            unit="none",
        ),
        lines(
            "Config age by gate",
            "The time since a gate last followed a registry. 0 in health. Requests go on by the last config.",
            Query("atserving_gate_config_age_seconds{MESH}", "{{instance}}"),
            unit="s",
        ),
        lines(
            "CPU of gates",
            "A gate is one process of one core: near 1 it is the limit. Start more gates.",
            Query("rate(atserving_gate_process_cpu_seconds_total{MESH}[RATE])", "{{instance}}"),
            unit="percentunit",
        ),
        lines(
            "Memory of gates",
            "Without what they hold for requests it is constant.",
            Query("atserving_gate_process_resident_memory_bytes{MESH}", "{{instance}}"),
            unit="bytes",
        ),
        lines(
            "Rate limit service",
            "Only with --rate-limit-service. failed, skipped: the service is away, and each gate limits alone.",
            Query("sum by (outcome) (rate(atserving_gate_rate_limit_questions_total{MESH}[RATE]))", "{{outcome}}"),
            unit="reqps",
        ),
        lines(
            "Processes up",
            "Those that Prometheus reaches, by kind.",
            Query('sum by (job) (up{MESH, job=~"gate|registry|envoy|etcd|evaluator"})', "{{job}}"),
        ),
    ]


def _instances() -> list[Panel]:
    return [
        lines(
            "Instances by state",
            "As the gates see them, the most of any gate. away, connecting, outdated for long: the instance is broken.",
            Query(
                "sum by (state) (max by (namespace, app, version, state) (atserving_gate_instances{APPS})) > 0",
                "{{state}}",
            ),
        ),
        lines(
            "In flight against capacity",
            "The ten fullest versions. At 100 % callers get a 429: start more instances.",
            Query(
                "topk(10, sum by (app, version) (atserving_evaluator_requests_in_flight{APPS})"
                " / sum by (app, version) (atserving_evaluator_max_concurrent{APPS}))",
                "{{app}} {{version}}",
            ),
            unit="percentunit",
            top=1,
            limit=0.85,
            link=to_app(),
        ),
        lines(
            "Worker restarts in 15 minutes",
            "Any is a crash of a net or script, a hang, or too much memory.",
            Query(
                "sum by (app, version) (increase(atserving_evaluator_worker_restarts_total{APPS}[15m])) > 0",
                "{{app}} {{version}}",
            ),
            link=to_app(),
        ),
    ]


def _envoy() -> list[Panel]:
    xx = f"sum by (envoy_response_code_class) (rate(envoy_http_downstream_rq_xx{_EDGE}[RATE]))"
    return [
        lines(
            "Answers by class",
            "All answers on the callers' port. More 5xx than the gates count: Envoy finds no gate, or is overloaded.",
            Query(xx, "{{envoy_response_code_class}}xx"),
            unit="reqps",
            width=6,
        ),
        lines(
            "Retries and overflow",
            "Requests asked at another gate, those that lost each gate that they asked, that found no healthy one, and"
            " those without room in the queue.",
            Query(f"sum(rate(envoy_cluster_upstream_rq_retry{_GATES}[RATE]))", "retries"),
            Query(f"sum(rate(envoy_cluster_upstream_rq_retry_limit_exceeded{_GATES}[RATE]))", "given up"),
            Query(f"sum(rate(envoy_cluster_upstream_cx_none_healthy{_GATES}[RATE]))", "no healthy gate"),
            Query(f"sum(rate(envoy_cluster_upstream_rq_pending_overflow{_GATES}[RATE]))", "overflow"),
            Query(f"sum(rate(envoy_http_downstream_rq_overload_close{_EDGE}[RATE]))", "short of memory"),
            unit="reqps",
            width=6,
        ),
        lines(
            "Heap",
            "In percent of its limit. Above 80 Envoy resets the largest streams, above 90 it takes no requests.",
            Query('envoy_overload_envoy_resource_monitors_fixed_heap_pressure{MESH, job="envoy"}', "{{instance}}"),
            unit="percent",
            top=100,
            limit=80,
            width=6,
        ),
        lines(
            "Connections of callers",
            "Open connections, and those closed because there were too many.",
            Query(f"sum(envoy_http_downstream_cx_active{_EDGE})", "open"),
            Query('sum(rate(envoy_listener_downstream_cx_overflow{MESH, job="envoy"}[RATE]))', "refused a second"),
            width=6,
        ),
    ]


def _certificates() -> list[Panel]:
    return [
        lines(
            "Certificates' time left",
            "Only with TLS. A certificate that is renewed jumps up; one that falls below 3 days was not.",
            Query(f"min by (job, instance) ({_EXPIRES}) - time()", "{{job}} {{instance}}"),
            Query(f"min by (job, instance) ({_ENVOY_EXPIRES}) - time()", "{{job}} {{instance}}"),
            unit="s",
            width=12,
        ),
        lines(
            "Log lines dropped",
            "Lines that nobody read fast enough from standard error. The log has gaps then.",
            Query(
                'sum by (job, instance) (rate({MESH, __name__=~"atserving_.+_log_lines_dropped_total"}[RATE]))',
                "{{job}} {{instance}}",
            ),
            width=12,
        ),
    ]
