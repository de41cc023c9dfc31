"""The range of values that a quantizer has codes for."""

from typing import Any

import torch
from torch import Tensor

from lq.functional.affine import affine_grid
from lq.functional.checks import check_values
from lq.functional.grid import Bits, scale_from_amax
from lq.nn.clip import Clip
from lq.nn.learned_range import LearnedRange
from lq.nn.learned_step import LearnedStep, learnable


class HeldRange(LearnedRange, LearnedStep):
    """A clipping magnitude, float32; of an affine quantizer the largest value, beside the smallest one."""

    _fits: bool
    num_bits: Bits
    _modules: dict[str, Any]

    @property
    def amax(self) -> Tensor | None:
        """Clipping magnitude: float32, ``()`` per tensor, else broadcastable to the input (or its :meth:`blocks`); the learned
        one if there is; ``None`` until set. With ``normalize`` it, and all that follows from it here, is in units of the spread
        of the weight."""
        amax, clip = self._held("_amax"), self._modules["clip"]
        if amax is None and isinstance(clip, Clip):
            return torch.maximum(-clip.clip_value_min, clip.clip_value_max).detach()
        return amax

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        if self._frozen:
            raise RuntimeError("The quantizer is frozen, its amax must not change: call `lq.unfreeze_` first.")
        if value is None:
            self.clip = None
            if self.learns_step:  # an optimizer may have the parameters
                self._waiting = True
            else:
                self._amax = self._low = None
            return
        if self.quant_desc.affine and self._held("_low") is None:
            raise RuntimeError("The quantizer is affine, its range has two ends: set `range`.")
        self._set(value)

    def _set(self, value: Tensor | float) -> None:
        amax = torch.as_tensor(value).detach().to(self.calibrator.device, torch.float32)
        check_values(amax)
        if self.quant_desc.learn_amax and not self.quant_desc.affine:
            amax = learnable(amax)
        present = self.amax
        if present is not None and present.shape != amax.shape:
            raise ValueError(f"`amax` has shape {tuple(amax.shape)}, but {tuple(present.shape)} is set: set None first.")
        if self.clip is not None:
            with torch.no_grad():
                self.clip.clip_value_max.copy_(amax)
                self.clip.clip_value_min.copy_(-amax if not self.unsigned else 0 * amax)
        else:
            self._fill("_amax", amax)
            if self.quant_desc.learn_amax is True:
                self.init_learn_amax()

    def _fill(self, name: str, value: Tensor) -> None:
        """Give an end of the range a value: in place where there is one, so that whatever holds it sees the new value."""
        held = getattr(self, name)
        if held is not None and held.shape == value.shape:
            with torch.no_grad():
                held.copy_(value)
        else:
            self._fits = False
            with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with
                self._hold(name, value.clone())
        if name == "_amax":
            self._waiting = False

    @property
    def clipping(self) -> Tensor | None:
        """Where values are clipped: ``amax``, times the descriptor's ``scale_amax`` unless it is learned."""
        amax = self.amax
        return None if amax is None else self._scaled(amax)

    @property
    def frozen(self) -> bool:
        """Whether amax must not change any more, nor be learned (see :func:`lq.freeze_`)."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self._frozen = value
        if self.clip is not None:
            self.clip.requires_grad_(not value)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(not value)

    @property
    def scale(self) -> Tensor | None:
        """``clipping / qmax``, or what an affine range is divided into: real units per step; ``None`` while there is no amax."""
        if self.quant_desc.affine and (ends := self.range) is not None:
            assert isinstance(self.num_bits, int)
            return affine_grid(*ends, self.num_bits)[0]
        clipping = self.clipping
        return None if clipping is None else scale_from_amax(clipping, self.num_bits, self.unsigned)

    step_size = scale

    @property
    def zero_point(self) -> Tensor | None:
        """The code of zero: float32 whole numbers, 0 unless the quantizer is affine; ``None`` while there is no amax."""
        ends = self.range
        if ends is None:
            return None
        if not self.quant_desc.affine:
            return torch.zeros_like(ends[0])
        assert isinstance(self.num_bits, int)
        return -affine_grid(*ends, self.num_bits)[1]

    @property
    def range(self) -> tuple[Tensor, Tensor] | None:
        """Where values are cut off below and above, float32, of the shape of amax; ``None`` while there is no amax.

        Setting it is for affine quantizers: their :attr:`amax` is the upper end, which alone says nothing.

        Raises:
            RuntimeError: the quantizer is frozen, or not affine.
            ValueError: an end that is not finite; zero lies outside; another shape than that of the range that is set.
        """
        clipping = self.clipping
        if clipping is None:
            return None
        if self.clip is not None:
            return self.clip.clip_value_min.detach(), self.clip.clip_value_max.detach()
        if self.quant_desc.affine:
            low = self._held("_low")
            assert low is not None
            return low, clipping
        return (torch.zeros_like(clipping) if self.unsigned else -clipping), clipping

    @range.setter
    def range(self, value: tuple[Tensor | float, Tensor | float]) -> None:
        if not self.quant_desc.affine:
            raise RuntimeError("The quantizer is symmetric: set `amax`, or give its descriptor `affine=True`.")
        low, high = (torch.as_tensor(end).detach().to(self.calibrator.device, torch.float32) for end in value)
        if not bool(((low <= 0) & low.isfinite()).all()) or low.shape != high.shape:
            raise ValueError(f"`range` is {low.tolist()} to {high.tolist()}: both have one shape, and zero lies between them.")
        if self._frozen:
            raise RuntimeError("The quantizer is frozen, its range must not change: call `lq.unfreeze_` first.")
        self._set(high)
        self._fill("_low", low)

    @property
    def _has_amax(self) -> bool:
        # asked several times in a forward, so it computes nothing
        if self._modules["clip"] is not None or self._buffers.get("_amax") is not None:
            return True
        return self.learns_step and not self._waiting

    def _scaled(self, amax: Tensor) -> Tensor:
        factor = self.quant_desc.scale_amax
        # a learned range needs no help, and values between the scaled and the learned bound would give neither a gradient
        return amax if factor is None or self.learned else amax * factor

    def _ranges(self) -> list[Tensor]:
        """The tensors that amax consists of: itself, or the bounds that are learned."""
        if self.clip is None:
            return [held for held in (self._amax, self._low) if held is not None]
        return [self.clip.clip_value_min, self.clip.clip_value_max]
