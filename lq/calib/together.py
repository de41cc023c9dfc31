"""Amax of many calibrators at once: histograms of one kind are one stack, which is much quicker than one after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lq.calib.histogram import HistogramCalibrator
from lq.functional.choose import AUTO, check_choice, least_error
from lq.functional.threshold import Search, threshold


def compute_amaxs(calibrators: Sequence[HistogramCalibrator], method: str, **options: Any) -> list[Tensor]:
    """``compute_amax(method, **options)`` of each of many calibrators that have seen data.

    >>> calibrators = [HistogramCalibrator(), HistogramCalibrator(num_bits=4)]
    >>> for calibrator in calibrators:
    ...     calibrator.collect(torch.arange(1000) / 1000)
    >>> compute_amaxs(calibrators, "mse")
    [tensor(0.9963), tensor(0.9324)]
    """
    methods = [method] * len(calibrators)
    if method == AUTO:
        methods = _each(calibrators, methods, options, _chosen)
    amaxs: list[Tensor] = _each(calibrators, methods, options, _amaxs)
    for calibrator, used in zip(calibrators, methods, strict=True):
        calibrator.method = used
    return amaxs


def _each(calibrators: Sequence[HistogramCalibrator], methods: list[str], options: dict[str, Any], function: Any) -> list[Any]:
    """``function`` of all calibrators of a kind, for each of them, in their order."""
    kinds: dict[Any, list[int]] = {}
    for i, (c, method) in enumerate(zip(calibrators, methods, strict=True)):
        kinds.setdefault((method, c.num_bits, c.unsigned, c.counts.shape[1], c.device), []).append(i)
    found: dict[int, Any] = {}
    for (method, num_bits, unsigned, _, _), members in kinds.items():
        check_choice(method, num_bits)
        alike = [calibrators[i] for i in members]
        found |= zip(members, function(alike, method, Search(num_bits, unsigned, **options)), strict=True)
    return [found[i] for i in range(len(calibrators))]


def _amaxs(alike: list[HistogramCalibrator], method: str, search: Search) -> list[Tensor]:
    counts, width, peak = (torch.cat(parts) for parts in zip(*((c.counts, c.width, c.peak) for c in alike), strict=True))
    rows = torch.split(threshold(counts, width, peak, method, search), [len(c.counts) for c in alike])
    return [calibrator._shaped(part) for calibrator, part in zip(alike, rows, strict=True)]


def _chosen(alike: list[HistogramCalibrator], method: str, search: Search) -> list[str]:
    parts = zip(*((*c.split(), c.width, c.peak) for c in alike), strict=True)
    fit, held_out, width, peak = (torch.cat(part) for part in parts)
    sizes = torch.tensor([len(c.counts) for c in alike], device=alike[0].device)
    layer = torch.repeat_interleave(torch.arange(len(alike), device=sizes.device), sizes)
    return least_error(fit, held_out, width, peak, layer, search)
