"""Does the exported file compute what the fake-quantized model computes?"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.export.inputs import as_args, on_device_of
from lq.export.runtime import OnnxModel
from lq.nn import QuantInputMixin, QuantMixin
from lq.nn.evaluating import evaluating


@dataclass(frozen=True, eq=False)
class Verification:
    """How far the outputs of an ONNX model are from those of the torch model, over all samples.

    A prediction is the argmax over axis 1 of the first output; of a single value, whether it is above 0. Differences are those of
    the first output, in float32, but for ``max_abs_diffs``.

    Attributes:
        samples: rows of the batches.
        agreement: fraction of equal predictions.
        disagreements: number of unequal ones.
        max_abs_diff: largest absolute difference.
        mean_abs_diff: mean absolute difference.
        max_abs_diffs: largest absolute difference of each output.
        step: the largest change that one code in the input of the last quantized layer makes in an output: its input scale
            times its largest fake-quantized weight. That layer is the one whose output is the model's first, else the last one
            called with an active input quantizer. NaN where there is none: then nothing but float rounding can differ.
        max_diff_steps: ``max_abs_diff / step``.
        worst_disagreement_steps: largest difference, in steps, in the rows whose predictions are unequal; 0 if there are none.
        torch_predictions: int64, ``(samples,)``, or ``(samples, *rest)`` where the output has more axes.
        onnx_predictions: likewise.
    """

    samples: int
    agreement: float
    disagreements: int
    max_abs_diff: float
    mean_abs_diff: float
    max_abs_diffs: tuple[float, ...]
    step: float
    max_diff_steps: float
    worst_disagreement_steps: float
    torch_predictions: Tensor = field(repr=False)
    onnx_predictions: Tensor = field(repr=False)


def verify(
    model: nn.Module,
    onnx_path: str | Path | OnnxModel,
    batches: Iterable[Any],
    *,
    feed: Callable[[Any], Mapping[str, Tensor]] | None = None,
) -> Verification:
    """Run the model, in evaluation, and the file in ONNX Runtime, on the same batches, and compare.

    The codes of both are equal but where a value lies within float rounding of the border between two of them; such a flip moves
    outputs by steps. So compare ``max_diff_steps`` and ``worst_disagreement_steps`` with a few, and ``max_abs_diff`` with float
    rounding only where no input is quantized.

    Args:
        model: the fake-quantized model; its modes and parameters stay as they are.
        onnx_path: what :func:`to_onnx` wrote of it, or an :class:`OnnxModel`.
        batches: each a tensor, a tuple of positional inputs, or a mapping of keyword inputs; no labels.
        feed: from a batch to the inputs of the ONNX model by name; by default positional inputs in order, keyword inputs by name.

    Raises:
        FileNotFoundError, ValueError: the file cannot be loaded; or there are no batches; or outputs differ in number or shape.
    """
    runtime = onnx_path if isinstance(onnx_path, OnnxModel) else OnnxModel(onnx_path)
    totals, step = _Totals(), None
    with evaluating(model):
        for batch in batches:
            inputs = on_device_of(model, batch)
            if step is None:
                with _watching(model) as watched:
                    expected = _outputs(model, inputs)
                step = _step(watched, expected)
            else:
                expected = _outputs(model, inputs)
            actual = _run(runtime, batch) if feed is None else runtime.run(feed(batch))
            totals.add([x.cpu() for x in expected], actual)
    if step is None:
        raise ValueError("`batches` is empty: give at least one batch (an iterator can be used once only).")
    return totals.result(step)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    output = model(**batch) if isinstance(batch, Mapping) else model(*as_args(batch))
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _run(runtime: OnnxModel, batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, Mapping):
        return runtime.run(batch)
    return runtime(*(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


# One step at the output

Watched = list[tuple[QuantInputMixin, "weakref.ref[Tensor]"]]


@contextmanager
def _watching(model: nn.Module) -> Iterator[Watched]:
    """Calls of layers with a quantized input, in order, with what they returned (weakly, so that no memory is held)."""
    calls: Watched = []

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, QuantInputMixin) and isinstance(output, Tensor) and module.input_quantizer.active:
            calls.append((module, weakref.ref(output)))

    handles = [m.register_forward_hook(seen) for m in model.modules() if isinstance(m, QuantInputMixin)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _step(calls: Watched, outputs: list[Tensor]) -> float:
    if not calls:
        return math.nan
    layer = next((m for m, output in calls if outputs and output() is outputs[0]), calls[-1][0])
    scale = layer.input_quantizer.scale
    if scale is None:
        return math.nan
    largest = float(layer.weight_quantizer(layer.weight).abs().max()) if isinstance(layer, QuantMixin) else 1.0
    return float(scale.max()) * largest


# Sums over batches


@dataclass
class _Totals:
    samples: int = 0
    total: float = 0.0
    count: int = 0
    largest: list[float] = field(default_factory=list)
    worst: float = 0.0
    predictions: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, expected: list[Tensor], actual: tuple[Tensor, ...]) -> None:
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, actual)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The model returns tensors of shapes {shapes[0]}, the ONNX model {shapes[1]}: export the model again."
            )
        differences = [(a.double() - e.double()).abs() for e, a in zip(expected, actual, strict=True)]
        largest = [float(d.max()) if d.numel() else 0.0 for d in differences]
        self.largest = [max(pair) for pair in zip(self.largest or largest, largest, strict=True)]
        self.total += float(differences[0].sum())
        self.count += differences[0].numel()
        self._compare(_by_row(expected[0]), _by_row(actual[0]), _by_row(differences[0]))

    def _compare(self, expected: Tensor, actual: Tensor, difference: Tensor) -> None:
        self.samples += expected.shape[0]
        pair = _predict(expected), _predict(actual)
        self.predictions.append(pair)
        unequal = difference.amax(dim=1)[pair[0] != pair[1]]
        if unequal.numel():
            self.worst = max(self.worst, float(unequal.max()))

    def result(self, step: float) -> Verification:
        theirs, ours = (torch.cat(column) for column in zip(*self.predictions, strict=True))
        disagreements = int((theirs != ours).sum())
        return Verification(
            samples=self.samples,
            agreement=1 - disagreements / max(theirs.numel(), 1),
            disagreements=disagreements,
            max_abs_diff=self.largest[0],
            mean_abs_diff=self.total / max(self.count, 1),
            max_abs_diffs=tuple(self.largest),
            step=step,
            max_diff_steps=self.largest[0] / step,
            worst_disagreement_steps=self.worst / step if disagreements else 0.0,
            torch_predictions=theirs,
            onnx_predictions=ours,
        )


def _by_row(output: Tensor) -> Tensor:
    """At least ``(samples, values)``."""
    return output.reshape(-1, 1) if output.dim() < 2 else output


def _predict(rows: Tensor) -> Tensor:
    return rows.argmax(dim=1) if rows.shape[1] != 1 else (rows.squeeze(1) > 0).to(torch.int64)
