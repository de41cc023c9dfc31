"""What quantization does to the output of a model, measured against the float output."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lq.analysis.quantizer_stats import decibels
from lq.nn.example import on_device_of, positional_inputs

# A torchmetrics object, updated with each output and its target; or a function of the whole model.
MetricLike = Metric | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Effect:
    """What some quantizers do to a model.

    Attributes:
        mse: mean squared error of the output, over all its values.
        sqnr_db: energy of the float output over that of the error, in dB; infinite without an error.
        metric: value of the metric; NaN without one.
    """

    mse: float
    sqnr_db: float
    metric: float = math.nan


def signal_and_noise(expected: Any, actual: Any) -> tuple[float, float]:
    """Energies of the expected floating tensors, nested as they may be, and of what the actual ones differ by.

    >>> import torch
    >>> signal_and_noise({"y": torch.tensor([3.0, 4.0])}, {"y": torch.tensor([3.0, 4.5])})
    (25.0, 0.25)
    """
    signal = noise = 0.0
    for e, a in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if is_floating(e):
            signal += float(e.double().square().sum())
            noise += float((a.double() - e.double()).square().sum())
    return signal, noise


def is_floating(value: Any) -> bool:
    """Whether a part of an output has an error."""
    return isinstance(value, Tensor) and value.is_floating_point()


class OutputError:
    """Runs a model on the same batches again and again, and compares with the outputs that it had at first.

    Args:
        model: computes in float now, in evaluation and without gradients.
        batches: positional inputs, each a tensor, tuple or list; kept in memory, as are the outputs.
        metric: see :data:`MetricLike`; a torchmetrics object is copied.
        targets: as many as batches, for a torchmetrics object.

    Attributes:
        metric: value of the metric in float; NaN without one.
        metric_name: what tables call it; ``None`` without one.

    Raises:
        ValueError: no batches, a float output that is not finite, a metric without targets, or as many as do not fit.
        TypeError: ``batches`` is one tensor, or the model has no floating output.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> _ = model.weight.copy_(torch.tensor([[1.0, 1.0]]))
    >>> error = OutputError(model, [torch.tensor([[1.0, 1.0]])])
    >>> _ = model.weight.copy_(torch.tensor([[1.0, 0.8]]))
    >>> round(error.measure().sqnr_db, 3)
    20.0
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        metric: MetricLike | None = None,
        targets: Iterable[Any] | None = None,
    ) -> None:
        if isinstance(batches, Tensor):
            raise TypeError("`batches` is one tensor: give a list of batches, each as the model takes it.")
        self._model, self._metric = model, metric.clone() if isinstance(metric, Metric) else metric
        self.batches = [positional_inputs(model, batch) for batch in batches]
        if not self.batches:
            raise ValueError("`batches` is empty: give at least one, as the model takes it.")
        self._targets = _checked(metric, targets, self.batches)
        outputs = [model(*batch) for batch in self.batches]
        self._expected = [[x for x in tree_leaves(output) if is_floating(x)] for output in outputs]
        self._check_expected()
        self.metric = self._value(outputs)

    @property
    def metric_name(self) -> str | None:
        return None if self._metric is None else name_of(self._metric)

    def _check_expected(self) -> None:
        for number, tensors in enumerate(self._expected):
            if not any(tensor.numel() for tensor in tensors):
                raise TypeError(f"{type(self._model).__name__} gives no floating tensor for batch {number}: there is no error.")
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise ValueError(f"The float output of batch {number} has NaN or Inf: look for bad samples, or leave it out.")

    def measure(self, *, metric: bool = True) -> Effect:
        """How the model's outputs differ from those it had in float, and the metric, unless it is left out."""
        signal = noise = 0.0
        outputs = []
        for batch, expected in zip(self.batches, self._expected, strict=True):
            output = self._model(*batch)
            energies = signal_and_noise(expected, [x for x in tree_leaves(output) if is_floating(x)])
            signal, noise = signal + energies[0], noise + energies[1]
            # only torchmetrics looks at them again
            outputs += [output] if isinstance(self._metric, Metric) else []
        values = sum(tensor.numel() for tensors in self._expected for tensor in tensors)
        return Effect(noise / values, decibels(signal, noise), self._value(outputs) if metric else math.nan)

    def _value(self, outputs: list[Any]) -> float:
        if self._metric is None:
            return math.nan
        if not isinstance(self._metric, Metric):
            return float(self._metric(self._model))
        metric = self._metric
        metric.reset()
        for output, target in zip(outputs, self._targets, strict=True):
            metric.to(next(x.device for x in tree_leaves(output) if is_floating(x))).update(output, target)
        return float(metric.compute())


def _checked(metric: MetricLike | None, targets: Iterable[Any] | None, batches: list[Any]) -> list[Any]:
    """Targets of a torchmetrics object, as many as batches."""
    if not isinstance(metric, Metric):
        if targets is not None:
            raise ValueError("`targets` are for a `metric` of torchmetrics, and it is none: leave them out.")
        return []
    if targets is None:
        raise ValueError(f"`metric` is a {type(metric).__name__}, which compares: give `targets`, one for each batch.")
    found = list(targets)
    if len(found) != len(batches):
        raise ValueError(f"`targets` has {len(found)}, and there are {len(batches)} batches: give one for each.")
    return [on_device_of(metric, target) for target in found]


def name_of(metric: MetricLike | None) -> str:
    """What tables call a metric.

    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> name_of(MulticlassAccuracy(num_classes=2))
    'multiclass_accuracy'
    """
    name = type(metric).__name__ if isinstance(metric, Metric) else getattr(metric, "__name__", "metric")
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
