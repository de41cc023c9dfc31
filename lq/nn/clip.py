"""A clipping range that can be learned."""

import torch
from torch import Tensor, nn

from lq.nn.functional import clip


class Clip(nn.Module):
    """Clips a tensor to a range, of which either side can be learned (PACT, see :func:`lq.nn.functional.clip`).

    Args:
        clip_value_min: lower bound, number or tensor that broadcasts to the input; where learning starts.
        clip_value_max: upper bound, likewise.
        learn_min: make the lower bound a parameter.
        learn_max: make the upper bound a parameter.

    Raises:
        ValueError: a lower bound above the upper one.

    >>> layer = Clip(-1.0, 2.0, learn_max=True)
    >>> layer(torch.tensor([-3.0, 1.0, 5.0])).tolist(), [name for name, _ in layer.named_parameters()]
    ([-1.0, 1.0, 2.0], ['clip_value_max'])
    """

    clip_value_min: Tensor
    clip_value_max: Tensor

    def __init__(
        self,
        clip_value_min: Tensor | float,
        clip_value_max: Tensor | float,
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        low, high = (torch.as_tensor(v, dtype=torch.float32).detach().clone() for v in (clip_value_min, clip_value_max))
        if bool((low > high).any()):
            raise ValueError(f"`clip_value_min` is {low.tolist()}, above `clip_value_max`, {high.tolist()}.")
        for name, value, learn in (("clip_value_min", low, learn_min), ("clip_value_max", high, learn_max)):
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:  # not saved, as in pytorch-quantization: it came with the constructor
                self.register_buffer(name, value, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Clip ``inputs``: any shape, floating."""
        return clip(inputs, self.clip_value_min, self.clip_value_max)
