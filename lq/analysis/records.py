"""What a run leaves behind for its report: plain data, without a model and without Lightning."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lq.analysis.quantizer_stats import LayerRow
from lq.calib import HistogramCalibrator
from lq.corrections import Corrections
from lq.functional.histogram import bin_width, grow
from lq.rescale import RescaledGroup
from lq.surgery import named_quantizers


@dataclass(frozen=True)
class Stage:
    """Metrics of the model at one point of a run.

    Attributes:
        name: ``float``, ``calibrated``, ``rescaled``, ``qat``, ``onnxruntime``, or any other; ``float`` is what the others are
            compared with, or else the first.
        metrics: values by name; accuracies are shares, 0 to 1.
    """

    name: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Deployed:
    """An exported graph.

    Attributes:
        name: ``float`` (what the others are compared with, or else the first), ``int8``.
        path: the file.
        bytes: its size.
        latency_ms: median time of a run; NaN if it was not measured.
    """

    name: str
    path: Path
    bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Histogram:
    """Magnitudes that a quantizer saw in calibration.

    Attributes:
        counts: int64 ``(bins,)``; bin ``i`` counts magnitudes from ``i * width``.
        width: of a bin.
        amax: clipping magnitude that was chosen.
        peak: largest magnitude.
    """

    counts: Tensor
    width: float
    amax: float
    peak: float

    @property
    def beyond(self) -> float:
        """Share of the values in bins that lie beyond ``amax``, 0 to 1; the bin that has it counts as kept."""
        total = int(self.counts.sum())
        return int(self.counts[self.first_beyond :].sum()) / total if total else 0.0

    @property
    def first_beyond(self) -> int:
        """The first bin that lies beyond ``amax``."""
        return math.floor(self.amax / self.width) + 1


@dataclass(frozen=True)
class Report:
    """All that :mod:`lq.analysis.report` shows; what is empty is left out.

    Attributes:
        title: headline.
        stages: metrics, in the order of the run.
        deployed: exported graphs.
        layers: a row for each quantizer.
        notes: facts about the run, as ``{"method": "percentile", "alpha": "0.5"}``.
        histograms: by quantizer.
        history: metrics over the steps, as :func:`read_history` has them.
        rescaled: what rescaling did.
        left: layers that it left as they are, and why.
        output_sqnr: of layers' outputs in dB, by stage of post-training quantization and by layer.
        corrected: what each correction did, by name.
    """

    title: str
    stages: list[Stage] = field(default_factory=list)
    deployed: list[Deployed] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    rescaled: list[RescaledGroup] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    output_sqnr: dict[str, dict[str, float]] = field(default_factory=dict)
    corrected: dict[str, Corrections] = field(default_factory=dict)


def histograms(model: nn.Module) -> dict[str, Histogram]:
    """Histograms of all quantizers that have one and an amax; those of channels are added up."""
    found = {}
    for name, quantizer in named_quantizers(model):
        calibrator = quantizer.calibrator
        if not isinstance(calibrator, HistogramCalibrator) or not calibrator.collected or quantizer.amax is None:
            continue
        exponent = calibrator.exponent.max()
        counts = grow(calibrator.counts, calibrator.exponent, exponent.expand_as(calibrator.exponent)).sum(dim=0)
        width = bin_width(exponent, len(counts)).item()
        found[name] = Histogram(counts.cpu(), width, quantizer.amax.max().item(), calibrator.peak.max().item())
    return found


def read_history(csv_path: str | Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv`` by Lightning's ``CSVLogger``, without their empty cells and those that are no numbers."""
    with Path(csv_path).open(newline="") as file:
        rows = [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
