"""The figures of a report. They share one style, colours that colour-blind readers can tell apart, and axes with units."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq.analysis.output_figure import draw_outputs
from lq.analysis.outputs import StagesSqnr
from lq.analysis.records import Histogram, Report
from lq.analysis.tables import baseline, is_error, is_share, main_metric

# from the palette of Okabe and Ito
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F6368"
# Any: matplotlib types its settings by the names of all of them
STYLE: Any = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E5E8",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}
# more small pictures than this nobody looks at, and more bars get no room for their names
MAX_PANELS = 40
BINS_DRAWN = 96
# of every figure, in inches, so that text has the same size in all of them on a page
WIDTH = 9.4


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw every figure that the report has data for into ``folder``, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in (accuracy, outputs, sqnr, histograms, amax):
        with rc_context(STYLE):
            drawn = figure(report)
            if drawn is not None:
                path = folder / f"{figure.__name__}.png"
                drawn.savefig(path)
                paths.append(path)
    return paths


def outputs(report: Report) -> Figure | None:
    """What is left of each layer's output, correction by correction."""
    return draw_outputs(report.output_sqnr, WIDTH, GREY)


def save_outputs(found: StagesSqnr, path: Path) -> Path:
    """That figure alone, as PNG."""
    with rc_context(STYLE):
        figure = draw_outputs(found, WIDTH, GREY)
        assert figure is not None
        figure.savefig(path)
    return path


def accuracy(report: Report) -> Figure | None:
    """What each stage costs against the float model, and the metric over the steps where the history has it."""
    metrics = _finite(baseline(report.stages).metrics) if report.stages else {}
    if not metrics:
        return None
    metric = main_metric(metrics)
    points = _points(report, metric)
    factor, unit = (100.0, "%") if is_share(metric, [metrics[metric]]) else (1.0, "")
    figure = Figure(figsize=(WIDTH, 0.9 + 0.4 * max(3, len(report.stages))))
    axes = figure.subplots(1, 2 if len(points) > 1 else 1, squeeze=False)[0]
    values = {stage.name: factor * stage.metrics[metric] for stage in report.stages if metric in _finite(stage.metrics)}
    _differences(axes[0], values, factor * metrics[metric], baseline(report.stages).name, metric, unit)
    if len(points) > 1:
        _over_steps(axes[1], [(step, factor * value) for step, value in points], values, metric, unit)
    return figure


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _points(report: Report, key: str) -> list[tuple[float, float]]:
    """Steps and values of a metric, where the history has both."""
    rows = map(_finite, report.history)
    return [(row["step"], row[key]) for row in rows if key in row and "step" in row]


def _differences(ax: Axes, values: dict[str, float], reference: float, reference_name: str, metric: str, unit: str) -> None:
    places = np.arange(len(values))
    differences = np.array(list(values.values())) - reference
    worse = differences > 0 if is_error(metric) else differences < 0 if unit else np.zeros(len(values), dtype=bool)
    ax.barh(places, differences, height=0.55, color=np.where(worse, ORANGE, BLUE))
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(places, list(values), color="black")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    low, high = min(differences.min(), 0), max(differences.max(), 0)
    margin = 0.1 * (high - low) or 0.5
    ax.set_xlim(low - margin, high + margin)
    ax.set_xlabel(f"difference to {reference_name} ({'percentage points' if unit else metric})")
    ax.set_title(metric, loc="left", fontweight="bold")
    # values stand in a column of their own, where no bar reaches them
    for place, value in enumerate(values.values()):
        text = f"{value:.2f} {unit}" if unit else f"{value:.4g}"
        ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center")


def _over_steps(ax: Axes, points: list[tuple[float, float]], stages: dict[str, float], metric: str, unit: str) -> None:
    steps, values = zip(*points, strict=True)
    ax.plot(steps, values, color=BLUE, marker="o", markersize=3.5)
    for value in stages.values():
        ax.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlabel("step")
    ax.set_title(f"{metric}{f' ({unit})' if unit else ''} over the fit; dashed: stages", loc="left", fontweight="bold")
    low, high = ax.get_ylim()
    levels: dict[float, list[str]] = {}
    for name, value in stages.items():
        levels.setdefault((value - low) / (high - low), []).append(name)
    for name, height in _apart({", ".join(names): level for level, names in levels.items()}, 0.075).items():
        ax.text(1.02, height, name, transform=ax.transAxes, va="center", color=GREY, fontsize=8)


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels from 0 to 1, pushed apart until none touches another."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max(height, max(placed.values(), default=-gap) + gap)
    # what was pushed over the top comes down again
    ceiling = 1.0
    for name in reversed(placed):
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - gap
    return placed


def sqnr(report: Report) -> Figure | None:
    """Signal to noise of each layer's input and weight."""
    rows = {row.name: row.sqnr_db for row in report.layers if np.isfinite(row.sqnr_db)}
    if not rows:
        return None
    roles: dict[str, dict[str, float]] = {"weight": {}, "input": {}}
    for name in _worst(rows, report):
        layer, _, role = name.rpartition(".")
        known = role in roles
        roles[role if known else "input"][layer if known else name] = rows[name]
    layers = list(dict.fromkeys(_layer(row.name) for row in report.layers if any(_layer(row.name) in r for r in roles.values())))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.3 * len(layers)))
    ax = figure.subplots()
    for role, offset, colour in (("input", -0.19, BLUE), ("weight", 0.19, ORANGE)):
        if not roles[role]:
            continue
        places = [layers.index(layer) + offset for layer in roles[role]]
        bars = ax.barh(places, list(roles[role].values()), height=0.36, color=colour, label=role)
        ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=7, color=GREY)
    ax.set_yticks(range(len(layers)), [_short(layer, 40) for layer in layers], color="black")
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("signal to quantization noise (dB), longer is better")
    figure.legend(loc="outside upper right", ncols=2)
    if len(rows) > MAX_PANELS:
        ax.set_title(_selection(len(rows)), loc="left")
    return figure


def _layer(name: str) -> str:
    return name.removesuffix(".input").removesuffix(".weight")


def histograms(report: Report) -> Figure | None:
    """What each quantizer saw, and where amax cuts it."""
    chosen = _worst([name for name, h in report.histograms.items() if int(h.counts.sum())], report)
    with _panels(chosen, len(report.histograms), "magnitude", "values in a bin (log scale)") as (figure, axes):
        for name, ax in axes.items():
            _histogram(ax, name, report.histograms[name])
        if figure is not None:
            handles, labels = next(iter(axes.values())).get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=3)
    return figure


def _histogram(ax: Axes, name: str, data: Histogram) -> None:
    edges, counts = _coarser(data)
    floor = 0.5
    heights = np.where(counts > 0, counts, floor)
    beyond = edges[:-1] >= data.first_beyond * data.width
    for colour, label, selected in ((BLUE, "kept", ~beyond), (ORANGE, "beyond amax", beyond)):
        shown = np.where(selected, heights, floor)
        ax.stairs(shown, edges, baseline=floor, fill=True, color=colour, alpha=0.75, label=label)
    ax.axvline(data.amax, color="black", linewidth=1.1, label="amax")
    ax.set_yscale("log")
    ax.set_ylim(floor, 3 * heights.max())
    ax.set_xlim(0, 1.03 * max(data.peak, data.amax) or 1)
    _title(ax, name, f"amax {data.amax:.3g}, {100 * data.beyond:.2g} % beyond")


def _coarser(data: Histogram) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Edges and counts of few enough bins to draw, with an edge where those beyond amax begin."""
    used = min(len(data.counts), int(data.peak / data.width) + 1)
    group = -(-used // BINS_DRAWN)
    starts = np.unique(np.concatenate([[0], np.arange(data.first_beyond % group, used, group)]))
    counts = np.add.reduceat(data.counts[:used].numpy(), starts)
    return np.append(starts, used) * data.width, counts


def amax(report: Report) -> Figure | None:
    """How amax of each input moved over the steps."""
    keys = dict.fromkeys(key for row in report.history for key in row if key.startswith("amax/") and not key.endswith(".weight"))
    series = {key.removeprefix("amax/"): points for key in keys if (points := _points(report, key))}
    with _panels(_worst(series, report), len(series), "step", "amax", sharex=True) as (figure, axes):
        for name, ax in axes.items():
            steps, values = (np.array(column) for column in zip(*series[name], strict=True))
            # amax keeps its value until it is refreshed
            ax.plot(steps, values, color=BLUE, drawstyle="steps-post", marker="o" if len(steps) == 1 else None)
            ax.set_ylim(0, 1.2 * values.max() or 1)
            if len(steps) == 1:
                ax.set_xticks(steps)
            change = f" to {values[-1]:.3g} ({100 * (values[-1] / values[0] - 1):+.1f} %)" if values[0] else ""
            _title(ax, name, f"{values[0]:.3g}{change if values[0] != values[-1] else ', unchanged'}")
    return figure


@contextmanager
def _panels(
    names: Sequence[str], total: int, xlabel: str, ylabel: str, sharex: bool = False
) -> Iterator[tuple[Figure | None, dict[str, Axes]]]:
    """A grid of small axes by name; no figure if there are no names."""
    if not names:
        yield None, {}
        return
    columns = 4 if len(names) == 4 or len(names) > 6 else 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 1.65 * rows + 0.75))
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False).flatten()
    for ax in grid[len(names) :]:
        ax.remove()
    for i, ax in enumerate(grid[: len(names)]):
        ax.tick_params(labelsize=7, labelbottom=not sharex or i + columns >= len(names))
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    if total > len(names):
        figure.suptitle(_selection(total), fontsize=9, x=0.01, ha="left")
    yield figure, dict(zip(names, grid, strict=False))


def _title(ax: Axes, name: str, detail: str) -> None:
    ax.set_title(_short(name, 26), loc="left", fontsize=8, fontweight="bold", pad=13)
    ax.text(0, 1.03, detail, transform=ax.transAxes, fontsize=7, color=GREY)


def _short(name: str, length: int) -> str:
    """``name`` in at most ``length`` characters, still to be told from its neighbours.

    >>> _short("model.encoder.layers.11.attention.output.input", 28)
    'm.e.l.11.a.output.input'
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= length:
            break
        parts[i] = part if part.isdigit() else part[:1]
    shorter = ".".join(parts)
    return shorter if len(shorter) <= length else f"{shorter[: length // 2]}…{shorter[-(length // 2 - 1) :]}"


def _worst(names: Sequence[str] | dict[str, Any], report: Report) -> list[str]:
    """``names`` in their order; of too many, those with the lowest SQNR."""
    if len(names) <= MAX_PANELS:
        return list(names)
    noise = {row.name: row.sqnr_db for row in report.layers}
    chosen = set(sorted(names, key=lambda name: noise.get(name, float("inf")))[:MAX_PANELS])
    return [name for name in names if name in chosen]


def _selection(total: int) -> str:
    return f"The {MAX_PANELS} of {total} quantizers with the lowest SQNR"
