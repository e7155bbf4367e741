"""Read the pages of metrics by the parsers of Prometheus' client library."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def families(text: str, content_type: str) -> list[Metric]:
    """Return the families of a page. Raises ValueError if it is not in its format."""
    parse = parse_openmetrics if "openmetrics" in content_type else text_string_to_metric_families
    return list(parse(text))
