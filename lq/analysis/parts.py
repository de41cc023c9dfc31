"""The parts of a quantized model that are switched on and off: a quantizer, or a layer with all that it has."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lq.functional.grid import Bits
from lq.nn.quant_module import QuantModule
from lq.nn.reuse import KeptWeight
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.surgery import named_quantizers

By = Literal["quantizer", "layer"]
Kind = Literal["weight", "input"]


@dataclass(frozen=True)
class Site:
    """A place in a layer where a quantizer is at work: on a weight, or on anything else that the layer takes."""

    layer: str
    role: str
    kind: Kind
    quantizer: TensorQuantizer


@dataclass(frozen=True)
class Part:
    """Quantizers that are switched together; one alone in somebody's ``forward`` has no site."""

    name: str
    quantizers: tuple[TensorQuantizer, ...]
    sites: tuple[Site, ...]

    @property
    def bits(self) -> str:
        """Widths of weights and activations: ``W4A8``."""
        widths = {site.kind: bits_text(site.quantizer.num_bits) for site in self.sites}
        if not widths:
            return "A" + bits_text(self.quantizers[0].num_bits)
        return "".join(letter + widths[kind] for kind, letter in (("weight", "W"), ("input", "A")) if kind in widths)


def bits_text(bits: Bits) -> str:
    """A width as text.

    >>> bits_text(4), bits_text((4, 3))
    ('4', 'E4M3')
    """
    return "E{}M{}".format(*bits) if isinstance(bits, tuple) else str(bits)


def find_parts(model: nn.Module, by: By) -> list[Part]:
    """What quantizes in a model, in its order.

    Raises:
        ValueError: nothing quantizes, a quantizer has no amax yet, or an unknown ``by``.

    >>> import torch, lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(2, 2)), "w4a8")
    >>> with lq.calibrating(model):
    ...     _ = model(torch.ones(1, 2))
    >>> [(part.name, part.bits) for part in find_parts(model, "quantizer") + find_parts(model, "layer")]
    [('0.input', 'A8'), ('0.weight', 'W4'), ('0', 'W4A8')]
    """
    if by not in ("quantizer", "layer"):
        raise ValueError(f"`by` is {by!r}: choose 'quantizer' or 'layer'.")
    if waiting := [name for name, q in named_quantizers(model) if q._if_quant and not q.active]:
        raise ValueError(f"{len(waiting)} quantizers have no amax, first `{waiting[0]}`: calibrate the model before.")
    names = {quantizer: name for name, quantizer in named_quantizers(model) if quantizer.active}
    if not names:
        raise ValueError(f"{type(model).__name__} has no quantizer at work: call `lq.quantize_` and calibrate before.")
    sites = list(_sites(model))
    if by == "quantizer":
        return [Part(name, (q,), tuple(site for site in sites if site.quantizer is q)) for q, name in names.items()]
    placed = {site.quantizer for site in sites}
    parts = [Part(name, (quantizer,), ()) for quantizer, name in names.items() if quantizer not in placed]
    for layer in dict.fromkeys(site.layer for site in sites):
        own = tuple(site for site in sites if site.layer == layer)
        parts.append(Part(layer, tuple(site.quantizer for site in own), own))
    order = {module: i for i, module in enumerate(model.modules())}
    return sorted(parts, key=lambda part: order[part.quantizers[0]])


def _sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            weights = module.weights()
            for role, quantizer in module.quantizers().items():
                if quantizer.active:
                    yield Site(name, role, "weight" if role in weights else "input", quantizer)


def separate_(model: nn.Module, copying: Callable[[TensorQuantizer], TensorQuantizer]) -> Callable[[], None]:
    """Give each layer quantizers of its own, in place, also where it shares one; what is returned undoes it.

    What takes one tensor shares a quantizer; whether a layer is quantized, and to which width, is a matter of that layer.
    """
    seen: set[TensorQuantizer] = set()
    shared = []
    for module in [m for m in model.modules() if isinstance(m, QuantModule)]:
        for role, quantizer in module.quantizers().items():
            if quantizer in seen:
                shared.append((module, f"{role}_quantizer", quantizer))
            seen.add(quantizer)

    def undo() -> None:
        for module, name, quantizer in shared:
            setattr(module, name, quantizer)

    for module, name, quantizer in shared:
        setattr(module, name, copying(quantizer))
    return undo


@contextmanager
def switching(parts: Sequence[Part]) -> Iterator[Callable[[Collection[Part]], None]]:
    """Gives a function that has some parts quantize, and no others, until the block ends; then all are as they were.

    Weights are quantized once for all runs in the block, and no statistics are collected.
    """
    quantizers = {quantizer: None for part in parts for quantizer in part.quantizers}
    weights = {site.quantizer for part in parts for site in part.sites if site.kind == "weight"}
    before = [(q, q._disabled, q._if_calib, q._kept) for q in quantizers]

    def switch(on: Collection[Part]) -> None:
        chosen = {quantizer for part in on for quantizer in part.quantizers}
        for quantizer in quantizers:
            quantizer._disabled = quantizer not in chosen

    try:
        for quantizer in quantizers:
            quantizer._if_calib = False
            quantizer._kept = KeptWeight() if quantizer in weights else None
        yield switch
    finally:
        for quantizer, disabled, if_calib, kept in before:
            quantizer._disabled, quantizer._if_calib, quantizer._kept = disabled, if_calib, kept
