"""Post-training quantization in one call: corrections, quantizers, thresholds, bias correction, and what each was worth."""

import copy
from collections.abc import Iterable
from glob import escape
from typing import Any, TypeVar

from torch import Tensor, nn

from lq.analysis.calibration import calibration_rows
from lq.analysis.outputs import PLAIN
from lq.calib import failing_together
from lq.calibration import load_calib_amax_, merge_statistics_, observe_, stop_observing_
from lq.corrections import TAKE_SHIFTS, Corrections, RecordingError, weights_bias_correction_
from lq.descriptor import QuantDescriptor, QuantRule
from lq.methods import Method
from lq.nn.evaluating import evaluating
from lq.nn.example import positional_inputs
from lq.nn.quant_module import QuantMixin
from lq.nn.reuse import weight_quantizers
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.placed import SHORTCUT_ROLES
from lq.ptq.config import QuantizationConfig, QuantizationMethod, with_power_of_two_scale
from lq.ptq.report import PtqReport
from lq.ptq.sqnr import layer_sqnr
from lq.sharing import holders_of
from lq.surgery import has_quantized_layers, named_quantizers, quantize_, remember_rules_, unquantized

M = TypeVar("M", bound=nn.Module)

BIAS = "weights_bias_correction"


def post_training_quantization(
    model: M, batches: Iterable[Any], config: QuantizationConfig | None = None, *, target: str | None = None
) -> tuple[M, PtqReport]:
    """A quantized copy of a trained model, and a report of what was done and what it was worth.

    In this order, each as ``config`` says: corrections of the float model (:mod:`lq.corrections`), which leave its output as it
    is; quantizers (:func:`lq.quantize_`); thresholds (:func:`lq.calibrating`); and last the biases. What is returned is a
    quantized model as any other: save it, fine-tune it, give it to :func:`lq.export.to_onnx`.

    Activations have codes from 0 on where calibration saw no negative value, as behind a ReLU: twice as many. TensorRT's integers
    have a sign, and at 8 bits ``target="tensorrt"`` keeps it.

    What a correction cannot do is left, and the report says why. A model whose run cannot be recorded is quantized all the same.

    Args:
        model: trained, in float; stays as it is.
        batches: the model's positional inputs, each a tensor, tuple or list, without labels; a few hundred samples are enough.
            They are all kept in memory.
        config: what to do; by default MCT's.
        target: ``"tensorrt"`` or ``"onnxruntime"`` places quantizers on residual adds too, as :func:`lq.quantize_` says.

    Raises:
        ValueError: no batches, NaN or Inf in them; a model that is quantized, or has nothing to quantize.
        TypeError: ``batches`` is one tensor, or has more than the model's inputs, or fewer.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> config = QuantizationConfig(activation_n_bits=4, weights_n_bits=4)
    >>> quantized, report = post_training_quantization(model, [torch.randn(64, 8)], config)
    >>> quantized[2].input_quantizer.unsigned, list(report.sqnr), report.sqnr["weights_bias_correction"][""] > 10
    (True, ['quantized', 'weights_bias_correction'], True)
    """
    config = config or QuantizationConfig()
    fed = _as_list(model, batches)
    if has_quantized_layers(model):
        raise ValueError("`model` is quantized already: give the float model, or `lq.dequantize_` it.")
    candidate = copy.deepcopy(model)
    done: dict[str, Corrections] = {}
    quantized = _quantized(candidate, fed, config, target)
    sqnr = {PLAIN: layer_sqnr(candidate, quantized, fed)}
    for name, correction in config.corrections().items():
        try:
            corrected, done[name] = _corrected(candidate, correction, fed)
        except RecordingError as error:
            done[name] = Corrections(left={"": str(error)})
        if done[name].applied:
            candidate = corrected
            quantized = _quantized(candidate, fed, config, target)
        sqnr[name] = layer_sqnr(candidate, quantized, fed)
    if config.weights_bias_correction and config.enable_weights_quantization:
        done[BIAS] = weights_bias_correction_(quantized, fed)
        sqnr[BIAS] = layer_sqnr(candidate, quantized, fed)
    left = {name: "no batch reached it" for name, quantizer in named_quantizers(quantized) if quantizer.amax is None}
    rules = [*config.rules(), *_exceptions(quantized)]
    remember_rules_(quantized, rules)
    return quantized, PtqReport(config, rules, calibration_rows(quantized), sqnr, done, left)


def _as_list(model: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    if isinstance(batches, Tensor):
        raise TypeError("`batches` is one tensor: give an iterable of batches, as `[x]`.")
    fed = [positional_inputs(model, batch) for batch in batches]
    if not fed:
        raise ValueError("`batches` is empty: give at least one, as the model takes it (an iterator can be used once only).")
    return fed


def _corrected(model: M, correction: Any, batches: list[tuple[Any, ...]]) -> tuple[M, Corrections]:
    """A copy, so that a correction that fails half-way leaves nothing behind."""
    changed = copy.deepcopy(model)
    return changed, correction(changed, batches)


def _quantized(model: M, batches: list[tuple[Any, ...]], config: QuantizationConfig, target: str | None) -> M:
    """A quantized and calibrated copy."""
    placed = quantize_(copy.deepcopy(model), config.rules(), target=target, args=batches[0])
    methods = _methods(placed, config)
    observe_(placed, methods)
    for quantizer in _activations(placed):
        # it notes how far values go below zero only where they should not
        quantizer.calibrator.unsigned = True
    try:
        with failing_together(), unquantized(placed), evaluating(placed):
            for batch in batches:
                placed(*batch)
    finally:
        stop_observing_(placed)
    merge_statistics_(placed)
    _choose_codes_(placed, config, target)
    return load_calib_amax_(placed, methods, strict=False)


def _methods(model: nn.Module, config: QuantizationConfig) -> Method:
    activations = set(_activations(model))
    weights = [name for name, quantizer in named_quantizers(model) if quantizer not in activations]
    return {"*": config.activation_calibration(), **{escape(name): config.weights_calibration() for name in weights}}


def _activations(model: nn.Module) -> list[TensorQuantizer]:
    weights = set(weight_quantizers(model))
    return [quantizer for _, quantizer in named_quantizers(model) if quantizer not in weights]


def _exceptions(model: nn.Module) -> list[QuantRule]:
    """Rules for what has no sign, and for shortcuts unlike the layer before them, so that the model can be built again."""
    rules: list[QuantRule] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantMixin):
            continue
        own = _descriptor_of(layer.input_quantizer)
        if layer.input_quantizer.unsigned:
            rules.append(QuantRule(escape(name), input=own, weight=_descriptor_of(layer.weight_quantizer)))
        for role in SHORTCUT_ROLES:
            quantizer = layer.quantizers().get(role)
            if quantizer is not None and (desc := _descriptor_of(quantizer)) != own:
                rules.append(QuantRule(escape(f"{name}.{role}"), input=desc))
    return rules


def _descriptor_of(quantizer: TensorQuantizer) -> QuantDescriptor | None:
    return None if quantizer._disabled else quantizer.quant_desc


def _choose_codes_(model: nn.Module, config: QuantizationConfig, target: str | None) -> None:
    """Leave the sign out of inputs where nothing was negative, and the target has codes without one."""
    method, wide = config.activation_quantization_method, config.activation_n_bits >= 8
    holders = holders_of(model)
    for quantizer in _activations(model):
        desc: QuantDescriptor = quantizer.quant_desc
        calibrator = quantizer.calibrator
        takers = [layer for layer, role in holders[quantizer] if role == "input" and isinstance(layer, QuantMixin)]
        # int8 holds 8 bits without a sign only shifted, which must be possible wherever the tensor goes
        shiftable = len(takers) == len(holders[quantizer]) and all(isinstance(layer, TAKE_SHIFTS) for layer in takers)
        free = takers and (not wide or (shiftable and target != "tensorrt"))
        if free and calibrator.collected and not quantizer.fixed and method is not QuantizationMethod.UNIFORM:
            desc = desc.replace(unsigned=desc.unsigned or not bool(calibrator.negative > 0))
        if method is QuantizationMethod.POWER_OF_TWO:
            desc = with_power_of_two_scale(desc)
        quantizer.quant_desc = desc
