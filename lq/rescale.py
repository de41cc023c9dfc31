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

from lq.alpha import BATCHES, Alpha, Sample, alphas_by_name, check_alpha, held_out, sample, search_alphas
from lq.calib import MaxCalibrator, gather, sync_calibrators
from lq.functional.smooth import smooth_factors
from lq.graph import Flow, tracing, untraced
from lq.groups import Group, find_groups, from_names, shared_parameters, spread, to_names
from lq.nn.convert import to_quantized_
from lq.nn.elsewhere import register_known
from lq.nn.evaluating import evaluating
from lq.nn.fast_paths import leave_fast_paths_, without_fast_paths
from lq.nn.input_channels import (
    channel_dim,
    factor_of,
    forget_amax_,
    has_input_channels,
    input_weight,
    inputs_of,
    is_layer,
    scale_input_channels_,
    why_no_layer,
    without_factors,
)
from lq.nn.quant_module import QuantInputMixin, QuantModule
from lq.producers import divide_
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
        register_known(model)
        excluded = _excluded_names(model, excluded_modules or ())
        quantized = has_quantized_layers(model)
        self.model = model if inplace else copy.deepcopy(model)
        self.groups: list[RescaledGroup] = []
        self.left: dict[str, str] = {}
        self._flow: Flow | None = None
        self._rescaled = False
        self._names = {m: name or type(m).__name__ for name, m in self.model.named_modules()}
        self._excluded = {m for name, m in self.model.named_modules() if name in excluded}
        self._layers = [m for m in self._names if m not in self._excluded and (_may_change(m) if quantized else is_layer(m))]
        # largest magnitude of each input channel of the layers that a batch reached
        self._input_amax: dict[nn.Module, Tensor] = {}
        # for alpha="auto": that in every other batch, and a few inputs of those between
        self._runs = 0
        self._known_amax: dict[nn.Module, Tensor] = {}
        self._samples: dict[nn.Module, list[Sample]] = defaultdict(list)
        if args or kwargs:
            self(*args, **(kwargs or {}))

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose inputs are looked at."""
        return [self._names[module] for module in self._layers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, in evaluation mode and without gradients, and collect; returns its output."""
        with self.collecting():
            return self.model(*args, **kwargs)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from the run of the model in the block: one run, because the first block is where the graph is found."""
        with ExitStack() as stack:
            for context in (evaluating, unquantized, without_fast_paths):
                stack.enter_context(context(self.model))
            flow = stack.enter_context(tracing(self.model)) if self._flow is None else self._flow
            for module in self._layers:
                stack.callback(module.register_forward_pre_hook(self._collect, with_kwargs=True).remove)
            yield
            self._runs += 1
        self._flow = flow if flow.calls else None

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with untraced():
            factor = factor_of(module)
            for x in inputs_of(module, args, kwargs):
                x = x if factor is None else x * factor  # what meets the weight
                amax = _channel_amax(x.detach(), channel_dim(module, x.dim()))
                held_out = self._runs % 2 == 1
                for ranges in (self._input_amax,) if held_out else (self._input_amax, self._known_amax):
                    ranges[module] = torch.maximum(ranges[module], amax) if module in ranges else amax
                samples = self._samples[module]
                # the first one is for layers that no batch reaches which is held out
                if sum(s.held_out for s in samples) < BATCHES if held_out else not samples:
                    samples.append(Sample(sample(module, x), held_out))

    def rescale(self, alpha: Alpha = 0.5) -> nn.Module:
        """Rescale with the statistics collected so far, over all ranks; :attr:`groups` then says what was done.

        Args:
            alpha: migration strength in [0, 1]: 0 gives the weights of every channel the same range, 1 the activations. A mapping
                from patterns on names of layers to numbers (``{"*": 0.5, "*.fc1": 0.8}``, the last match wins); or ``"auto"``:
                for each group the one of 0, 0.05 ... 1 with the least squared error at the layers' outputs, on a few inputs of
                the batches collected; groups stay as they are where that gains nothing, or too little to pay for a multiply.
                Every other batch is held out of the ranges that alpha is found with, and gives the inputs: with a great alpha no
                channel has room left for values beyond those that were seen.

        Returns:
            The rescaled model: ``model`` itself if ``inplace``, else the copy.

        Raises:
            ValueError: alpha outside [0, 1], a pattern that matches nothing, no batch was collected, or NaN or Inf in one.
            RuntimeError: called a second time.
        """
        check_alpha(alpha)
        if self._rescaled:
            raise RuntimeError("The model is rescaled already: make another calibrator for a second time.")
        self._agree_on_ranges()
        groups = self._agreed_groups()
        chosen = list(zip(groups, self._alphas(groups, alpha), strict=True))
        self.groups = [self._rescale_group(group, value) for group, value in chosen if value is not None]
        self.left = self._reasons(chosen)
        leave_fast_paths_(self.model)
        self._samples.clear()
        self._rescaled = True
        return self.model

    def _agree_on_ranges(self) -> None:
        """Merge the ranges of all ranks; complain on each where data was not finite."""
        calibrators = {m: MaxCalibrator(axis=0).to(input_weight(m).device) for m in self._layers}
        for module, amax in self._input_amax.items():
            known = self._known_amax.get(module, torch.zeros_like(amax))
            calibrators[module].collect(torch.cat([amax, known]).unsqueeze(1))
        broken = [self._names[m] for m, c in calibrators.items() if c.collected and not c.finite]
        error = f"NaN or Inf in the input of {', '.join(broken[:5])}: look for bad samples." if broken else None
        sync_calibrators(list(calibrators.values()), error)
        found = {module: calibrator.compute_amax() for module, calibrator in calibrators.items()}
        both = {module: amax.flatten().chunk(2) for module, amax in found.items() if amax is not None}
        self._input_amax = {module: amax for module, (amax, _) in both.items()}
        # where only batches that are held out reach a layer, nothing else is known of it
        self._known_amax = {module: known if known.any() else amax for module, (amax, known) in both.items()}

    def _agreed_groups(self) -> list[Group]:
        """The groups that the first rank with a batch found: ranks whose batches took other paths do as it does."""
        mine = None
        if self._flow is not None:
            reached = [m for m in self._layers if m in self._input_amax]
            tied = shared_parameters(self.model)
            mine = to_names(find_groups(self._flow, reached, tied, self._excluded), self.model)
        agreed = next((groups for groups in gather(mine) if groups is not None), None)
        if not agreed:
            raise ValueError(
                "There is nothing to rescale: run at least one batch that reaches a linear or conv layer through the calibrator."
            )
        return from_names(agreed, self.model)

    def _reasons(self, chosen: list[tuple[Group, float | None]]) -> dict[str, str]:
        """Why layers are left as they are, by name."""
        grouped = {module for group, _ in chosen for module, _ in group.layers}
        done = {module for group, value in chosen for module, _ in group.layers if value is not None}
        reasons = {}
        for name, module in self.model.named_modules():
            if not has_input_channels(module) or module in done:
                continue
            if module in self._excluded:
                reasons[name] = "excluded"
            elif not is_layer(module):
                reasons[name] = why_no_layer(module)
            elif module not in self._layers:
                reasons[name] = "its input stays in float, or has an amax that must not change"
            elif module not in self._input_amax:
                reasons[name] = "no batch reached it"
            elif module in grouped:
                reasons[name] = "no alpha takes enough of its error off"
            else:
                reasons[name] = "something else takes its weight too"
        return reasons

    def _alphas(self, groups: list[Group], alpha: Alpha) -> list[float | None]:
        """Alpha of each group; ``None`` for one that stays as it is."""
        if isinstance(alpha, Mapping):
            return [*alphas_by_name(alpha, [[self._names[m] for m, _ in group.layers] for group in groups])]
        if not isinstance(alpha, str):
            return [float(alpha)] * len(groups)
        with evaluating(self.model), unquantized(self.model), without_factors(self._layers):
            return search_alphas(groups, self._known_amax, {m: held_out(samples) for m, samples in self._samples.items()})

    @torch.no_grad()
    def _rescale_group(self, group: Group, alpha: float) -> RescaledGroup:
        inputs, weights = group.ranges(self._input_amax)
        factors = smooth_factors(inputs, weights, alpha)
        for module, index in group.layers:
            forget_amax_(module)
            mine = spread(factors, index)
            if group.producer is None:
                _keep_to_itself_(self.model, module)
            scale_input_channels_(module, mine if group.producer else insert_(module, mine))
        divide_(group.parameters, factors)
        if group.producer is not None:
            forget_amax_(group.producer)
        return RescaledGroup(
            producer="" if group.producer is None else self._names[group.producer],
            consumers=tuple(self._names[m] for m, _ in group.layers),
            channels=factors.numel(),
            action="folded" if group.producer else "inserted",
            alpha=alpha,
            input_amax=(inputs.max().item(), (inputs / factors).max().item()),
            weight_amax=(weights.max().item(), (weights * factors).max().item()),
        )


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


def _may_change(module: nn.Module) -> bool:
    """Whether a layer's input is quantized, with an amax that may change."""
    if not is_layer(module) or not isinstance(module, QuantInputMixin) or module.input_quantizer._disabled:
        return False
    return not any(q.fixed for q in module.quantizers().values())


def _channel_amax(x: Tensor, dim: int) -> Tensor:
    """Largest magnitude of each channel, ``(channels,)``, without a copy of ``x``."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[dim])
    others = [i for i in range(x.dim()) if i != dim]
    return torch.maximum(x.amax(others), -x.amin(others)) if others else x.abs()


def _keep_to_itself_(model: nn.Module, module: nn.Module) -> None:
    """Give a module a copy of an input quantizer that others share: a factor makes its input another tensor."""
    if not isinstance(module, QuantInputMixin):
        return
    own = module.input_quantizer
    holders = [q for m in model.modules() if isinstance(m, QuantModule) for q in m.quantizers().values() if q is own]
    if len(holders) > 1:
        module.input_quantizer = copy.deepcopy(own)


def insert_(module: nn.Module, factors: Tensor) -> Tensor:
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
