"""The tables of a report, as text in cells: one source for the terminal and for Markdown."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lq.analysis.quantizer_stats import LayerRow
from lq.analysis.records import Deployed, Stage
from lq.rescale import RescaledGroup

if TYPE_CHECKING:
    import rich.console

NOTHING = "-"
# metrics with one of these words in their names are shares, and shown in percent
SHARES = {"acc", "acc1", "acc5", "accuracy", "agreement", "auroc", "f1", "iou", "precision", "recall", "top1", "top5"}
# of metrics with one of these, less is better
ERRORS = {"bpb", "bpc", "cer", "err", "error", "loss", "mae", "mse", "nll", "perplexity", "ppl", "rmse", "wer"}

Named = TypeVar("Named", Stage, Deployed)


@dataclass(frozen=True)
class Table:
    """A table of text; rich's ``console.print`` shows it, :meth:`markdown` writes it. Its first column is a name."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def _numeric(self, column: int) -> bool:
        """Whether a column has numbers only: those stand to the right."""
        return column > 0 and all(_is_number(row[column]) for row in self.rows)

    def markdown(self) -> str:
        """A Markdown table, without the title."""
        rule = ["---:" if self._numeric(i) else "---" for i in range(len(self.columns))]
        lines = [[escape(text) for text in self.columns], rule, *([escape(text) for text in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __rich__(self) -> "rich.console.Group":
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(box=SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            # numbers stay whole where the terminal is narrow; long names are folded
            whole = max(len(row[i]) for row in self.rows) if self.rows and self._numeric(i) else None
            header = Text(column.replace(" (", "\n(").replace(" / ", "\n/ "))
            drawn.add_column(header, justify="right" if self._numeric(i) else "left", min_width=whole, overflow="fold")
        for row in self.rows:
            # Text, so that brackets in names are not taken for styles
            drawn.add_row(*(Text(text) for text in row))
        # a title of the table itself would be folded to its width
        return Group(Text(self.title, style="bold"), drawn)


def escape(text: str) -> str:
    """``text`` as Markdown shows it literally, on one line.

    >>> print(escape("a|b *.input _x_ val_acc"))
    a\\|b \\*.input \\_x\\_ val_acc
    """
    text = re.sub(r"[\\`*|\[\]]", r"\\\g<0>", " ".join(text.split()))
    # underscores inside of words are no emphasis and stay readable
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _is_number(text: str) -> bool:
    return text in ("", NOTHING, "∞", "-∞") or text.lstrip("+-").replace(".", "", 1).replace("e-", "", 1).isdigit()


def number(value: float | None) -> str:
    """Four digits; infinities and missing values by a sign.

    >>> number(3.14159), number(float("inf")), number(None)
    ('3.142', '∞', '-')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    # the sign # keeps trailing zeros, so that columns line up
    return f"{value:#.4g}"


def decibels_text(value: float | None) -> str:
    """One digit; infinities and missing values by a sign.

    >>> decibels_text(20.04), decibels_text(float("inf"))
    ('20.0', '∞')
    """
    return number(value) if value is None or not math.isfinite(value) else f"{value:.1f}"


def percent(share: float, digits: int = 2) -> str:
    """A share as a percentage, without the sign.

    >>> percent(0.98765)
    '98.77'
    """
    return NOTHING if math.isnan(share) else f"{100 * share:.{digits}f}"


def is_share(metric: str, values: Iterable[object]) -> bool:
    """Whether a metric is a share: by its name, and by its values, which are floats from 0 to 1 (or missing).

    >>> is_share("val_acc", [0.97, None]), is_share("val_acc", [97.1]), is_share("val_loss", [0.1])
    (True, False, False)
    """
    known = [v for v in values if v is not None and not (isinstance(v, float) and math.isnan(v))]
    named = not SHARES.isdisjoint(_words(metric))
    return named and bool(known) and all(isinstance(v, float) and 0 <= v <= 1 for v in known)


def is_error(metric: str) -> bool:
    """Whether less of a metric is better, by its name.

    >>> is_error("val_perplexity"), is_error("val_acc")
    (True, False)
    """
    return not ERRORS.isdisjoint(_words(metric))


def _words(metric: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", metric.lower())


def main_metric(metrics: Mapping[str, float]) -> str:
    """The metric to compare by: the first share, or else the first that is no loss, or else the first; empty if there is none.

    >>> main_metric({"val_loss": 0.1, "val_acc": 0.97}), main_metric({"val_loss": 1.4, "val_perplexity": 4.1})
    ('val_acc', 'val_perplexity')
    """
    shares = [name for name, value in metrics.items() if is_share(name, [value])]
    return next(iter([*shares, *(name for name in metrics if "loss" not in _words(name)), *metrics]), "")


def baseline(items: list[Named]) -> Named:
    """What the others are compared with: the one named ``float``, or else the first."""
    return next((item for item in items if item.name == "float"), items[0])


def stage_table(stages: list[Stage]) -> Table:
    """Metrics of each stage, beside the float model: of accuracies in percentage points, else of the main metric in percent."""
    reference = baseline(stages)
    main = main_metric(reference.metrics)
    columns, cells = ["Stage"], [[stage.name] for stage in stages]
    for metric in dict.fromkeys(name for stage in stages for name in stage.metrics):
        values = [stage.metrics.get(metric, math.nan) for stage in stages]
        share = is_share(metric, values)
        columns.append(f"{metric} (%)" if share else metric)
        for row, value in zip(cells, values, strict=True):
            row.append(percent(value) if share else number(value))
        if share:
            columns.append(f"to {reference.name} (points)")
            for row, stage, value in zip(cells, stages, values, strict=True):
                points = 100 * (value - reference.metrics.get(metric, math.nan))
                row.append("" if stage is reference else _signed(points))
        elif metric == main:
            known = reference.metrics[metric]
            columns.append(f"to {reference.name} (%)")
            for row, stage, value in zip(cells, stages, values, strict=True):
                row.append("" if stage is reference else _signed(100 * (value - known) / abs(known)) if known else NOTHING)
    return Table("Stages", columns, cells)


def _signed(points: float) -> str:
    if math.isnan(points):
        return NOTHING
    text = f"{points:+.2f}"
    return "0.00" if float(text) == 0 else text


def deployed_table(deployed: list[Deployed]) -> Table:
    """Size and speed of each graph, and both as multiples of those of the float graph."""
    reference = baseline(deployed)
    columns = ["Graph", "File", "Size (KiB)", f"Size / {reference.name}", "Latency (ms)", f"Latency / {reference.name}"]

    def ratio(value: Callable[[Deployed], float], graph: Deployed) -> str:
        return f"{value(graph) / value(reference):.2f}" if value(reference) and math.isfinite(value(graph)) else NOTHING

    rows = [
        [
            graph.name,
            graph.path.name,
            f"{graph.bytes / 1024:.1f}",
            ratio(lambda g: g.bytes, graph),
            NOTHING if math.isnan(graph.latency_ms) else f"{graph.latency_ms:.3f}",
            ratio(lambda g: g.latency_ms, graph),
        ]
        for graph in deployed
    ]
    return Table("Deployed graphs", columns, rows)


def layer_table(layers: list[LayerRow]) -> Table:
    """What is known of each quantizer."""
    methods = any(row.method for row in layers)
    columns = ["Quantizer", "Bits", *["Method"] * methods, "amax", "Peak", "Saturated (%)", "SQNR (dB)"]
    # rescaling leaves a factor on few inputs, mostly on none
    columns += ["Rescaled"] * (rescaled := any(row.rescaled for row in layers))
    rows = [
        [
            row.name,
            str(row.num_bits) if isinstance(row.num_bits, int) else "E{}M{}".format(*row.num_bits),
            *[row.method or NOTHING] * methods,
            number(row.amax) if row.low is None else f"{number(row.low)} to {number(row.amax)}",
            number(row.peak),
            percent(row.saturated, digits=3),
            f"{row.sqnr_db:.1f}" if math.isfinite(row.sqnr_db) else number(row.sqnr_db),
            *["yes" if row.rescaled else ""] * rescaled,
        ]
        for row in layers
    ]
    return Table("Quantizers", columns, rows)


def rescale_table(groups: Sequence[RescaledGroup], left: Mapping[str, str] | None = None) -> Table:
    """What a rescaling did to each group of layers: ``calibrator.groups`` and ``calibrator.left``.

    >>> import torch, lq
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 1, bias=False))
    >>> calibrator = lq.RescalingCalibrator(model, args=(torch.tensor([[1.0, 9.0]]),))
    >>> _ = calibrator.rescale(alpha=1.0)
    >>> rescale_table(calibrator.groups).rows[0][:6]
    ['0', '1', '2', 'folded', '1.00', '1.000 → 1.000']
    """
    columns = ["From", "Layers", "Channels", "Factors", "alpha", "Input amax", "Weight amax"]
    rows = [
        [
            group.producer or NOTHING,
            " ".join(group.consumers),
            str(group.channels),
            group.action,
            f"{group.alpha:.2f}",
            *(f"{number(before)} → {number(after)}" for before, after in (group.input_amax, group.weight_amax)),
        ]
        for group in groups
    ]
    rows += [[NOTHING, name, NOTHING, f"left: {why}", *[NOTHING] * 3] for name, why in (left or {}).items()]
    return Table("Rescaling", columns, rows)


def compare_runs(rows: list[dict[str, object]], sort_by: str | None = None, descending: bool = True) -> Table:
    """One table over the jobs of a sweep.

    Args:
        rows: a job each: its overrides and metrics by name. Jobs need not have the same ones.
        sort_by: order the jobs by this metric; those without it come last.
        descending: the largest first.

    Raises:
        ValueError: no job has ``sort_by``.

    >>> jobs = [{"method": "max", "val_acc": 0.991}, {"method": "mse", "val_acc": 0.9955}]
    >>> print(compare_runs(jobs, sort_by="val_acc").markdown())
    | method | val_acc (%) |
    | --- | ---: |
    | mse | 99.55 |
    | max | 99.10 |
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    if sort_by is not None:
        if sort_by not in names:
            raise ValueError(f"`sort_by` is {sort_by!r}, but the runs have {', '.join(names) or 'nothing'}.")
        rows = sorted(rows, key=lambda row: _rank(row.get(sort_by), descending))
    shares = {name for name in names if is_share(name, (row.get(name) for row in rows))}
    columns = [f"{name} (%)" if name in shares else name for name in names]
    return Table("Runs", columns, [[_cell(row.get(name), name in shares) for name in names] for row in rows])


def _rank(value: object, descending: bool) -> tuple[bool, float]:
    if not isinstance(value, int | float) or math.isnan(value):
        return True, 0.0
    return False, -value if descending else value


def _cell(value: object, share: bool) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return percent(value) if share else f"{value:.4g}"
    return str(value)
