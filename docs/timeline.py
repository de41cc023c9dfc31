"""Draws docs/timeline.png: which callback does what, and when.

python docs/timeline.py
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lq.analysis.figures import BLUE, GREY, ORANGE, STYLE, WIDTH

HOOKS = [
    "setup",
    "restore",
    "on_fit_start",
    "sanity check",
    "on_train_start",
    "train batch\nstarts",
    "before\nbackward",
    "optimizer\nstep",
    "train batch\nends",
    "validation\nends",
    "on_train_end",
    "on_fit_end",
]
# callback: what it does at hooks; orange is what changes scales
ROWS = {
    "ExactResume": {0: "random\nnumbers", 4: "data to\nits place", 8: "random\nnumbers", 9: "give them\nback"},
    "Distill": {0: "copy the\nteacher", 5: "hook\noutputs", 6: "add its\nloss"},
    "Quantize": {
        0: "place\nquantizers",
        1: "amax from\ncheckpoint",
        4: "calibrate,\nrescale,\ncalibrate",
        9: "best\nso far?",
        10: "validate,\nbest back",
    },
    "QATSchedule": {2: "original\nrates", 5: "write the\nrate"},
    "QuantDelay": {5: "still float?", 8: "as it was"},
    "ScaleFreeze": {4: "start its\nclock", 5: "observe,\nor freeze", 7: "drop frozen\ngradients", 8: "refresh", 10: "let go"},
    "QuantMonitor": {4: "histograms", 5: "measure", 8: "log", 10: "table of\nstages"},
    "OnnxExport": {0: "can it be\nwritten?", 11: "write the\ngraph"},
}
CHANGES_SCALES = {("Quantize", 1), ("Quantize", 4), ("Quantize", 10), ("ScaleFreeze", 8)}


def main() -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH + 2, 5.2))
        ax = figure.subplots()
        ax.axvspan(4.5, 8.5, color="#F1F3F4", zorder=0)
        ax.text(6.5, -0.75, "every train batch", ha="center", color=GREY)
        for y, (callback, done) in enumerate(ROWS.items()):
            ax.axhline(y, color="#E3E5E8", linewidth=0.8, zorder=1)
            for x, what in done.items():
                color = ORANGE if (callback, x) in CHANGES_SCALES else BLUE
                box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": color}
                ax.text(x, y, what, ha="center", va="center", fontsize=7, bbox=box, zorder=2)
        ax.set(xlim=(-0.6, len(HOOKS) - 0.4), ylim=(len(ROWS) - 0.4, -1.0))
        ax.set_xticks(range(len(HOOKS)), HOOKS, fontsize=7)
        ax.set_yticks(range(len(ROWS)), list(ROWS))
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.grid(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        figure.savefig(Path(__file__).with_name("timeline.png"))


if __name__ == "__main__":
    main()
