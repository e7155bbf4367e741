"""Panels in the one style of all boards, and what the boards share: variables, links, annotations.

An expression has the name of a selector in capitals in place of the labels that the board's variables choose::

    sum by (app) (rate(atserving_gate_requests_total{MESH, code=~"5.."}[RATE]))
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as shared
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="$datasource")
"""The Prometheus that the reader of a board has chosen."""

_TAG = "atserving"
_MESH = 'namespace=~"$namespace"'
_APP = f'{_MESH}, app="$app"'
_VERSION = f'{_APP}, version=~"$version"'
_SELECTORS = {
    "{MESH": "{" + _MESH,
    "{APPS": "{" + _MESH + ', app=~"$app"',
    "{APP": "{" + _APP,
    "{VERSION": "{" + _VERSION,
    "{INSTANCE": "{" + _VERSION + ', instance=~"$instance"',
    "[RATE]": "[$__rate_interval]",
}
_LEGEND_CALCS = ["lastNotNull", "max"]
_TIME = "${__url_time_range}&${datasource:queryparam}&${namespace:queryparam}"

Panel = Builder[models.Panel]
Limits = Sequence[tuple[float, str]]
"""From which value on a value has which colour, ascending. Below the first it is green."""


@dataclass(frozen=True)
class Query:
    """An expression, and the name of its series, with labels as ``{{label}}``."""

    expression: str
    legend: str = ""
    exemplars: bool = False


def to_app(label: str = "app") -> build.DashboardLink:
    """Return a link from a series to the board of its app."""
    return _link("Open the app", f"/d/atserving-app?var-app=${{__field.labels.{label}}}&{_TIME}")


def to_instance() -> build.DashboardLink:
    """Return a link from a series to the board of its instance."""
    variables = "&".join(f"var-{name}=${{__field.labels.{name}}}" for name in ("app", "version", "instance"))
    return _link("Open the instance", f"/d/atserving-instance?{variables}&{_TIME}")


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    height: int = 8,
    stack: bool = False,
    top: float | None = None,
    limit: float | None = None,
    link: build.DashboardLink | None = None,
) -> Panel:
    """Return a panel of lines. ``top`` is the end of its axis. ``limit`` is drawn as a dashed line."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(height)
        .min(0)
        .line_width(1.5)
        .fill_opacity(30 if stack else 5)
        .show_points(kinds.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(
            shared.VizLegendOptions()
            .show_legend(True)
            .placement(kinds.LegendPlacement.BOTTOM)
            .display_mode(kinds.LegendDisplayMode.TABLE)
            .calcs(_LEGEND_CALCS)
        )
        .tooltip(shared.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    )
    if stack:
        panel = panel.stacking(shared.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if top is not None:
        panel = panel.max(top)
    if limit is not None:
        dashed = shared.GraphThresholdsStyleConfig().mode(kinds.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds([(limit, "red")])).thresholds_style(dashed)
    if link:
        panel = panel.data_links([link])
    for query in _targets(queries):
        panel = panel.with_target(query)
    return panel


def number(
    title: str, description: str, expression: str, *, unit: str = "short", limits: Limits = (), width: int = 3
) -> Panel:
    """Return a panel with the last value of one series, coloured by limits, over its course."""
    (target,) = _targets([Query(expression)])
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .no_value("none")
        .span(width)
        .height(4)
        .thresholds(_thresholds(limits))
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.AREA)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(target)
    )


def heat(title: str, description: str, expression: str, *, width: int = 8, height: int = 8) -> Panel:
    """Return a panel that shows in which bucket of seconds how many observations were."""
    (target,) = _targets([Query(expression, "{{le}}")])
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(height)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64).exponent(0.5))
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .cell_gap(0)
        .show_legend()
        .show_tooltip()
        .exemplars_color("rgba(255,120,10,0.8)")
        .with_target(target.exemplar(True).format(PromQueryFormat.HEATMAP))
    )


def rows(
    title: str, description: str, key: str, columns: Sequence[tuple[str, str, str]], link: build.DashboardLink
) -> Panel:
    """Return a table: a row for each value of the label ``key``, and columns of (name, unit, expression)."""
    panel = table.Panel().title(title).description(description).datasource(SOURCE).span(24).height(7)
    names = {key: key}
    for number_, (name, unit, expression) in enumerate(columns):
        ref = chr(ord("A") + number_)
        names[f"Value #{ref}"] = name
        panel = panel.with_target(
            prometheus.Dataquery().expr(_filled(expression)).ref_id(ref).instant().format(PromQueryFormat.TABLE)
        ).override_by_name(name, [models.DynamicConfigValue("unit", unit), models.DynamicConfigValue("decimals", 2)])
    links = models.DynamicConfigValue("links", [link.build()])
    order = {"excludeByName": {"Time": True}, "renameByName": names}
    return (
        panel.override_by_name(key, [links])
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=order))
        .sort_by([shared.TableSortByFieldState().display_name(columns[0][0]).desc(True)])
    )


def to_row() -> build.DashboardLink:
    """Return a link from a row of a table to the board of its app."""
    return _link("Open the app", f"/d/atserving-app?var-app=${{__value.text}}&{_TIME}")


def board(
    name: str,
    description: str,
    variables: Sequence[Builder[models.VariableModel]],
    sections: Sequence[tuple[str, Sequence[Panel]]],
) -> build.Dashboard:
    """Return a board of sections, each a title and its panels from left to right."""
    result = (
        build.Dashboard(f"AtServing: {name}")
        .uid(f"atserving-{name}")
        .description(description)
        .tags([_TAG])
        .readonly()
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .links(list(_boards([each.build().name for each in variables])))
        .annotation(_alerts())
        .variables([_datasource(), _namespace(), *variables])
    )
    ids = itertools.count(1)
    for title, panels in sections:
        result = result.with_row(build.Row(title).id(next(ids)))
        for panel in panels:
            panel.build().id_val = next(ids)
            result = result.with_panel(panel)
    return result


def variable(name: str, label: str, description: str, values: str, *, several: bool) -> build.QueryVariable:
    """Return a variable whose values are those of a label. ``several``: the reader may choose some of them, or all."""
    result = (
        build.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(SOURCE)
        .query({"query": f"label_values({_filled(values)})", "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    if several:
        # `.*` also finds series without the label: those of a mesh outside Kubernetes have no namespace.
        everything = models.VariableOption(selected=True, text="All", value="$__all")
        result = result.multi(True).include_all(True).all_value(".*").current(everything)
    return result


def _datasource() -> build.DatasourceVariable:
    return build.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _namespace() -> build.QueryVariable:
    values = "atserving_gate_config_revision, namespace"
    return variable("namespace", "Namespace", "The mesh's namespace on Kubernetes", values, several=True)


def _boards(own: Sequence[str]) -> list[build.DashboardLink]:
    """Return links to all boards, with the choices of this one that they have, too."""
    links = []
    for name in ("mesh", "app", "instance", "registry"):
        kept = ["datasource", "namespace"]
        if name in ("app", "instance"):
            # On the board of the mesh the choice may be all apps.
            kept += [each for each in ("app", "version") if each in own and "version" in own]
        choices = "&".join(f"${{{each}:queryparam}}" for each in kept)
        link = build.DashboardLink(name).type(models.DashboardLinkType.LINK).url(f"/d/atserving-{name}?{choices}")
        links.append(link.keep_time(True))
    return links


class _Alerts(models.AnnotationQuery):
    """Marks of the alerts that fire, with the texts that Prometheus' marks have in Grafana beyond its schema."""

    def to_json(self) -> dict[str, object]:
        texts = {
            "titleFormat": "{{alertname}}",
            "textFormat": "{{app}} {{version}} {{instance}}",
            "tagKeys": "severity",
        }
        return {**super().to_json(), **texts}


class _AlertsBuilder(build.AnnotationQuery):
    def __init__(self) -> None:
        self._internal = _Alerts()


def _alerts() -> build.AnnotationQuery:
    return (
        _AlertsBuilder()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertname=~"AtServing.+", alertstate="firing"}')
    )


def _link(title: str, url: str) -> build.DashboardLink:
    return build.DashboardLink(title).url(url)


def _thresholds(limits: Limits) -> build.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="green")]
    steps += [models.Threshold(value=value, color=color) for value, color in limits]
    return build.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(_filled(each.expression))
        .legend_format(each.legend.replace("{{instance}}", "{{pod}} {{instance}}") or "__auto")
        .ref_id(chr(ord("A") + number_))
        .range()
        .exemplar(each.exemplars)
        for number_, each in enumerate(queries)
    ]


def _filled(expression: str) -> str:
    """Return an expression with its selectors. Beside the label ``instance`` it keeps the pod, which people know."""
    expression = re.sub(r"\bby \(([^)]*)\binstance\b", r"by (\1pod, instance", expression)
    for name, labels in _SELECTORS.items():
        expression = expression.replace(name, labels)
    return expression


def quantiles(buckets: str, by: str = "", legend: str = "") -> list[Query]:
    """Return the queries of three quantiles of a histogram. ``buckets`` are its series, ``by`` more labels to keep."""
    kept = f"le, {by}" if by else "le"
    return [
        Query(
            f"histogram_quantile({q}, sum by ({kept}) (rate({buckets}[RATE])))",
            f"{legend}{name}",
            exemplars=name == "p99",
        )
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    ]


def ratio(part: str, whole: str) -> str:
    """Return the share of one rate in another; 0 where there is no part, none where there is no whole."""
    return f"(sum(rate({part}[RATE])) or vector(0)) / (sum(rate({whole}[RATE])) > 0)"


def p99(buckets: str) -> str:
    """Return the 99 % quantile of a histogram's series; none without observations."""
    return f"histogram_quantile(0.99, sum by (le) (rate({buckets}[RATE]))) > 0"
