"""promtool accepts the rules and their unit tests; each alert has a test, a severity, and a runbook in the docs."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import orjson
import pytest
import yaml

from tests.monitoring.rules import FOLDER, JOBS, ROOT, RULES, TESTS, Rule, alerts, expectations, rules, unit_tests
from tests.prometheus import program, shortened
from tests.test_docs import anchors

RUNBOOKS = ROOT / "docs" / "alerts.md"

every_alert = pytest.mark.parametrize("alert", alerts(), ids=lambda each: each.name)


def promtool(*arguments: str | Path) -> None:
    run = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


@pytest.mark.parametrize("tests", TESTS, ids=lambda each: each.name)
def test_alerts_fire_when_they_should(tests: Path) -> None:
    promtool("test", "rules", tests)


@pytest.mark.parametrize("tests", TESTS, ids=lambda each: each.name)
def test_unit_tests_evaluate_the_groups_in_the_order_of_the_rules(tests: Path) -> None:
    groups = [each["name"] for each in yaml.safe_load(RULES.read_text())["groups"]]
    assert yaml.safe_load(tests.read_text())["group_eval_order"] == groups


def test_promtool_accepts_the_shortened_rules(tmp_path: Path) -> None:
    text = shortened(RULES.read_text())
    assert "[5000ms]" in text
    assert "0.5 * sum_over_time" in text
    (tmp_path / "rules.yaml").write_text(text)
    promtool("check", "rules", tmp_path / "rules.yaml")


def documented(first_line: str) -> str:
    """Return the code block of docs/monitoring.md that begins with a line."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    (block,) = [each for each in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, re.MULTILINE) if first_line in each]
    return textwrap.dedent(block.lstrip("\n"))


def test_the_documented_objectives_are_taken(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    (tmp_path / "objectives.yaml").write_text(documented("# objectives.yaml"))
    bounds = ("1.0", "5.0", "+Inf")
    series = [f'atserving_gate_request_seconds_bucket{{app="digits", le="{each}"}}' for each in bounds]
    series.append('atserving_gate_requests_total{app="digits", version="v1", code="200"}')

    def is_(expression: str, labels: str, value: float) -> dict[str, object]:
        samples = [{"labels": f"{expression}{labels}", "value": value}]
        return {"expr": expression, "eval_time": "5m", "exp_samples": samples}

    test = {
        "interval": "30s",
        "input_series": [{"series": each, "values": "1x20"} for each in series],
        "promql_expr_test": [
            is_("app:atserving_error_budget:ratio", '{app="digits"}', 0.01),
            is_("app:atserving_slow_budget:ratio", '{app="digits", le="5.0"}', 0.05),
        ],
    }
    tests = {"rule_files": ["rules.yaml", "objectives.yaml"], "evaluation_interval": "30s", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", tmp_path / "test.yaml")


def test_the_documented_scrape_config_is_valid(tmp_path: Path) -> None:
    config = yaml.safe_load(documented("rule_files: [monitoring/rules.yaml]"))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": [str(RULES)]}))
    promtool("check", "config", tmp_path / "prometheus.yml")
    assert {each["job_name"] for each in config["scrape_configs"]} == JOBS


def test_runbooks_name_panels_that_boards_have() -> None:
    named = set(re.findall(r"\*(\w+):\s+([^*]+)\*", RUNBOOKS.read_text()))
    assert {board for board, _ in named} == {"mesh", "app", "instance", "registry"}
    boards = {each.stem: orjson.loads(each.read_bytes()) for each in (FOLDER / "boards").glob("*.json")}
    panels = {(name, each["title"]) for name, board in boards.items() for each in board["panels"] if "title" in each}
    assert not {(board, " ".join(title.split())) for board, title in named} - panels


def test_a_name_is_one_rules() -> None:
    named = [(each.name, *sorted(each.labels.items())) for each in rules()]
    assert len(named) == len(set(named))


@every_alert
def test_an_alert_is_tested_to_fire_and_not_to_fire(alert: Rule) -> None:
    own = [each for each in expectations() if each.alert == alert.name]
    assert any(each.fires for each in own), "no test expects it to fire"
    assert any(not each.fires for each in own), "no test expects it not to fire"


@every_alert
def test_the_texts_of_an_alert_use_labels_that_it_has(alert: Rule) -> None:
    used = alert.labels_in_texts() - {"namespace", "pod", "instance"}
    for each in (each for each in expectations() if each.alert == alert.name):
        assert not [labels for labels in each.fires if not used <= labels.keys()]


@every_alert
def test_an_alert_has_a_severity_and_a_runbook(alert: Rule) -> None:
    assert alert.labels["severity"] in ("page", "ticket")
    page, _, anchor = alert.annotations["runbook_url"].partition("#")
    assert page.endswith("/alerts.md")
    assert anchor == alert.name.lower()
    assert anchor in anchors(RUNBOOKS)


def test_all_runbooks_are_on_one_page() -> None:
    assert len({each.annotations["runbook_url"].partition("#")[0] for each in alerts()}) == 1


def test_a_runbook_is_there_for_alerts_only() -> None:
    headings = re.findall(r"^### (.+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(each.name for each in alerts())


def test_the_tests_are_of_alerts() -> None:
    assert {each.alert for each in expectations()} == {each.name for each in alerts()}
    assert all(each["name"] for each in unit_tests())
