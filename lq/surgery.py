"""Verbs on a whole model: place quantizers, calibrate them, freeze them, take them out again."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from lq.calib import HistogramCalibrator, sync_calibrators
from lq.descriptor import QuantDescriptor, QuantRule, resolve_rules
from lq.functional.threshold import Search, check_method
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin, QuantMixin
from lq.nn.tensor_quantizer import TensorQuantizer

M = TypeVar("M", bound=nn.Module)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every enabled quantizer with its short name: ``layer1.conv1.input``, ``layer1.conv1.weight``."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not module._disabled:
            yield name.removesuffix("_quantizer"), module


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has any quantizer."""
    return any(isinstance(m, TensorQuantizer) for m in model.modules())


# Placing and removing


def quantize_(model: M, rules: str | Sequence[QuantRule] = "int8") -> M:
    """Put quantizers into ``model``, in place, as the rules say; the last rule that matches a module wins.

    Modules keep their identity, parameters and hooks. Until they are calibrated the new quantizers pass their input through,
    so the model still computes what it did.

    Args:
        model: any module.
        rules: a preset's name (``int8``, ``int8_per_tensor``, ``int8_weight_only``, ``w4a8``) or a list of :class:`QuantRule`.

    Returns:
        ``model``.

    Raises:
        ValueError: a pattern that matches no quantizable module, an unknown preset, a model without quantizable modules, or
            one that has quantizers already.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> quantizers = dict(named_quantizers(quantize_(model)))
    >>> list(quantizers)
    ['0.input', '0.weight', '2.input', '2.weight']
    """
    if is_quantized(model):
        raise ValueError("The model has quantizers already: call `lq.dequantize_` before placing others.")
    targets = {name: m for name, m in model.named_modules() if type(m) in QUANT_MODULES}
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no quantizable layer: known are "
            f"{', '.join(c.__name__ for c in QUANT_MODULES)}; others need `lq.nn.register`. A model that is built in "
            "`setup` or `configure_model` must exist before: build it in `__init__`."
        )
    chosen = _choose(resolve_rules(rules), targets)
    for name, rule in chosen.items():
        if rule.input is not None or rule.weight is not None:
            _to_quantized_(targets[name], rule.input, rule.weight)
    if not is_quantized(model):
        raise ValueError("The rules leave every layer in float: give at least one an `input` or a `weight` descriptor.")
    _leave_fast_path_(model)
    return model


def _choose(rules: list[QuantRule], targets: dict[str, nn.Module]) -> dict[str, QuantRule]:
    chosen: dict[str, QuantRule] = {}
    for rule in rules:
        matches = [name for name in targets if fnmatchcase(name, rule.pattern)]
        if not matches:
            close = difflib.get_close_matches(rule.pattern, targets, n=3, cutoff=0.0)
            raise ValueError(f"The rule's pattern {rule.pattern!r} matches no quantizable layer: the closest are {close}.")
        chosen.update(dict.fromkeys(matches, rule))
    return chosen


def _to_quantized_(module: nn.Module, input: QuantDescriptor | None, weight: QuantDescriptor | None) -> None:
    quant_class = QUANT_MODULES[type(module)]
    module.__class__ = quant_class
    assert isinstance(module, QuantInputMixin)
    module.init_quantizers(*([input, weight] if issubclass(quant_class, QuantMixin) else [input]))
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    for quantizer in module.quantizers().values():
        quantizer.dynamic = False
        quantizer.to(device)


def _leave_fast_path_(model: nn.Module) -> None:
    # in evaluation torch's fused encoder layer reads the weights of its linear layers and never calls them
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and is_quantized(module):
            module.activation_relu_or_gelu = 0


def dequantize_(model: M) -> M:
    """Take all quantizers out again, in place; weights are as trained."""
    for module in list(model.modules()):
        if isinstance(module, QuantInputMixin):
            module.drop_quantizers()
            module.__class__ = next(f for f, q in QUANT_MODULES.items() if q is type(module))
    return model


# Calibration


@contextmanager
def calibrating(model: M, method: str = "max", **options: Any) -> Iterator[M]:
    """Collect statistics from every forward inside the block; on leaving it, merge them over ranks and set amax.

    Inside, the model computes in float, in evaluation mode and without gradients, so that BatchNorm statistics stay. Weights are
    looked at once. Frozen quantizers take no part. If the block raises, amax stays as it was.

    Args:
        model: a model with quantizers.
        method: ``max``, ``percentile``, ``mse`` or ``entropy``. Any but ``max`` collects histograms of inputs; weights follow the
            ``calib_method`` of their descriptor.
        options: of :meth:`lq.calib.HistogramCalibrator.compute_amax`: ``percentile``, ``start_bin``, ``stride``.

    Raises:
        ValueError: an unknown method or option, a model without quantizers, NaN or Inf in the data (names the quantizer), or
            quantizers that saw no data (names them).

    >>> model = quantize_(nn.Sequential(nn.Linear(2, 2)))
    >>> with calibrating(model, method="max"):
    ...     _ = model(torch.tensor([[1.0, -3.0]]))
    >>> dict(named_quantizers(model))["0.input"].amax
    tensor(3.)
    """
    check_method(method)
    _check_options(options)
    if not is_quantized(model):
        raise ValueError(f"{type(model).__name__} has no quantizers to calibrate: call `lq.quantize_` first.")
    roles = _roles(model)
    with _observed(model, roles, method):
        yield model
    _sync(roles)
    load_calib_amax_(model, method, **options)


@contextmanager
def _observed(model: nn.Module, roles: dict[str, tuple[TensorQuantizer, torch.Tensor | None]], method: str) -> Iterator[None]:
    """Statistics on, quantization off, evaluation mode, no gradients; all undone on leaving."""
    switches = [(q, q._if_quant, q._if_calib) for _, q in named_quantizers(model)]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for quantizer, weight in roles.values():
            _prepare(quantizer, "max" if weight is not None else method)
            quantizer._if_calib = weight is None
        for quantizer, _, _ in switches:
            quantizer.disable_quant()
        with torch.no_grad():
            yield
            for quantizer, weight in roles.values():
                if weight is not None:
                    quantizer.calibrator.collect(weight)
    finally:
        for quantizer, if_quant, if_calib in switches:
            quantizer._if_quant, quantizer._if_calib = if_quant, if_calib
        for module, mode in modes:
            module.training = mode


def _roles(model: nn.Module) -> dict[str, tuple[TensorQuantizer, torch.Tensor | None]]:
    """Quantizers that may change, by name; those of weights with the weight they belong to."""
    weights = {m.weight_quantizer: m.weight for m in model.modules() if isinstance(m, QuantMixin)}
    return {name: (q, weights.get(q)) for name, q in named_quantizers(model) if not q.frozen}  # type: ignore[misc]


def _prepare(quantizer: TensorQuantizer, method: str) -> None:
    """Forget earlier statistics; where the method needs a histogram and the quantizer has none, give it one."""
    if method not in ("max", "noclipping") and not isinstance(quantizer.calibrator, HistogramCalibrator):
        desc = quantizer.quant_desc
        device = quantizer.calibrator.device
        quantizer.calibrator = HistogramCalibrator(desc.num_bits, desc.axis, desc.unsigned, desc.num_bins).to(device)
    quantizer.calibrator.reset()


def _sync(roles: dict[str, tuple[TensorQuantizer, torch.Tensor | None]]) -> None:
    """Merge the statistics of inputs over ranks (weights are the same on all); complain where data was not finite."""
    broken = [name for name, (q, _) in roles.items() if q.calibrator.collected and not q.calibrator.finite]
    error = None
    if broken:
        error = (
            f"NaN or Inf in calibration data, first at `{broken[0]}` ({len(broken)} of {len(roles)} quantizers): "
            "look for bad samples, or for a layer that overflows."
        )
    try:
        sync_calibrators([q.calibrator for q, weight in roles.values() if weight is None], error)
    except RuntimeError as failure:
        raise ValueError(str(failure)) from None


def load_calib_amax_(model: M, method: str = "max", **options: Any) -> M:
    """Set every amax from the statistics at hand: another method needs neither data nor a model run.

    Args:
        model: a model that was calibrated with histograms (any method but ``max``).
        method: as :func:`calibrating`.
        options: as :func:`calibrating`.

    Raises:
        ValueError: quantizers that saw no data (named), or have statistics that do not allow ``method``.
    """
    check_method(method)
    _check_options(options)
    roles = _roles(model)
    if unseen := [name for name, (q, _) in roles.items() if not q.calibrator.collected]:
        raise ValueError(
            f"{len(unseen)} of {len(roles)} quantizers saw no calibration data: {', '.join(unseen[:10])}. Run batches through the "
            "model, or leave layers that it never calls out with a rule without descriptors."
        )
    for name, (quantizer, weight) in roles.items():
        if isinstance(quantizer.calibrator, HistogramCalibrator):
            quantizer.load_calib_amax(method, **options)
        elif weight is None and method not in ("max", "noclipping"):
            raise ValueError(f"`{name}` has no histogram for method {method!r}: calibrate with `method={method!r}`.")
        else:
            quantizer.load_calib_amax()
    return model


def _check_options(options: dict[str, Any]) -> None:
    known = ("percentile", "start_bin", "stride")
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"Unknown calibration option {', '.join(map(repr, unknown))}: choose among {', '.join(known)}.")
    Search(**options)


# Freezing


def freeze_(model: M) -> M:
    """Let no amax change any more, in place."""
    for _, quantizer in named_quantizers(model):
        quantizer.frozen = True
    return model


def unfreeze_(model: M) -> M:
    """Let amax change again, in place."""
    for _, quantizer in named_quantizers(model):
        quantizer.frozen = False
    return model
