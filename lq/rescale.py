"""SmoothQuant: move what is hard to quantize from activations into weights, with the float output unchanged."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lq.calib import MaxCalibrator, gather, sync_calibrators
from lq.functional.smooth import smooth_factors
from lq.graph import Call, Flow, tracing
from lq.nn.evaluating import evaluating
from lq.nn.quant_module import (
    QUANT_MODULES,
    QuantInputMixin,
    QuantModule,
    input_channel_view,
    scale_input_channels_,
    to_quantized_,
)
from lq.surgery import has_quantized_layers, unquantized

Excluded = Sequence[type[nn.Module] | nn.Module | str]

NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

# What a positive factor on a channel passes through unchanged: f(s x) = s f(x), channel by channel.
PASSING_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
PASSING_FUNCTIONS = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout2d", "contiguous", "clone"),
        *(f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)),
    }
)


@dataclass(frozen=True)
class RescaledGroup:
    """What was done to the layers that share one input: names, and largest magnitudes before and after."""

    producer: str
    consumers: tuple[str, ...]
    channels: int
    action: str
    alpha: float
    input_amax: tuple[float, float]
    weight_amax: tuple[float, float]


@dataclass
class _Group:
    """Linear and conv layers that share one factor, and the norm it folds into, if there is one."""

    layers: list[nn.Module]
    norm: nn.Module | None = None


class RescalingCalibrator:
    """Collects the range of every input channel of linear and conv layers, then rescales (SmoothQuant, arXiv:2211.10438).

    Factors go into the affine of a norm whose output feeds only such layers, directly or through operations that let a positive
    factor per channel pass (ReLU, pooling, dropout), as found in the first run. Elsewhere the layer multiplies its input: the
    quantizer's ``pre_quant_scale``. Layers are left as they are whose weight something else takes too, or is computed; and, in a
    model with quantized layers, those whose input stays in float, or has an amax that must not change.

    Args:
        model: float or quantized; after rescaling, quantizers of rescaled layers have no amax and must be calibrated.
        args: example inputs; if given (or ``kwargs``), the model is run with them once, at once.
        kwargs: example keyword inputs.
        excluded_modules: modules, types of modules, or wildcards on names, to be left as they are.
        inplace: change ``model`` itself; by default a copy is rescaled and ``model`` stays untouched.

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
        excluded = _excluded_names(model, excluded_modules or ())
        quantized = has_quantized_layers(model)
        self.model = model if inplace else copy.deepcopy(model)
        self.groups: list[RescaledGroup] = []
        self._flow: Flow | None = None
        self._rescaled = False
        self._names = {m: name or type(m).__name__ for name, m in self.model.named_modules()}
        self._calibrators = {
            m: MaxCalibrator(axis=0).to(_weight(m).device)
            for name, m in self.model.named_modules()
            if name not in excluded and (_is_quantized_layer(m) if quantized else _is_layer(m))
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
        channels = x.movedim(_channel_dim(module, x.dim()), 0)
        self._calibrators[module].collect(channels.reshape(channels.shape[0], -1))

    def rescale(self, alpha: float = 0.5) -> nn.Module:
        """Rescale with the statistics collected so far, over all ranks; :attr:`groups` then says what was done.

        Args:
            alpha: migration strength in [0, 1]: 0 leaves activations as they are, 1 gives every channel the same range.

        Returns:
            The rescaled model: ``model`` itself if ``inplace``, else the copy.

        Raises:
            ValueError: alpha outside [0, 1], no batch was collected, or NaN or Inf in one.
            RuntimeError: called a second time.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` is {alpha}: it must lie in [0, 1].")
        if self._rescaled:
            raise RuntimeError("The model is rescaled already: make another calibrator for a second time.")
        broken = [self._names[m] for m, c in self._calibrators.items() if c.collected and not c.finite]
        error = f"NaN or Inf in the input of {', '.join(broken[:5])}: look for bad samples." if broken else None
        sync_calibrators(list(self._calibrators.values()), error)
        for group in self._agreed_groups():
            self.groups.append(self._rescale_group(group, alpha))
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
        modules = {name: module for module, name in self._names.items()}
        return [_Group([modules[name] for name in layers], modules.get(norm)) for layers, norm in agreed]

    def _named(self, group: _Group) -> tuple[list[str], str | None]:
        return [self._names[m] for m in group.layers], None if group.norm is None else self._names[group.norm]

    def _find_groups(self, flow: Flow) -> list[_Group]:
        # a weight that something else takes too cannot change for this layer alone
        shared = _shared_parameters(self.model) | flow.parameters
        left = [m for m, c in self._calibrators.items() if c.collected and id(_weight(m)) not in shared]
        groups: list[_Group] = []
        for call in flow.calls:
            if isinstance(call.target, NORMS) and _can_take_factor(call.target, flow, shared):
                layers = _takers(flow, call.outputs[0], _norm_dim(call.target))
                if layers and all(m in left for m in layers):
                    groups.append(_Group(layers, call.target))
                    left = [m for m in left if m not in layers]
        # what takes the same value shares a factor, so that q, k and v see one activation
        by_input: dict[object, list[nn.Module]] = {}
        for module in left:
            calls = flow.calls_of(module)
            by_input.setdefault(calls[0].inputs[0] if len(calls) == 1 else module, []).append(module)
        return groups + [_Group(layers) for layers in by_input.values()]

    @torch.no_grad()
    def _rescale_group(self, group: _Group, alpha: float) -> RescaledGroup:
        inputs = torch.stack([self._input_amax(m) for m in group.layers]).amax(dim=0)
        weights = torch.stack([_weight_amax(m) for m in group.layers]).amax(dim=0)
        factors = smooth_factors(inputs, weights, alpha)
        for module in group.layers:
            _forget_amax(module)
            scale_input_channels_(module, factors if group.norm is not None else _insert_(module, factors))
        if group.norm is not None:
            for parameter in (group.norm.weight, group.norm.bias if hasattr(group.norm, "bias") else None):
                if isinstance(parameter, Tensor):
                    parameter /= factors.to(parameter.dtype)
        return RescaledGroup(
            producer="" if group.norm is None else self._names[group.norm],
            consumers=tuple(self._names[m] for m in group.layers),
            channels=factors.numel(),
            action="inserted" if group.norm is None else "folded",
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


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has input channels that weights meet: a linear layer or a convolution, quantized or not.

    Not with a weight that is computed (pruning, weight_norm): a factor on it would be gone with the next forward.
    """
    known = type(module) in QUANT_MODULES or isinstance(module, QuantInputMixin)
    return known and isinstance(module, LAYERS) and module._parameters.get("weight") is not None


def _is_quantized_layer(module: nn.Module) -> bool:
    """Whether a layer's input is quantized, with an amax that may change."""
    if not _is_layer(module) or not isinstance(module, QuantInputMixin) or module.input_quantizer._disabled:
        return False
    return not any(q.fixed for q in module.quantizers().values())


def _channel_dim(module: nn.Module, ndim: int) -> int:
    """Dimension of the input channels: the last one of linear layers, the one before the kernel's of convolutions."""
    return ndim - 1 - len(getattr(module, "kernel_size", ()))


def _norm_dim(norm: nn.Module) -> int:
    return -1 if isinstance(norm, nn.LayerNorm | nn.RMSNorm) else 1


def _weight_amax(module: nn.Module) -> Tensor:
    """Largest magnitude of the weights that meet each input channel, ``(channels,)``."""
    return input_channel_view(module).abs().amax(dim=(1, 3)).flatten()


# Where a factor can go


def _can_take_factor(norm: nn.Module, flow: Flow, shared: set[int]) -> bool:
    """Whether a norm has a one-dimensional affine of its own and is called once."""
    weight = getattr(norm, "weight", None)
    own = isinstance(weight, Tensor) and weight.dim() == 1 and id(weight) not in shared
    return own and len(flow.calls_of(norm)) == 1


def _takers(flow: Flow, value: int, dim: int) -> list[nn.Module] | None:
    """Layers that take ``value``, also behind passing operations; ``None`` if anything else does."""
    if value in flow.returned:
        return None
    layers: list[nn.Module] = []
    for call in flow.consumers(value):
        if (layer := _taker(flow, call, value, dim)) is not None:
            layers.append(layer)
        elif _passes(call) and (behind := _takers(flow, call.outputs[0], dim)) is not None:
            layers += behind
        else:
            return None
    return layers


def _taker(flow: Flow, call: Call, value: int, dim: int) -> nn.Module | None:
    """The layer called, if it is one that is called once and has ``value``'s dimension ``dim`` as its input channels."""
    module = call.target
    if isinstance(module, str) or not _is_layer(module) or len(flow.calls_of(module)) != 1:
        return None
    ndim = flow.ndim[value]
    return module if _channel_dim(module, ndim) == dim % ndim else None


def _passes(call: Call) -> bool:
    known = call.target in PASSING_FUNCTIONS if isinstance(call.target, str) else type(call.target) in PASSING_MODULES
    return known and len(call.inputs) == 1 and len(call.outputs) == 1


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
