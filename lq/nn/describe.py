"""A quantizer in one line, as pytorch-quantization prints it."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lq.nn.tensor_quantizer import TensorQuantizer


def describe(quantizer: "TensorQuantizer") -> str:
    """What a quantizer does, its amax, its calibrator, and what is switched on.

    >>> from lq.nn import TensorQuantizer
    >>> describe(TensorQuantizer())
    '8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator(track_amax=False) quant'
    """
    if quantizer._disabled:
        return "disabled"
    desc, calibrator = quantizer.quant_desc, quantizer.calibrator
    amax = "dynamic" if quantizer.amax is None and quantizer.dynamic else _short(quantizer.amax)
    if desc.affine and (ends := quantizer.range) is not None:
        amax = f"{_short(ends[0])}..{_short(ends[1])}"
    parts = [
        *["unsigned"] * desc.unsigned,
        *["affine"] * desc.affine,
        f"{desc.num_bits}bit",
        "fake" if desc.fake_quant else "int",
        "per-tensor" if desc.axis is None else f"axis=({desc.axis})" if isinstance(desc.axis, int) else f"axis={desc.axis}",
        *([] if desc.block_size is None else [f"block_size={desc.block_size}"]),
        f"{'range' if desc.affine else 'amax'}={amax}" + ("" if desc.scale_amax is None else f"*{desc.scale_amax}"),
        *["normalized"] * bool(desc.normalize),
        *["learned"] * quantizer.learned,
        *(name for name in ("pre_quant_scale", "pre_quant_shift") if getattr(quantizer, name) is not None),
        f"calibrator={type(calibrator).__name__}({calibrator.extra_repr()})",
    ]
    switches = {
        "quant": quantizer._if_quant,
        "clip": quantizer._if_clip,
        "calib": quantizer._if_calib,
        "frozen": quantizer.frozen,
    }
    return " ".join(parts + [name for name, on in switches.items() if on])


def _short(amax: Tensor | None) -> str:
    if amax is None:
        return "None"
    if amax.numel() == 1:
        return f"{amax.item():.4f}"
    return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"
