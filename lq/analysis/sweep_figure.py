"""The figure of a sweep: the main metric of each stage over the jobs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq.analysis.figures import GREY, STYLE, WIDTH

if TYPE_CHECKING:
    from lq.analysis.sweep import Job, Sweep

Colour = tuple[float, ...]

# More jobs than this have no room for their names.
MAX_JOBS = 80
# Values of a key that lie further apart than this, as a ratio, are drawn over their logarithms.
WIDE = 30


def save_sweep(sweep: "Sweep", path: Path) -> Path:
    """Write the figure as PNG."""
    with rc_context(STYLE):
        draw_sweep(sweep).savefig(path)
    return path


def draw_sweep(sweep: "Sweep") -> Figure:
    """A line for each stage over one key that has numbers; else a row for each job, in groups of the first key."""
    numbers = sweep.numbers(sweep.keys[0]) if len(sweep.keys) == 1 else None
    figure = _lines(sweep, numbers) if numbers is not None else _rows(sweep)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=6)
    return figure


def _constant(sweep: "Sweep") -> float | None:
    """The metric in float where it is the same for all jobs, and so no matter of any."""
    values = {job.values["float"] for job in sweep.jobs if "float" in job.values}
    return values.pop() if len(values) == 1 else None


def _stages(sweep: "Sweep") -> dict[str, Colour]:
    """The stages that differ between jobs, with their colours: the later, the darker."""
    stages = [stage for stage in sweep.stages if stage != "float" or _constant(sweep) is None]
    return dict(zip(stages, map(tuple, colormaps["viridis_r"](np.linspace(0.2, 1, len(stages)))), strict=True))


def _sized(stages: dict[str, Colour]) -> Iterator[tuple[tuple[str, Colour], float]]:
    """Stages with sizes of their dots: the later, the smaller, so that equal ones can be seen."""
    yield from zip(stages.items(), np.linspace(8, 5, len(stages)).tolist(), strict=True)


def _lines(sweep: "Sweep", numbers: list[float]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6))
    ax = figure.subplots()
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    xs = np.array(numbers)[order]
    if (constant := _constant(sweep)) is not None:
        ax.axhline(constant, color="black", linewidth=1, label="float")
    for (stage, colour), size in _sized(_stages(sweep)):
        points = [(numbers[i], sweep.jobs[i].values[stage]) for i in order if stage in sweep.jobs[i].values]
        ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=size, linewidth=size / 4, label=stage)
    if xs[0] > 0 and xs[-1] / xs[0] > WIDE:
        ax.set_xscale("log")
    ax.set_xticks(xs, [sweep.jobs[i].told[sweep.keys[0]] for i in order])
    ax.minorticks_off()
    for i in order:
        if sweep.jobs[i].failed:
            ax.text(numbers[i], 0.02, "failed", transform=ax.get_xaxis_transform(), ha="center", color=GREY)
    ax.set_xlabel(sweep.keys[0])
    ax.set_ylabel(sweep.label)
    return figure


def _rows(sweep: "Sweep") -> Figure:
    """Jobs with equal first keys stand together, under that key, each with what else it was told."""
    grouped = len(sweep.keys) > 1
    shown = sweep.jobs[:MAX_JOBS]
    labels: list[str] = []
    places: list[tuple[int, Job]] = []
    for group in dict.fromkeys(job.told.get(sweep.keys[0], "") for job in shown) if grouped else [None]:
        if group is not None:
            labels.append(f"{sweep.keys[0]}={group}" if group else f"without {sweep.keys[0]}")
        for job in shown:
            if group is None or job.told.get(sweep.keys[0], "") == group:
                places.append((len(labels), job))
                labels.append(_label(sweep, job))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.25 * max(3, len(labels))))
    ax = figure.subplots()
    _dots(ax, sweep, places)
    ax.set_yticks(range(len(labels)), labels, color="black")
    jobs = {place for place, _ in places}
    for i, text in enumerate(ax.get_yticklabels()):
        text.set_fontweight("normal" if i in jobs else "bold")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(sweep.label)
    if len(sweep.jobs) > MAX_JOBS:
        ax.set_title(f"the first {MAX_JOBS} of {len(sweep.jobs)} jobs", loc="left")
    return figure


def _label(sweep: "Sweep", job: "Job") -> str:
    if not sweep.keys:
        return job.name
    if len(sweep.keys) == 1:
        return f"{sweep.keys[0]}={job.told[sweep.keys[0]]}" if job.told else f"without {sweep.keys[0]}"
    return "  ".join(f"{key}={job.told[key]}" for key in sweep.keys[1:] if key in job.told) or job.name


def _dots(ax: Axes, sweep: "Sweep", places: "list[tuple[int, Job]]") -> None:
    """A row for each job, a dot for each stage, and the last stage's value at the right, the best one bold."""
    if (constant := _constant(sweep)) is not None:
        ax.axvline(constant, color="black", linewidth=1, label="float", zorder=0)
    last = {place: values[-1] for place, job in places if (values := list(job.values.values()))}
    stages = _stages(sweep)
    for place, job in places:
        if values := [job.values[stage] for stage in stages if stage in job.values]:
            ax.hlines(place, min(values), max(values), color=GREY, linewidth=0.8, zorder=1)
        text = sweep.text(last[place]) if place in last else "failed"
        best = sweep.unit == "%" and place in last and last[place] == max(last.values())
        weight = "bold" if best else "normal"
        ax.text(1.01, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8, fontweight=weight)
    if len({list(job.values)[-1] for _, job in places if job.values}) == 1:
        ax.text(1.01, -0.9, sweep.stages[-1], transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
    for (stage, colour), size in _sized(stages):
        found = [(job.values[stage], place) for place, job in places if stage in job.values]
        xs, ys = zip(*found, strict=True)
        ax.scatter(xs, ys, color=colour, s=size**2, label=stage, zorder=2)
