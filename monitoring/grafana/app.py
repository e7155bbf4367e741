"""The board of an app: which version, instance or stage is slow or fails."""

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
    to_instance,
    variable,
)

_REQUESTS = "atserving_gate_requests_total"
_SECONDS = "atserving_gate_request_seconds_bucket{APP}"
_STAGE = "atserving_evaluator_stage_seconds"
_FULL = "atserving_evaluator_requests_in_flight{VERSION} / atserving_evaluator_max_concurrent{VERSION}"


def make() -> Dashboard:
    return board(
        "app",
        "One app. Callers' requests as the gates see them, and beside them the stages inside its instances.",
        [
            variable("app", "App", "The app to show", "atserving_registry_instances{MESH}, app", several=False),
            variable("version", "Version", "Its versions", "atserving_registry_instances{APP}, version", several=True),
        ],
        [
            ("Now", _now()),
            ("Callers", _callers()),
            ("Inside the instances", _stages()),
            ("Versions and instances", _versions()),
            ("Shadow", _shadow()),
        ],
    )


def _now() -> list[Panel]:
    return [
        number(
            "Requests",
            "Requests a second of the chosen versions.",
            f"sum(rate({_REQUESTS}{{VERSION}}[RATE]))",
            unit="reqps",
            width=4,
        ),
        number(
            "Errors",
            "The share of 5xx, without 502: those are the fault of a host that the caller named.",
            ratio(_REQUESTS + '{VERSION, code=~"5..", code!="502"}', _REQUESTS + "{VERSION}"),
            unit="percentunit",
            limits=[(0.001, "orange"), (0.01, "red")],
            width=4,
        ),
        number(
            "p99",
            "99 % of the app's requests take less at the gates, those of all versions.",
            p99(_SECONDS),
            unit="s",
            limits=[(1, "orange"), (5, "red")],
            width=4,
        ),
        number(
            "Instances",
            "Registered instances of the chosen versions.",
            "sum(max by (version) (atserving_registry_instances{VERSION}))",
            width=4,
        ),
        number(
            "Capacity in use",
            "At 100 % callers get a 429: start more instances.",
            "sum(atserving_evaluator_requests_in_flight{VERSION}) / sum(atserving_evaluator_max_concurrent{VERSION})",
            unit="percentunit",
            limits=[(0.7, "orange"), (0.85, "red")],
            width=4,
        ),
        number(
            "Restarts in 1 hour",
            "Any is a crash of the net or script, a hang, or too much memory.",
            "sum(increase(atserving_evaluator_worker_restarts_total{VERSION}[1h]))",
            limits=[(0.5, "orange"), (3, "red")],
            width=4,
        ),
    ]


def _callers() -> list[Panel]:
    return [
        lines(
            "Requests by version",
            "What each version answers. After a promotion the new one takes over.",
            Query(f"sum by (version) (rate({_REQUESTS}{{VERSION}}[RATE]))", "{{version}}"),
            unit="reqps",
        ),
        lines(
            "Outcomes other than 200",
            "500: the net fails. 503: no instance is ready. 504: the deadline passed. 429: all is full, or a caller"
            " is above its limit. Codes of one version alone point at its release.",
            Query(
                f'sum by (version, code) (rate({_REQUESTS}{{VERSION, code!="200"}}[RATE])) > 0', "{{version}} {{code}}"
            ),
            unit="reqps",
        ),
        lines(
            "Refusals by reason",
            "Requests that the gates refuse at once. full: start more instances. unready: no instance is ready."
            " limit, denied: the caller.",
            Query("sum by (reason) (rate(atserving_gate_refusals_total{APP}[RATE])) > 0", "{{reason}}"),
            unit="reqps",
            stack=True,
        ),
        lines(
            "Latency at the gates",
            "From a request's arrival to its outcome. Compare with the stages below: what they lack was spent in"
            " the gate, on retries, or on the way.",
            *quantiles(_SECONDS),
            unit="s",
        ),
        heat(
            "Requests by latency",
            "Two bands are two kinds of requests. A dot is a trace.",
            f"sum by (le) (rate({_SECONDS}[RATE]))",
        ),
        lines(
            "Retries by cause",
            "Attempts beyond the first. lost, unreachable: instances or their network break. full: they are busy.",
            Query("sum by (cause) (rate(atserving_gate_retries_total{APP}[RATE])) > 0", "{{cause}}"),
            unit="reqps",
            stack=True,
        ),
    ]


def _stages() -> list[Panel]:
    by_stage = f'rate({_STAGE}_bucket{{VERSION, stage!="total"}}[RATE])'
    mean = (
        f'sum by (stage) (rate({_STAGE}_sum{{VERSION, stage!="total"}}[RATE]))'
        f' / on () group_left sum(rate({_STAGE}_count{{VERSION, stage="total"}}[RATE]))'
    )
    return [
        lines(
            "Mean time by stage",
            "The area is the mean time of a request. queue: engines are busy, start more. fetch: hosts of resources"
            " are slow. forward: the net itself.",
            Query(mean, "{{stage}}"),
            unit="s",
            stack=True,
        ),
        lines(
            "p99 by stage",
            "The stage with the highest line makes the slow requests slow.",
            Query(f"histogram_quantile(0.99, sum by (le, stage) ({by_stage}))", "{{stage}}", exemplars=True),
            unit="s",
        ),
        lines(
            "p99 by version",
            "The whole time inside the instances. A new version that is slower shows here.",
            Query(
                "histogram_quantile(0.99, sum by (le, version) "
                f'(rate({_STAGE}_bucket{{VERSION, stage="total"}}[RATE])))',
                "{{version}}",
                exemplars=True,
            ),
            unit="s",
        ),
        lines(
            "Mean batch size",
            "Batches grow under load. 1 under load: the release does not batch, or its engines are idle.",
            Query(
                "sum by (version) (rate(atserving_evaluator_batch_size_sum{VERSION}[RATE]))"
                " / sum by (version) (rate(atserving_evaluator_batch_size_count{VERSION}[RATE]))",
                "{{version}}",
            ),
        ),
        lines(
            "In flight against capacity",
            "By instance. All alike: start more. One alone: that instance is slow.",
            Query(_FULL, "{{version}} {{instance}}"),
            unit="percentunit",
            top=1,
            limit=0.85,
            link=to_instance(),
        ),
        lines(
            "Queue by instance",
            "Requests in an instance without a thread or engine working on them.",
            Query("atserving_evaluator_queue_length{VERSION}", "{{version}} {{instance}}"),
            link=to_instance(),
        ),
    ]


def _versions() -> list[Panel]:
    return [
        lines(
            "Shares asked and given",
            "The part of requests without a version that each version should get, and gets. Apart: a version is full"
            " or unready, or callers send keys.",
            Query("max by (version) (atserving_gate_split_share{VERSION})", "{{version}} asked"),
            Query(
                "sum by (version) (rate(atserving_gate_split_requests_total{VERSION}[RATE]))"
                " / on () group_left sum(rate(atserving_gate_split_requests_total{APP}[RATE]))",
                "{{version}} given",
            ),
            unit="percentunit",
        ),
        lines(
            "Instances by state",
            "As the gates see them, the most of any gate. away: the worker is lost. connecting: not reached."
            " outdated: it has loaded other content.",
            Query(
                "max by (version, state) (atserving_gate_instances{VERSION}) > 0",
                "{{version}} {{state}}",
            ),
        ),
        lines(
            "Registered instances",
            "As the registries see them. A version in production at 0 is served by nobody.",
            Query("max by (version) (atserving_registry_instances{VERSION})", "{{version}}"),
        ),
        lines(
            "Attempts by instance",
            "How often gates picked each instance, by its id. Those of a version get alike; one that fails gets less.",
            Query(
                "sum by (version, instance_id) (rate(atserving_gate_attempts_total{VERSION}[RATE]))",
                "{{version}} {{instance_id}}",
            ),
            unit="reqps",
        ),
        lines(
            "Worker restarts in 15 minutes",
            "Any is a crash of the net or script, a hang, or too much memory.",
            Query(
                "increase(atserving_evaluator_worker_restarts_total{VERSION}[15m])",
                "{{version}} {{instance}}",
            ),
            link=to_instance(),
        ),
        lines(
            "Requests without an instance",
            "Requests of a version that has no ready instance, and those that wait for one.",
            Query(
                "sum by (version) (rate(atserving_gate_requests_without_instance_total{VERSION}[RATE]))",
                "{{version}} a second",
            ),
            Query("sum by (version) (atserving_gate_requests_waiting_for_instance{VERSION})", "{{version}} waiting"),
        ),
    ]


def _shadow() -> list[Panel]:
    p = "histogram_quantile({q}, sum by (version, of, le) (rate(atserving_gate_shadow_seconds_bucket{APP}[RATE])))"
    return [
        lines(
            "Shadow comparison",
            "Copies of requests to a shadow, beside the answers that callers got. different, failed: look before you"
            " promote it. dropped: the shadow has no room.",
            Query(
                "sum by (version, outcome) (rate(atserving_gate_shadow_copies_total{APP}[RATE]))",
                "{{version}} {{outcome}}",
            ),
            unit="reqps",
            width=12,
        ),
        lines(
            "Shadow's time",
            "The shadow's time (version) beside that of the version whose requests are copied (baseline).",
            Query(p.replace("{q}", "0.5"), "p50 {{version}} {{of}}"),
            Query(p.replace("{q}", "0.99"), "p99 {{version}} {{of}}"),
            unit="s",
            width=12,
        ),
    ]
