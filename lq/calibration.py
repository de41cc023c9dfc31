"""Calibrate a whole model: statistics from its forwards, one synchronisation over ranks, amax."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.calib import (
    AffineCalibrator,
    Calibrator,
    HeldOutCalibrator,
    HistogramCalibrator,
    MaxCalibrator,
    compute_amaxs,
    failing_together,
    histogram_amax,
    sync_calibrators,
)
from lq.functional.affine_range import METHODS as AFFINE_METHODS
from lq.functional.choose import AUTO
from lq.methods import Choice, Method, check_options, choices_by_name
from lq.nn.evaluating import evaluating
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.surgery import named_quantizers, unquantized

M = TypeVar("M", bound=nn.Module)

# Quantizers by name, those of weights with the weight they belong to.
Roles = dict[str, tuple[TensorQuantizer, Tensor | None]]


@contextmanager
def calibrating(model: M, method: Method = "max", **options: Any) -> Iterator[M]:
    """Collect statistics from every forward inside the block; on leaving it, merge them over ranks and set amax.

    Inside, the model computes in float, in evaluation mode and without gradients, so that BatchNorm statistics stay. Weights are
    looked at once. Frozen quantizers take no part. If the block raises, amax stays as it was, and every rank stops.

    Args:
        model: a model with quantizers.
        method: ``max``, ``percentile``, ``mse``, ``mae``, ``lp``, ``kl``, ``entropy``, or ``auto``: for each quantizer the one of
            them with the least squared error on batches that amax was not computed from (``quantizer.calibrator.method`` says
            which). Or a mapping from patterns on the short names of quantizers (``{"*": "mse", "head.*": "max"}``), of which the
            last match wins, and whose values may have options of their own (``{"*.weight": {"method": "lp", "p": 3}}``). Any but
            ``max`` collects histograms of inputs; weights follow the ``calib_method`` of their descriptor, and are all there to
            measure on. A step that is learned from a weight starts where the method says in any case.
        options: of :meth:`lq.calib.HistogramCalibrator.compute_amax`: ``percentile``, ``z_threshold``, ``power_of_two`` ...

    Raises:
        ValueError: an unknown method or option, a model without quantizers, NaN or Inf in the data (names the quantizer), or
            quantizers that saw no data (names them).

    >>> from lq.surgery import quantize_
    >>> model = quantize_(nn.Sequential(nn.Linear(2, 2)))
    >>> with calibrating(model, method="max"):
    ...     _ = model(torch.tensor([[1.0, -3.0]]))
    >>> dict(named_quantizers(model))["0.input"].amax
    tensor(3.)
    """
    check_options(method, options)
    if not _roles(model):
        raise ValueError(f"{type(model).__name__} has no quantizers to calibrate: call `lq.quantize_` or `lq.unfreeze_` first.")
    observe_(model, method)
    try:
        with failing_together(), unquantized(model), evaluating(model):
            yield model
    finally:
        stop_observing_(model)
    merge_statistics_(model)
    load_calib_amax_(model, method, **options)


def load_calib_amax_(model: M, method: Method = "max", *, momentum: float = 0.0, strict: bool = True, **options: Any) -> M:
    """Set every amax from the statistics at hand: another method needs neither data nor a model run.

    Args:
        model: a model that was calibrated with histograms (any method but ``max``).
        method: as :func:`calibrating`.
        momentum: share of the present amax that stays, in [0, 1).
        strict: refuse quantizers that saw no data; else they keep what they have.
        options: as :func:`calibrating`.

    Raises:
        ValueError: quantizers that saw no data (named), or have statistics that do not allow ``method``.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` is {momentum}: it must lie in [0, 1).")
    check_options(method, options)
    roles = _roles(model)
    unseen = [name for name, (q, _) in roles.items() if not q.calibrator.collected]
    if unseen and strict:
        raise ValueError(
            f"{len(unseen)} of {len(roles)} quantizers saw no calibration data: {', '.join(unseen[:10])}. Run batches "
            "that reach them through the model (in a fit override `Quantize.calibration_step`), or leave out what it never calls "
            "with a rule without descriptors."
        )
    choices = choices_by_name(roles, method, options)
    check_affine_methods(((name, quantizer) for name, (quantizer, _) in roles.items()), choices)
    choices = {name: choice.on_grid(roles[name][0].quant_desc) for name, choice in choices.items()}
    for name, (quantizer, weight) in roles.items():
        if weight is None and not suits(quantizer.calibrator, wanted := choices[name].method):
            missing = "batches held out" if wanted == AUTO else "histogram"
            raise ValueError(f"`{name}` has no {missing} for method {wanted!r}: calibrate with that method.")
    calibrators = {name: quantizer.calibrator for name, (quantizer, _) in roles.items() if name not in unseen}
    for name, amax in (amaxs_by_name(calibrators, choices) | _steps_by_name(roles, choices)).items():
        quantizer = roles[name][0]
        quantizer.amax = _between(amax, quantizer.amax, momentum)
    for name, ends in ranges_by_name(calibrators, choices).items():
        quantizer = roles[name][0]
        low, high = (_between(*pair, momentum) for pair in zip(ends, quantizer.range or (None, None), strict=True))
        quantizer.range = low, high
    return model


def _steps_by_name(roles: Roles, choices: dict[str, Choice]) -> dict[str, Tensor]:
    """Amax of weights from which a step is then learned, by their method.

    Few bits are what is learned, and leave most weights 0 where the step begins at the largest one. All of a weight is there, so
    none of its histograms is kept.
    """
    found = {}
    for name, (quantizer, weight) in roles.items():
        desc, calibrator, choice = quantizer.quant_desc, quantizer.calibrator, choices[name]
        learned = isinstance(desc.learn_amax, str) and isinstance(calibrator, MaxCalibrator)
        if weight is None or not learned or choice.method in ("max", "noclipping"):
            continue
        # nothing has to be held out, and where all is measured on, least squared error has least squared error
        method = "mse" if choice.method == AUTO else choice.method
        x = quantizer.normalized(quantizer.blocks(weight))
        found[name] = histogram_amax(x, calibrator, desc.num_bins, method, **dict(choice.options))
        calibrator.method = method
    return found


def _between(new: Tensor, present: Tensor | None, momentum: float) -> Tensor:
    return new if present is None or not momentum else torch.lerp(new, present.to(new.device), momentum)


def amaxs_by_name(calibrators: dict[str, Calibrator], choices: dict[str, Choice]) -> dict[str, Tensor]:
    """Amax of calibrators: all histograms of one choice together, and the largest magnitude where there is no histogram."""
    amaxs: dict[str, Tensor] = {}
    for choice in dict.fromkeys(choices.values()):
        stack = {n: c for n, c in calibrators.items() if choices[n] == choice and isinstance(c, HistogramCalibrator)}
        amaxs |= zip(stack, compute_amaxs(list(stack.values()), choice.method, **dict(choice.options)), strict=True)
    others = {n: c for n, c in calibrators.items() if n not in amaxs and not isinstance(c, AffineCalibrator)}
    largest = {name: calibrator.compute_amax() for name, calibrator in others.items()}
    return amaxs | {name: amax for name, amax in largest.items() if amax is not None}


def ranges_by_name(calibrators: dict[str, Calibrator], choices: dict[str, Choice]) -> dict[str, tuple[Tensor, Tensor]]:
    """Ranges of affine quantizers' calibrators."""
    found = {}
    for name, calibrator in calibrators.items():
        if isinstance(calibrator, AffineCalibrator):
            # the others are about the edges that a symmetric amax is looked for among
            options = {key: value for key, value in choices[name].options if key not in ("start_bin", "stride", "power_of_two")}
            found[name] = calibrator.compute_range(choices[name].method, **options)
    return {name: ends for name, ends in found.items() if ends is not None}


def _needed(method: str) -> type[HistogramCalibrator]:
    """What collects the statistics for a method."""
    return HeldOutCalibrator if method == AUTO else HistogramCalibrator


def suits(calibrator: Calibrator, method: str) -> bool:
    """Whether a calibrator collects what a method needs; the largest magnitude is kept by all."""
    if isinstance(calibrator, AffineCalibrator):
        return method in AFFINE_METHODS
    return method in ("max", "noclipping") or isinstance(calibrator, _needed(method))


# The two halves of a calibration, for those who go on training in between


def check_affine_methods(roles: Iterable[tuple[str, TensorQuantizer]], choices: Mapping[str, Choice]) -> None:
    """Raise ``ValueError`` for a method or an option that an affine quantizer, named, cannot have."""
    for name, quantizer in roles:
        choice = choices[name]
        if quantizer.quant_desc.affine and not suits(quantizer.calibrator, choice.method):
            raise ValueError(f"`{name}` is affine, and `method` {choice.method!r}: choose one of {', '.join(AFFINE_METHODS)}.")
        if quantizer.quant_desc.affine and dict(choice.options).get("power_of_two"):
            raise ValueError(f"`{name}` is affine, and `power_of_two` is True: a power of two is a symmetric amax, not a range.")


def observe_(model: M, method: Method = "max", *, keep: bool = False) -> M:
    """Collect statistics of every input from now on, in place; quantizers go on doing what they do. ``keep`` those at hand."""
    roles = _roles(model)
    choices = choices_by_name(roles, method, {})
    check_affine_methods(((name, quantizer) for name, (quantizer, _) in roles.items()), choices)
    for name, (quantizer, weight) in roles.items():
        if not keep:
            _prepare(quantizer, "max" if weight is not None else choices[name].method)
        quantizer._if_calib = weight is None
    return model


def merge_statistics_(model: M) -> M:
    """Stop collecting, look at the weights as they are now, and merge the statistics of inputs over ranks, in place."""
    stop_observing_(model)
    roles = _roles(model)
    for name, (quantizer, weight) in roles.items():
        if weight is not None:
            quantizer.calibrator.reset()
            try:
                quantizer.collect(weight)
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from None
    _sync(roles)
    return model


def stop_observing_(model: M) -> M:
    """Collect no more, in place; the statistics at hand stay."""
    for _, quantizer in named_quantizers(model):
        quantizer.disable_calib()
    return model


def _roles(model: nn.Module) -> Roles:
    """The quantizers that may change: neither frozen, nor learned, nor given by their descriptor."""
    modules = [m for m in model.modules() if isinstance(m, QuantModule)]
    weights = {m.quantizers()[role]: weight for m in modules for role, weight in m.weights().items()}
    return {name: (q, weights.get(q)) for name, q in named_quantizers(model) if not q.fixed}


def _prepare(quantizer: TensorQuantizer, method: str) -> None:
    """Forget earlier statistics; where the method needs more than the quantizer's calibrator collects, give it another."""
    present, num_bins = quantizer.calibrator, quantizer.quant_desc.num_bins
    if not suits(present, method):
        wanted = _needed(method)(present.num_bits, present.axis, present.unsigned, num_bins)
        quantizer.calibrator = wanted.to(present.device)
    quantizer.calibrator.reset()


def _sync(roles: Roles, error: str | None = None) -> None:
    """Merge the statistics of inputs over ranks (weights are the same on all); complain where data was not finite."""
    if broken := [name for name, (q, _) in roles.items() if q.calibrator.collected and not q.calibrator.finite]:
        error = (
            f"NaN or Inf in calibration data, first at `{broken[0]}` ({len(broken)} of {len(roles)} quantizers): "
            "look for bad samples, or for a layer that overflows."
        )
    elif low := [name for name, (q, _) in roles.items() if q.unsigned and bool(q.calibrator.negative > 0)]:
        error = (
            f"`{low[0]}` is unsigned, but saw values down to {-roles[low[0]][0].calibrator.negative.item():g} ({len(low)} of "
            f"{len(roles)} quantizers): give it `unsigned=False`."
        )
    sync_calibrators([q.calibrator for q, weight in roles.values() if weight is None], error)
