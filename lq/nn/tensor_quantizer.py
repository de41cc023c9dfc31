"""The module that holds ``amax`` and quantizes a tensor with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lq.calib import AffineCalibrator, Calibrator, HistogramCalibrator, MaxCalibrator
from lq.descriptor import QuantDescriptor
from lq.functional.affine import fake_quant_affine
from lq.functional.amax import amax_shape, compute_amax, min_max
from lq.functional.blocks import split_blocks
from lq.functional.checks import check_broadcast, check_not_negative
from lq.functional.fake_quant import fake_quant, quantize, straight_through
from lq.functional.operators import saves_elsewhere
from lq.nn.describe import describe
from lq.nn.described import Described
from lq.nn.held_range import HeldRange
from lq.nn.learned_step import ENDS
from lq.nn.pre_quant import PreQuant
from lq.nn.reuse import KeptWeight, LastResult, can_be_reused
from lq.nn.spread import Spread, kept_axis
from lq.nn.switches import Switches

BUFFERS = ("_amax", "_low", "_pre_quant_scale", "_pre_quant_shift")
# Fields of a descriptor that decide which statistics are collected.
STATISTICS = ("axis", "block_size", "calib_method", "num_bins", "affine", "normalize")


def make_calibrator(desc: QuantDescriptor) -> Calibrator:
    """The calibrator that a descriptor asks for."""
    if desc.affine:
        assert isinstance(desc.num_bits, int)
        return AffineCalibrator(desc.num_bits, kept_axis(desc), desc.num_bins)
    if desc.calib_method == "histogram":
        return HistogramCalibrator(desc.num_bits, kept_axis(desc), desc.unsigned, desc.num_bins)
    return MaxCalibrator(desc.num_bits, kept_axis(desc), desc.unsigned)


class TensorQuantizer(Switches, Described, PreQuant, Spread, HeldRange, nn.Module):
    """Quantizes a tensor as its descriptor says; collects statistics while calibration is enabled.

    ``amax``, ``pre_quant_scale`` and ``pre_quant_shift`` are buffers that stay float32 on every cast of the module, are ``None``
    until set, and are created on loading a state dict with the shape they have there.

    Args:
        quant_desc: what to do.
        disabled: neither quantize nor collect.
        if_quant: quantize.
        if_clip: clip, to the range that is learned.
        if_calib: collect statistics.

    Attributes:
        calibrator: collects the statistics.
        clip: the range that is learned, with ``learn_amax``, once there is an amax to start from.
        dynamic: while there is no amax, take that of each input (as pytorch-quantization does). Quantizers placed by
            :func:`lq.quantize_` have it off, and pass their input through until they are calibrated.

    >>> quantizer = TensorQuantizer(QuantDescriptor(amax=1.27))
    >>> quantizer(torch.tensor([0.101, 3.0]))
    tensor([0.1000, 1.2700])
    >>> quantizer
    TensorQuantizer(8bit fake per-tensor amax=1.2700 calibrator=MaxCalibrator(track_amax=False) quant)
    """

    # stands for fake quantization while lq.export.enable_onnx_export is at work: given the inputs and their amax
    _on_export: Callable[[Tensor, Tensor], Tensor] | None = None
    # what is used again: set where several layers share the quantizer, and where a weight does not change
    _last: LastResult | None = None
    _kept: KeptWeight | None = None

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(quant_desc, QuantDescriptor | None):
            raise TypeError(f"`quant_desc` is {quant_desc!r}: it must be a QuantDescriptor.")
        self._disabled, self._if_quant, self._if_calib = disabled, if_quant, if_calib
        self.dynamic = True
        self._frozen = False
        self._fits = False
        for name in BUFFERS:
            self.register_buffer(name, None)
        self.register_module("clip", None)
        self._quant_desc = quant_desc or QuantDescriptor()
        self.calibrator = make_calibrator(self.quant_desc)
        if self.quant_desc.amax is not None:
            self.amax = torch.tensor(self.quant_desc.amax)
        self._if_clip = False
        if if_clip:
            self.enable_clip()

    @property
    def quant_desc(self) -> QuantDescriptor:
        """What the quantizer does. Another descriptor keeps amax and, if it collects the same, the statistics."""
        return self._quant_desc

    @quant_desc.setter
    def quant_desc(self, value: QuantDescriptor) -> None:
        if self.learned and value.unsigned != self.unsigned:
            raise RuntimeError("The range is learned, and `unsigned` decides which sides it has: set `amax` to None first.")
        if any(getattr(value, name) != getattr(self._quant_desc, name) for name in STATISTICS):
            self.calibrator = make_calibrator(value).to(self.calibrator.device)
        for name in ("affine", "normalize"):
            if getattr(value, name) != getattr(self._quant_desc, name) and self._has_amax:
                raise RuntimeError(f"`{name}` decides what the range is, and there is one: set `amax` to None first.")
        self._quant_desc, self._fits = value, False
        self.calibrator.num_bits, self.calibrator.unsigned = value.num_bits, value.unsigned

    @property
    def active(self) -> bool:
        """Whether the next forward would quantize."""
        return not self._disabled and self._if_quant and (self.dynamic or self._has_amax)

    @property
    def idle(self) -> bool:
        """Whether the next forward would return its input and look at nothing."""
        works = self.active or self._if_calib or (self._if_clip and self.clip is not None)
        untouched = self._pre_quant_scale is None and self._pre_quant_shift is None
        return untouched and (self._disabled or not works)

    @property
    def fixed(self) -> bool:
        """Whether calibration leaves amax alone: it is frozen, learned, or given by the descriptor."""
        learned = self.learned and not self._waiting
        return self._frozen or learned or self.quant_desc.amax is not None

    @property
    def _calibrator(self) -> Calibrator:
        return self.calibrator  # pytorch-quantization's name

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("calibrator" if name == "_calibrator" else name, value)

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Set amax from the calibrator's statistics; arguments go to its ``compute_amax``.

        Raises:
            RuntimeError: no statistics were collected; with ``strict=False`` amax then stays as it is.
        """
        if isinstance(self.calibrator, AffineCalibrator):
            ends = self.calibrator.compute_range(*args, **kwargs)
            amax = None
            if ends is not None:
                self.range = ends
                return
        else:
            amax = self.calibrator.compute_amax(*args, **self.quant_desc.search_options(kwargs))
        if amax is not None:
            self.amax = amax
        elif strict:
            raise RuntimeError("The quantizer saw no data, so there is no amax to load: run batches with calibration enabled.")

    # What it does

    def forward(self, inputs: Tensor) -> Tensor:
        """Quantize ``inputs``: any shape, a floating dtype, which the output has too.

        Raises:
            ValueError: amax does not fit the shape of ``inputs``, or ``block_size`` does not divide its last dimension.
            TypeError: negative ``inputs`` to an ``unsigned`` quantizer. The first batch after amax was set is looked at; later
                ones are not, since that would make a GPU wait, and have negative values clipped to 0. Nor are those behind a
                ``pre_quant_shift``, which are clipped too.
        """
        inputs = self.arriving(inputs)
        if self._disabled:
            return inputs
        if self.quant_desc.block_size is None:
            return self._process(inputs)
        return self._process(self.blocks(inputs)).flatten(-2)

    def collect(self, inputs: Tensor) -> None:
        """Take the statistics of ``inputs``, calibration enabled or not."""
        self.calibrator.collect(self.normalized(self.blocks(inputs)))

    def blocks(self, inputs: Tensor) -> Tensor:
        """``inputs`` as amax broadcasts to them: with ``block_size``, their view as ``(..., blocks, block_size)``."""
        block_size = self.quant_desc.block_size
        return inputs if block_size is None else split_blocks(inputs, block_size)

    def _process(self, inputs: Tensor) -> Tensor:
        if self._if_calib and (self._last is None or torch.compiler.is_compiling() or self._last.is_new(inputs)):
            # negative values are clipped behind a shift, and not refused
            self.calibrator.collect(self.normalized(inputs if self._pre_quant_shift is None else inputs.clamp_min(0)))
        quantizes = self.active
        if not self._fits and (quantizes or self._if_clip):
            self._fit(inputs)
        if self.clip is not None and (self._if_clip or self._if_quant):
            inputs = self.clip(inputs)
        if not quantizes:
            return inputs
        spread = None
        if self.quant_desc.normalize:
            inputs, spread = self.centered(inputs)
        if self.learns_step and torch.is_grad_enabled() and self._on_export is None:
            return self._process_learned(inputs, spread)
        desc, amax = self.quant_desc, self.amax
        if desc.affine:
            return self._process_affine(inputs)
        if amax is None:
            amax = compute_amax(inputs, kept_axis(desc))
        elif spread is not None:
            amax = amax * spread
        amax = self._scaled(amax)
        if self._on_export is not None:
            return self._on_export(inputs, amax)
        if desc.fake_quant:
            return self._fake_quant(inputs, amax, (desc.num_bits, desc.unsigned, desc.narrow_range))
        assert isinstance(desc.num_bits, int)
        codes = quantize(inputs, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
        return straight_through(inputs, amax, codes, desc.unsigned)

    def _fake_quant(self, inputs: Tensor, amax: Tensor, grid: tuple[Any, ...]) -> Tensor:
        # compiled code looks at nothing that is kept, and so is not compiled anew for it
        if torch.compiler.is_compiling() or (self._kept is None and self._last is None) or not can_be_reused(inputs):
            return fake_quant(inputs, amax, *grid)
        held, key = self._amax, (*grid, self.quant_desc.scale_amax)
        if self._kept is not None and held is not None and isinstance(inputs, nn.Parameter):
            return self._kept.of(inputs, amax, held, self.unsigned, key, lambda: fake_quant(inputs, amax, *grid))
        # what is computed again for the backward pass must save what it saved before
        if self._last is None or held is None or self._if_calib or saves_elsewhere():
            return fake_quant(inputs, amax, *grid)
        result = self._last.get(inputs, held, key)
        if result is None:
            result = fake_quant(inputs, amax, *grid)
            self._last.set(inputs, result, held, key)
        return result

    def _process_affine(self, inputs: Tensor) -> Tensor:
        assert isinstance(self.num_bits, int)
        if self._on_export is not None:
            raise RuntimeError("An affine quantizer has a zero point, and those of TensorRT are 0: `affine=False` exports.")
        low, high = self.range or min_max(inputs, self.axis)
        return fake_quant_affine(inputs, low, high, self.num_bits)

    def _fit(self, inputs: Tensor) -> None:
        """Look at the first inputs for a new amax, and give it the shape that broadcasts to them."""
        if not inputs.is_floating_point():
            raise TypeError(f"`inputs` are {inputs.dtype}: only floating tensors are quantized.")
        looking = not torch.compiler.is_compiling()
        if self.unsigned and looking and self._pre_quant_shift is None:
            check_not_negative(inputs)
        if not self._has_amax:
            return
        shape = amax_shape(inputs, kept_axis(self.quant_desc))
        for amax in self._ranges():
            # a list of numbers from a descriptor has no other dimensions yet
            if amax.shape != shape and amax.numel() == torch.Size(shape).numel():
                amax.data = amax.data.reshape(shape)
            check_broadcast(inputs, amax)
        if looking:
            self._fits = True

    # Housekeeping of torch

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TensorQuantizer":
        def keep_dtype(value: Tensor) -> Tensor:
            # scales and statistics stay as they are under .half() and .to(torch.bfloat16): there fn only chooses the device
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (shift := state_dict.get(f"{prefix}_pre_quant_shift")) is not None:
            self.pre_quant_shift = shift  # unsigned from here on
        ranges = (f"{prefix}_amax", f"{prefix}clip.")
        if self.quant_desc.amax is not None and not any(key.startswith(ranges) for key in state_dict):
            # given, so a float checkpoint need not have it
            for name, value in self.state_dict(prefix=prefix).items():
                state_dict.setdefault(name, value)
        if self.quant_desc.learn_amax is True and f"{prefix}clip.clip_value_max" in state_dict:
            # pytorch-quantization has the fixed amax beside the learned one, and two sides where only one is used
            for name in ("_amax", *["clip.clip_value_min"] * self.unsigned):
                state_dict.pop(prefix + name, None)
        self._load_clip(state_dict, prefix, unexpected_keys=args[3])
        if (f"{prefix}_low" in state_dict) != (self.quant_desc.affine and f"{prefix}_amax" in state_dict):
            kinds = ("symmetric", "affine") if self.quant_desc.affine else ("affine", "symmetric")
            args[4].append(f"`{prefix}_amax` is of a quantizer that is {kinds[0]}, and this one is {kinds[1]}.")
            return
        for name in BUFFERS:
            if (value := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = value = value.float()  # as it is kept, where it is assigned and not copied, too
                # an optimizer may lead what is learned below zero, where it stands for its magnitude
                positive = value.abs() if isinstance(self.quant_desc.learn_amax, str) else value
                if name == "_amax" and not bool(((positive >= 0) & value.isfinite()).all()):
                    # pytorch-quantization saves NaN for layers that saw no data
                    args[4].append(f"`{prefix}_amax` is negative or not finite: calibrate this layer, or delete the key.")
                    return
                if name not in ENDS:
                    setattr(self, name, torch.empty_like(value, device=self.calibrator.device))
        self._load_step(state_dict, prefix)
        self._fits = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow()

    def _follow(self) -> None:
        """Have the calibrator where amax is: assigned from a state dict it may have come to another device."""
        amax = self.amax
        if amax is not None and amax.device != self.calibrator.device:
            # of what was built on `meta` there is nothing to move
            fresh = make_calibrator(self.quant_desc) if self.calibrator.device.type == "meta" else self.calibrator
            self.calibrator = fresh.to(amax.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learns_step:
            self._save_step(destination, prefix)

    def __repr__(self) -> str:
        return f"TensorQuantizer({self.extra_repr()})"

    def extra_repr(self) -> str:
        return describe(self)
