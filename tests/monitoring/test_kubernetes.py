"""The files for Kubernetes have the same rules and boards, and give the same labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import yaml

from tests.monitoring.rules import FOLDER, ROOT, RULES
from tests.prometheus import Prometheus
from tests.waiting import until_async

OPERATOR = ROOT / "k8s" / "components" / "monitoring-operator"


def test_the_operator_gets_the_same_rules() -> None:
    rule = yaml.safe_load((OPERATOR / "rules.yaml").read_text())
    assert rule["spec"] == yaml.safe_load(RULES.read_text()), "run make rules"


def test_grafana_gets_every_board() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    maps = {each["name"]: each["files"] for each in kustomization["configMapGenerator"]}
    boards = list((FOLDER / "boards").glob("*.json"))
    # Grafana's sidecar writes the files of all ConfigMaps in a cluster into one folder.
    assert maps == {f"board-{each.stem}": [f"atserving-{each.name}=boards/{each.name}"] for each in boards}


async def test_a_prometheus_without_the_operator_gives_pods_the_labels_that_the_rules_use(tmp_path: Path) -> None:
    (scrape,) = yaml.safe_load((FOLDER / "prometheus-kubernetes.yaml").read_text())["scrape_configs"]

    def pod(port: int, **labels: str) -> dict[str, object]:
        """One port of a pod, as Prometheus finds it. Debian's cannot ask Kubernetes itself."""
        found = {
            "pod_ip": "127.0.0.1",
            "pod_name": "gate-x",
            "namespace": "atserving",
            "pod_phase": "Running",
            "pod_annotation_prometheus_io_scrape": "true",
            "pod_annotation_prometheus_io_port": "9090",
            "pod_label_app_kubernetes_io_part_of": "atserving",
            "pod_label_app_kubernetes_io_component": "gate",
        }
        own = {f"__meta_kubernetes_{name}": value for name, value in (found | labels).items()}
        return {"targets": [f"127.0.0.1:{port}"], "labels": own}

    targets = [
        pod(50051),
        pod(9090),
        pod(9090, pod_name="gate-gone", pod_phase="Succeeded"),
        pod(9090, pod_name="other", pod_label_app_kubernetes_io_part_of="other"),
    ]
    prometheus = Prometheus(tmp_path, targets)
    config = orjson.loads((tmp_path / "prometheus.yml").read_bytes())
    config["scrape_configs"][0]["relabel_configs"] = scrape["relabel_configs"]
    (tmp_path / "prometheus.yml").write_bytes(orjson.dumps(config))
    async with prometheus:

        async def found() -> list[dict[str, Any]]:
            active: list[dict[str, Any]] = (await prometheus.get("targets", state="active"))["activeTargets"]
            return active

        await until_async(found, what="Prometheus has targets")
        (target,) = await found()
    labels = {"job": "gate", "namespace": "atserving", "pod": "gate-x", "instance": "127.0.0.1:9090"}
    assert target["labels"] == labels
    assert target["scrapeUrl"] == "http://127.0.0.1:9090/metrics"
