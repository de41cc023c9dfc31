"""The figure of layers' outputs, correction by correction."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lq.analysis.outputs import OUTPUT, StagesSqnr, label, layers_of

# More layers than this have no room for their names.
MAX_LAYERS = 60


def draw_outputs(sqnr: StagesSqnr, width: float, line: str) -> Figure | None:
    """A row for each layer, the worst ones where there are too many, with a dot for each stage.

    Args:
        sqnr: by stage and layer.
        width: of the figure in inches.
        line: colour of what joins the dots.
    """
    if not sqnr:
        return None
    layers, last = layers_of(sqnr), list(sqnr.values())[-1]
    kept = set(sorted(layers, key=lambda layer: last.get(layer, np.inf))[:MAX_LAYERS])
    shown = [*(layer for layer in layers if layer in kept), OUTPUT]
    values = np.array([[found.get(layer, np.nan) for layer in shown] for found in sqnr.values()])
    values[~np.isfinite(values)] = np.nan
    # in a picture of its own size, whatever the number of layers
    figure = Figure(figsize=(width, 1.2 + 0.26 * len(shown)))
    axes, places = figure.subplots(), np.arange(len(shown))
    known = np.isfinite(values).any(axis=0)
    axes.hlines(
        places[known],
        np.nanmin(values[:, known], axis=0),
        np.nanmax(values[:, known], axis=0),
        color=line,
        linewidth=0.8,
        zorder=1,
    )
    colors = colormaps["viridis_r"](np.linspace(0.15, 1, len(sqnr)))
    for stage, row, color in zip(sqnr, values, colors, strict=True):
        axes.scatter(row, places, color=color, s=26, label=label(stage), zorder=2)
    axes.set_yticks(places, [layer or "model's output" for layer in shown], color="black")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("SQNR of the output (dB), more is better")
    if len(layers) > MAX_LAYERS:
        axes.set_title(f"the worst {MAX_LAYERS} of {len(layers)} layers", loc="left")
    figure.legend(loc="outside upper right", ncols=3)
    return figure
