"""The board of an instance: one evaluator, its front and its worker."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.grafana.panels import Panel, Query, board, heat, lines, number, p99, quantiles, ratio, variable

_OWN = "atserving_evaluator_"
_STAGE = _OWN + "stage_seconds"


def make() -> Dashboard:
    return board(
        "instance",
        "The instances of a version, or one of them. An instance is an evaluator: a front that takes requests, and a"
        " worker that runs the net.",
        [
            variable("app", "App", "The app", "atserving_evaluator_max_concurrent{MESH}, app", several=False),
            variable("version", "Version", "All", "atserving_evaluator_max_concurrent{APP}, version", several=True),
            variable(
                "instance",
                "Instance",
                "The addresses of their metrics",
                "atserving_evaluator_max_concurrent{VERSION}, instance",
                several=True,
            ),
        ],
        [
            ("Now", _now()),
            ("Requests", _requests()),
            ("Load", _load()),
            ("Processes", _processes()),
            ("GPU", _gpu()),
        ],
    )


def _now() -> list[Panel]:
    return [
        number(
            "Requests",
            "Requests a second that the gates have sent.",
            f"sum(rate({_OWN}requests_total{{INSTANCE}}[RATE]))",
            unit="reqps",
            width=4,
        ),
        number(
            "Errors",
            "The share of 5xx, without 502: those are the fault of a host that the caller named.",
            ratio(_OWN + 'requests_total{INSTANCE, code=~"5..", code!="502"}', _OWN + "requests_total{INSTANCE}"),
            unit="percentunit",
            limits=[(0.001, "orange"), (0.01, "red")],
            width=4,
        ),
        number(
            "p99",
            "99 % of the requests take less inside the instance.",
            p99(_STAGE + '_bucket{INSTANCE, stage="total"}'),
            unit="s",
            limits=[(1, "orange"), (5, "red")],
            width=4,
        ),
        number(
            "Capacity in use",
            "At 100 % the instance refuses requests, and gates ask another.",
            f"sum({_OWN}requests_in_flight{{INSTANCE}}) / sum({_OWN}max_concurrent{{INSTANCE}})",
            unit="percentunit",
            limits=[(0.7, "orange"), (0.85, "red")],
            width=4,
        ),
        number(
            "Restarts in 1 hour",
            "Restarts of the worker: a crash of the net or script, a hang, or too much memory. The log has the reason.",
            f"sum(increase({_OWN}worker_restarts_total{{INSTANCE}}[1h]))",
            limits=[(0.5, "orange"), (3, "red")],
            width=4,
        ),
        number(
            "Runs for",
            "The time since the youngest front started. Short again and again: the process restarts.",
            f"time() - max({_OWN}process_start_time_seconds{{INSTANCE}})",
            unit="s",
            width=4,
        ),
    ]


def _requests() -> list[Panel]:
    mean = (
        f'sum by (stage) (rate({_STAGE}_sum{{INSTANCE, stage!="total"}}[RATE]))'
        f' / on () group_left sum(rate({_STAGE}_count{{INSTANCE, stage="total"}}[RATE]))'
    )
    return [
        lines(
            "Requests by code",
            "500: the net fails. 429: the instance is full. 503: the worker is away. 504: the deadline passed.",
            Query(f"sum by (code) (rate({_OWN}requests_total{{INSTANCE}}[RATE]))", "{{code}}"),
            unit="reqps",
        ),
        lines(
            "Refusals by reason",
            "Requests that the instance did not take; gates ask another one. full: its capacity. fetching, host: the"
            " hosts of resources are slow. away: the worker.",
            Query(f"sum by (reason) (rate({_OWN}refusals_total{{INSTANCE}}[RATE])) > 0", "{{reason}}"),
            unit="reqps",
            stack=True,
        ),
        lines(
            "Attempts of gates, by instance",
            "How often gates picked each instance of the version, by its id. One that gets less than others fails, or"
            " is full.",
            Query(
                "sum by (version, instance_id) (rate(atserving_gate_attempts_total{VERSION}[RATE]))",
                "{{version}} {{instance_id}}",
            ),
            unit="reqps",
        ),
        lines(
            "Latency",
            "The whole time inside the instance.",
            *quantiles(_STAGE + '_bucket{INSTANCE, stage="total"}'),
            unit="s",
        ),
        lines(
            "Mean time by stage",
            "The area is the mean time of a request. queue grows and forward does not: the engines are busy."
            " fetch: hosts of resources are slow.",
            Query(mean, "{{stage}}"),
            unit="s",
            stack=True,
        ),
        heat(
            "Requests by latency",
            "A band that moves up is a slowdown of all; a second band is some requests only. A dot is a trace.",
            f'sum by (le) (rate({_STAGE}_bucket{{INSTANCE, stage="total"}}[RATE]))',
        ),
    ]


def _load() -> list[Panel]:
    return [
        lines(
            "In flight and capacity",
            "The lower line reaches the upper: the instance is full.",
            Query(f"{_OWN}requests_in_flight{{INSTANCE}}", "in flight {{instance}}"),
            Query(f"{_OWN}max_concurrent{{INSTANCE}}", "capacity {{instance}}"),
        ),
        lines(
            "Requests that fetch",
            "Those whose resources are on their way. It grows when a host of resources is slow.",
            Query(f"{_OWN}requests_fetching{{INSTANCE}}", "{{instance}}"),
        ),
        lines(
            "Queue",
            "Requests without a thread or engine working on them.",
            Query(f"{_OWN}queue_length{{INSTANCE}}", "{{instance}}"),
        ),
        lines(
            "Mean batch size",
            "Batches grow under load, up to the batch size of the plan.",
            Query(
                f"sum by (instance) (rate({_OWN}batch_size_sum{{INSTANCE}}[RATE]))"
                f" / sum by (instance) (rate({_OWN}batch_size_count{{INSTANCE}}[RATE]))",
                "{{instance}}",
            ),
        ),
        lines(
            "Held bytes against the most",
            "At 100 % the front refuses requests: they or their answers are large, or gates read too slowly.",
            Query(f"{_OWN}held_bytes{{INSTANCE}} / {_OWN}max_held_bytes{{INSTANCE}}", "{{instance}}"),
            unit="percentunit",
            top=1,
            limit=0.9,
        ),
        lines(
            "Worker away, and gates connected",
            "1: the worker restarts, or stands still. An instance without connections is not reached by gates, or its"
            " version had no request lately.",
            Query(f"{_OWN}worker_away{{INSTANCE}}", "away {{instance}}"),
            Query(f"{_OWN}connections{{INSTANCE}}", "gates {{instance}}"),
        ),
    ]


def _processes() -> list[Panel]:
    both = (("front", ""), ("worker", "worker_"))
    return [
        lines(
            "CPU",
            "Cores in use. The worker near its limit is the net at work; the front near 1 is many small requests.",
            *(
                Query(f"rate({_OWN}{part}process_cpu_seconds_total{{INSTANCE}}[RATE])", f"{name} {{{{instance}}}}")
                for name, part in both
            ),
        ),
        lines(
            "Memory",
            "A worker that grows without end is killed at its limit, and restarts.",
            *(
                Query(f"{_OWN}{part}process_resident_memory_bytes{{INSTANCE}}", f"{name} {{{{instance}}}}")
                for name, part in both
            ),
            unit="bytes",
        ),
        lines(
            "Worker restarts in 15 minutes",
            "Any is a crash of the net or script, a hang, or too much memory.",
            Query(f"increase({_OWN}worker_restarts_total{{INSTANCE}}[15m])", "{{instance}}"),
        ),
    ]


def _gpu() -> list[Panel]:
    return [
        lines(
            "GPU utilisation",
            "Only with a GPU. Near 100 % it is the limit. Low under load: decoding or fetching is.",
            Query(f"{_OWN}gpu_utilisation_ratio{{INSTANCE}}", "GPU {{gpu}} {{instance}}"),
            unit="percentunit",
            top=1,
            width=12,
        ),
        lines(
            "GPU memory in use",
            "Only with a GPU. Near 100 % larger batches or images may fail.",
            Query(
                f"{_OWN}gpu_memory_used_bytes{{INSTANCE}} / {_OWN}gpu_memory_total_bytes{{INSTANCE}}",
                "GPU {{gpu}} {{instance}}",
            ),
            unit="percentunit",
            top=1,
            limit=0.95,
            width=12,
        ),
    ]
