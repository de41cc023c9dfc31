"""What all calibrators share: state with a declared reduction over ranks, and the checks on the data."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lq.functional.amax import Axis, amax_shape, rows_amax, to_rows
from lq.functional.grid import Bits, check_num_bits


class Calibrator(Metric):
    """Collects statistics of a tensor and computes ``amax`` from them.

    A ``torchmetrics.Metric``: ``collect`` is ``update``, ``compute_amax`` is ``compute`` with a method. States are reduced over
    ranks by :func:`lq.calib.sync_calibrators`, all quantizers of a model together, so nothing synchronises on ``compute``.

    Args:
        num_bits: width of the integer the amax is for.
        axis: dimensions with an amax of their own.
        unsigned: the integer has no sign.

    Attributes:
        shape: of amax; ``None`` before any data.
        method: by which amax was computed last; ``None`` before that.
    """

    # states of two batches do not merge one by one (a histogram aligns its range first), so torchmetrics must not try
    full_state_update = True
    shape: tuple[int, ...] | None
    method: str | None
    peak: Tensor
    negative: Tensor

    def __init__(self, num_bits: Bits = 8, axis: Axis = None, unsigned: bool = False) -> None:
        super().__init__(sync_on_compute=False)
        check_num_bits(num_bits, unsigned)
        self.num_bits, self.axis, self.unsigned = num_bits, axis, unsigned
        self.shape = self.method = None
        # float64 holds every magnitude of every dtype; its reduction also brings the peak of other ranks
        self.add_state("peak", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="max")
        # magnitude of the smallest negative value, looked for only where there should be none
        self.add_state("negative", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    @property
    def collected(self) -> bool:
        """Whether any batch has been seen."""
        return self.shape is not None

    @property
    def finite(self) -> bool:
        """Whether everything seen so far was finite. Asks the device."""
        return bool(self.peak.isfinite().all())

    def collect(self, x: Tensor) -> None:
        """Take the statistics of ``x``: any shape, a floating dtype, the same kept dimensions each time.

        Without values it is no data: an expert that no token came to still has none.
        """
        if not x.numel():
            return
        if not torch.compiler.is_compiling():
            self.update(x)
            return
        # torchmetrics counts updates in a Python number: code that reads it would be compiled anew for each batch
        type(self).update(self, x)
        self._update_count, self._computed = 1, None

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` as rows with their largest magnitudes, which also go into ``peak``."""
        x = x.detach()
        shape = self._fitting(amax_shape(x, self.axis))
        rows = to_rows(x, self.axis)
        largest = rows_amax(rows)
        self.adopt(shape)
        self.peak = torch.maximum(self.peak, largest)
        if self.unsigned and rows.numel():
            self.negative = torch.maximum(self.negative, -rows.amin())
        return rows, largest

    def _fitting(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape``, if amax has had no other."""
        if self.shape is not None and shape != self.shape:
            raise RuntimeError(f"amax changed its shape from {self.shape} to {shape}: call `reset()` before other data.")
        return shape

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the shape of amax, with statistics of no data."""
        if self.shape is None:
            self.shape = shape
            self.peak = self.peak.expand(torch.Size(shape).numel()).clone()

    def statistics(self) -> dict[str, Any]:
        """All that was collected, as plain data for :meth:`load_statistics`; nothing if no batch was seen."""
        states = {name: getattr(self, name).clone() for name in self._defaults}
        return {} if self.shape is None else {"shape": self.shape, "batches": self._update_count, **states}

    def load_statistics(self, statistics: dict[str, Any]) -> None:
        """Go on from what :meth:`statistics` gave."""
        self.reset()
        if statistics:
            self.adopt(tuple(statistics["shape"]))
            self._update_count = statistics["batches"]
            for name in self._defaults:
                setattr(self, name, statistics[name].to(self.device))

    def align(self, before: dict[str, Any]) -> None:
        """Hook between the reductions of ``max`` and of ``sum`` states over ranks; ``before`` has the states until then."""

    def compute(self) -> Tensor | None:
        """Amax by the calibrator's default method."""
        return self.compute_amax()

    @abstractmethod
    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """float32 amax, ``()`` or broadcastable to the data; ``None`` if no data was collected."""

    def _shaped(self, amax: Tensor) -> Tensor:
        assert self.shape is not None
        if self.unsigned and bool(self.negative > 0):
            raise ValueError(f"`unsigned` is True, but data went down to {-self.negative.item():g}: use `unsigned=False`.")
        return amax.to(torch.float32).reshape(self.shape)

    def reset(self) -> None:
        """Forget everything, the shape of amax included."""
        super().reset()
        self.shape = self.method = None
