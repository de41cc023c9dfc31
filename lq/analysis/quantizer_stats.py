"""How much each quantizer cuts off, and how much noise it adds, measured while batches run through the model."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.affine import affine_codes, affine_grid
from lq.functional.fake_quant import quantize, widened
from lq.functional.grid import integer_bounds
from lq.nn import TensorQuantizer
from lq.surgery import named_quantizers

# The widest integer whose codes are told apart: wider ones have too many for a batch to meet.
CODES_BITS = 12


class QuantizerStats:
    """Sums over everything that a quantizer quantized. They stay on its device; only the properties ask for them.

    Args:
        sample: look at no more than this many values of a tensor, spread evenly over it; ``None`` looks at all.
        codes: also note which codes occur.

    Attributes:
        totals: float64 ``(4,)``: saturated values, values, signal energy, noise energy; ``None`` before the first batch. Sums
            over ranks are the statistics of all ranks.
        codes: bool ``(codes of the grid,)``: those that occurred; ``None`` if nobody asked, for floats, and for integers of
            more than 12 bits.
    """

    def __init__(self, sample: int | None = None, codes: bool = False) -> None:
        self.totals: Tensor | None = None
        self.codes: Tensor | None = None
        self._sample, self._with_codes = sample, codes

    @torch.no_grad()
    def update(self, quantizer: TensorQuantizer, x: Tensor, q: Tensor) -> None:
        """Add the values ``x`` and what they became, ``q``. No host synchronisation."""
        amax = quantizer.clipping
        assert amax is not None
        x, q, ends = quantizer.blocks(x), quantizer.blocks(q), quantizer.range
        assert ends is not None
        low, high = ends
        if self._sample is not None:
            (x, q), (low, high, amax) = evenly(self._sample, (x, q), (low, high, amax))
        x, q = widened(x), widened(q)  # squares of half precision overflow
        outside = ((x < low) | (x > high)).count_nonzero().double()
        count = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
        energies = (t.square().sum(dtype=torch.float64) for t in (x, x - q))
        batch = torch.stack([outside, count, *energies])
        self.totals = batch if self.totals is None else self.totals + batch
        if self._with_codes:
            # a learned range is clipped to before rounding
            self._note_codes(quantizer, x if quantizer.clip is None else x.clamp(low, high), low, high, amax)

    def _note_codes(self, quantizer: TensorQuantizer, x: Tensor, low: Tensor, high: Tensor, amax: Tensor) -> None:
        desc = quantizer.quant_desc
        if isinstance(desc.num_bits, tuple) or desc.num_bits > CODES_BITS:
            return
        first, last = integer_bounds(desc.num_bits, desc.unsigned or desc.affine, desc.narrow_range)
        if self.codes is None:
            self.codes = torch.zeros(last - first + 1, dtype=torch.bool, device=x.device)
        # not from what came out: in half precision neighbouring codes may give the same value
        x = x.nan_to_num(0.0)
        if desc.affine:
            codes = affine_codes(x, *affine_grid(low, high, desc.num_bits), desc.num_bits)
        else:
            codes = quantize(x, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
        self.codes.scatter_(0, (codes.flatten() - first).long(), True)

    def _host(self) -> list[float]:
        totals: list[float] = [0.0] * 4 if self.totals is None else self.totals.tolist()
        return totals

    @property
    def values(self) -> int:
        """How many values were quantized."""
        return int(self._host()[1])

    @property
    def saturated(self) -> float:
        """Share of the values beyond ``amax`` (below 0, if unsigned; a learned range), 0 to 1; NaN without values."""
        saturated, values, *_ = self._host()
        return saturated / values if values else math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB; infinite without noise, NaN without values."""
        _, values, signal, noise = self._host()
        return decibels(signal, noise) if values else math.nan


def evenly(limit: int, tensors: Sequence[Tensor], ranges: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """At most ``limit`` values of each tensor, at the same places in all, spread evenly over every dimension.

    The places lie a stride apart that has no divisor in common with any dimension, so that each channel, row and column comes up
    as often as the next. Without a copy of the tensors, however their dimensions lie in memory, and without a synchronisation.

    Args:
        limit: values to keep.
        tensors: of one shape.
        ranges: what broadcasts to them, all of one shape.

    Returns:
        ``tensors`` as ``(values,)``, ``ranges`` as ``()`` or ``(values,)``; both as they are if there are no more than ``limit``.

    >>> (x,), (amax,) = evenly(4, [torch.arange(12.0).reshape(2, 6)], [torch.tensor([[1.0], [2.0]])])
    >>> x.tolist(), amax.tolist()
    ([0.0, 5.0, 10.0], [1.0, 1.0, 2.0])
    """
    first = tensors[0]
    if first.numel() <= limit:
        return list(tensors), list(ranges)
    stride = -(-first.numel() // limit)
    while math.gcd(stride, first.numel()) > 1:
        stride += 1
    order = sorted(range(first.dim()), key=first.stride, reverse=True)  # from slow to fast: then flattening is a view
    sampled = [t.permute(order).reshape(-1)[::stride] for t in tensors]
    if ranges[0].numel() == 1:
        return sampled, [r.reshape(()) for r in ranges]
    # where in a range's memory the value of each place lies: dimensions that it is broadcast over have a step of 0
    places = torch.arange(0, first.numel(), stride, device=first.device)
    index, inner = torch.zeros_like(places), 1
    steps = ranges[0].contiguous().expand(first.shape).stride()
    for d in reversed(order):
        if steps[d]:
            index += places // inner % first.shape[d] * steps[d]
        inner *= first.shape[d]
    return sampled, [r.flatten()[index] for r in ranges]


def decibels(signal: float, noise: float) -> float:
    """The ratio of two energies in dB; infinite without noise.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@contextmanager
def measuring(
    model: nn.Module, names: Iterable[str] | None = None, *, sample: int | None = None, codes: bool = False
) -> Iterator[dict[str, QuantizerStats]]:
    """Measure the quantizers of ``model`` in every forward inside the block.

    What counts is what a quantizer rounds, after ``pre_quant_scale`` and ``pre_quant_shift``. Forwards in which a quantizer
    passes its input through, or has no amax of its own, do not count.

    Args:
        model: a model with quantizers.
        names: short names of quantizers, or shell wildcards on them (``*.input``); ``None`` is all.
        sample: look at no more than this many values of a tensor, spread evenly over it; ``None`` looks at all.
        codes: also note which codes occur.

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
    stats = {name: QuantizerStats(sample, codes) for name in quantizers}
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
        x = quantizer.arriving(args[0].detach())
        # without fake quantization the output is codes
        q = output.detach() if quantizer.fake_quant else (quantizer.blocks(output.detach()) * scale).reshape(x.shape)
        if quantizer.quant_desc.normalize:  # in units of amax
            _, spread = quantizer.centered(quantizer.blocks(x))
            q = (quantizer.blocks(q) / spread).reshape(x.shape) if quantizer.fake_quant else q
            x = quantizer.normalized(quantizer.blocks(x)).reshape(x.shape)
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
        low: the lower end of an affine quantizer's range, the least where each channel has its own; ``amax`` is the upper one.
    """

    name: str
    num_bits: int | tuple[int, int]
    amax: float
    peak: float | None
    saturated: float
    sqnr_db: float
    rescaled: bool
    method: str | None = None
    low: float | None = None


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
                low=lowest(quantizer),
            )
        )
    return rows


def lowest(quantizer: TensorQuantizer) -> float | None:
    """The least value that an affine quantizer has a code for; ``None`` for others."""
    ends = quantizer.range if quantizer.quant_desc.affine else None
    return None if ends is None else ends[0].min().item()
