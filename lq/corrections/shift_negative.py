"""Inputs of layers with a small negative lobe are shifted, so that they need no sign, with the float output unchanged."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lq.calib import AffineCalibrator
from lq.corrections.ranges import observe, peeked
from lq.corrections.record import Applied, Corrections
from lq.descriptor import QuantDescriptor
from lq.functional.grid import largest_code
from lq.groups import shared_parameters
from lq.methods import check_options
from lq.nn.conv import QuantConv1d, QuantConv2d, QuantConv3d
from lq.nn.convert import to_quantized_
from lq.nn.elsewhere import QuantTransposedLinear, register_known
from lq.nn.fast_paths import leave_fast_paths_
from lq.nn.input_channels import add_to_bias_, has_input_channels, is_layer, summed_weight, why_no_layer
from lq.nn.linear import QuantLinear
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin
from lq.surgery import has_quantized_layers

# What shifts all that its weights meet, padding too.
TAKE_SHIFTS = (QuantLinear, QuantTransposedLinear, QuantConv1d, QuantConv2d, QuantConv3d)


@torch.no_grad()
def shift_negative_activation_correction_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ratio: float = 0.25,
    threshold_recalculation: bool = False,
    method: str = "max",
    desc: QuantDescriptor | None = None,
    **options: Any,
) -> Corrections:
    """Shift inputs of linear layers and convolutions whose negative values are small beside their range, in place.

    GELU, SiLU, Hardswish, Mish, ELU, LeakyReLU and others give values from a little below zero to far above it. Symmetric codes
    for them leave nearly half of what they have without use. Here the layer adds a shift to its input, its bias takes
    ``W shift``, summed over input channels and kernel, off again, and :func:`lq.quantize_` quantizes the sum without a sign: a
    step of ``(amax + shift) / (2**num_bits - 1)`` in place of ``amax / (2**(num_bits - 1) - 1)``, up to 6 dB less noise (Sony's
    Model Compression Toolkit, "shift negative activation correction").

    What is shifted is the layer's own input, so nothing else notices, and whatever gave the lobe, a module, a function or
    arithmetic, may. A convolution pads with zeros first, and shifts them too. The shift is a whole number of steps: zero remains
    one of the values that can be had. It is the quantizer's ``pre_quant_shift``, saved with the model, and an add in the exported
    graph. Values below those that the batches had are clipped, as values beyond amax are.

    A bias that was exact for the weights is not for rounded ones: :func:`lq.corrections.weights_bias_correction_` afterwards
    makes up for it. Factors on channels (:class:`lq.RescalingCalibrator` and the other corrections) come before; they leave a
    shifted layer alone. An affine quantizer has a zero point, and gains nothing by a shift.

    Args:
        model: float, before quantization.
        batches: the model's positional inputs, each a tuple, list or tensor.
        ratio: most that the magnitude of the smallest value may be beside the symmetric amax; in (0, 1].
        threshold_recalculation: have calibration find amax on the shifted input. Else it is the symmetric amax plus the shift.
        method: by which the symmetric amax is found, as in :func:`lq.calibrating`. With ``power_of_two`` among the options amax
            stays as it is, and what does not fit below it together with the shift is left.
        desc: of the quantizer that the input will have: an integer of any width.
        options: of the method.

    Returns:
        What was done, by the layers; other layers are left.

    Raises:
        ValueError: the model is quantized, there are no batches, NaN or Inf in them, a bad ratio, method, option, or a
            descriptor of floats.

    >>> model = nn.Sequential(nn.Hardswish(), nn.Linear(1, 1)).requires_grad_(False)
    >>> _ = model[1].weight.fill_(2), model[1].bias.fill_(0)
    >>> shift_negative_activation_correction_(model, [torch.tensor([[-1.5], [10.0]])]).applied[0].detail
    'from -0.375 to 10: shifted by 0.4082, amax 10, then 10.41 without a sign'
    >>> model[1].bias, model(torch.tensor([[10.0]]))
    (Parameter containing: tensor([-0.8163]), tensor([[20.]]))
    """
    desc = desc or QuantDescriptor()
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` is {ratio}: it must lie in (0, 1].")
    if not isinstance(desc.num_bits, int):
        raise ValueError(f"`desc` has `num_bits={desc.num_bits}`: a float format has a sign, and gains nothing by a shift.")
    check_options(method, options)
    if has_quantized_layers(model):
        raise ValueError("The model has quantized layers: corrections come before `lq.quantize_` (`lq.dequantize_` undoes it).")
    _, batches = peeked(batches)
    register_known(model)
    layers = {name or type(m).__name__: m for name, m in model.named_modules() if has_input_channels(m)}
    shared = shared_parameters(model)
    reasons = {name: _why_never(layer, shared) for name, layer in layers.items()}
    calibrators = {n: AffineCalibrator(desc.num_bits, num_bins=desc.num_bins) for n in layers if reasons[n] is None}
    observe(model, {layers[name]: calibrator for name, calibrator in calibrators.items()}, batches)
    options = dict(desc.search_options(options))
    plans = {name: _Plan.of(calibrator, method, options) for name, calibrator in calibrators.items() if calibrator.collected}
    reasons |= {name: plans[name].why_not(ratio) if name in plans else "no batch reached it" for name in calibrators}
    applied = []
    for name, plan in plans.items():
        if reasons[name] is None:
            _shift_(layers[name], plan, keep_amax=not threshold_recalculation)
            applied.append(Applied(name, plan.detail()))
    leave_fast_paths_(model)
    return Corrections(applied, {name: reason for name, reason in reasons.items() if reason is not None})


@dataclass(frozen=True)
class _Plan:
    """A shift, and the amax before and after.

    Attributes:
        low: magnitude of the smallest value, 0 where none is negative.
        high: the largest value.
        signed: amax of symmetric codes.
        shift: a whole number of steps of unsigned codes, at least ``low``.
        unsigned: amax of these, with the shift.
        room: what ``high`` and the shift have to fit into.
    """

    low: float
    high: float
    signed: float
    shift: float
    unsigned: float
    room: float = math.inf

    @classmethod
    def of(cls, calibrator: AffineCalibrator, method: str, options: dict[str, Any]) -> "_Plan":
        amax = calibrator.compute_amax(method, **options)
        assert amax is not None
        signed, (low, high) = amax.item(), calibrator.peak.flatten().tolist()
        codes = largest_code(calibrator.num_bits, unsigned=True)
        if options.get("power_of_two"):
            # of a scale that is a power of two the bit of the sign makes two
            share = options.get("scale_amax")
            step = signed * share / largest_code(calibrator.num_bits, unsigned=False) / 2 if share else signed / codes
            shift = math.ceil(low / step) * step if step else 0.0
            return cls(low, high, signed, shift, signed, room=signed)
        # n steps of (signed + shift) / codes are shift
        steps = math.ceil(codes * low / (signed + low)) if low else 0
        shift = steps * signed / (codes - steps) if steps < codes else low
        return cls(low, high, signed, shift, signed + shift)

    def why_not(self, ratio: float) -> str | None:
        """Why a layer's input is better left as it is."""
        if self.low == 0:
            return "its input has no negative values"
        if self.low > ratio * self.signed:
            return f"its input goes down to {-self.low:.4g}, more than {ratio:g} of amax {self.signed:.4g}"
        if min(self.high, self.signed) + self.shift > self.room:
            return f"its input goes up to {self.high:.4g}, and with the shift {self.shift:.4g} beyond amax {self.signed:.4g}"
        return None

    def detail(self) -> str:
        change = f"amax {self.signed:.4g}, then {self.unsigned:.4g} without a sign"
        return f"from {-self.low:.4g} to {self.high:.4g}: shifted by {self.shift:.4g}, {change}"


def _shift_(layer: nn.Module, plan: _Plan, keep_amax: bool) -> None:
    quantized = layer if isinstance(layer, QuantInputMixin) else to_quantized_(layer)
    assert isinstance(quantized, QuantInputMixin)
    shift = torch.tensor(plan.shift)
    # the bias takes off exactly what is added, which is rounded to float32
    add_to_bias_(layer, -shift.double() * summed_weight(layer).cpu())
    quantized.input_quantizer.pre_quant_shift = shift
    if keep_amax:
        quantized.input_quantizer.amax = plan.unsigned


def _why_never(layer: nn.Module, shared: set[int]) -> str | None:
    """Why a layer's input cannot be shifted, whatever it is."""
    if not is_layer(layer):
        return why_no_layer(layer)
    if getattr(layer, "transposed", False):
        return "parts of its output meet other parts of the kernel, so no bias makes up for a shift"
    if not issubclass(QUANT_MODULES.get(type(layer), type(layer)), TAKE_SHIFTS):
        return f"{type(layer).__name__} is no linear layer or convolution"
    if id(layer._parameters["bias"]) in shared:
        return "another module holds its bias too"
    return None
