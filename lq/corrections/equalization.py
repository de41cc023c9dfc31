"""Cross-layer equalization: weights of neighbouring layers get one range in each channel, with the float output unchanged."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lq.corrections.places import Places, find_places
from lq.corrections.ranges import peeked
from lq.corrections.record import Applied, Corrections
from lq.functional.smooth import smooth_factors
from lq.graph import Flow
from lq.groups import Group, spread
from lq.nn.batchnorm import affine_of, fold_into_, has_fixed_statistics, replace_
from lq.nn.input_channels import channel_dim, input_channel_view, input_weight, is_layer, scale_input_channels_
from lq.producers import divide_, producer_of


@torch.no_grad()
def activation_channel_equalization_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    fold: bool = True,
    bound: float = 100.0,
    tolerance: float = 1e-3,
    sweeps: int = 100,
) -> Corrections:
    """Divide output channels of layers by factors, and multiply the weights that meet them by the same, in place.

    With :math:`r^{(1)}_i` the largest weight of output channel i, times BatchNorm's factor where one follows, and
    :math:`r^{(2)}_i` the largest one that meets it in the next layer, the factor is
    :math:`s_i = \\sqrt{r^{(1)}_i r^{(2)}_i} / r^{(2)}_i`: both ranges are the same then (Nagel et al., 2019, arXiv:1906.04721,
    eq. 11). All pairs of layers take turns until nothing changes.

    Between two layers may be ReLU, LeakyReLU, PReLU, pooling, padding with zeros, reshapes, and whatever else lets a positive
    factor pass (:mod:`lq.channels`); several layers may take the channels. The bias is divided too, so that a channel with tiny
    weights and a large bias would get huge activations: ``bound`` keeps them in check.

    Args:
        model: float, before quantization.
        batches: the model's positional inputs, each a tuple, list or tensor. The first one shows how the layers are connected;
            weights alone say what the factors are.
        fold: first put every BatchNorm that alone takes what one of the layers gives into the layer. Else factors divide the
            BatchNorm between two layers, which is as exact and leaves it there for training.
        bound: factors stay within [1 / bound, bound].
        tolerance: a pair whose factors are all as near to 1 as this is even.
        sweeps: most turns to take.

    Returns:
        What was done: factors by the layers whose input channels they multiply.

    Raises:
        ValueError: the model is quantized, there are no batches, or an option is out of range.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).requires_grad_(False)
    >>> model[0].weight[:], model[2].weight[:] = torch.tensor([[8.0], [0.5]]), torch.tensor([[2.0, 0.5]])
    >>> activation_channel_equalization_(model, [torch.ones(1, 1)]).applied[0].detail
    '2 channels of `0` divided by 1 to 2: weights 0.5 to 8, then 0.5 to 4, and 0.5 to 2, then 0.5 to 4'
    >>> model[0].weight.flatten(), model[2].weight.flatten()
    (tensor([4.0000, 0.5000]), tensor([4.0000, 0.5000]))
    """
    if not bound > 1 or not tolerance > 0 or sweeps < 1:
        raise ValueError(
            f"`bound` is {bound}, `tolerance` {tolerance}, `sweeps` {sweeps}: they are above 1, above 0, at least 1."
        )
    args, _ = peeked(batches)
    places = find_places(model, args)
    pairs = _pairs(places)
    details: dict[nn.Module, list[str]] = defaultdict(list)
    if fold and any(pair.is_uneven(pair.factors(bound), tolerance) for pair in pairs):
        for layer, norm in _foldable(places, pairs):
            fold_into_(layer, norm)
            replace_(model, norm, nn.Identity())
            details[layer].append(f"BatchNorm `{places.names[norm]}` folded")
        places = find_places(model, args)
        pairs = _pairs(places)
    with _in_double(pairs):
        _sweep_(pairs, bound, tolerance, sweeps)
    for pair in pairs:
        for layer, _ in pair.group.layers if pair.changed else ():
            details[layer].append(pair.detail(places.names))
    applied = [Applied(name, "; ".join(details[m])) for name, m in places.layers().items() if m in details]
    return Corrections(applied, {n: _why_not(places, pairs, m) for n, m in places.layers().items() if m not in details})


@dataclass
class _Pair:
    """Layers that share factors, and the layer before them.

    Attributes:
        group: the layers, and what the factors divide: the layer before, or the BatchNorm behind it.
        before: the layer before.
        total: the factors.
        ranges_before: largest magnitudes of the weights before anything was changed.
    """

    group: Group
    before: nn.Module
    total: Tensor = field(init=False)
    ranges_before: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.ranges_before = self.ranges()
        self.total = torch.ones_like(self.ranges_before[0], dtype=torch.float64)

    @property
    def producer(self) -> nn.Module:
        assert self.group.producer is not None
        return self.group.producer

    @property
    def changed(self) -> bool:
        return bool((self.total != 1).any())

    def parameters(self) -> list[nn.Parameter]:
        return [*(p for p, _ in self.group.parameters), *(input_weight(m) for m, _ in self.group.layers)]

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Largest weight of each channel that is given, and of what meets it."""
        weight, dim = self.group.parameters[0]
        if weight.dim() > 1:
            rows = weight.abs().amax([i for i in range(weight.dim()) if i != dim])
        else:
            rows = input_channel_view(self.before).abs().amax(dim=(2, 3)).flatten() * affine_of(self.producer)[0].abs()
        return rows, self.group.weight_ranges()

    def factors(self, bound: float) -> Tensor:
        """What makes the ranges even, as far as the bound allows."""
        # with the rows' ranges for the inputs' and alpha 0.5 SmoothQuant's factors are those of eq. 11
        factors = smooth_factors(*self.ranges(), alpha=0.5).double()
        return (self.total * factors).clamp(1 / bound, bound) / self.total

    def is_uneven(self, factors: Tensor, tolerance: float) -> bool:
        return bool(((factors - 1).abs() > tolerance).any())

    def apply_(self, factors: Tensor) -> None:
        divide_(self.group.parameters, factors)
        for layer, index in self.group.layers:
            scale_input_channels_(layer, spread(factors, index))
        self.total *= factors

    def detail(self, names: Mapping[nn.Module, str]) -> str:
        used = self.ranges_before[1] > 0
        rows, columns = (
            f"{_span(old[used])}, then {_span(new[used])}" for old, new in zip(self.ranges_before, self.ranges(), strict=True)
        )
        channels = f"{int(used.sum())} channels of `{names[self.before]}`"
        return f"{channels} divided by {_span(self.total[used])}: weights {rows}, and {columns}"


def _pairs(places: Places) -> list[_Pair]:
    found = ((group, _layer_before(places.flow, group)) for group in places.groups)
    return [_Pair(group, before) for group, before in found if before is not None]


def _span(values: Tensor) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _layer_before(flow: Flow, group: Group) -> nn.Module | None:
    """The layer whose output channels are a group's, BatchNorm behind it or not; the module whose code computes it as one."""
    if group.producer is None or group.parameters[0][0].dim() > 1:
        return group.producer
    if not has_fixed_statistics(group.producer):
        return None
    (call,) = flow.calls_of(group.producer)
    before = next((c.target for c in flow.calls if call.inputs[0] in c.outputs), None)
    if not isinstance(before, nn.Module) or not is_layer(before):
        return None
    return before if channel_dim(before, len(flow.shape[call.inputs[0]])) == 1 else None


def _sweep_(pairs: Sequence[_Pair], bound: float, tolerance: float, sweeps: int) -> None:
    """Let pairs take turns: the rows of one layer are the columns of another pair's."""
    for _ in range(sweeps):
        even = True
        for pair in pairs:
            factors = pair.factors(bound)
            if pair.is_uneven(factors, tolerance):
                pair.apply_(factors)
                even = False
        if even:
            return


@contextmanager
def _in_double(pairs: Sequence[_Pair]) -> Iterator[None]:
    """What turns change has float64 inside the block: it is rounded once, however many there are."""
    dtypes = {p: p.dtype for pair in pairs for p in pair.parameters()}
    for p in dtypes:
        p.data = p.data.double()
    try:
        yield
    finally:
        for p, dtype in dtypes.items():
            p.data = p.data.to(dtype)


def _foldable(places: Places, pairs: Sequence[_Pair]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Layers of pairs with the BatchNorm that alone takes what they give."""
    involved = dict.fromkeys(layer for pair in pairs for layer in (pair.before, *(m for m, _ in pair.group.layers)))
    for layer in involved:
        norm = places.flow.only_consumer(layer)
        if norm is None or not has_fixed_statistics(norm):
            continue
        producer = producer_of(places.flow, places.flow.calls_of(layer)[0], places.tied)
        # BatchNorm works on axis 1: a linear layer on (batch, time, features) has its channels elsewhere
        if producer is not None and producer.dim == 1:
            yield layer, norm


def _why_not(places: Places, pairs: Sequence[_Pair], layer: nn.Module) -> str:
    if any(layer is m for pair in pairs for m, _ in pair.group.layers):
        return "its channels are even already"
    producer = next((g.producer for g in places.groups if g.producer and any(layer is m for m, _ in g.layers)), None)
    if producer is not None:
        return f"{type(producer).__name__} `{places.names[producer]}` before it has no layer's weights"
    return places.why_not(layer)
