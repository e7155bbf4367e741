"""Draw a board's panels, in their grid, from what their queries returned.

It is no Grafana: the queries, the grid, the units and the limits are the board's, and no more.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from PIL import Image

from monitoring.board_files import Panel

mpl.use("agg")

# Okabe and Ito's, which most colour-blind people can tell apart; dashes tell those of a second round.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
_STATES = {"green": "#00745A", "orange": "#B36B00", "red": "#C0392B"}
_INK, _FAINT, _PAPER = "#24292f", "#6e7781", "#eef0f2"

_DPI = 100
_COLUMN_PX, _UNIT_PX, _GAP_PX = 52, 30, 8
_LEGEND_ROWS, _LEGEND_PX = 3, 17
_COLORS_OF_FILE = 256


@dataclass(frozen=True)
class Series:
    """A named course: seconds since the first, and values, with gaps as NaN."""

    name: str
    labels: Mapping[str, str]
    times: Sequence[float]
    values: Sequence[float]


Data = Mapping[str, Sequence[Series]]
"""The series of each query of a panel, by its ref."""
Mark = tuple[float, float]
"""From when to when an alert fired: a red band. Twice the same: a dotted line."""


def picture(path: Path, panels: Sequence[tuple[Panel, Data]], seconds: float, marks: Sequence[Mark] = ()) -> None:
    """Write the picture of a board, or of some of its panels, over ``seconds``."""
    left = min(panel.x for panel, _ in panels)
    top = min(panel.y for panel, _ in panels)
    wide = max(panel.x + panel.w for panel, _ in panels) - left
    high = max(panel.y + panel.h for panel, _ in panels) - top
    size = (wide * _COLUMN_PX / _DPI, high * _UNIT_PX / _DPI)
    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.linewidth": 0.6, "text.color": _INK}):
        figure = Figure(figsize=size, dpi=_DPI, facecolor=_PAPER)
        canvas = _Canvas(figure, left, top, wide, high, seconds)
        for panel, data in panels:
            canvas.draw(panel, data, marks)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    # A palette makes the file a third. Without k-means thin lines get the colours of others.
    drawn = Image.open(buffer).convert("RGB")
    drawn.quantize(_COLORS_OF_FILE, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


class _Canvas:
    def __init__(self, figure: Figure, left: int, top: int, wide: int, high: int, seconds: float) -> None:
        self._figure = figure
        self._seconds = seconds
        self._left, self._top = left, top
        self._w, self._h = wide * _COLUMN_PX, high * _UNIT_PX

    def draw(self, panel: Panel, data: Data, marks: Sequence[Mark]) -> None:
        x, y = (panel.x - self._left) * _COLUMN_PX, (panel.y - self._top) * _UNIT_PX
        w, h = panel.w * _COLUMN_PX, panel.h * _UNIT_PX
        if panel.kind == "row":
            self._text(x + 10, y + h - 8, panel.title, size=12, weight="bold", va="bottom")
            return
        self._axes(x + _GAP_PX / 2, y + _GAP_PX / 2, w - _GAP_PX, h - _GAP_PX, card=True)
        self._text(x + 14, y + 12, panel.title, size=9 if panel.kind == "stat" else 10, weight="bold")
        body = (x + 14, y + 34, w - 28, h - 46)
        kinds: dict[str, Callable[[], None]] = {
            "stat": lambda: self._number(panel, data, *body),
            "table": lambda: self._table(panel, data, *body),
            "heatmap": lambda: self._heat(panel, data, *body),
            "timeseries": lambda: self._lines(panel, data, marks, *body),
        }
        kinds[panel.kind]()

    def _axes(self, x: float, y: float, w: float, h: float, *, card: bool = False) -> Axes:
        """Return axes at a place in pixels from the upper left corner."""
        axes = self._figure.add_axes((x / self._w, 1 - (y + h) / self._h, w / self._w, h / self._h))
        if card:
            axes.set(xticks=[], yticks=[], facecolor="white")
            axes.spines[:].set_color("#d0d7de")
        return axes

    def _text(self, x: float, y: float, text: str, *, size: float = 9, color: str = _INK, **how: Any) -> None:
        self._figure.text(
            x / self._w, 1 - y / self._h, text, size=size, color=color, **{"va": "top", "ha": "left", **how}
        )

    def _number(self, panel: Panel, data: Data, x: float, y: float, w: float, h: float) -> None:
        (series,) = list(data.values()) or [[]]
        values = [value for each in series[:1] for value in each.values if not math.isnan(value)]
        if not values:
            self._text(x, y + 10, "none", size=20, color=_FAINT)
            return
        state = "green"
        for limit, color in panel.limits:
            state = color if values[-1] >= limit else state
        self._text(x, y + 2, _spell(values[-1], panel.unit), size=20, color=_STATES[state], weight="bold")
        spark = self._axes(x, y + 42, w, h - 42)
        spark.fill_between(series[0].times, series[0].values, color=_STATES[state], alpha=0.18, linewidth=0)
        spark.plot(series[0].times, series[0].values, color=_STATES[state], linewidth=1.1)
        spark.set_ylim(bottom=0, top=max([*values, 1e-9]) * 1.15)
        spark.axis("off")

    def _table(self, panel: Panel, data: Data, x: float, y: float, w: float, h: float) -> None:
        cells: dict[str, dict[str, float]] = {}
        for ref, series in data.items():
            for each in series:
                cells.setdefault(next(iter(each.labels.values()), ""), {})[ref] = each.values[-1]
        columns = panel.columns
        first = next(iter(columns))
        order = sorted(cells, key=lambda key: -cells[key].get(first, 0))
        step = w / (len(columns) + 1)
        fitting = int(h // 24) - 1
        for number, name in enumerate(["app", *(name for name, _ in columns.values())]):
            self._text(x + number * step, y, name, color=_FAINT, weight="bold")
        for row, key in enumerate(order[:fitting], 1):
            self._text(x, y + 24 * row, key or "(unknown)", color=_COLORS[0])
            for number, (ref, (_, unit)) in enumerate(columns.items(), 1):
                if ref in cells[key]:
                    self._text(x + number * step, y + 24 * row, _spell(cells[key][ref], unit))

    def _heat(self, panel: Panel, data: Data, x: float, y: float, w: float, h: float) -> None:
        axes = self._axes(x + 46, y, w - 46, h - 18)
        (series,) = data.values()
        steps = sorted(
            (float(each.labels["le"]), each) for each in series if each.labels["le"] != "+Inf" and len(each.times) > 1
        )
        if steps:
            counts = np.diff(np.array([np.nan_to_num(each.values) for _, each in steps]), axis=0, prepend=0)
            bounds = [steps[0][0] / 2, *(bound for bound, _ in steps)]
            times = [*steps[0][1].times, steps[0][1].times[-1] + 1]
            counts = np.where(counts > 0, counts, np.nan)
            axes.pcolormesh(times, bounds, counts, cmap="Blues", norm=PowerNorm(0.5, vmin=-0.2 * np.nanmax(counts)))
            seen = np.flatnonzero(np.nansum(counts, axis=1))
            axes.set_yscale("log")
            axes.set_ylim(bounds[max(int(seen[0]) - 1, 0)], bounds[min(int(seen[-1]) + 2, len(bounds) - 1)])
        self._style(axes, "s")
        axes.minorticks_off()

    def _lines(self, panel: Panel, data: Data, marks: Sequence[Mark], x: float, y: float, w: float, h: float) -> None:
        series = [each for all_of_it in data.values() for each in all_of_it]
        if len(series) > 2 * _LEGEND_ROWS:
            series.sort(key=_peak, reverse=True)
        legend_px = min(max((len(series) + 1) // 2, 1), _LEGEND_ROWS) * _LEGEND_PX
        axes = self._axes(x + 46, y, w - 46, h - 20 - legend_px)
        if panel.stacked and series:
            areas = _aligned(series)
            axes.stackplot(areas[0].times, *(each.values for each in areas), colors=_COLORS, alpha=0.75, linewidth=0)
        else:
            for number, each in enumerate(series):
                dash = _DASHES[number // len(_COLORS) % len(_DASHES)]
                axes.plot(each.times, each.values, color=_COLORS[number % len(_COLORS)], linestyle=dash, linewidth=1.4)
        peak = max((_peak(each) for each in series), default=0)
        if panel.limits:
            axes.axhline(panel.limits[0][0], color=_STATES["red"], linestyle=(0, (5, 3)), linewidth=0.9)
        for begin, end in marks:
            if begin < end:
                axes.axvspan(begin, end, color=_STATES["red"], alpha=0.10, linewidth=0)
            else:
                axes.axvline(begin, color=_INK, linestyle=(0, (1, 2)), linewidth=1.2)
        if panel.stacked and series:
            peak = max(sum(values) for values in zip(*(each.values for each in _aligned(series)), strict=True))
        axes.set_ylim(0, panel.top or 1.1 * peak or 1)
        if panel.unit == "none" and series:
            lowest = min(value for each in series for value in each.values if not math.isnan(value))
            axes.set_ylim(max(lowest - 2, 0), max(peak + 2, lowest + 4))
        self._style(axes, panel.unit)
        if not series:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=_FAINT, size=11)
        self._legend(series, panel.unit, x, y + h - legend_px, w)

    def _style(self, axes: Axes, unit: str) -> None:
        axes.set_facecolor("white")
        axes.grid(color="#e6e9ec", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#d0d7de")
        axes.tick_params(length=0, colors=_FAINT, labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 1.5, 2, 3, 6, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02}"))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MultipleLocator(_binary_step(axes)) if unit == "bytes" else MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _spell(value, unit)))
        axes.set_xlim(0, self._seconds)

    def _legend(self, series: Sequence[Series], unit: str, x: float, y: float, w: float) -> None:
        fitting = 2 * _LEGEND_ROWS if len(series) <= 2 * _LEGEND_ROWS else 2 * _LEGEND_ROWS - 1
        half = w / 2
        for number, each in enumerate(series[:fitting]):
            at_x, at_y = x + number % 2 * half, y + number // 2 * _LEGEND_PX
            line = self._axes(at_x, at_y + 3, 16, 8)
            color, dash = _COLORS[number % len(_COLORS)], _DASHES[number // len(_COLORS) % len(_DASHES)]
            line.plot([0, 1], [0, 0], color=color, linestyle=dash, linewidth=2.4)
            line.axis("off")
            last = next((value for value in reversed(each.values) if not math.isnan(value)), math.nan)
            value = "" if math.isnan(last) else "  " + _spell(last, unit)
            most = max(int((half - 24) / 6.2) - len(value), 6)
            name = each.name if len(each.name) <= most else each.name[: most - 1] + "…"
            self._text(at_x + 21, at_y, name + value, size=8)
        if len(series) > fitting:
            self._text(x + half, y + (_LEGEND_ROWS - 1) * _LEGEND_PX, f"and {len(series) - fitting} more", size=8)


def _aligned(series: Sequence[Series]) -> list[Series]:
    """Return series with the same times, 0 where they had no value."""
    times = sorted({time for each in series for time in each.times})
    result = []
    for each in series:
        known = dict(zip(each.times, np.nan_to_num(each.values), strict=True))
        result.append(Series(each.name, each.labels, times, [float(known.get(time, 0)) for time in times]))
    return result


def _binary_step(axes: Axes) -> float:
    """Return a power of two that divides the axis in 2 to 4."""
    return float(2 ** math.ceil(math.log2(max(axes.get_ylim()[1], 4) / 4)))


def _peak(series: Series) -> float:
    return max((value for value in series.values if not math.isnan(value)), default=0.0)


_SCALES: Mapping[str, Sequence[tuple[float, float, str]]] = {
    "s": [
        (86400, 86400, " d"),
        (3600, 3600, " h"),
        (60, 60, " min"),
        (1, 1, " s"),
        (1e-3, 1e-3, " ms"),
        (0, 1e-6, " µs"),
    ],
    "bytes": [(1 << 30, 1 << 30, " GiB"), (1 << 20, 1 << 20, " MiB"), (1 << 10, 1 << 10, " KiB"), (0, 1, " B")],
    "percentunit": [(0, 0.01, " %")],
    "percent": [(0, 1, " %")],
    "reqps": [(1e6, 1e6, " M/s"), (1e3, 1e3, " k/s"), (0, 1, " /s")],
    "short": [(1e6, 1e6, " M"), (1e4, 1e3, " k"), (0, 1, "")],
    "none": [(0, 1, "")],
}


def _spell(value: float, unit: str) -> str:
    """Return a value with its unit, in three digits."""
    if not math.isfinite(value):
        return "-"
    if not value:
        return "0" + _SCALES[unit][-1][2] if unit not in ("s", "reqps") else "0"
    _, divisor, name = next(scale for scale in _SCALES[unit] if abs(value) >= scale[0])
    scaled = value / divisor
    if name == " %" and scaled < 0.01:
        return "< 0.01 %"
    return f"{scaled:.0f}{name}" if abs(scaled) >= 100 or unit == "none" else f"{scaled:.3g}{name}"
