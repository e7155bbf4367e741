"""The board of the registries and their etcd: can anything be published, and do all follow."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.grafana.panels import Panel, Query, board, lines, number

_OWN = "atserving_registry_"
_ETCD = '{MESH, job="etcd"}'


def make() -> Dashboard:
    return board(
        "registry",
        "The registries and their etcd. While they are down requests go on; publishing and new instances wait.",
        [],
        [
            ("Now", _now()),
            ("Mirror of etcd", _mirror()),
            ("Calls", _calls()),
            ("Config", _config()),
            ("etcd", _etcd()),
        ],
    )


def _now() -> list[Panel]:
    return [
        number(
            "Registries without etcd",
            "They serve the last known config.",
            f"sum({_OWN}mirror_stale{{MESH}})",
            limits=[(1, "red")],
            width=4,
        ),
        number(
            "Most lag",
            "The time since the last proof that a mirror is current. Up to 3 s in health.",
            f"max({_OWN}mirror_lag_seconds{{MESH}})",
            unit="s",
            limits=[(10, "orange"), (30, "red")],
            width=4,
        ),
        number(
            "Malformed keys",
            "Keys whose value is malformed. `atserving release list` names them.",
            f"max({_OWN}config_malformed_keys{{MESH}})",
            limits=[(1, "orange")],
            width=4,
        ),
        number(
            "Keys held back",
            "Keys that were deleted, most of all at once. Restore etcd, or accept the deletions, within 10 minutes.",
            f"max({_OWN}config_held_keys{{MESH}})",
            limits=[(1, "red")],
            width=4,
        ),
        number(
            "Followers",
            "Streams of gates, evaluators and operators that follow the config.",
            f"sum({_OWN}followers{{MESH}})",
            width=4,
        ),
        number(
            "etcd's database",
            "In use of its quota. At 100 % nothing can be written.",
            f"max(etcd_mvcc_db_total_size_in_bytes{_ETCD} / etcd_server_quota_backend_bytes{_ETCD})",
            unit="percentunit",
            limits=[(0.6, "orange"), (0.8, "red")],
            width=4,
        ),
    ]


def _mirror() -> list[Panel]:
    return [
        lines(
            "Lag of the mirror",
            "It saws between 0 and 3 s in health. A line that only rises has lost etcd.",
            Query(f"{_OWN}mirror_lag_seconds{{MESH}}", "{{instance}}"),
            unit="s",
            limit=10,
        ),
        lines(
            "Revisions",
            "The mirror follows etcd; keys of others in the same etcd raise etcd's alone. A gate stays at the last"
            " change that concerns it.",
            Query(f"max({_OWN}mirror_etcd_revision{{MESH}})", "etcd"),
            Query(f"{_OWN}mirror_revision{{MESH}}", "mirror {{instance}}"),
            Query("min(atserving_gate_config_revision{MESH})", "slowest gate"),
            unit="none",
        ),
        lines(
            "Events and snapshots",
            "Snapshots again and again: the watch breaks, or followers are too slow.",
            Query(f"sum by (instance) (rate({_OWN}mirror_events_total{{MESH}}[RATE]))", "events a second {{instance}}"),
            Query(f"sum by (instance) (increase({_OWN}mirror_snapshots_total{{MESH}}[15m]))", "snapshots {{instance}}"),
        ),
        lines(
            "Followers",
            "All gates and evaluators, spread over the registries. They move when a registry stops.",
            Query(f"sum by (kind, instance) ({_OWN}followers{{MESH}})", "{{kind}} {{instance}}"),
        ),
        lines(
            "Followers that were too slow",
            "Each gets a new snapshot. Many: the network or a gate is overloaded.",
            Query(f"sum by (instance) (increase({_OWN}followers_behind_total{{MESH}}[15m]))", "{{instance}}"),
        ),
        lines(
            "Instances",
            "Registered instances of all versions, and those that left in 15 minutes.",
            Query(f"sum(max by (namespace, app, version) ({_OWN}instances{{MESH}}))", "registered"),
            Query(f"max(increase({_OWN}instances_gone_total{{MESH}}[15m]))", "gone"),
        ),
    ]


def _calls() -> list[Panel]:
    seconds = f"{_OWN}call_seconds_bucket{{MESH}}"
    return [
        lines(
            "Calls by method",
            "Calls of instances and operators. A stream counts when it ends.",
            Query(f"sum by (method) (rate({_OWN}calls_total{{MESH}}[RATE]))", "{{method}}"),
            unit="reqps",
        ),
        lines(
            "Calls that failed",
            "503 of a stream: the registry stopped. Others of RegisterInstance: instances can't come.",
            Query(
                f'sum by (method, code) (rate({_OWN}calls_total{{MESH, code!="200"}}[RATE])) > 0', "{{method}} {{code}}"
            ),
            unit="reqps",
        ),
        lines(
            "p99 of calls",
            "Slow calls of all methods: etcd's disk is slow.",
            Query(f"histogram_quantile(0.99, sum by (le, method) (rate({seconds}[RATE])))", "{{method}}"),
            unit="s",
        ),
        lines(
            "Leases",
            "failed: instances can't register or renew. Many registered: instances restart.",
            Query(f"sum by (outcome) (rate({_OWN}leases_total{{MESH}}[RATE]))", "{{outcome}}"),
            unit="reqps",
        ),
        lines(
            "Operators refused",
            "401: somebody unknown. 403: without the right.",
            Query(f"sum by (code) (increase({_OWN}operators_refused_total{{MESH}}[15m]))", "{{code}} in 15 minutes"),
        ),
        lines(
            "CPU of registries",
            "A registry is one process of one core.",
            Query(f"rate({_OWN}process_cpu_seconds_total{{MESH}}[RATE])", "{{instance}}"),
            unit="percentunit",
        ),
    ]


def _config() -> list[Panel]:
    return [
        lines(
            "Keys",
            "A fall is a deletion. The registries hold one of most releases back.",
            Query(f"max({_OWN}config_keys{{MESH}})", "served"),
            Query(f"max({_OWN}config_malformed_keys{{MESH}})", "malformed"),
            Query(f"max({_OWN}config_held_keys{{MESH}})", "held back"),
        ),
        lines(
            "Bytes of the config",
            "Each follower receives them when it connects.",
            Query(f"max({_OWN}config_bytes{{MESH}})", "config"),
            unit="bytes",
        ),
        lines(
            "History behind the mirror",
            "Revisions that are not recorded yet. It stays 0, but for moments.",
            Query(f"max({_OWN}mirror_revision{{MESH}}) - max({_OWN}history_revision{{MESH}})", "revisions"),
            unit="none",
        ),
    ]


def _etcd() -> list[Panel]:
    fsync = f"etcd_disk_wal_fsync_duration_seconds_bucket{_ETCD}"
    return [
        lines(
            "Calls of etcd that failed",
            "timeout: a member is frozen or overloaded. unavailable: one is down. refused: its user lacks rights."
            " out_of_space: the database is full. compacted: the watch breaks.",
            Query(
                f'sum by (outcome) (rate({_OWN}etcd_calls_total{{MESH, outcome!="ok"}}[RATE]))',
                "{{outcome}}",
            ),
            unit="reqps",
        ),
        lines(
            "Calls of etcd",
            "By method, those that succeeded.",
            Query(f'sum by (method) (rate({_OWN}etcd_calls_total{{MESH, outcome="ok"}}[RATE]))', "{{method}}"),
            unit="reqps",
        ),
        lines(
            "Moves to another member",
            "After a failure. Many: the members or their network are unstable.",
            Query(
                f"sum by (instance) (increase({_OWN}etcd_switches_total{{MESH}}[15m]))", "in 15 minutes {{instance}}"
            ),
        ),
        lines(
            "Size of the database",
            "Compaction keeps it small. At the quota nothing can be written.",
            Query(f"etcd_mvcc_db_total_size_in_bytes{_ETCD}", "size {{instance}}"),
            Query(f"etcd_mvcc_db_total_size_in_use_in_bytes{_ETCD}", "in use {{instance}}"),
            unit="bytes",
        ),
        lines(
            "Changes of the leader",
            "Several in an hour: slow disks or network.",
            Query(f"increase(etcd_server_leader_changes_seen_total{_ETCD}[1h])", "in 1 hour {{instance}}"),
        ),
        lines(
            "p99 of fsync",
            "Above 10 ms etcd's disk is too slow, above 100 ms leaders change.",
            Query(f"histogram_quantile(0.99, sum by (le, instance) (rate({fsync}[RATE])))", "{{instance}}"),
            unit="s",
            limit=0.1,
        ),
    ]
