"""One synchronisation of all statistics of a model over ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities import dim_zero_max, dim_zero_sum

from lq.calib.calibrator import Calibrator


def _states(calibrators: Sequence[Calibrator], reduction: Any) -> Iterator[tuple[Calibrator, str]]:
    for calibrator in calibrators:
        for name, declared in calibrator._reductions.items():
            if declared is reduction:
                yield calibrator, name


def _all_reduce(states: list[tuple[Calibrator, str]], dtype: torch.dtype, op: Any) -> None:
    """Reduce many states in one flat tensor."""
    values: list[Tensor] = [getattr(calibrator, name) for calibrator, name in states]
    flat = torch.cat([v.reshape(-1).to(dtype) for v in values])
    dist.all_reduce(flat, op)
    parts = torch.split(flat, [v.numel() for v in values])
    for (calibrator, name), value, part in zip(states, values, parts, strict=True):
        setattr(calibrator, name, part.reshape(value.shape).to(value.dtype))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks."""
    values = [value]
    if _is_distributed():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """If the block raises on this rank, tell the others, who wait for its statistics: they raise too, and none waits for ever."""
    try:
        yield
    except Exception as failure:
        with suppress(ValueError):
            sync_calibrators([], f"{type(failure).__name__}: {failure}")
        raise


def sync_calibrators(calibrators: Sequence[Calibrator], error: str | None = None) -> None:
    """Merge the statistics of all ranks into every rank: exactly, and in three collectives whatever the number of calibrators.

    Ranks may have seen different numbers of batches, or none. Does nothing outside ``torch.distributed``.

    Args:
        calibrators: the same ones, in the same order, on every rank.
        error: why this rank cannot go on; then every rank raises, and none waits for ever.

    Raises:
        ValueError: a rank reported an error (the message is that of the first one), or ranks saw different shapes.
    """
    distributed = _is_distributed()
    reports = gather((error, [c.shape for c in calibrators]))
    for rank, (failure, _) in enumerate(reports):
        if failure is not None:
            raise ValueError(f"Calibration failed on rank {rank}: {failure}" if distributed else failure)
    if not distributed or not calibrators:
        return
    for i, calibrator in enumerate(calibrators):
        seen = {shapes[i] for _, shapes in reports} - {None}
        if len(seen) > 1:
            raise ValueError(f"amax has different shapes on the ranks: {sorted(seen)}. Give every rank data of one shape.")
        if seen:
            calibrator.adopt(seen.pop())
    before = [c.metric_state for c in calibrators]
    _all_reduce(list(_states(calibrators, dim_zero_max)), torch.float64, dist.ReduceOp.MAX)
    for calibrator, states in zip(calibrators, before, strict=True):
        calibrator.align(states)
    if sums := list(_states(calibrators, dim_zero_sum)):
        _all_reduce(sums, torch.int64, dist.ReduceOp.SUM)
