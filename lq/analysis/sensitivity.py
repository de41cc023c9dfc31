"""Which quantizers, or layers, cost the most: each alone switched on, and each alone switched off."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lq.analysis.output_error import Effect, MetricLike, OutputError
from lq.analysis.parts import By, Kind, find_parts, separate_, switching
from lq.analysis.rules import descriptors_of, rules_of
from lq.analysis.tables import Table, decibels_text, is_share, number, percent
from lq.descriptor import QuantDescriptor, QuantRule
from lq.functional.grid import Bits
from lq.nn.evaluating import evaluating


@dataclass(frozen=True)
class SensitivityRow:
    """What a quantizer, or a layer, costs.

    Attributes:
        name: of the quantizer or the layer.
        bits: widths of its weight and its activations: ``W4A8``.
        alone: it quantizes, and all others are off.
        without: it is off, and all others quantize.
        sites: layers that have it, and what it quantizes there.
    """

    name: str
    bits: str
    alone: Effect
    without: Effect
    sites: tuple[tuple[str, Kind], ...]


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found. ``rich.print(result.table())``, ``result.figure(path)``, ``result.rules(worst=3)``.

    Attributes:
        rows: the most sensitive first: by the error of the output with it alone quantized.
        quantized: all quantize.
        metric_name: what tables call the metric; ``None`` without one.
        float_metric: its value in float; NaN without one.
        layers: the rules that the model has now, by the names of its layers.
    """

    rows: tuple[SensitivityRow, ...]
    quantized: Effect
    metric_name: str | None
    float_metric: float
    layers: Mapping[str, QuantRule]

    def rules(self, worst: int | None = None, *, below_db: float | None = None, num_bits: Bits | None = None) -> list[QuantRule]:
        """Rules for the float model that spare the most sensitive: a rule for each layer that stays quantized.

        Args:
            worst: spare as many rows, from the first on.
            below_db: or those that alone leave less than this SQNR, in dB.
            num_bits: the width that they get; ``None`` leaves them in float.

        Raises:
            ValueError: neither ``worst`` nor ``below_db``, or both; a number of rows that there are not; a row that is a
                quantizer in somebody's ``forward``, which no rule reaches.
        """
        if (worst is None) == (below_db is None):
            raise ValueError(f"`worst` is {worst} and `below_db` {below_db}: give one of them.")
        if worst is not None and not 0 <= worst <= len(self.rows):
            raise ValueError(f"`worst` is {worst}: there are {len(self.rows)} rows to spare.")
        spared = self.rows[:worst] if below_db is None else [row for row in self.rows if row.alone.sqnr_db < below_db]
        if alone := [row.name for row in spared if not row.sites]:
            raise ValueError(f"`{alone[0]}` stands alone in a `forward`, which no rule reaches: change it there.")
        sites = {site for row in spared for site in row.sites}
        rules = [_spared(layer, rule, sites, num_bits) for layer, rule in self.layers.items()]
        return [rule for rule in rules if rule.input or rule.weight]

    def table(self) -> Table:
        """A row for each, and one for all of them together, and for none."""
        columns, title = ["Quantized", "Bits", "Alone (dB)", "All but it (dB)"], "Sensitivity of the output"
        rows = [[row.name, row.bits, decibels_text(row.alone.sqnr_db), decibels_text(row.without.sqnr_db)] for row in self.rows]
        rows.append(["all", "", decibels_text(self.quantized.sqnr_db), "∞"])
        if self.metric_name is not None:
            values = [(row.alone.metric, row.without.metric) for row in self.rows] + [(self.quantized.metric, self.float_metric)]
            share = is_share(self.metric_name, [value for pair in values for value in pair])
            title += f" and of {self.metric_name}{' (%)' * share}"
            columns += ["Alone (metric)", "All but it (metric)"]
            for row, pair in zip(rows, values, strict=True):
                row += [percent(value) if share else number(value) for value in pair]
        return Table(title, columns, rows)

    def records(self) -> dict[str, Any]:
        """All figures in plain types."""
        rows = [{key: value for key, value in asdict(row).items() if key != "sites"} for row in self.rows]
        return {"rows": rows, "quantized": asdict(self.quantized), "metric": self.metric_name, "float_metric": self.float_metric}

    def figure(self, path: str | Path) -> Path:
        """Draw it as PNG."""
        from lq.analysis.sensitivity_figure import save_sensitivity

        return save_sensitivity(self, Path(path))


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    by: By = "quantizer",
    metric: MetricLike | None = None,
    targets: Iterable[Any] | None = None,
) -> Sensitivity:
    """What each quantizer alone does to the output, and what the others do without it.

    Each is switched on with all others off, and off with all others on; the output is compared with that in float. The model
    runs twice for each, and twice more, in evaluation and without gradients, and is afterwards as it was.

    Args:
        model: quantized and calibrated. Quantizers that are off stay so.
        batches: the model's positional inputs, each a tensor, tuple or list, without labels; a few hundred samples are enough.
            They are kept in memory, and so are the float outputs. Of several processes each measures its own.
        by: ``"quantizer"``: one that several layers share, as those of one tensor do, is switched as one. Or ``"layer"``: the
            inputs, the weight and the shortcut of a layer together, and what it shares with others only in itself.
        metric: a torchmetrics object, which is copied and updated with each output and its target; or a function of the model,
            as a validation loop is, that returns a number.
        targets: for torchmetrics, one for each batch.

    Raises:
        ValueError: nothing quantizes, a quantizer has no amax, no batches, a float output that is not finite, a metric without
            targets.
        TypeError: ``batches`` is one tensor, or the model has no floating output.

    >>> import torch, lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)), "w4a8")
    >>> _ = [nn.init.ones_(weight) for weight in model.parameters()]
    >>> with lq.calibrating(model):
    ...     _ = model(torch.tensor([[1.27]]))
    >>> found = sensitivity(model, [torch.tensor([[1.0], [0.104]])], by="layer")
    >>> [(row.name, row.bits, f"{row.alone.mse:.1e}") for row in found.rows]
    [('0', 'W4A8', '8.0e-06'), ('1', 'W4A8', '8.0e-06')]
    >>> [rule.pattern for rule in found.rules(worst=1)]
    ['1']
    """
    with ExitStack() as stack:
        if by == "layer":
            # copies that share everything but the switches
            stack.callback(separate_(model, copy.copy))
        parts = find_parts(model, by)
        switch = stack.enter_context(switching(parts))
        stack.enter_context(evaluating(model))
        switch([])
        error = OutputError(model, batches, metric, targets)

        def measured(*on: Any) -> Effect:
            switch(on)
            return error.measure()

        rows = [
            SensitivityRow(
                part.name,
                part.bits,
                alone=measured(part),
                without=measured(*(other for other in parts if other is not part)),
                sites=tuple((site.layer, site.kind) for site in part.sites),
            )
            for part in parts
        ]
        quantized = measured(*parts)
        rules = rules_of(model, descriptors_of(parts))
    rows.sort(key=lambda row: -row.alone.mse)
    return Sensitivity(tuple(rows), quantized, error.metric_name, error.metric, rules)


def _spared(layer: str, rule: QuantRule, sites: set[tuple[str, Kind]], num_bits: Bits | None) -> QuantRule:
    def chosen(kind: Kind, desc: QuantDescriptor | None) -> QuantDescriptor | None:
        if desc is None or (layer, kind) not in sites:
            return desc
        return None if num_bits is None else desc.replace(num_bits=num_bits)

    return replace(rule, input=chosen("input", rule.input), weight=chosen("weight", rule.weight))
