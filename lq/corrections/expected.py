"""What layers see on average, known from the BatchNorm before them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.channels import MOVING_FUNCTIONS, MOVING_MODULES
from lq.functional.clipped_normal import clipped_normal_mean
from lq.graph import Call, Flow, Value
from lq.nn.batchnorm import has_fixed_statistics

# Nothing in evaluation: what is normal remains so.
SAME: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# The mean of what they give is what they give for the mean.
LINEAR_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *MOVING_MODULES,
)
LINEAR_FUNCTIONS = MOVING_FUNCTIONS | {f"{kind}{n}d" for kind in ("avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)}
# Where clips end.
RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
CLIPS: dict[object, tuple[float, float]] = {nn.ReLU: RELU, "relu": RELU, "relu_": RELU, nn.ReLU6: RELU6, "relu6": RELU6}


def expected_input(flow: Flow, layer: nn.Module) -> tuple[Tensor, nn.Module] | None:
    """The mean of what a layer takes, and the BatchNorm that tells it; ``None`` if none does.

    What a BatchNorm gives has its bias for a mean in each channel, and its weight for a standard deviation, and is taken to be
    normal; a ReLU or ReLU6 clips it (:func:`lq.functional.clipped_normal.clipped_normal_mean`). Average pooling, zero padding
    and reshapes may follow.

    Args:
        flow: a recorded run.
        layer: a leaf of it.

    Returns:
        The mean, float64, in the shape that the input had in the run; the same at all places of a channel, but where padding
        comes in.
    """
    calls = flow.calls_of(layer)
    if len(calls) != 1:
        return None
    way = [*_way_from_norm(flow, calls[0].inputs[0])][::-1]
    norm = way[0].target if way else None
    if not isinstance(norm, nn.Module) or not has_fixed_statistics(norm):
        return None
    mean, std = (_spread(flow, way[0], values) for values in _moments(norm))
    normal = True
    for call in way[1:]:
        clip = _clip(call)
        if clip is not None:
            if not normal:
                return None
            mean = clipped_normal_mean(mean, std, *clip)
        elif not isinstance(call.target, SAME):
            mean = _applied(call, mean)
        normal = normal and isinstance(call.target, SAME)
    return mean, norm


def _way_from_norm(flow: Flow, value: int) -> Iterator[Call]:
    """Calls that a value came through, from the last one to the BatchNorm, or to what lets no mean pass."""
    makers = {output: call for call in flow.calls for output in call.outputs}
    while (call := makers.get(value)) is not None:
        yield call
        if not _passes(call):
            return
        value = call.inputs[0]


def _passes(call: Call) -> bool:
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return False
    known = call.target in LINEAR_FUNCTIONS if isinstance(call.target, str) else isinstance(call.target, SAME + LINEAR_MODULES)
    return known or _clip(call) is not None


def _clip(call: Call) -> tuple[float, float] | None:
    """Where a call clips, if it does."""
    return CLIPS.get(call.target if isinstance(call.target, str) else type(call.target))


def _moments(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel that a BatchNorm gives, ``(channels,)``."""
    assert isinstance(norm.running_mean, Tensor)
    weight, bias, one = norm._parameters["weight"], norm._parameters["bias"], torch.ones_like(norm.running_mean).double()
    return one * 0 if bias is None else bias.double(), one if weight is None else weight.double().abs()


def _spread(flow: Flow, call: Call, values: Tensor) -> Tensor:
    """A value for each channel, along dimension 1 of what a call gave."""
    shape = flow.shape[call.outputs[0]]
    return values.reshape([-1 if i == 1 else 1 for i in range(len(shape))]).expand(shape)


def _applied(call: Call, mean: Tensor) -> Tensor:
    if isinstance(call.target, nn.Module):
        given: Tensor = type(call.target).forward(call.target, mean)
        return given
    assert call.arguments is not None
    args, kwargs = tree_map(lambda leaf: mean if isinstance(leaf, Value) else leaf, call.arguments)
    given = call.function(*args, **kwargs)
    return given
