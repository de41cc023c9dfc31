"""How far a runtime's outputs are from those of the torch model, over batches."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputDifference:
    """One output over all samples.

    Attributes:
        name: the graph's name for it.
        max_abs: largest absolute difference, in float64.
        mean_abs: mean absolute difference.
        step: the largest change that one code in the input of the last quantized layer makes in an output: its input scale
            times its largest fake-quantized weight. That layer is the one whose output this is, else the last one called with an
            active input quantizer. NaN where there is none: then nothing but float rounding can differ.
    """

    name: str
    max_abs: float
    mean_abs: float
    step: float

    @property
    def max_steps(self) -> float:
        """``max_abs`` in steps."""
        return self.max_abs / self.step

    @property
    def mean_steps(self) -> float:
        """``mean_abs`` in steps."""
        return self.mean_abs / self.step

    def __str__(self) -> str:
        largest, mean = f"largest difference {self.max_abs:.3g}", f"mean {self.mean_abs:.3g}"
        if math.isnan(self.step):
            return f"{self.name}: {largest}, {mean}; no input is quantized, so there are no steps"
        return f"{self.name}: {largest} ({self.max_steps:.3g} steps), {mean} ({self.mean_steps:.3g} steps)"


@dataclass(frozen=True, eq=False)
class RuntimeDifference:
    """One runtime against torch.

    A prediction is the argmax over the classes of the first output, axis 1 unless :func:`verify` was told another; of a single
    value, whether it is above 0.

    Attributes:
        runtime: ``"onnxruntime"`` or ``"tensorrt"``.
        outputs: each of them, in order.
        agreement: fraction of equal predictions.
        disagreements: number of unequal ones.
        worst_disagreement_steps: largest difference, in steps, in the rows whose predictions are unequal; 0 if there are none,
            NaN if there are no steps.
        least_cosine: the least cosine, over samples, of the first output to that of torch: of embeddings it says what predictions
            say of classes.
        predictions: int64, ``(samples,)``, or ``(samples, *rest)`` where the first output has more axes.
    """

    runtime: str
    outputs: tuple[OutputDifference, ...]
    agreement: float
    disagreements: int
    worst_disagreement_steps: float
    least_cosine: float
    predictions: Tensor = field(repr=False)


@dataclass
class Totals:
    """What :class:`RuntimeDifference` is made of, batch by batch; ``class_axis`` is that of the classes in the first output."""

    class_axis: int = 1
    total: list[float] = field(default_factory=list)
    count: list[int] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    worst: float = 0.0
    unequal: int = 0
    cosine: float = 1.0
    predictions: list[Tensor] = field(default_factory=list)

    def add(self, runtime: str, expected: list[Tensor], actual: tuple[Tensor, ...]) -> None:
        """Count one batch.

        Raises:
            ValueError: outputs differ in number or shape.
        """
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, actual)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"The model returns tensors of shapes {shapes[0]}, {runtime} {shapes[1]}: export the model again.")
        differences = [_apart(e.double(), a.double()) for e, a in zip(expected, actual, strict=True)]
        zeros = [0] * len(differences)
        self.count = [n + d.numel() for n, d in zip(self.count or zeros, differences, strict=True)]
        self.total = [t + float(d.sum()) for t, d in zip(self.total or zeros, differences, strict=True)]
        self.largest = [
            max(m, float(d.max()) if d.numel() else 0.0) for m, d in zip(self.largest or zeros, differences, strict=True)
        ]
        self.cosine = min(self.cosine, least_cosine(expected[0], actual[0]))
        first, second = (predict(outputs[0], self.class_axis) for outputs in (expected, actual))
        self._compare(first, second, _by_row(differences[0]))

    def _compare(self, expected: Tensor, actual: Tensor, difference: Tensor) -> None:
        self.predictions.append(actual)
        unequal = expected != actual
        self.unequal += int(unequal.sum())
        if bool(unequal.any()):
            self.worst = max(self.worst, float(difference.amax(dim=self.class_axis)[unequal].max()))

    def result(self, runtime: str, names: tuple[str, ...], steps: list[float]) -> RuntimeDifference:
        """The sums as figures."""
        columns = zip(names, self.largest, self.total, self.count, steps, strict=True)
        predictions = torch.cat(self.predictions)
        return RuntimeDifference(
            runtime=runtime,
            outputs=tuple(OutputDifference(name, most, total / max(n, 1), step) for name, most, total, n, step in columns),
            agreement=1 - self.unequal / max(predictions.numel(), 1),
            disagreements=self.unequal,
            worst_disagreement_steps=self.worst / steps[0] if self.unequal else 0.0,
            least_cosine=self.cosine,
            predictions=predictions,
        )


def _apart(expected: Tensor, actual: Tensor) -> Tensor:
    """Absolute differences; infinite where only one is NaN or infinite, or both are and differ."""
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    return (actual - expected).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0)


def least_cosine(expected: Tensor, actual: Tensor) -> float:
    """The least cosine of a sample to its counterpart; 1 where both are zero, or there is none, -1 where it is NaN.

    >>> least_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
    0.7071067811865475
    """
    a, b = (_by_row(x).flatten(1).double() for x in (expected, actual))
    cosines = torch.cosine_similarity(a, b, dim=1).masked_fill((a == b).all(dim=1), 1.0).nan_to_num(nan=-1.0)
    return float(cosines.min()) if len(cosines) else 1.0


def predict(output: Tensor, class_axis: int = 1) -> Tensor:
    """The class of each row; of a single value, whether it is above 0.

    Raises:
        ValueError: there is no such axis.

    >>> predict(torch.tensor([[0.1, 0.7], [0.9, 0.2]])), predict(torch.tensor([[0.5], [-0.5]]))
    (tensor([1, 0]), tensor([1, 0]))
    """
    rows = _by_row(output)
    if not -rows.dim() <= class_axis < rows.dim():
        raise ValueError(
            f"`class_axis` is {class_axis}, and the first output has shape {tuple(output.shape)}: give one of its axes."
        )
    if rows.shape[class_axis] != 1:
        return rows.argmax(dim=class_axis)
    return (rows.squeeze(class_axis) > 0).to(torch.int64)


def _by_row(output: Tensor) -> Tensor:
    """At least ``(samples, values)``."""
    return output.reshape(-1, 1) if output.dim() < 2 else output
