"""Widths that change while a model trains: fewer bits, step by step."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.calib import Calibrator, HistogramCalibrator, compute_amaxs, failing_together, sync_calibrators
from lq.nn.evaluating import evaluating
from lq.nn.quant_module import QuantModule
from lq.nn.spread import kept_axis
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.surgery import named_quantizers

M = TypeVar("M", bound=nn.Module)


def widths_of(model: nn.Module) -> dict[str, int]:
    """Bits of each integer quantizer, by its short name."""
    found = ((name, quantizer.num_bits) for name, quantizer in named_quantizers(model))
    return {name: bits for name, bits in found if isinstance(bits, int)}


def set_widths_(model: M, widths: Mapping[str, int]) -> M:
    """Give quantizers these widths, in place; amax stays."""
    for name, quantizer in named_quantizers(model):
        if name in widths and quantizer.num_bits != widths[name]:
            quantizer.num_bits = widths[name]
    return model


@contextmanager
def changing_widths(model: M, widths: Mapping[str, int], method: str = "mse") -> Iterator[M]:
    """On leaving the block quantizers have new widths, and the amax that is best for them by the forwards in it.

    Progressive quantization (Zhuang et al., 2018, arXiv:1711.00205): a network of fewer bits starts from one of more. A learned
    step starts anew from amax, in the parameter that the optimizer has. Inside, the model is in evaluation and computes no
    gradients, and quantizes as before; statistics are those of all ranks. Quantizers that are frozen, affine, or saw nothing keep
    their amax, as do those whose descriptor gives it and those with a learned clip.

    Args:
        model: calibrated.
        widths: bits by short name of a quantizer, as :func:`widths_of` has them; others stay.
        method: how amax is chosen, as for :meth:`lq.calib.HistogramCalibrator.compute_amax`.

    >>> import lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(2, 2)), [lq.QuantRule("*", lq.QuantDescriptor(8))])
    >>> with lq.calibrating(model):
    ...     _ = model(torch.tensor([[1.0, -8.0]]))
    >>> x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([8.0])]).reshape(-1, 2)
    >>> with changing_widths(model, {"0.input": 3}):
    ...     _ = model(x)
    >>> quantizer = model[0].input_quantizer
    >>> quantizer.num_bits, quantizer.amax < 8
    (3, tensor(True))
    """
    chosen = {n: q for n, q in named_quantizers(model) if n in widths and q.num_bits != widths[n]}
    moving = {name: quantizer for name, quantizer in chosen.items() if _moves(quantizer)}
    calibrators = {name: _calibrator(quantizer, widths[name]) for name, quantizer in moving.items()}
    weights = {m.quantizers()[role]: w for m in model.modules() if isinstance(m, QuantModule) for role, w in m.weights().items()}
    with ExitStack() as hooks:
        for name, quantizer in moving.items():
            if quantizer not in weights:
                hooks.callback(quantizer.register_forward_pre_hook(_collecting(calibrators[name])).remove)
        with failing_together(), evaluating(model):
            yield model
    for name, quantizer in moving.items():
        if quantizer in weights:
            _collect(quantizer, calibrators[name], weights[quantizer])
    sync_calibrators([calibrators[name] for name, quantizer in moving.items() if quantizer not in weights])
    seen = {name: calibrator for name, calibrator in calibrators.items() if calibrator.collected}
    amaxs = dict(zip(seen, compute_amaxs(list(seen.values()), method), strict=True))
    set_widths_(model, widths)
    for name, amax in amaxs.items():
        if amax is not None:
            moving[name].amax = amax


def _moves(quantizer: TensorQuantizer) -> bool:
    """Whether amax is the method's to choose."""
    given = quantizer.frozen or quantizer.quant_desc.amax is not None or quantizer.clip is not None
    return not given and not quantizer.quant_desc.affine and quantizer.amax is not None


def _calibrator(quantizer: TensorQuantizer, bits: int) -> HistogramCalibrator:
    desc = quantizer.quant_desc
    return HistogramCalibrator(bits, kept_axis(desc), desc.unsigned, desc.num_bins).to(quantizer.calibrator.device)


def _collecting(calibrator: Calibrator) -> Any:
    def collect(quantizer: TensorQuantizer, args: tuple[Any, ...]) -> None:
        _collect(quantizer, calibrator, quantizer.arriving(args[0].detach()))

    return collect


@torch.no_grad()
def _collect(quantizer: TensorQuantizer, calibrator: Calibrator, x: Tensor) -> None:
    # what an unsigned quantizer is given below zero it clips
    x = x.clamp_min(0) if quantizer.unsigned else x
    calibrator.collect(quantizer.normalized(quantizer.blocks(x)))
