"""A histogram some batches of which are also counted apart, to measure on them what the others suggest."""

from typing import Any

import torch
from torch import Tensor

from lq.calib.histogram import HistogramCalibrator
from lq.functional.histogram import grow

# Of so many batches one is held out, the second one first: two batches are enough.
EVERY = 4


class HeldOutCalibrator(HistogramCalibrator):
    """Collects as :class:`HistogramCalibrator` does, and counts every fourth batch once more, apart.

    ``compute_amax("auto")`` measures every method on the batches apart, with amax from the others, and takes the best one on all.

    >>> calibrator = HeldOutCalibrator(num_bits=4)
    >>> for x in torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)):
    ...     calibrator.collect(x)
    >>> calibrator.compute_amax("auto"), calibrator.method
    (tensor(2.5039), 'mse')
    """

    held_out: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("held_out", torch.zeros_like(self.counts), dist_reduce_fx="sum")

    def collect(self, x: Tensor) -> None:
        if x.numel():
            self.update(x)  # counted, compiled too: the count says which batches are held out

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of ``x``."""
        counts, exponent = self.counts, self.exponent
        super().update(x)
        self.held_out = grow(self.held_out, exponent, self.exponent)
        # torchmetrics counts the calls, this one included
        if self._update_count % EVERY == 2:
            self.held_out += self.counts - grow(counts, exponent, self.exponent)

    def adopt(self, shape: tuple[int, ...]) -> None:
        if self.shape is None:
            self.held_out = self.held_out.repeat(torch.Size(shape).numel(), 1)
        super().adopt(shape)

    def align(self, before: dict[str, Any]) -> None:
        super().align(before)
        self.held_out = grow(self.held_out, before["exponent"], self.exponent)

    def split(self) -> tuple[Tensor, Tensor]:
        if not self.held_out.any():
            raise ValueError("`method` 'auto' holds the second of every four batches out, and saw none: collect at least 2.")
        return self.counts - self.held_out, self.held_out
