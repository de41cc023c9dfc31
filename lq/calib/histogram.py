"""Amax chosen from a histogram of magnitudes."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lq.calib.calibrator import Calibrator
from lq.functional import histogram
from lq.functional.amax import Axis
from lq.functional.grid import Bits
from lq.functional.threshold import Search, check_method, threshold


class HistogramCalibrator(Calibrator):
    """Collects a histogram of magnitudes once; any method computes amax from it, as often as wanted.

    The histogram is the same to the last bit for any split of the data into batches, in any order, on any number of ranks (see
    :mod:`lq.functional.histogram`).

    Args:
        num_bits: as :class:`Calibrator`.
        axis: as :class:`Calibrator`; with it, each channel has a histogram of its own.
        unsigned: as :class:`Calibrator`.
        num_bins: resolution over the range in use.
        grow_method: deprecated in pytorch-quantization, and without a meaning here.
        skip_zeros: leave exact zeros out.
        torch_hist: pytorch-quantization's choice between torch and NumPy. Counts are the same, and always torch's.

    >>> calibrator = HistogramCalibrator()
    >>> calibrator.collect(torch.arange(1000) / 1000)
    >>> calibrator.compute_amax("percentile", percentile=50)
    tensor(0.4990)
    """

    counts: Tensor
    exponent: Tensor

    def __init__(
        self,
        num_bits: Bits = 8,
        axis: Axis = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        if grow_method is not None:
            warnings.warn(f"`grow_method={grow_method!r}` is deprecated and ignored.", DeprecationWarning, stacklevel=2)
        self.skip_zeros, self.torch_hist = skip_zeros, torch_hist
        counts, exponent = histogram.empty_histogram(1, histogram.bins_for(num_bins))
        self.add_state("exponent", exponent, dist_reduce_fx="max")
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of ``x``."""
        rows, peak = self._rows(x)
        self.counts, self.exponent = histogram.update(self.counts, self.exponent, rows, peak, self.skip_zeros)

    def adopt(self, shape: tuple[int, ...]) -> None:
        if self.shape is None:
            rows = torch.Size(shape).numel()
            self.counts, self.exponent = self.counts.repeat(rows, 1), self.exponent.repeat(rows)
        super().adopt(shape)

    def align(self, before: dict[str, Any]) -> None:
        self.counts = histogram.grow(self.counts, before["exponent"], self.exponent)

    @property
    def width(self) -> Tensor:
        """Width of a bin, float64 ``(rows,)``."""
        return histogram.bin_width(self.exponent, self.counts.shape[1])

    def compute_amax(
        self, method: str = "entropy", *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99
    ) -> Tensor | None:
        """Amax by ``method``: ``max``, ``percentile``, ``mse`` or ``entropy`` (see :mod:`lq.functional.threshold`).

        Args:
            method: how amax is chosen.
            stride: bins between candidates (``mse``, ``entropy``).
            start_bin: first candidate (``mse``, ``entropy``).
            percentile: percentage of values to keep (``percentile``).

        Raises:
            ValueError: an unknown method, or an option out of range.
        """
        check_method(method, self.num_bits)
        search = Search(self.num_bits, self.unsigned, percentile, start_bin, stride)
        if not self.collected:
            return None
        return self._shaped(threshold(self.counts, self.width, self.peak, method, search))

    def extra_repr(self) -> str:
        return f"num_bins={self.counts.shape[1] // 2}"
