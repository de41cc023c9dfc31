"""What a model is worth at which size: mixed widths beside one width everywhere."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lq.analysis.allocation import Allocation, Allocator, Cost
from lq.analysis.output_error import MetricLike
from lq.analysis.tables import Table, decibels_text, is_share, number, percent
from lq.analysis.widths import Choices
from lq.methods import Method

# Budgets of a front, unless some are given.
BUDGETS = 9


@dataclass(frozen=True)
class Front:
    """What :func:`front` found. ``rich.print(found.table())``, ``found.figure(path)``.

    Attributes:
        allocated: widths that were chosen, by rising budget.
        uniform: one width everywhere, as often as there are widths.
        by: what the budget is about.
        metric_name: what tables call the metric; ``None`` without one.
        float_metric: its value in float; NaN without one.
        chosen: an allocation for a budget of its own, that tables and figures point out.
    """

    allocated: tuple[Allocation, ...]
    uniform: tuple[Allocation, ...]
    by: Cost
    metric_name: str | None
    float_metric: float
    chosen: Allocation | None = None

    def cost(self, allocation: Allocation) -> float:
        """KiB, or millions of bit-operations."""
        return allocation.size / 1024 if self.by == "size" else allocation.bit_operations / 1e6

    @staticmethod
    def name_of(allocation: Allocation) -> str:
        """The widths that most layers have: some have no weight, or an activation in float."""
        return Counter(map(str, allocation.widths.values())).most_common(1)[0][0]

    @property
    def unit(self) -> str:
        """That of :meth:`cost`, with a name."""
        return "Weights (KiB)" if self.by == "size" else "Bit-operations (millions)"

    def table(self) -> Table:
        """A row for each allocation, and for each width everywhere, the cheapest first."""
        found = [("allocated", a) for a in self.allocated] + [(f"all {self.name_of(a)}", a) for a in self.uniform]
        found += [] if self.chosen is None else [("chosen", self.chosen)]
        found.sort(key=lambda item: self.cost(item[1]))
        columns = ["Widths", "Bits", self.unit, "Expected (MSE)", "Found (MSE)", "SQNR (dB)"]
        rows = [
            [
                kind,
                f"{a.mean_bits:.2f}",
                f"{self.cost(a):.4g}",
                number(a.predicted_mse),
                number(a.effect.mse),
                decibels_text(a.effect.sqnr_db),
            ]
            for kind, a in found
        ]
        if self.metric_name is not None:
            values = [a.effect.metric for _, a in found]
            share = is_share(self.metric_name, values)
            columns.append(f"{self.metric_name}{' (%)' * share}")
            rows = [[*row, percent(value) if share else number(value)] for row, value in zip(rows, values, strict=True)]
        return Table("Widths by layer, and one width everywhere", columns, rows)

    def records(self) -> dict[str, Any]:
        """All figures in plain types."""
        return {
            "by": self.by,
            "metric": self.metric_name,
            "float_metric": self.float_metric,
            "allocated": [a.records() for a in self.allocated],
            "uniform": [a.records() for a in self.uniform],
            "chosen": None if self.chosen is None else self.chosen.records(),
        }

    def figure(self, path: str | Path) -> Path:
        """Draw it as PNG."""
        from lq.analysis.sensitivity_figure import save_front

        return save_front(self, Path(path))


def front(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Choices = (2, 3, 4, 8),
    budgets: Iterable[float] | None = None,
    *,
    by: Cost = "size",
    method: Method = "mse",
    metric: MetricLike | None = None,
    targets: Iterable[Any] | None = None,
) -> Front:
    """Allocations for several budgets, each run as a whole, beside each width everywhere.

    Args:
        model: as for :func:`lq.analysis.allocate_bits`, like ``batches``, ``bits``, ``by`` and ``method``.
        batches: errors are measured on them.
        bits: widths to choose among.
        budgets: in bits on average; by default nine from the narrowest to the widest.
        by: ``"size"`` or ``"bit_operations"``.
        method: of calibration.
        metric: as for :func:`lq.analysis.sensitivity`, like ``targets``; a function of the model may have data of its own.
        targets: one for each batch.

    Raises:
        ValueError: as :func:`lq.analysis.allocate_bits`.

    >>> import torch, lq
    >>> _ = torch.manual_seed(0)
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)))
    >>> batches = [torch.randn(64, 16)]
    >>> with lq.calibrating(model):
    ...     _ = model(batches[0])
    >>> found = front(model, batches, bits=(2, 4, 8), budgets=[3, 5])
    >>> [str(a.widths["2"]) for a in found.allocated], [str(a.widths["2"]) for a in found.uniform]
    (['W4A8', 'W8A8'], ['W2A8', 'W4A8', 'W8A8'])
    """
    return front_of(Allocator(model, batches, bits, by, method, metric, targets), BUDGETS if budgets is None else budgets)


def front_of(allocator: Allocator, budgets: int | Iterable[float], chosen: Allocation | None = None) -> Front:
    """The front of an allocator, over some budgets, or as many of them from the narrowest widths to the widest.

    Args:
        allocator: with a metric or without.
        budgets: in bits on average, or how many.
        chosen: one of its allocations, to be shown among the others.
    """
    wanted = np.linspace(*allocator.range(), budgets).tolist() if isinstance(budgets, int) else sorted(budgets)
    error = allocator.trial.error
    return Front(
        allocated=tuple(allocator.allocate(budget) for budget in wanted),
        uniform=tuple(allocator.uniform()),
        by=allocator.by,
        metric_name=error.metric_name,
        float_metric=error.metric,
        chosen=chosen,
    )
