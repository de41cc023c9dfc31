"""The figures of a sensitivity, and of what it is good for."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq.analysis.figures import BLUE, GREY, ORANGE, STYLE, WIDTH
from lq.analysis.tables import is_share

if TYPE_CHECKING:
    from lq.analysis.allocation import Allocation
    from lq.analysis.front import Front
    from lq.analysis.sensitivity import Sensitivity, SensitivityRow

# More rows than this have no room for their names.
MAX_ROWS = 60


def save_sensitivity(found: "Sensitivity", path: Path) -> Path:
    """Write the figure as PNG."""
    with rc_context(STYLE):
        draw_sensitivity(found).savefig(path)
    return path


def draw_sensitivity(found: "Sensitivity") -> Figure:
    """A row for each quantizer or layer, the most sensitive first: the output's SQNR, and the metric where there is one."""
    rows = found.rows[:MAX_ROWS]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.26 * max(3, len(rows))))
    axes = figure.subplots(1, 1 if found.metric_name is None else 2, squeeze=False, sharey=True)[0]
    axes[0].set_yticks(range(len(rows)), [f"{row.name}  {row.bits}" for row in rows], color="black")
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    _pairs(axes[0], [(row.alone.sqnr_db, row.without.sqnr_db) for row in rows])
    axes[0].axvline(found.quantized.sqnr_db, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="all quantized")
    axes[0].set_xlabel("SQNR of the output (dB), more is better")
    if found.metric_name is not None:
        _draw_metric(axes[1], found, rows)
    if len(found.rows) > MAX_ROWS:
        axes[0].set_title(f"the first {MAX_ROWS} of {len(found.rows)}", loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _draw_metric(ax: Axes, found: "Sensitivity", rows: "tuple[SensitivityRow, ...]") -> None:
    assert found.metric_name is not None
    pairs = [(row.alone.metric, row.without.metric) for row in rows]
    ends = (found.quantized.metric, found.float_metric)
    factor, unit = (100.0, " (%)") if is_share(found.metric_name, [v for pair in [*pairs, ends] for v in pair]) else (1.0, "")
    _pairs(ax, [(factor * alone, factor * without) for alone, without in pairs])
    ax.axvline(factor * ends[0], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ax.axvline(factor * ends[1], color="black", linewidth=1, zorder=0)
    values = [factor * value for pair in [*pairs, ends] for value in pair if np.isfinite(value)]
    margin = 0.06 * (max(values) - min(values)) or 0.01 * abs(values[0]) or 1.0
    ax.set_xlim(min(values) - margin, max(values) + margin)
    ax.set_xlabel(f"{found.metric_name}{unit}; black line: float")


def _pairs(ax: Axes, pairs: list[tuple[float, float]]) -> None:
    """Two dots in each row, joined; what is not finite is left out."""
    values = np.array(pairs)
    values[~np.isfinite(values)] = np.nan
    places = np.arange(len(pairs))
    ax.hlines(places, values[:, 0], values[:, 1], color=GREY, linewidth=0.8, zorder=1)
    for column, colour, label in ((0, BLUE, "it alone quantized"), (1, ORANGE, "all but it quantized")):
        ax.scatter(values[:, column], places, color=colour, s=26, label=label, zorder=2)
    ax.grid(axis="y", visible=False)


def save_front(found: "Front", path: Path) -> Path:
    """Write the figure as PNG."""
    with rc_context(STYLE):
        draw_front(found).savefig(path)
    return path


def draw_front(found: "Front") -> Figure:
    """What mixed widths are worth beside one width everywhere: the output's SQNR, and the metric where there is one."""
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots(1, 1 if found.metric_name is None else 2, squeeze=False)[0]
    _draw_kinds(axes[0], found, lambda a: a.effect.sqnr_db)
    axes[0].set_ylabel("SQNR of the output (dB), more is better")
    if found.metric_name is not None:
        factor, unit = (100.0, " (%)") if is_share(found.metric_name, [found.float_metric]) else (1.0, "")
        axes[1].axhline(factor * found.float_metric, color="black", linewidth=1, zorder=1)
        _draw_kinds(axes[1], found, lambda a: factor * a.effect.metric)
        axes[1].set_ylabel(f"{found.metric_name}{unit}; black line: float")
    for ax in axes:
        ax.set_xlabel(found.unit)
        ax.set_xlim(left=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _draw_kinds(ax: Axes, found: "Front", value: "Callable[[Allocation], float]") -> None:
    """Allocations, one width everywhere, and the allocation that was asked for."""
    points = sorted((found.cost(a), value(a)) for a in found.allocated)
    ax.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4, linewidth=1.2, label="allocated")
    uniform = [(found.cost(a), value(a)) for a in found.uniform]
    xs, ys = zip(*uniform, strict=True)
    ax.scatter(xs, ys, color=ORANGE, marker="s", s=24, zorder=3, label="one width everywhere")
    for a, point in zip(found.uniform, uniform, strict=True):
        # below a rising curve there is room
        place: Any = {"xytext": (6, -3), "textcoords": "offset points", "va": "top", "fontsize": 7, "color": ORANGE}
        ax.annotate(found.name_of(a), point, **place)
    if found.chosen is not None:
        label = f"within the budget: {found.chosen.mean_bits:.2f} bits"
        ax.scatter(found.cost(found.chosen), value(found.chosen), color="black", marker="*", s=90, zorder=4, label=label)
    ax.margins(y=0.12)
