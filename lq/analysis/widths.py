"""A copy of a model whose layers take any width, for measuring: what each costs, and what it does to the output."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lq.analysis.output_error import Effect, MetricLike, OutputError
from lq.analysis.parts import Kind, Part, bits_text, find_parts, separate_
from lq.analysis.rules import descriptors_of, rules_of
from lq.calibration import calibrating, load_calib_amax_
from lq.descriptor import QuantDescriptor, QuantRule
from lq.functional.grid import Bits
from lq.methods import Method
from lq.nn.evaluating import evaluating
from lq.nn.reuse import keep_weights_
from lq.nn.tensor_quantizer import TensorQuantizer

# What a tensor in float counts in bit-operations.
FLOAT_BITS = 32

# Widths to choose among: of weights, or pairs of a weight and what it meets.
Choices = Sequence[int | tuple[int, int]]


class Widths(NamedTuple):
    """Widths of a layer's weight and of its activations; ``None`` where that is not quantized.

    >>> str(Widths(4, 8)), Widths(4, 8).product
    ('W4A8', 32)
    """

    weight: Bits | None
    input: Bits | None

    @property
    def product(self) -> int:
        """Bit-operations of one multiplication; of two activations if there is no weight."""
        return _count(self.input if self.weight is None else self.weight) * _count(self.input)

    def given(self, wanted: "Widths") -> "Widths":
        """Other widths, where they say some; what is in float stays so."""
        pairs = zip(self, wanted, strict=True)
        return Widths(*(own if own is None or new is None else new for own, new in pairs))

    def __str__(self) -> str:
        return "".join(letter + bits_text(b) for letter, b in (("W", self.weight), ("A", self.input)) if b is not None)


def _count(bits: Bits | None) -> int:
    return FLOAT_BITS if bits is None else 1 + sum(bits) if isinstance(bits, tuple) else bits


class Trial:
    """A copy of a quantized model, calibrated anew, whose layers can be switched from width to width.

    Args:
        model: quantized and calibrated.
        batches: positional inputs.
        bits: the widths that it has to be ready for.
        method: how amax is chosen, for weights too, at each width.
        metric: see :class:`lq.analysis.output_error.OutputError`.
        targets: likewise.

    Attributes:
        present: the widths that the model has, by layer.
        weights: number of weights, by layer.
        macs: multiplications with an addition in the first batch, by layer.
        error: compares with the float output.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        bits: Iterable[int],
        method: Method,
        metric: MetricLike | None = None,
        targets: Iterable[Any] | None = None,
    ) -> None:
        find_parts(model, "layer")
        self.model = copy.deepcopy(model)
        separate_(self.model, copy.deepcopy)
        self.parts = find_parts(self.model, "layer")
        self.layers = {part.name: part for part in self.parts if part.sites}
        self._descriptors = descriptors_of(self.parts)
        self.present = {name: Widths(_bits(d.get("weight")), _bits(d.get("input"))) for name, d in self._descriptors.items()}
        self._switch([])
        with evaluating(self.model):
            self.error = OutputError(self.model, batches, metric, targets)
        self._switch(self.parts)
        self._ranges = self._calibrate(set(bits), method)
        keep_weights_(self.model)
        self.weights = {name: self._numel(part) for name, part in self.layers.items()}
        self.macs = self._count_macs()

    def _switch(self, on: Sequence[Part]) -> None:
        for part in self.parts:
            for quantizer in part.quantizers:
                quantizer._disabled = part not in on

    def _calibrate(self, bits: set[int], method: Method) -> dict[tuple[TensorQuantizer, Bits], Any]:
        """The range of each quantizer at each width, and at its own."""
        quantizers = [quantizer for part in self.parts for quantizer in part.quantizers]
        for quantizer in quantizers:
            quantizer.frozen = False
            if quantizer.learns_step:
                quantizer.fix_step()
            if quantizer.quant_desc.amax is None:
                quantizer.amax = None
            quantizer.quant_desc = _measured(quantizer.quant_desc)
        own = {quantizer: quantizer.num_bits for quantizer in quantizers}
        with calibrating(self.model, method):
            for batch in self.error.batches:
                self.model(*batch)
        found = {(quantizer, own[quantizer]): _range(quantizer) for quantizer in quantizers}
        for width in bits:
            for quantizer in quantizers:
                quantizer.num_bits = width
            load_calib_amax_(self.model, method)
            found |= {(quantizer, width): _range(quantizer) for quantizer in quantizers}
        return found

    def _numel(self, part: Part) -> int:
        layer = self.model.get_submodule(part.name)
        weighed = {site.role for site in part.sites if site.kind == "weight"}
        tensors: dict[str, Tensor] = layer.weights()  # type: ignore[operator]
        return sum(tensor.numel() for role, tensor in tensors.items() if role in weighed)

    def _count_macs(self) -> dict[str, int]:
        with evaluating(self.model), FlopCounterMode(display=False) as counter:
            self.model(*self.error.batches[0])
        root = type(self.model).__name__
        flops = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        flops[""] = flops.get(root, 0)
        inner = {name: [n for n in self.layers if n != name and n.startswith(f"{name}.")] for name in self.layers}
        return {name: (flops.get(name, 0) - sum(flops.get(n, 0) for n in inner[name])) // 2 for name in self.layers}

    def measure(self, widths: Mapping[str, Widths], *, alone: bool = False) -> Effect:
        """What layers of these widths do to the output, all others being off. What no rule reaches is on, and the metric is
        taken, unless they are measured ``alone``.
        """
        for name, of_layer in widths.items():
            for site in self.layers[name].sites:
                bits = getattr(of_layer, site.kind)
                _set(site.quantizer, bits, self._ranges[site.quantizer, bits])
        always = [] if alone else [part for part in self.parts if not part.sites]
        self._switch([*always, *(self.layers[name] for name in widths)])
        with evaluating(self.model):
            return self.error.measure(metric=not alone)

    def rules(self, widths: Mapping[str, Widths]) -> list[QuantRule]:
        """Rules that give layers these widths."""
        chosen = {
            name: {kind: _with_bits(desc, kind, getattr(widths[name], kind)) for kind, desc in descs.items()}
            for name, descs in self._descriptors.items()
        }
        return list(rules_of(self.model, chosen).values())

    def size(self, widths: Mapping[str, Widths]) -> float:
        """Bytes of the quantized weights of layers, without their scales."""
        return sum(self.weights[name] * _count(w.weight) for name, w in widths.items()) / 8

    def bit_operations(self, widths: Mapping[str, Widths]) -> float:
        """Products of the widths of what layers multiply, over all multiplications of the first batch."""
        return float(sum(self.macs[name] * w.product for name, w in widths.items()))


def _bits(desc: QuantDescriptor | None) -> Bits | None:
    return None if desc is None else desc.num_bits


def _measured(desc: QuantDescriptor) -> QuantDescriptor:
    return desc.replace(calib_method="histogram", learn_amax=False)


def _with_bits(desc: QuantDescriptor, kind: Kind, bits: Bits) -> QuantDescriptor:
    # the largest weight is no good amax at few bits
    method = "histogram" if kind == "weight" else desc.calib_method
    return desc.replace(num_bits=bits, calib_method=method)


def _range(quantizer: TensorQuantizer) -> Any:
    ends = quantizer.range if quantizer.quant_desc.affine else (quantizer.amax,)
    assert ends is not None
    return tuple(end.clone() for end in ends if end is not None)


def _set(quantizer: TensorQuantizer, bits: Bits, ends: tuple[Tensor, ...]) -> None:
    quantizer.quant_desc = quantizer.quant_desc.replace(num_bits=bits)
    if quantizer.quant_desc.affine:
        quantizer.range = ends[0], ends[1]
    else:
        quantizer.amax = ends[0]
