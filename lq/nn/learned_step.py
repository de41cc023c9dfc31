"""A range whose ends are parameters: step sizes that are learned (LSQ), and clipping (PACT)."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.calib import Calibrator
from lq.descriptor import QuantDescriptor
from lq.functional.learned import fake_quant_affine_learned, fake_quant_learned, gradient_scale, not_positive
from lq.functional.normalize import following

ENDS = ("_amax", "_low")


class LearnedStep:
    """With ``learn_amax="lsq"`` or ``"pact"`` amax is a parameter under the name of the buffer, and so in state dicts.

    An optimizer, and what synchronises gradients, take parameters before there is data to calibrate on: :meth:`await_amax`.
    """

    # whether the parameters are there, and nothing has said yet where they start
    _waiting = False
    # what is quantized; a weight that comes as a parameter is known for one anyway
    _of_weight = False

    _buffers: dict[str, Tensor | None]
    _parameters: dict[str, nn.Parameter | None]
    _frozen: bool
    calibrator: Calibrator
    quant_desc: QuantDescriptor

    @property
    def learns_step(self) -> bool:
        """Whether amax is a parameter, also before it has a value."""
        return self._parameters.get("_amax") is not None

    def await_amax(self, shape: tuple[int, ...]) -> None:
        """Create the parameters for an amax of ``shape``, float32, which calibration or a checkpoint will give values.

        Until then the quantizer is one without an amax.
        """
        self._waiting = True
        for name in ENDS[: 1 + self.quant_desc.affine]:
            self._hold(name, torch.ones(shape, device=self.calibrator.device))

    def fix_step(self) -> None:
        """Learn no more: what was learned is what a descriptor without ``learn_amax`` has."""
        ends = {name: self._parameters.get(name) for name in ENDS}
        self.quant_desc = self.quant_desc.replace(learn_amax=False)
        for name, value in ends.items():
            if value is not None:
                self._hold(name, _value(name, value.detach()))

    def _held(self, name: str) -> Tensor | None:
        """An end of the range as it is now, without a gradient; ``None`` until there is one."""
        value = self._parameters.get(name)  # a module finds its attributes by a slow way
        if value is None:
            return self._buffers.get(name)
        return None if self._waiting else _value(name, value.detach())

    def _hold(self, name: str, value: Tensor | None) -> None:
        """Make ``value`` the buffer, or the parameter, of that name."""
        delattr(self, name)
        if value is not None and self.quant_desc.learn_amax in ("lsq", "pact"):
            self._parameters[name] = nn.Parameter(value, requires_grad=not self._frozen)
        else:
            self._buffers[name] = value

    def _process_learned(self, inputs: Tensor, spread: Tensor | None = None) -> Tensor:
        desc, amax = self.quant_desc, self._parameters["_amax"]
        assert amax is not None
        assert isinstance(desc.num_bits, int)
        # LSQ, section 2.2: N is the number of weights that share a step, or of the values that do in a sample
        of_weight = self._of_weight or desc.normalize or isinstance(inputs, nn.Parameter)
        samples = 1 if of_weight or not inputs.dim() else len(inputs)
        features = inputs.numel() // max(amax.numel() * samples, 1)
        unsigned = desc.unsigned or desc.affine
        factor = gradient_scale(max(features, 1), desc.num_bits, unsigned) if desc.learn_amax == "lsq" else 1.0
        if desc.affine:
            low = self._parameters["_low"]
            assert low is not None
            return fake_quant_affine_learned(inputs, not_positive(low), amax.abs(), desc.num_bits, factor)
        grid = (desc.num_bits, desc.unsigned, desc.narrow_range)
        size = amax.abs() if spread is None else following(amax.abs(), spread)
        return fake_quant_learned(inputs, size, *grid, factor, rounding=desc.learn_amax == "lsq")

    def _save_step(self, state_dict: dict[str, Any], prefix: str) -> None:
        for name in ENDS if self._waiting else ():
            state_dict.pop(prefix + name, None)

    def _load_step(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Have a place for each end of a state dict; the optimizer's, where there is one."""
        loaded = f"{prefix}_amax" in state_dict
        for name in ENDS:
            present, value = self._parameters.get(name), state_dict.get(prefix + name)
            if value is None and present is not None and self._waiting:
                state_dict[prefix + name] = present.detach()
            elif value is not None and (present is None or present.shape != value.shape):
                self._hold(name, torch.empty_like(value, dtype=torch.float32, device=self.calibrator.device))
        self._waiting = self._waiting and not loaded


def learnable(amax: Tensor) -> Tensor:
    """Where learning starts: an amax of 0 gives no gradient, so it begins at the mean of the others, or at 1.

    Channels that were pruned have it, layers that start at zero, and inputs that calibration saw nothing but zeros of.

    >>> learnable(torch.tensor([[0.0], [2.0], [4.0]])).tolist()
    [[3.0], [2.0], [4.0]]
    """
    positive = amax[amax > 0]
    return amax.where(amax > 0, positive.mean() if positive.numel() else 1.0)


def _value(name: str, parameter: Tensor) -> Tensor:
    """What a parameter stands for, wherever an optimizer led it: amax is not negative, and the lower end not positive."""
    return parameter.abs() if name == "_amax" else parameter.clamp_max(0)
