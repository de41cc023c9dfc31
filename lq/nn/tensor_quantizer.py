"""The module that holds ``amax`` and quantizes a tensor with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lq.calib import Calibrator, HistogramCalibrator, MaxCalibrator
from lq.descriptor import QuantDescriptor
from lq.functional.amax import compute_amax, scale_from_amax
from lq.functional.fake_quant import fake_tensor_quant, tensor_quant

BUFFERS = ("_amax", "_pre_quant_scale")


def make_calibrator(desc: QuantDescriptor) -> Calibrator:
    """The calibrator that a descriptor asks for."""
    if desc.calib_method == "histogram":
        return HistogramCalibrator(desc.num_bits, desc.axis, desc.unsigned, desc.num_bins)
    return MaxCalibrator(desc.num_bits, desc.axis, desc.unsigned)


class TensorQuantizer(nn.Module):
    """Quantizes a tensor as its descriptor says; collects statistics while calibration is enabled.

    ``amax`` and ``pre_quant_scale`` are buffers that stay float32 on every cast of the module, are ``None`` until set, and
    are created on loading a state dict with the shape they have there.

    Args:
        quant_desc: what to do.
        disabled: neither quantize nor collect.
        if_quant: quantize.
        if_calib: collect statistics.

    Attributes:
        dynamic: while there is no amax, take that of each input (as pytorch-quantization does). Quantizers placed by
            :func:`lq.quantize_` have it off, and pass their input through until they are calibrated.
        frozen: amax must not change any more (see :func:`lq.freeze_`).

    >>> quantizer = TensorQuantizer(QuantDescriptor(amax=1.27))
    >>> quantizer(torch.tensor([0.101, 3.0]))
    tensor([0.1000, 1.2700])
    >>> quantizer
    TensorQuantizer(8bit fake per-tensor amax=1.2700 calibrator=MaxCalibrator(track_amax=False) quant)
    """

    _amax: Tensor | None
    _pre_quant_scale: Tensor | None

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        self.quant_desc = quant_desc or QuantDescriptor()
        self._disabled, self._if_quant, self._if_calib = disabled, if_quant, if_calib
        self.dynamic = True
        self.frozen = False
        for name in BUFFERS:
            self.register_buffer(name, None)
        self.calibrator = make_calibrator(self.quant_desc)
        if self.quant_desc.amax is not None:
            self.amax = torch.tensor(self.quant_desc.amax)

    # What the quantizer is set to do

    def enable(self) -> None:
        """Take part again after :meth:`disable`."""
        self._disabled = False

    def disable(self) -> None:
        """Neither quantize nor collect, whatever else is set."""
        self._disabled = True

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Do not quantize; statistics are still collected if calibration is enabled."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collect statistics in every forward."""
        self._if_calib = True

    def disable_calib(self) -> None:
        """Stop collecting statistics; those at hand stay."""
        self._if_calib = False

    # What it holds

    @property
    def amax(self) -> Tensor | None:
        """Clipping magnitude: float32, ``()`` per tensor, else broadcastable to the input; ``None`` until set."""
        return self._amax

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        if self.frozen:
            raise RuntimeError("The quantizer is frozen, its amax must not change: call `lq.unfreeze_` first.")
        if value is None:
            self._amax = None
            return
        amax = torch.as_tensor(value).detach().to(self.calibrator.device, torch.float32)
        if not bool(((amax >= 0) & amax.isfinite()).all()):
            raise ValueError(f"`amax` must be finite and not negative, found {amax.tolist()}.")
        if self._amax is not None and self._amax.shape != amax.shape:
            raise ValueError(f"`amax` has shape {tuple(amax.shape)}, but {tuple(self._amax.shape)} is set: set None first.")
        if self._amax is None:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with
                self._amax = amax.clone()
        else:  # in place, so that whatever holds the buffer sees the new value
            self._amax.copy_(amax)

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """Factor on the input before quantization, broadcastable to it: SmoothQuant's, where it could not be folded."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Tensor | None) -> None:
        self._pre_quant_scale = None if value is None else value.detach().to(self.calibrator.device, torch.float32)

    @property
    def scale(self) -> Tensor | None:
        """``amax / qmax``: real units per step."""
        return None if self._amax is None else scale_from_amax(self._amax, self.num_bits, self.unsigned)

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """Dimensions with an amax of their own."""
        return self.quant_desc.axis

    @property
    def num_bits(self) -> int:
        """Width of the integer."""
        return self.quant_desc.num_bits

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0."""
        return self.quant_desc.unsigned

    @property
    def fake_quant(self) -> bool:
        """Whether outputs are real values on the grid (else integer codes)."""
        return self.quant_desc.fake_quant

    @property
    def active(self) -> bool:
        """Whether the next forward would quantize."""
        return not self._disabled and self._if_quant and (self.dynamic or self._amax is not None)

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Set amax from the calibrator's statistics; arguments go to its ``compute_amax``.

        Raises:
            RuntimeError: no statistics were collected; with ``strict=False`` amax then stays as it is.
        """
        amax = self.calibrator.compute_amax(*args, **kwargs)
        if amax is not None:
            self.amax = amax
        elif strict:
            raise RuntimeError("The quantizer saw no data, so there is no amax to load: run batches with calibration enabled.")

    # What it does

    def forward(self, inputs: Tensor) -> Tensor:
        """Quantize ``inputs``: any shape, a floating dtype, which the output has too."""
        # the weights behind carry the inverse of this factor, so it applies even to a disabled quantizer
        if self._pre_quant_scale is not None:
            inputs = inputs * self._pre_quant_scale.to(inputs.dtype)
        if self._disabled:
            return inputs
        if self._if_calib:
            self.calibrator.collect(inputs)
        if not self._if_quant:
            return inputs
        amax = self._amax
        if amax is None:
            if not self.dynamic:
                return inputs
            amax = compute_amax(inputs, self.axis)
        desc = self.quant_desc
        if desc.fake_quant:
            return fake_tensor_quant(inputs, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
        return tensor_quant(inputs, amax, desc.num_bits, desc.unsigned, desc.narrow_range)[0]

    # Housekeeping of torch

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TensorQuantizer":
        def keep_dtype(value: Tensor) -> Tensor:
            # scales and statistics stay as they are under .half() and .to(torch.bfloat16): there fn only chooses the device
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in BUFFERS:
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(value, dtype=torch.float32, device=self.calibrator.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"TensorQuantizer({self.extra_repr()})"

    def extra_repr(self) -> str:
        if self._disabled:
            return "disabled"
        axis = "per-tensor" if self.axis is None else f"axis={_in_brackets(self.axis)}"
        parts = [f"{self.num_bits}bit", "fake" if self.fake_quant else "int", axis, f"amax={_short(self._amax)}"]
        if self.unsigned:
            parts.insert(1, "unsigned")
        if self._pre_quant_scale is not None:
            parts.append("pre_quant_scale")
        parts.append(f"calibrator={type(self.calibrator).__name__}({self.calibrator.extra_repr()})")
        parts += ["quant"] * self._if_quant + ["calib"] * self._if_calib + ["frozen"] * self.frozen
        return " ".join(parts)


def _in_brackets(axis: int | tuple[int, ...]) -> str:
    return f"({axis})" if isinstance(axis, int) else str(axis)


def _short(amax: Tensor | None) -> str:
    if amax is None:
        return "None"
    if amax.numel() == 1:
        return f"{amax.item():.4f}"
    return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"
