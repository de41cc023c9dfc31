"""Damp and freeze the weights of a model that oscillate between two codes, in any training loop."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.fake_quant import quantize
from lq.functional.grid import scale_from_amax
from lq.functional.oscillation import Oscillation, damping_loss, follow_
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

# Codes are kept as int8; with more bits than that a change of a code is nothing.
MOST_BITS = 8


def oscillating_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, TensorQuantizer]]:
    """Weights that may oscillate: trained, quantized to at most 8 bits, with a quantizer that has an amax; each once."""
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for role, weight in module.weights().items() if isinstance(module, QuantModule) else ():
            quantizer = module.quantizers()[role]
            desc = quantizer.quant_desc
            trained = isinstance(weight, nn.Parameter) and weight.requires_grad and weight not in seen
            small = isinstance(desc.num_bits, int) and desc.num_bits <= MOST_BITS - desc.unsigned and not desc.affine
            # a factor in front of the quantizer, or two learned bounds, would have to be undone
            plain = quantizer.pre_quant_scale is None and quantizer.clip is None
            if trained and small and plain and not quantizer._disabled and quantizer.amax is not None:
                assert isinstance(weight, nn.Parameter)
                seen.add(weight)
                yield f"{name}.{role}".lstrip("."), weight, quantizer


def _on_grid(quantizer: TensorQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What is rounded of a weight, in the blocks of its amax, and that amax in real units."""
    values, amax = quantizer.blocks(weight), quantizer.clipping
    assert amax is not None
    if not quantizer.quant_desc.normalize:
        return values, amax
    centered, spread = quantizer.centered(values)
    return centered, amax * spread


def damp_(model: nn.Module, strength: float, parameters: Iterable[Tensor] | None = None) -> None:
    """Add the gradient of ``strength`` times the damping loss to the weights' gradients: between ``backward`` and ``step``.

    Nagel et al., 2022, arXiv:2203.08114, section 4.2; the strength rises in the course of a training.

    Args:
        model: calibrated; weights without a gradient are left.
        strength: the paper's lambda, for a sum over all weights in real units.
        parameters: those of the optimizer that steps, where there are several; by default all.

    >>> from lq import QuantDescriptor
    >>> from lq.nn import QuantLinear
    >>> layer = QuantLinear(2, 1, bias=False, quant_desc_weight=QuantDescriptor(3, amax=3.0))
    >>> layer.weight.data, layer.weight.grad = torch.tensor([[0.75, 2.0]]), torch.zeros(1, 2)
    >>> damp_(layer, 0.1)
    >>> layer.weight.grad  # 0.1 * 2 * (0.75 - 1)
    tensor([[-0.0500,  0.0000]])
    """
    chosen = None if parameters is None else set(parameters)
    for _, weight, quantizer in oscillating_weights(model):
        if weight.grad is None or (chosen is not None and weight not in chosen):
            continue
        desc = quantizer.quant_desc
        assert isinstance(desc.num_bits, int)
        with torch.enable_grad():
            values, amax = _on_grid(quantizer, weight)
            loss = damping_loss(values, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
            (gradient,) = torch.autograd.grad(loss, weight)
        weight.grad.add_(gradient, alpha=strength)


class Oscillations:
    """Follows the codes of a model's weights from step to step, and freezes those that oscillate.

    A frozen weight keeps its code: after each step it stands at the centre of its bin, wherever the scale went. (With
    ``normalize`` at the centre that it had before: what is written changes the spread, and with it the scale, a little.)

    Args:
        model: calibrated.
        momentum: share of a step in the running means of frequency and code.

    Attributes:
        states: a :class:`lq.functional.oscillation.Oscillation` by weight.

    >>> from lq import QuantDescriptor
    >>> from lq.nn import QuantLinear
    >>> layer = QuantLinear(1, 1, bias=False, quant_desc_weight=QuantDescriptor(3, amax=3.0))
    >>> layer.weight.data.fill_(0.4)
    tensor([[0.4000]])
    >>> oscillations = Oscillations(layer, momentum=0.5)
    >>> for value in (0.6, 0.4, 0.6):  # as an optimizer would
    ...     _ = layer.weight.data.fill_(value)
    ...     oscillations.update_(threshold=0.7)
    >>> oscillations.frozen, layer.weight.item()
    (1.0, 1.0)
    """

    def __init__(self, model: nn.Module, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"`momentum` is {momentum}: it must lie in (0, 1].")
        self.model, self.momentum = model, momentum
        self.states = {name: Oscillation.of(_codes(q, weight)[0]) for name, weight, q in oscillating_weights(model)}

    @torch.no_grad()
    def update_(self, threshold: float | None = None) -> None:
        """Look at the weights after an optimizer's step; freeze those that oscillate more often than ``threshold``, in place."""
        for name, weight, quantizer in oscillating_weights(self.model):
            codes, scale, shift = _codes(quantizer, weight)
            if name not in self.states:  # calibrated, or trained, since
                self.states[name] = Oscillation.of(codes)
            state = self.states[name]
            held = follow_(state, codes, self.momentum, threshold)
            if threshold is not None:
                centers = (held.to(scale.dtype) * scale + shift).to(weight.dtype)
                weight.copy_(torch.where(state.frozen, centers, quantizer.blocks(weight)).reshape(weight.shape))

    @property
    def frozen(self) -> float:
        """Share of weights that are frozen."""
        return self._share("frozen", 0)

    def frequent(self, threshold: float = 0.005) -> float:
        """Share of weights that oscillate more often than ``threshold``, the paper's 0.5 % by default."""
        return self._share("frequency", threshold)

    def _share(self, name: str, threshold: float) -> float:
        values = [getattr(state, name) for state in self.states.values()]
        total = sum(value.numel() for value in values)
        return sum(int((value > threshold).sum()) for value in values) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: 11 bytes for each weight."""
        return {name: dict(vars(state)) for name, state in self.states.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, weight, _ in oscillating_weights(self.model):
            if name in state_dict:
                self.states[name] = Oscillation(**{k: v.to(weight.device).clone() for k, v in state_dict[name].items()})


@torch.no_grad()
def _codes(quantizer: TensorQuantizer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight, in the blocks of its amax, their scale, and what lies between a weight and what is rounded of it."""
    desc = quantizer.quant_desc
    assert isinstance(desc.num_bits, int)
    values, amax = _on_grid(quantizer, weight)
    scale = scale_from_amax(amax, desc.num_bits, desc.unsigned)
    codes = quantize(values, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
    return codes, scale, quantizer.blocks(weight) - values
