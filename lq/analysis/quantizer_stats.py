"""How much each quantizer cuts off, and how much noise it adds, measured while batches run through the model."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lq.nn import TensorQuantizer
from lq.surgery import named_quantizers


class QuantizerStats:
    """Sums over everything that a quantizer quantized. They stay on its device; only the properties ask for them.

    Attributes:
        totals: float64 ``(4,)``: saturated values, values, signal energy, noise energy; ``None`` before the first batch. Sums
            over ranks are the statistics of all ranks.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None

    @torch.no_grad()
    def update(self, quantizer: TensorQuantizer, x: Tensor, q: Tensor) -> None:
        """Add the values ``x`` and what they became, ``q``. No host synchronisation."""
        assert quantizer.clipping is not None
        # squares of half precision overflow
        x, q = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, q))
        outside = quantizer.blocks(x.abs()) > quantizer.clipping
        if quantizer.unsigned:
            outside |= quantizer.blocks(x < 0)
        count = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
        energies = (t.square().sum(dtype=torch.float64) for t in (x, x - q))
        batch = torch.stack([outside.sum(dtype=torch.float64), count, *energies])
        self.totals = batch if self.totals is None else self.totals + batch

    def _host(self) -> list[float]:
        totals: list[float] = [0.0] * 4 if self.totals is None else self.totals.tolist()
        return totals

    @property
    def values(self) -> int:
        """How many values were quantized."""
        return int(self._host()[1])

    @property
    def saturated(self) -> float:
        """Share of the values beyond ``amax`` (or below 0, if unsigned), 0 to 1; NaN without values."""
        saturated, values, *_ = self._host()
        return saturated / values if values else math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB; infinite without noise, NaN without values."""
        _, values, signal, noise = self._host()
        return decibels(signal, noise) if values else math.nan


def decibels(signal: float, noise: float) -> float:
    """The ratio of two energies in dB; infinite without noise.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@contextmanager
def measuring(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[dict[str, QuantizerStats]]:
    """Measure the quantizers of ``model`` in every forward inside the block.

    What counts is what a quantizer rounds, after ``pre_quant_scale``. Forwards in which a quantizer passes its input through, or
    has no amax of its own, do not count.

    Args:
        model: a model with quantizers.
        names: short names of quantizers, or shell wildcards on them (``*.input``); ``None`` is all.

    Raises:
        ValueError: a name that matches no quantizer.

    >>> import lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(2, 2)))
    >>> with lq.calibrating(model):
    ...     _ = model(torch.tensor([[1.0, -4.0]]))
    >>> with measuring(model, ["*.input"]) as stats:
    ...     _ = model(torch.tensor([[2.0, -8.0]]))
    >>> stats["0.input"].values, stats["0.input"].saturated
    (2, 0.5)
    """
    quantizers = _select(dict(named_quantizers(model)), names)
    stats = {name: QuantizerStats() for name in quantizers}
    with ExitStack() as hooks:
        for name, quantizer in quantizers.items():
            hooks.callback(quantizer.register_forward_hook(_hook(stats[name])).remove)
        yield stats


def _select(quantizers: dict[str, TensorQuantizer], names: Iterable[str] | None) -> dict[str, TensorQuantizer]:
    if names is None:
        return quantizers
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if not any(fnmatchcase(known, name) for known in quantizers):
            raise ValueError(f"`names` has {name!r}, which matches no quantizer: known are {', '.join(quantizers) or 'none'}.")
    return {known: q for known, q in quantizers.items() if any(fnmatchcase(known, name) for name in names)}


def _hook(stats: QuantizerStats) -> Any:
    def measure(quantizer: TensorQuantizer, args: tuple[Any, ...], output: Tensor) -> None:
        scale = quantizer.scale
        if not quantizer.active or scale is None:
            return
        x: Tensor = args[0].detach()
        if quantizer.pre_quant_scale is not None:
            x = x * quantizer.pre_quant_scale.to(x.dtype)
        # without fake quantization the output is codes
        q = output.detach() if quantizer.fake_quant else (quantizer.blocks(output.detach()) * scale).reshape(x.shape)
        stats.update(quantizer, x, q)

    return measure


@dataclass(frozen=True)
class LayerRow:
    """What there is to say about one quantizer.

    Attributes:
        name: short name, as ``layer1.conv1.input``.
        num_bits: width of the integer.
        amax: clipping magnitude, the largest where each channel has its own.
        peak: largest magnitude that calibration saw; ``None`` if its statistics are gone.
        saturated: share of values beyond amax, 0 to 1.
        sqnr_db: signal to quantization noise ratio.
        rescaled: inputs are multiplied by a ``pre_quant_scale`` first.
        method: by which amax was chosen; ``None`` leaves it out.
    """

    name: str
    num_bits: int | tuple[int, int]
    amax: float
    peak: float | None
    saturated: float
    sqnr_db: float
    rescaled: bool
    method: str | None = None


def table(model: nn.Module, stats: dict[str, QuantizerStats]) -> list[LayerRow]:
    """A row for each quantizer that was measured, in the order of the model."""
    rows = []
    for name, quantizer in named_quantizers(model):
        if name not in stats or not stats[name].values or quantizer.amax is None:
            continue
        calibrator, measured = quantizer.calibrator, stats[name]
        rows.append(
            LayerRow(
                name=name,
                num_bits=quantizer.num_bits,
                amax=quantizer.amax.max().item(),
                peak=calibrator.peak.max().item() if calibrator.collected else None,
                saturated=measured.saturated,
                sqnr_db=measured.sqnr_db,
                rescaled=quantizer.pre_quant_scale is not None,
            )
        )
    return rows
