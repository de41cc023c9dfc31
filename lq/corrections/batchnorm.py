"""BatchNorm statistics of the quantized network, estimated anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.calib import failing_together, sync_calibrators
from lq.corrections.record import Applied, Corrections
from lq.nn.evaluating import evaluating
from lq.nn.example import positional_inputs

M = TypeVar("M", bound=nn.Module)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def reestimating_batchnorm(model: M, norms: Iterable[_BatchNorm] | None = None) -> Iterator[M]:
    """Forwards inside the block give BatchNorms new statistics: the average over all of them, and over all ranks.

    With few bits, weights that oscillate between two codes, and activations that change with them, leave the exponential averages
    of training behind what the network computes at its end (Nagel et al., 2022, arXiv:2203.08114, section 2.3.1; before that Sun
    et al., 2019, "Hybrid 8-bit Floating Point (HFP8) Training"). Inside, all else is in evaluation, without gradients, so that no
    random number is drawn. A BatchNorm that no forward reaches keeps what it has; if the block raises, all do.

    Args:
        model: calibrated.
        norms: those to estimate; by default all of ``model`` that keep statistics.

    Raises:
        ValueError: there is none, no forward reaches one, or a mean or variance is not finite (on any rank).

    >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    >>> with reestimating_batchnorm(model):
    ...     for values in ([1.0, 3.0], [5.0, 9.0]):
    ...         _ = model(torch.tensor(values).unsqueeze(1))
    >>> model[0].running_mean, model[0].running_var  # (2 + 7) / 2, (2 + 8) / 2
    (tensor([4.5000]), tensor([5.]))
    """
    chosen = batchnorms(model) if norms is None else list(norms)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm to estimate: none keeps statistics, or all are held in evaluation."
        )
    before = [(norm, norm.momentum, norm.training, _clones(norm)) for norm in chosen]
    done = False
    try:
        with torch.inference_mode(False), evaluating(model):
            for norm in chosen:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the average over all batches
                norm.training = True
            with failing_together():
                yield model
            sync_calibrators([])  # to hear of a rank that failed
            _average_(chosen)
        done = True
    finally:
        for norm, momentum, training, values in before:
            norm.momentum, norm.training = momentum, training
            if not done or not norm.num_batches_tracked:
                _put_back_(norm, values)


def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Any], norms: Iterable[_BatchNorm] | None = None) -> Corrections:
    """Give BatchNorms the statistics of ``batches``, in place, as :func:`reestimating_batchnorm` says.

    Worth most behind calibration to few bits, before anything is trained: there all that rounding does to means and variances
    is an error, and this takes it up.

    Args:
        model: calibrated.
        batches: positional inputs of the forward, each a tuple, list or tensor; of the size that training has.
        norms: those to estimate; by default all of ``model`` that keep statistics.

    Returns:
        What was done, by the BatchNorms; those that no batch changed are left.

    Raises:
        ValueError: as :func:`reestimating_batchnorm`.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batchnorm_(model, [torch.tensor([[1.0], [3.0]])]).applied[0].detail
    'mean moved by up to 2, variance multiplied by 2 to 2'
    >>> model[0].running_mean
    tensor([2.])
    """
    chosen = set(batchnorms(model) if norms is None else norms)
    named: dict[str, Any] = {name or type(m).__name__: m for name, m in model.named_modules() if m in chosen}
    before = {name: _clones(norm) for name, norm in named.items()}
    with reestimating_batchnorm(model, named.values()):
        for batch in batches:
            model(*positional_inputs(model, batch))
    changed = {n: norm for n, norm in named.items() if not all(map(torch.equal, _clones(norm), before[n]))}
    return Corrections(
        [Applied(name, _moved(norm, *before[name][:2])) for name, norm in changed.items()],
        {name: "no batch changed it" for name in named if name not in changed},
    )


def _moved(norm: Any, mean: torch.Tensor, variance: torch.Tensor) -> str:
    """What became of these statistics; as a BatchNorm has them, which adds ``eps`` to variances."""
    far = (norm.running_mean - mean).abs().max()
    ratio = (norm.running_var + norm.eps) / (variance + norm.eps)
    return f"mean moved by up to {far:.3g}, variance multiplied by {ratio.min():.3g} to {ratio.max():.3g}"


def _clones(norm: _BatchNorm) -> list[torch.Tensor]:
    return [getattr(norm, name).clone() for name in STATISTICS]


def _put_back_(norm: _BatchNorm, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in zip(STATISTICS, values, strict=True):
            getattr(norm, name).copy_(value)


@torch.no_grad()
def _average_(norms: list[Any]) -> None:
    """Average statistics over ranks, in place, each by the batches that it has seen; complain of none, and of infinite ones."""
    counts = torch.stack([norm.num_batches_tracked for norm in norms]).double()
    sizes = [2 * norm.num_features for norm in norms]
    sums = torch.cat(
        [count * torch.cat([norm.running_mean, norm.running_var]).double() for norm, count in zip(norms, counts, strict=True)]
    )
    flat = torch.cat([counts, sums])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    if not bool(flat.isfinite().all()):
        raise ValueError("BatchNorm statistics are not finite: look for bad samples, or for a layer that overflows.")
    counts, sums = flat[: len(norms)], flat[len(norms) :]
    if not counts.any():
        raise ValueError("No batch reached a BatchNorm: give at least one, and a generator only once.")
    for norm, count, total in zip(norms, counts, torch.split(sums, sizes), strict=True):
        mean, variance = (total / count.clamp_min(1)).chunk(2)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.copy_(count)
