"""What a calibration chose and what it costs, from the statistics alone: neither data nor a forward is needed."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lq.analysis.quantizer_stats import LayerRow, QuantizerStats, decibels, lowest
from lq.analysis.tables import Table, layer_table
from lq.calib import AffineCalibrator, Calibrator, HistogramCalibrator
from lq.functional.affine import fake_quant_affine
from lq.functional.fake_quant import fake_quant
from lq.functional.grid import scale_from_amax
from lq.functional.rounding import energies
from lq.nn import TensorQuantizer
from lq.nn.quant_module import QuantModule
from lq.surgery import named_quantizers


def calibration_table(model: nn.Module) -> Table:
    """The quantizers of a calibrated model: bits, method, amax, largest magnitude seen, saturated share, SQNR.

    Inputs are described by the histograms that calibration collected, weights by themselves. ``print(table.markdown())``, or
    ``rich.print(table)``.

    >>> import lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(2, 2)))
    >>> with lq.calibrating(model, method="percentile", percentile=75):
    ...     _ = model(torch.tensor([[1.0, -4.0], [2.0, 0.5]]))
    >>> table = calibration_table(model)
    >>> table.columns
    ['Quantizer', 'Bits', 'Method', 'amax', 'Peak', 'Saturated (%)', 'SQNR (dB)']
    >>> table.rows[0]
    ['0.input', '8', 'percentile', '2.002', '4.000', '25.000', '7.3']
    """
    return layer_table(calibration_rows(model))


def calibration_rows(model: nn.Module) -> list[LayerRow]:
    """What :func:`calibration_table` shows, as numbers."""
    weights = {m.quantizers()[role]: w for m in model.modules() if isinstance(m, QuantModule) for role, w in m.weights().items()}
    rows = []
    for name, quantizer in named_quantizers(model):
        if quantizer.clipping is not None:
            row = calibrator_row(name, quantizer.calibrator, quantizer.clipping)
            if quantizer in weights:
                stats = _measured(quantizer, weights[quantizer])
                row = replace(row, saturated=stats.saturated, sqnr_db=stats.sqnr_db)
            rows.append(replace(row, rescaled=quantizer.pre_quant_scale is not None, low=lowest(quantizer)))
    return rows


@torch.no_grad()
def _measured(quantizer: TensorQuantizer, weight: Tensor) -> QuantizerStats:
    """What quantization does to a weight, which is all there."""
    assert quantizer.clipping is not None
    weight = quantizer.normalized(quantizer.blocks(weight)).reshape(weight.shape)
    blocks, stats = quantizer.blocks(weight), QuantizerStats()
    desc = quantizer.quant_desc
    if desc.affine:
        assert quantizer.range is not None
        assert isinstance(desc.num_bits, int)
        rounded = fake_quant_affine(blocks, *quantizer.range, desc.num_bits)
    else:
        rounded = fake_quant(blocks, quantizer.clipping, desc.num_bits, desc.unsigned, desc.narrow_range)
    stats.update(quantizer, weight, rounded.reshape(weight.shape))
    return stats


def calibrator_row(name: str, calibrator: Calibrator, amax: Tensor) -> LayerRow:
    """What the statistics of one calibrator say about an ``amax``.

    Without a histogram there is no SQNR. With one, a value counts as saturated from the first bin on that lies beyond amax, and
    the SQNR is that of the bins' centres: where steps are narrower than bins (12 bits or more) it is left out.
    """
    rows = amax.reshape(-1).double()
    saturated, sqnr = math.nan, math.nan
    # an affine quantizer has two peaks
    if calibrator.collected and not isinstance(calibrator, AffineCalibrator) and bool((rows >= calibrator.peak).all()):
        saturated = 0.0
    if isinstance(calibrator, HistogramCalibrator) and calibrator.collected:
        counts, width = calibrator.counts, calibrator.width
        beyond = torch.arange(counts.shape[1], device=counts.device) >= torch.ceil(rows / width).unsqueeze(1)
        # the bin above an edge has the peak where that lies on the edge
        beyond &= (rows < calibrator.peak).unsqueeze(1)
        total = int(counts.sum())
        saturated = int((counts * beyond).sum()) / total if total else math.nan
        if bool((scale_from_amax(rows, calibrator.num_bits, calibrator.unsigned) >= width)[rows > 0].all()):
            energy = energies(counts, width, rows, calibrator.num_bits, calibrator.unsigned)
            sqnr = decibels(*(part.sum().item() for part in energy))
    return LayerRow(
        name=name,
        num_bits=calibrator.num_bits,
        amax=amax.max().item(),
        peak=calibrator.peak.max().item() if calibrator.collected else None,
        saturated=saturated,
        sqnr_db=sqnr,
        rescaled=False,
        method=calibrator.method,
    )
