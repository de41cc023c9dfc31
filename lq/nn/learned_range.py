"""The two-sided range of a quantizer whose descriptor says ``learn_amax=True``: where it starts, and how it is saved."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lq.calib import Calibrator
from lq.descriptor import QuantDescriptor
from lq.nn.clip import Clip


class LearnedRange:
    """Bounds that are parameters; ``clip`` is ``None`` until there is an amax to start from."""

    _amax: Tensor | None
    _frozen: bool
    _hold: Callable[[str, Tensor | None], None]
    learns_step: bool
    calibrator: Calibrator
    clip: Clip | None
    quant_desc: QuantDescriptor
    unsigned: bool

    @property
    def learned(self) -> bool:
        """Whether the range is learned."""
        return self.clip is not None or self.learns_step

    def enable_clip(self) -> None:
        """Clip to the learned range also where nothing is quantized: a stage that learns it before quantization starts.

        Raises:
            RuntimeError: the descriptor has no ``learn_amax``, or there is no range yet.
        """
        self._require_learn_amax()
        if self.clip is None:
            raise RuntimeError("There is no range to clip to yet: calibrate first, or give the descriptor an `amax`.")
        self._if_clip = True

    def disable_clip(self) -> None:
        """Clip only where quantization does."""
        self._if_clip = False

    def init_learn_amax(self) -> None:
        """Learn amax from now on, starting at the one that is set. Do this before the optimizer is made.

        With ``learn_amax``, setting amax does it, by hand or by calibration. Without effect if it is learned already.

        Raises:
            RuntimeError: the descriptor has no ``learn_amax``, or there is no amax yet.
        """
        self._require_learn_amax()
        if self.learned:
            return
        if self._amax is None:
            raise RuntimeError("There is no amax to start learning from: calibrate first, or give the descriptor one.")
        if self.quant_desc.learn_amax is not True:
            for name in ("_amax", "_low"):
                self._hold(name, getattr(self, name))
            return
        amax, self._amax = self._amax, None
        self._learn(-amax, amax)

    def _require_learn_amax(self) -> None:
        if not self.quant_desc.learn_amax:
            raise RuntimeError("`learn_amax` is False in the quantizer's descriptor: there is no range to learn or clip to.")

    def _learn(self, low: Tensor, high: Tensor) -> None:
        low = low.clamp_min(0) if self.unsigned else low
        self.clip = Clip(low, high, learn_min=not self.unsigned, learn_max=True)
        self.clip.requires_grad_(not self._frozen)

    def _load_clip(self, state_dict: dict[str, Any], prefix: str, unexpected_keys: list[str]) -> None:
        keys = [key for key in state_dict if key.startswith(f"{prefix}clip.")]
        if not keys and self.clip is not None and f"{prefix}_amax" in state_dict:
            # saved before it was learned: where learning starts
            amax = state_dict.pop(f"{prefix}_amax")
            sides = {"max": amax} if self.unsigned else {"min": -amax, "max": amax}
            state_dict |= {f"{prefix}clip.clip_value_{side}": value for side, value in sides.items()}
        if self.quant_desc.learn_amax is not True:
            unexpected_keys += keys
        elif keys and self.clip is None:
            self._amax = None
            ones = torch.ones_like(state_dict[keys[-1]], dtype=torch.float32, device=self.calibrator.device)
            self._learn(-ones, ones)
