"""The range of affine quantization, chosen from a signed histogram."""

import math
from typing import Any

import torch
from torch import Tensor

from lq.calib.calibrator import Calibrator
from lq.functional import histogram
from lq.functional.affine_range import affine_range
from lq.functional.amax import Axis, amax_shape, to_rows
from lq.functional.grid import check_num_bits
from lq.functional.threshold import Search, check_method, threshold


class AffineCalibrator(Calibrator):
    """The signed twin of :class:`lq.calib.HistogramCalibrator`: negative values and the others have a histogram each.

    Both have a range of their own, so that a small negative lobe (GELU, SiLU) is resolved as well as a long positive tail. Counts
    are exact over any split of the data and any number of ranks.

    Args:
        num_bits: width of the integer.
        axis: dimensions with a range of their own.
        num_bins: resolution over the range in use, of each sign.
        skip_zeros: leave exact zeros out.

    >>> calibrator = AffineCalibrator()
    >>> calibrator.collect(torch.nn.functional.silu(torch.linspace(-8, 8, 1001)))
    >>> calibrator.compute_range("max")
    (tensor(-0.2785), tensor(7.9973))
    >>> calibrator.compute_amax("max")
    tensor(7.9973)
    """

    counts: Tensor
    exponent: Tensor

    def __init__(self, num_bits: int = 8, axis: Axis = None, num_bins: int = 2048, skip_zeros: bool = False) -> None:
        check_num_bits(num_bits, floats=False)
        super().__init__(num_bits, axis)
        self.skip_zeros = skip_zeros
        # (sign, rows, ...): the negative ones first
        counts, exponent = histogram.empty_histogram(2, histogram.bins_for(num_bins))
        self.add_state("peak", torch.zeros(2, 1, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("exponent", exponent.unsqueeze(1), dist_reduce_fx="max")
        self.add_state("counts", counts.unsqueeze(1), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``."""
        x = x.detach()
        self.adopt(self._fitting(amax_shape(x, self.axis)))
        rows = to_rows(x, self.axis)
        sides = (-rows).clamp_min_(0), rows.clamp_min(0)
        largest = torch.stack([_largest(side) for side in sides])
        self.peak = torch.maximum(self.peak, largest)
        # a side has zeros in place of the other one's values, which are not to be counted; those that are zero go to the right
        not_negative = histogram.zeros(sides[0])
        skip = not_negative, histogram.zeros(sides[1]) if self.skip_zeros else rows.shape[1] - not_negative
        parts = zip(self.counts, self.exponent, sides, largest, skip, strict=True)
        counts, exponents = zip(*(histogram.update(*part) for part in parts), strict=True)
        self.counts, self.exponent = torch.stack(counts), torch.stack(exponents)

    def adopt(self, shape: tuple[int, ...]) -> None:
        if self.shape is None:
            rows = torch.Size(shape).numel()
            self.counts, self.exponent = self.counts.repeat(1, rows, 1), self.exponent.repeat(1, rows)
            self.shape, self.peak = shape, self.peak.repeat(1, rows)

    def align(self, before: dict[str, Any]) -> None:
        self.counts = self._grown(before["exponent"], self.exponent)

    def _grown(self, exponent: Tensor, new_exponent: Tensor) -> Tensor:
        parts = zip(self.counts, exponent, new_exponent, strict=True)
        return torch.stack([histogram.grow(*part) for part in parts])

    def compute_range(
        self,
        method: str = "mse",
        *,
        percentile: float = 99.99,
        p: float = 2.0,
        z_threshold: float = math.inf,
        min_threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest value of the grid by ``method``, float32; ``None`` if no data was collected.

        Args:
            method: ``max``, ``percentile``, ``mse``, ``mae``, ``lp``, ``kl``: see :mod:`lq.functional.affine_range`.
            percentile: percentage of values to keep.
            p: exponent of ``lp``.
            z_threshold: leave out bins that lie more than this many standard deviations from the mean.
            min_threshold: the least width of the range.

        Raises:
            ValueError: a method that has no affine form, or an option out of range.
        """
        search = Search(self.num_bits, percentile=percentile, p=p, z_threshold=z_threshold, min_threshold=min_threshold)
        if not self.collected:
            return None
        low, high = affine_range(self.counts, self.exponent, self.peak, method, search)
        self.method = method
        return self._shaped(low), self._shaped(high)

    def compute_amax(self, method: str = "mse", **options: Any) -> Tensor | None:
        """Amax of symmetric quantization from the same statistics, by a method of :mod:`lq.functional.threshold`."""
        check_method(method, self.num_bits)
        search = Search(self.num_bits, **options)
        if not self.collected:
            return None
        self.method, exponent = method, self.exponent.amax(dim=0)
        counts = self._grown(self.exponent, exponent.expand_as(self.exponent)).sum(dim=0)
        width = histogram.bin_width(exponent, counts.shape[1])
        return self._shaped(threshold(counts, width, self.peak.amax(dim=0), method, search))

    def extra_repr(self) -> str:
        return f"num_bins={self.counts.shape[2] // 2}"


def _largest(rows: Tensor) -> Tensor:
    """Largest of each row of ``(rows, values)``, none of them negative, float64; 0 for an empty row."""
    return rows.amax(dim=1).double() if rows.shape[1] else rows.new_zeros(rows.shape[0], dtype=torch.float64)
