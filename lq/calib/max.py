"""Amax as the largest magnitude seen."""

from typing import Any

import numpy as np
from torch import Tensor

from lq.calib.calibrator import Calibrator
from lq.functional.amax import Axis
from lq.functional.grid import Bits


class MaxCalibrator(Calibrator):
    """Tracks the largest magnitude.

    Args:
        num_bits: as :class:`Calibrator`.
        axis: as :class:`Calibrator`.
        unsigned: as :class:`Calibrator`.
        track_amax: keep the amax of every batch in :attr:`amaxs`, for plots.

    >>> import torch
    >>> calibrator = MaxCalibrator()
    >>> for x in (torch.tensor([0.5, -2.0]), torch.tensor([1.0])):
    ...     calibrator.collect(x)
    >>> calibrator.compute_amax()
    tensor(2.)
    """

    def __init__(self, num_bits: Bits = 8, axis: Axis = None, unsigned: bool = False, track_amax: bool = False) -> None:
        super().__init__(num_bits, axis, unsigned)
        self.track_amax = track_amax
        self.amaxs: list[np.ndarray[Any, Any]] = []

    def update(self, x: Tensor) -> None:
        """Track the largest magnitude of ``x``."""
        _, largest = self._rows(x)
        if self.track_amax:
            self.amaxs.append(self._shaped(largest).cpu().numpy())

    def compute_amax(self) -> Tensor | None:
        """The largest magnitude of all that was collected."""
        if not self.collected:
            return None
        self.method = "max"
        return self._shaped(self.peak)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.amaxs = []

    def extra_repr(self) -> str:
        return f"track_amax={self.track_amax}"
