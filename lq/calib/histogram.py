"""Amax chosen from a histogram of magnitudes."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lq.calib.calibrator import Calibrator
from lq.functional import histogram
from lq.functional.amax import Axis
from lq.functional.choose import AUTO, check_choice, least_error
from lq.functional.grid import Bits
from lq.functional.threshold import Search, threshold


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
        if not isinstance(num_bins, int) or num_bins < 2:
            raise ValueError(f"`num_bins` is {num_bins!r}: it must be an integer, at least 2.")
        if grow_method is not None:
            warnings.warn(f"`grow_method={grow_method!r}` is deprecated and ignored.", DeprecationWarning, stacklevel=2)
        self.skip_zeros, self.torch_hist = skip_zeros, torch_hist
        counts, exponent = histogram.empty_histogram(1, histogram.bins_for(num_bins))
        self.add_state("exponent", exponent, dist_reduce_fx="max")
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of ``x``."""
        rows, peak = self._rows(x)
        skip = histogram.zeros(rows) if self.skip_zeros else None
        self.counts, self.exponent = histogram.update(self.counts, self.exponent, rows, peak, skip)

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
        self,
        method: str = "entropy",
        *,
        stride: int = 1,
        start_bin: int = 128,
        percentile: float = 99.99,
        p: float = 2.0,
        z_threshold: float = math.inf,
        min_threshold: float = 0.0,
        power_of_two: bool = False,
        scale_amax: float = 1.0,
    ) -> Tensor | None:
        """Amax by ``method``: a key of :data:`lq.functional.threshold.METHODS`, or ``auto``.

        Args:
            method: ``max``, ``percentile``, ``mse``, ``mae``, ``lp``, ``kl``, ``entropy``; or ``auto``, the one of them with the
                least squared error on :meth:`split` data. :attr:`method` then says which.
            stride: bins between candidates, where the method searches.
            start_bin: first candidate, likewise.
            percentile: percentage of values to keep (``percentile``).
            p: exponent (``lp``).
            z_threshold: leave out bins that lie more than this many standard deviations from the mean.
            min_threshold: the least result.
            power_of_two: choose among powers of two.
            scale_amax: what the quantizer multiplies amax with: errors are those of the grid that this makes.

        Raises:
            ValueError: an unknown method, one that does not go with ``num_bits``, or an option out of range.
        """
        options = (percentile, start_bin, stride, p, z_threshold, min_threshold, power_of_two, scale_amax)
        search = Search(self.num_bits, self.unsigned, *options)
        check_choice(method, self.num_bits)
        if not self.collected:
            return None
        if method == AUTO:
            layer = torch.zeros(len(self.counts), dtype=torch.int64, device=self.device)
            (method,) = least_error(*self.split(), self.width, self.peak, layer, search)
        self.method = method
        return self._shaped(threshold(self.counts, self.width, self.peak, method, search))

    def split(self) -> tuple[Tensor, Tensor]:
        """Counts that ``auto`` computes amax from, and those on which it measures the error: here both are all of them."""
        return self.counts, self.counts

    def extra_repr(self) -> str:
        return f"num_bins={self.counts.shape[1] // 2}"
