"""Which layer gets how many bits: an integer program over errors that were measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
from torch import nn

from lq.analysis.output_error import Effect, MetricLike
from lq.analysis.tables import Table, number
from lq.analysis.widths import Choices, Trial, Widths
from lq.descriptor import QuantRule
from lq.methods import Method

Cost = Literal["size", "bit_operations"]


@dataclass(frozen=True)
class Allocation:
    """Widths for every layer. ``rich.print(found.table())``; ``lq.quantize_(float_model, found.rules)`` builds the model.

    Attributes:
        widths: of the weight and the activations, by layer.
        rules: a rule for each layer; weights have histograms, so that ``lq.calibrating`` chooses their amax by its method too.
        errors: mean squared error of the output with the layer alone quantized so, by layer.
        size: bytes of the quantized weights, without their scales.
        bit_operations: products of the widths of what is multiplied, over all multiplications in the first batch.
        mean_bits: the width that costs as much everywhere.
        effect: what all of it does to the output, measured.
    """

    widths: Mapping[str, Widths]
    rules: tuple[QuantRule, ...]
    errors: Mapping[str, float]
    size: float
    bit_operations: float
    mean_bits: float
    effect: Effect

    @property
    def predicted_mse(self) -> float:
        """The sum of :attr:`errors`: as if the errors of layers had nothing to do with each other."""
        return sum(self.errors.values())

    def records(self) -> dict[str, Any]:
        """All figures in plain types."""
        layers = {name: {**widths._asdict(), "mse": self.errors[name]} for name, widths in self.widths.items()}
        costs = {"size": self.size, "bit_operations": self.bit_operations, "mean_bits": self.mean_bits}
        return {"layers": layers, **costs, "predicted_mse": self.predicted_mse, **asdict(self.effect)}

    def table(self) -> Table:
        """A row for each layer, and one for all of them together."""
        rows = [[name, str(widths), number(self.errors[name])] for name, widths in self.widths.items()]
        rows.append(["all", "", number(self.effect.mse)])
        total = f"{self.size:,.0f} bytes, {self.bit_operations:.3g} bit-operations"
        return Table(f"Widths: {self.mean_bits:.2f} bits on average, {total}", ["Layer", "Bits", "MSE of the output"], rows)


class Allocator:
    """The error of every layer at every width, measured once for any number of budgets, as ``allocator.allocate(budget)``.

    Arguments are those of :func:`allocate_bits`, and ``metric`` and ``targets`` those of :func:`lq.analysis.sensitivity`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        bits: Choices,
        by: Cost = "size",
        method: Method = "mse",
        metric: MetricLike | None = None,
        targets: Iterable[Any] | None = None,
    ) -> None:
        if by not in ("size", "bit_operations"):
            raise ValueError(f"`by` is {by!r}: choose 'size' or 'bit_operations'.")
        self.by, self.bits = by, [_widths(choice, by) for choice in bits]
        if not self.bits:
            raise ValueError("`bits` is empty: give the widths to choose among, as (2, 4, 8).")
        wanted = {b for b in chain(*self.bits) if isinstance(b, int)}
        self.trial = Trial(model, batches, wanted, method, metric, targets)
        # what cannot change has one choice
        self.choices = {n: list(dict.fromkeys(map(w.given, self.bits))) for n, w in self.trial.present.items()}
        counts = self.trial.weights if by == "size" else self.trial.macs
        self._total = sum(counts.values())
        if not self._total:
            what = "weights" if by == "size" else "multiplications"
            raise ValueError(f"`by` is {by!r}, and no quantized layer has {what}.")

    @cached_property
    def errors(self) -> dict[tuple[str, Widths], float]:
        """Mean squared errors of the output, with each layer alone at each width; measured when they are asked for first."""
        return {
            (name, widths): self.trial.measure({name: widths}, alone=True).mse
            for name, choices in self.choices.items()
            for widths in choices
        }

    def cost(self, widths: Mapping[str, Widths]) -> float:
        """Bytes or bit-operations."""
        return self.trial.size(widths) if self.by == "size" else self.trial.bit_operations(widths)

    def mean_bits(self, cost: float) -> float:
        """The width that costs as much everywhere."""
        return 8 * cost / self._total if self.by == "size" else math.sqrt(cost / self._total)

    def _budget(self, mean_bits: float) -> float:
        return self._total * (mean_bits / 8 if self.by == "size" else mean_bits**2)

    def _ends(self) -> tuple[float, float]:
        """Costs of the cheapest and of the dearest widths everywhere."""
        costs = [[self.cost({name: widths}) for widths in choices] for name, choices in self.choices.items()]
        return sum(map(min, costs)), sum(map(max, costs))

    def range(self) -> tuple[float, float]:
        """The least and the largest budget, in bits on average."""
        least, most = self._ends()
        return self.mean_bits(least), self.mean_bits(most)

    def allocate(self, budget: float) -> Allocation:
        """The widths with the least error within a budget."""
        least, most = self.range()
        if not least - 1e-9 <= budget <= most + 1e-9:
            bounds = f"the narrowest widths of `bits` everywhere are {least:.3g} bits on average, the widest {most:.3g}"
            costs = " and ".join(f"{cost:,.0f}" for cost in self._ends())
            unit = "bytes" if self.by == "size" else "bit-operations"
            raise ValueError(f"`budget` is {budget}: {bounds} ({costs} {unit}). Choose between them.")
        options = [[(self.cost({n: w}), self.errors[n, w]) for w in choices] for n, choices in self.choices.items()]
        chosen = choose(options, self._budget(budget))
        return self.describe({name: self.choices[name][i] for name, i in zip(self.choices, chosen, strict=True)})

    def uniform(self) -> list[Allocation]:
        """Each of the widths everywhere."""
        return [self.describe({name: w.given(bits) for name, w in self.trial.present.items()}) for bits in self.bits]

    def describe(self, widths: Mapping[str, Widths]) -> Allocation:
        """Everything about widths of all layers; the model is run with them."""
        return Allocation(
            widths=widths,
            rules=tuple(self.trial.rules(widths)),
            errors={name: self.errors[name, w] for name, w in widths.items()},
            size=self.trial.size(widths),
            bit_operations=self.trial.bit_operations(widths),
            mean_bits=self.mean_bits(self.cost(widths)),
            effect=self.trial.measure(widths),
        )


def allocate_bits(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Choices = (2, 3, 4, 8),
    *,
    budget: float,
    by: Cost = "size",
    method: Method = "mse",
) -> Allocation:
    """Widths for every layer that cost no more than a budget, with the least error of the output.

    Each layer alone is quantized to each width, and the squared error of the model's output is measured. Such errors of several
    layers nearly add up while they are small (Zhou et al., "Adaptive Quantization for Deep Neural Network", 2018,
    arXiv:1712.01048, section 3), so the choice is an integer program: one width for each layer, the least sum of errors, the sum
    of costs within the budget (as HAWQ-V3 has it, Yao et al., 2021, arXiv:2011.10680, equation 6, with errors estimated from
    second derivatives; errors measured at the output, as here: Pandey et al., 2023, arXiv:2302.05397). ``scipy.optimize.milp``
    solves it, to the optimum.

    Args:
        model: quantized and calibrated; stays as it is. Its layers and their descriptors count, its amax does not: a copy is
            calibrated on the batches, at each width.
        batches: as for :func:`lq.analysis.sensitivity`.
        bits: widths to choose among: ``4`` for a weight, and with ``by="bit_operations"`` also for what it is multiplied with; or
            pairs of both, ``(4, 8)``. What a layer has in float stays so.
        budget: in bits on average: no more than what a model has whose quantized layers all have this width. Fractions are fine.
        by: ``"size"``: of the quantized weights, without scales. ``"bit_operations"``: a multiplication of a 4-bit with an 8-bit
            value counts 32, so a budget of 4 bits is that of W4A4; float counts as 32 bits.
        method: of calibration, for inputs and weights.

    Raises:
        ValueError: a budget that no choice meets, or that leaves nothing to choose; what :func:`lq.analysis.sensitivity` raises.
        ImportError: scipy is missing.

    >>> import torch, lq
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> batches = [torch.randn(64, 16)]
    >>> quantized = lq.quantize_(model)
    >>> with lq.calibrating(quantized):
    ...     _ = quantized(batches[0])
    >>> found = allocate_bits(quantized, batches, bits=(2, 4, 8), budget=4.5)
    >>> {name: str(widths) for name, widths in found.widths.items()}, found.mean_bits <= 4.5
    ({'0': 'W4A8', '2': 'W4A8', '4': 'W8A8'}, True)
    """
    return Allocator(model, batches, bits, by, method).allocate(budget)


def choose(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """One option of each group, with the least sum of errors and costs that sum up to no more than a budget.

    Args:
        options: of each group, costs and errors, none negative.
        budget: at least the sum of the least costs.

    Returns:
        Places of the options in their groups.

    >>> choose([[(1, 9.0), (2, 4.0), (4, 1.0)], [(1, 5.0), (2, 3.0), (4, 0.0)]], budget=5)
    [2, 0]
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError('`scipy` is missing: allocating bits needs `pip install "lightning-lq[recipes]"`.') from error
    groups = np.repeat(np.arange(len(options)), [len(group) for group in options])
    costs, errors = (np.array([option[i] for group in options for option in group], dtype=float) for i in (0, 1))
    one_each = LinearConstraint((groups == np.arange(len(options))[:, None]).astype(float), 1, 1)
    within = LinearConstraint(costs / max(budget, np.finfo(float).tiny), -np.inf, 1)
    # errors differ by many powers of ten, and the solver's tolerances are absolute: an error beyond the sum that a first solution
    # has is in no better one, so a second run takes that sum for the unit, and any beyond its double for the double
    unit = float(sum(errors)) or 1.0
    for _ in range(2):
        scaled = 1e3 * np.minimum(errors / unit, 2)
        found = milp(scaled, integrality=1, bounds=Bounds(0, 1), constraints=[one_each, within], options={"mip_rel_gap": 0})
        if found.x is None:
            raise RuntimeError(f"scipy.optimize.milp found no solution: {found.message}")
        places = [int(np.argmax(found.x[groups == group])) for group in range(len(options))]
        unit = float(sum(group[place][1] for group, place in zip(options, places, strict=True))) or 1.0
    return places


def _widths(choice: int | tuple[int, int], by: Cost) -> Widths:
    """Widths of a weight and of what it meets; ``None`` leaves that."""
    if isinstance(choice, int) and not isinstance(choice, bool):
        return Widths(choice, choice if by == "bit_operations" else None)
    if isinstance(choice, Sequence) and len(choice) == 2 and all(isinstance(b, int) for b in choice):
        return Widths(*choice)
    raise ValueError(f"`bits` has {choice!r}: give widths, as 4, or pairs of weight and activation, as (4, 8).")
