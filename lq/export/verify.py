"""Does the exported file compute what the fake-quantized model computes?"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.export.difference import RuntimeDifference, Totals, predict
from lq.export.runtime import OnnxModel
from lq.nn import QuantInputMixin, QuantMixin
from lq.nn.evaluating import evaluating
from lq.nn.example import on_device_of, positional_inputs
from lq.surgery import named_quantizers

if TYPE_CHECKING:
    from lq.export.parting import CodeDifference
    from lq.export.tensorrt.engine import Engine


class Runtime(Protocol):
    """What runs an exported file: :class:`lq.export.OnnxModel`, :class:`lq.export.Engine`."""

    outputs: tuple[str, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    def run(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, eq=False)
class Verification:
    """Torch and the runtimes side by side; ``print`` shows it.

    Attributes:
        samples: rows of the batches.
        predictions: of the torch model; :class:`lq.export.RuntimeDifference` says what a prediction is.
        onnxruntime: how far ONNX Runtime is from torch.
        tensorrt: how far the engine is, where one was given.
        layers: the codes of each activation in torch and in ONNX Runtime, in the order of their calls, in the first batch.
            TensorRT's are not among them: an engine that hands them out is another one, with other fusions.
    """

    samples: int
    predictions: Tensor = field(repr=False)
    onnxruntime: RuntimeDifference
    tensorrt: RuntimeDifference | None
    layers: tuple["CodeDifference", ...] = field(repr=False)

    @property
    def first_difference(self) -> "CodeDifference | None":
        """Where torch and ONNX Runtime part: the first quantizer whose codes differ by more than float rounding does."""
        return next((layer for layer in self.layers if layer.beyond_rounding), None)

    def __str__(self) -> str:
        lines = []
        for runtime in (self.onnxruntime, self.tensorrt):
            if runtime is not None:
                lines.append(
                    f"{runtime.runtime}: {100 * runtime.agreement:.2f} % of {self.predictions.numel()} predictions agree"
                )
                lines += [f"  {output}" for output in runtime.outputs]
        first = self.first_difference
        if first is not None:
            lines.append(
                f"first other codes: {first.name}, {first.unequal} of {first.codes}, by {first.largest:.3g} steps at most"
            )
        elif self.layers:
            unequal, codes = sum(layer.unequal for layer in self.layers), sum(layer.codes for layer in self.layers)
            lines.append(f"codes of {len(self.layers)} quantizers: {unequal} of {codes} differ, by float rounding")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    onnx: str | Path | OnnxModel,
    plan: "str | Path | Engine | None" = None,
    *,
    batches: Iterable[Any],
    feed: Callable[[Any], Mapping[str, Tensor]] | None = None,
    class_axis: int = 1,
) -> Verification:
    """Run the model, in evaluation, the file in ONNX Runtime, and the engine on the same batches, and compare.

    The codes of all are equal but where a value lies within float rounding of the border between two of them; such a flip moves
    outputs by steps. So compare ``max_steps`` and ``worst_disagreement_steps`` with a few, and ``max_abs`` with float rounding
    only where no input is quantized.

    Args:
        model: the fake-quantized model; its modes and parameters stay as they are.
        onnx: what :func:`to_onnx` wrote of it, to be run as it is written; or an :class:`OnnxModel`, which may be optimized.
        plan: what :func:`build_engine` made of that, or an :class:`Engine`.
        batches: each a tensor, a tuple of positional inputs, or a mapping of keyword inputs; no labels.
        feed: from a batch to the inputs of the ONNX model by name; by default positional inputs in order, keyword inputs by name.
        class_axis: of the first output: 1 for ``(batch, classes, ...)``, -1 for a language model's ``(batch, length, classes)``.

    Raises:
        FileNotFoundError, ValueError: a file cannot be loaded; or the model is not calibrated; or there are no batches; or
            outputs differ in number or shape; or there is no axis ``class_axis``.
        ImportError, RuntimeError: there is a ``plan``, but no TensorRT or no GPU.
    """
    if pending := [name for name, q in named_quantizers(model) if q._if_quant and q.amax is None and not q.dynamic]:
        raise ValueError(
            f"`{pending[0]}` ({len(pending)} quantizers in all) has no amax, so the model computes in float there: calibrate it, "
            "or load the checkpoint that the file was exported from."
        )
    if isinstance(batches, Tensor):
        raise ValueError("`batches` is one tensor, of which each row would be a batch: give a list, `batches=[images]`.")
    runtimes = _runtimes(onnx, plan)
    totals = {name: Totals(class_axis) for name in runtimes}
    predictions: list[Tensor] = []
    steps: list[float] = []
    layers: tuple[CodeDifference, ...] = ()
    with evaluating(model):
        for batch in batches:
            run = _runner(batch, feed)
            if not predictions:
                steps, layers = _look(model, batch, run, runtimes["onnxruntime"])
            expected = [x.cpu() for x in _outputs(model, batch)]
            predictions.append(predict(expected[0], class_axis))
            for name, runtime in runtimes.items():
                totals[name].add(name, expected, tuple(x.cpu() for x in run(runtime)))
    if not predictions:
        raise ValueError("`batches` is empty: give at least one batch (an iterator can be used once only).")
    found = {name: totals[name].result(name, runtime.outputs, steps) for name, runtime in runtimes.items()}
    joined = torch.cat(predictions)
    return Verification(len(joined), joined, found["onnxruntime"], found.get("tensorrt"), layers)


def _runtimes(onnx: str | Path | OnnxModel, plan: "str | Path | Engine | None") -> dict[str, Runtime]:
    runtimes: dict[str, Runtime] = {"onnxruntime": onnx if isinstance(onnx, OnnxModel) else OnnxModel(onnx, optimize=False)}
    if plan is not None:
        from lq.export.tensorrt.engine import Engine

        runtimes["tensorrt"] = plan if isinstance(plan, Engine) else Engine(plan)
    return runtimes


def _runner(batch: Any, feed: Callable[[Any], Mapping[str, Tensor]] | None) -> Callable[[Runtime], tuple[Tensor, ...]]:
    """What runs a batch."""
    if feed is not None:
        named = feed(batch)
        return lambda runtime: runtime.run(named)
    if isinstance(batch, Mapping):
        named = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        return lambda runtime: runtime.run(named)
    return lambda runtime: runtime(*(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    output = model(**on_device_of(model, batch)) if isinstance(batch, Mapping) else model(*positional_inputs(model, batch))
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _look(
    model: nn.Module, batch: Any, run: Callable[[Runtime], tuple[Tensor, ...]], graph: Runtime
) -> tuple[list[float], "tuple[CodeDifference, ...]"]:
    """One step at each output, and where codes differ on the way there."""
    from lq.export.parting import compare_codes, recording

    with _watching(model) as watched, recording(model) as calls:
        outputs = _outputs(model, batch)
    steps = [_step(watched, output) for output in outputs]
    # a graph that came as bytes is one whose codes are being looked at
    if not isinstance(graph, OnnxModel) or graph.path is None:
        return steps, ()
    return steps, compare_codes(model, calls, graph, run)


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


def _step(calls: Watched, output: Tensor) -> float:
    if not calls:
        return math.nan
    layer = next((m for m, made in calls if made() is output), calls[-1][0])
    scale = layer.input_quantizer.scale
    if scale is None:
        return math.nan
    largest = float(layer.weight_quantizer(layer.weight).abs().max()) if isinstance(layer, QuantMixin) else 1.0
    return float(scale.max()) * largest
