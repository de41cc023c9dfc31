"""SmoothQuant: move what is hard to quantize from activations into weights, with the float output unchanged."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lq.alpha import BATCHES, GRID, Alpha, alphas_by_name, check_alpha, output_errors, sample
from lq.calib import MaxCalibrator, gather, sync_calibrators
from lq.channels import NONE, follow
from lq.functional.smooth import smooth_factors
from lq.graph import Flow, tracing
from lq.nn.evaluating import evaluating
from lq.nn.quant_module import (
    QuantInputMixin,
    QuantModule,
    input_channel_view,
    scale_input_channels_,
    to_quantized_,
)
from lq.producers import LAYERS, Producer, channel_dim, divide_, is_layer, producer_of
from lq.surgery import has_quantized_layers, unquantized

Excluded = Sequence[type[nn.Module] | nn.Module | str]


@dataclass(frozen=True)
class RescaledGroup:
    """What was done to layers that share factors.

    Attributes:
        producer: the norm or layer that took in the inverse; empty where a multiply was inserted.
        consumers: the layers.
        channels: how many factors there are.
        action: ``folded`` or ``inserted``.
        alpha: migration strength.
        input_amax: largest magnitude of the layers' inputs, before and after.
        weight_amax: of their weights.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int
    action: str
    alpha: float
    input_amax: tuple[float, float]
    weight_amax: tuple[float, float]


@dataclass
class _Group:
    """Layers that share factors, and what takes in the inverse of them.

    Attributes:
        layers: with, for each input channel, the number of its factor, or -1 for none; int64 ``(channels,)``.
        factors: how many there are.
        producer: its name, or nothing.
        parameters: of the producer, each with the dimension of its channels.
    """

    layers: list[tuple[nn.Module, Tensor]]
    factors: int
    producer: str = ""
    parameters: tuple[tuple[nn.Parameter, int], ...] = ()


class RescalingCalibrator:
    """Collects the range of every input channel of linear and conv layers, then rescales (SmoothQuant, arXiv:2211.10438).

    Factors go into the affine of a norm, or the rows of a layer, whose channels feed only such layers, directly or through
    operations that let a positive factor on a channel pass, as found in the first run: ReLU, pooling, reshapes, concatenation,
    the other operand of a gate, the values of attention. Elsewhere the layer multiplies its input: the quantizer's
    ``pre_quant_scale``. Layers are left as they are whose weight something else takes too, or is computed; and, in a model with
    quantized layers, those whose input stays in float, or has an amax that must not change.

    Args:
        model: float or quantized; after rescaling, quantizers of rescaled layers have no amax and must be calibrated.
        args: example inputs; if given (or ``kwargs``), the model is run with them once, at once.
        kwargs: example keyword inputs.
        excluded_modules: modules, types of modules, or wildcards on names, to be left as they are.
        inplace: change ``model`` itself; by default a copy is rescaled and ``model`` stays untouched.

    Attributes:
        model: what is rescaled.
        groups: what was done, once it is.
        left: layers that were left as they are, by name, and why.

    Raises:
        ValueError: an excluded module or pattern that is not in the model.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    >>> x = torch.tensor([[1.0, 2.0, 3.0, 40.0]])
    >>> calibrator = RescalingCalibrator(model)
    >>> _ = calibrator(x)
    >>> rescaled = calibrator.rescale(alpha=0.5)
    >>> calibrator.groups[0].action, torch.allclose(model(x), rescaled(x))
    ('folded', True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        excluded_modules: Excluded | None = None,
        inplace: bool = False,
    ) -> None:
        self._excluded = _excluded_names(model, excluded_modules or ())
        quantized = has_quantized_layers(model)
        self.model = model if inplace else copy.deepcopy(model)
        self.groups: list[RescaledGroup] = []
        self.left: dict[str, str] = {}
        self._flow: Flow | None = None
        # for alpha="auto": a few inputs of each layer
        self._samples: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._rescaled = False
        self._names = {m: name or type(m).__name__ for name, m in self.model.named_modules()}
        self._calibrators = {
            m: MaxCalibrator(axis=0).to(_weight(m).device)
            for name, m in self.model.named_modules()
            if name not in self._excluded and (_is_quantized_layer(m) if quantized else is_layer(m))
        }
        if args or kwargs:
            self(*args, **(kwargs or {}))

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose inputs are looked at."""
        return [self._names[module] for module in self._calibrators]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, in evaluation mode and without gradients, and collect; returns its output."""
        with self.collecting():
            return self.model(*args, **kwargs)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from the run of the model in the block: one run, because the first block is where the graph is found."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(unquantized(self.model))
            # hooks run in the order they were made: the tracer's come first, so that it does not take ours for the model's
            flow = stack.enter_context(tracing(self.model)) if self._flow is None else self._flow
            for module in self._calibrators:
                stack.callback(module.register_forward_pre_hook(self._collect, with_kwargs=True).remove)
            yield
        self._flow = flow if flow.calls else None

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if len(samples := self._samples[module]) < BATCHES:
            samples.append(sample(module, x))
        self._calibrators[module].collect(_channel_amax(x.detach(), channel_dim(module, x.dim())))

    def rescale(self, alpha: Alpha = 0.5) -> nn.Module:
        """Rescale with the statistics collected so far, over all ranks; :attr:`groups` then says what was done.

        Args:
            alpha: migration strength in [0, 1]: 0 leaves activations as they are, 1 gives every channel the same range. A mapping
                from patterns on names of layers to numbers (``{"*": 0.5, "*.fc1": 0.8}``, the last match wins); or ``"auto"``:
                for each group the one of 0, 0.05 ... 1 with the least squared error at the layers' outputs, on a few inputs of
                the batches collected.

        Returns:
            The rescaled model: ``model`` itself if ``inplace``, else the copy.

        Raises:
            ValueError: alpha outside [0, 1], a pattern that matches nothing, no batch was collected, or NaN or Inf in one.
            RuntimeError: called a second time.
        """
        check_alpha(alpha)
        if self._rescaled:
            raise RuntimeError("The model is rescaled already: make another calibrator for a second time.")
        broken = [self._names[m] for m, c in self._calibrators.items() if c.collected and not c.finite]
        error = f"NaN or Inf in the input of {', '.join(broken[:5])}: look for bad samples." if broken else None
        sync_calibrators(list(self._calibrators.values()), error)
        groups = self._agreed_groups()
        for group, value in zip(groups, self._alphas(groups, alpha), strict=True):
            self.groups.append(self._rescale_group(group, value))
        self.left = self._reasons(groups)
        self._samples.clear()
        self._rescaled = True
        return self.model

    def _agreed_groups(self) -> list[_Group]:
        """The groups that the first rank with a batch found: ranks whose batches took other paths do as it does."""
        mine = None if self._flow is None else [self._named(group) for group in self._find_groups(self._flow)]
        agreed = next((groups for groups in gather(mine) if groups is not None), None)
        if not agreed:
            raise ValueError(
                "There is nothing to rescale: run at least one batch that reaches a linear or conv layer through the calibrator."
            )
        modules, parameters = {name: m for m, name in self._names.items()}, dict(self.model.named_parameters())
        return [
            _Group([(modules[name], i) for name, i in layers], n, by, tuple((parameters[name], dim) for name, dim in divided))
            for layers, n, by, divided in agreed
        ]

    def _reasons(self, groups: list[_Group]) -> dict[str, str]:
        """Why layers are left as they are, by name."""
        done = {module for group in groups for module, _ in group.layers}
        reasons = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, LAYERS) or module in done:
                continue
            if name in self._excluded:
                reasons[name] = "excluded"
            elif not is_layer(module):
                reasons[name] = "its weight is computed, or its class unknown"
            elif module not in self._calibrators:
                reasons[name] = "its input stays in float, or has an amax that must not change"
            elif not self._calibrators[module].collected:
                reasons[name] = "no batch reached it"
            else:
                reasons[name] = "something else takes its weight too"
        return reasons

    def _named(self, group: _Group) -> tuple[Any, ...]:
        names = {p: name for name, p in self.model.named_parameters()}
        layers = [(self._names[m], index) for m, index in group.layers]
        return layers, group.factors, group.producer, [(names[p], dim) for p, dim in group.parameters]

    def _find_groups(self, flow: Flow) -> list[_Group]:
        # a weight that something else takes too cannot change for one layer alone
        tied = _shared_parameters(self.model)
        shared = tied | {id(p) for p in flow.parameters.values()}
        left = {m: torch.ones(_channels(m), dtype=torch.bool) for m in self._calibrators if self._may_change(m, shared)}
        groups: list[_Group] = []
        for call in flow.calls:
            producer = producer_of(flow, call, tied)
            if producer is None or (name := self._name_of(producer)) is None:
                continue
            use = follow(flow, call.outputs[0], producer.dim, lambda m, ndim: channel_dim(m, ndim) if m in left else None)
            # a channel whose factor is known already has no other
            layers = [(m, torch.where(left[m], index, NONE)) for m, index in use.layers]
            layers = [(m, index) for m, index in layers if bool((index >= 0).any())]
            if layers:
                groups.append(_Group(layers, len(use.free), name, producer.parameters))
                for m, index in layers:
                    left[m] &= index < 0
        return groups + self._inserted(flow, [m for m, channels in left.items() if bool(channels.all())])

    def _name_of(self, producer: Producer) -> str | None:
        """Of its module, or the one that holds its parameters; ``None`` if that is excluded."""
        if producer.module is not None:
            name = self._names[producer.module]
        else:
            name = next(n for n, p in self.model.named_parameters() if p is producer.parameters[0][0]).rpartition(".")[0]
        return None if name in self._excluded else name

    def _may_change(self, module: nn.Module, shared: set[int]) -> bool:
        return self._calibrators[module].collected and id(_weight(module)) not in shared

    def _inserted(self, flow: Flow, modules: list[nn.Module]) -> list[_Group]:
        """Groups for a multiply: what takes the same value shares factors, so that q, k and v see one activation."""
        by_input: dict[object, list[nn.Module]] = {}
        for module in modules:
            calls = flow.calls_of(module)
            by_input.setdefault(calls[0].inputs[0] if len(calls) == 1 else module, []).append(module)
        return [_Group([(m, torch.arange(n)) for m in ms], n) for ms in by_input.values() for n in [_channels(ms[0])]]

    def _alphas(self, groups: list[_Group], alpha: Alpha) -> list[float]:
        if isinstance(alpha, Mapping):
            return alphas_by_name(alpha, [[self._names[m] for m, _ in group.layers] for group in groups])
        if not isinstance(alpha, str):
            return [float(alpha)] * len(groups)
        with evaluating(self.model), unquantized(self.model):
            mine = [self._output_errors(group) for group in groups]
        # the ranks saw other samples, and must choose the same
        return [GRID[int(torch.stack(errors).sum(dim=0).argmin())] for errors in zip(*gather(mine), strict=True)]

    def _output_errors(self, group: _Group) -> Tensor:
        """Errors of a group's layers for each alpha, with the samples of this rank."""
        ranges = self._ranges(group)
        candidates = [smooth_factors(*ranges, alpha) for alpha in GRID]
        total = torch.zeros(len(GRID), dtype=torch.float64)
        for module, index in group.layers:
            if samples := self._samples[module]:
                total += output_errors(module, samples, [_spread(factors, index) for factors in candidates])
        return total

    def _ranges(self, group: _Group) -> tuple[Tensor, Tensor]:
        """Largest magnitudes of inputs and of weights for each factor."""
        inputs, weights = (_gathered(group, [amax(m) for m, _ in group.layers]) for amax in (self._input_amax, _weight_amax))
        return inputs, weights

    @torch.no_grad()
    def _rescale_group(self, group: _Group, alpha: float) -> RescaledGroup:
        inputs, weights = self._ranges(group)
        factors = smooth_factors(inputs, weights, alpha)
        for module, index in group.layers:
            _forget_amax(module)
            mine = _spread(factors, index)
            scale_input_channels_(module, mine if group.parameters else _insert_(module, mine))
        divide_(group.parameters, factors)
        for module, name in self._names.items():
            if group.parameters and name == group.producer:
                _forget_amax(module)
        return RescaledGroup(
            producer=group.producer,
            consumers=tuple(self._names[m] for m, _ in group.layers),
            channels=factors.numel(),
            action="folded" if group.parameters else "inserted",
            alpha=alpha,
            input_amax=(inputs.max().item(), (inputs / factors).max().item()),
            weight_amax=(weights.max().item(), (weights * factors).max().item()),
        )

    def _input_amax(self, module: nn.Module) -> Tensor:
        amax = self._calibrators[module].compute_amax()
        assert amax is not None
        earlier = module.input_quantizer.pre_quant_scale if isinstance(module, QuantInputMixin) else None
        return amax.flatten() if earlier is None else amax.flatten() * earlier.flatten()


# Modules and names


def _excluded_names(model: nn.Module, excluded: Excluded) -> set[str]:
    """Names of all modules that are excluded, or lie inside one that is."""
    roots: set[str] = set()
    for item in excluded:
        found = {name for name, m in model.named_modules() if _is_named(item, name, m)}
        if not found:
            raise ValueError(f"`excluded_modules` has {item!r}, which is not in the model.")
        roots |= found
    return {name for name, _ in model.named_modules() if any(name == r or name.startswith(f"{r}.") for r in roots)}


def _is_named(item: type[nn.Module] | nn.Module | str, name: str, module: nn.Module) -> bool:
    if isinstance(item, str):
        return fnmatchcase(name, item)
    return isinstance(module, item) if isinstance(item, type) else module is item


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters that two modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


# Channels


def _is_quantized_layer(module: nn.Module) -> bool:
    """Whether a layer's input is quantized, with an amax that may change."""
    if not is_layer(module) or not isinstance(module, QuantInputMixin) or module.input_quantizer._disabled:
        return False
    return not any(q.fixed for q in module.quantizers().values())


def _weight_amax(module: nn.Module) -> Tensor:
    """Largest magnitude of the weights that meet each input channel, ``(channels,)``."""
    return input_channel_view(module).abs().amax(dim=(1, 3)).flatten()


def _channel_amax(x: Tensor, dim: int) -> Tensor:
    """Largest magnitude of each channel, ``(channels, 1)``, without a copy of ``x``."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[dim], 1)
    others = [i for i in range(x.dim()) if i != dim]
    return (torch.maximum(x.amax(others), -x.amin(others)) if others else x.abs()).unsqueeze(1)


def _channels(module: nn.Module) -> int:
    """How many input channels a layer has."""
    groups, _, channels, _ = input_channel_view(module).shape
    return groups * channels


def _spread(factors: Tensor, index: Tensor) -> Tensor:
    """The factor of each input channel, 1 where it has none."""
    index = index.to(factors.device)
    return torch.where(index >= 0, factors[index.clamp_min(0)], 1.0)


def _gathered(group: _Group, values: list[Tensor]) -> Tensor:
    """The largest of the values that share a factor, ``(factors,)``; 0 where there is none."""
    largest = values[0].new_zeros(group.factors)
    for (_, index), value in zip(group.layers, values, strict=True):
        index = index.to(value.device)
        largest.scatter_reduce_(0, index[index >= 0], value[index >= 0], "amax")
    return largest


# Inserting


def _insert_(module: nn.Module, factors: Tensor) -> Tensor:
    """Divide the module's input by ``factors``, in place; returns, in float64, what the weights have to be multiplied by.

    What is inserted is rounded to float32: the weights take exactly its inverse, whatever their own dtype.
    """
    quantized = module if isinstance(module, QuantInputMixin) else to_quantized_(module)
    assert isinstance(quantized, QuantInputMixin)
    quantizer = quantized.input_quantizer
    shape = (-1, *[1] * len(getattr(module, "kernel_size", ())))
    before = torch.ones_like(factors).reshape(shape) if quantizer.pre_quant_scale is None else quantizer.pre_quant_scale
    quantizer.pre_quant_scale = before / factors.reshape(shape)
    return (before.double() / quantizer.pre_quant_scale.double()).flatten()


def _forget_amax(module: nn.Module) -> None:
    """Drop the amax of quantizers whose tensors change."""
    if isinstance(module, QuantModule):
        for quantizer in module.quantizers().values():
            quantizer.amax = None
