"""The bias of quantized layers takes up the mean of the error that rounded weights make."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lq.calib import failing_together, gather, sync_calibrators
from lq.corrections.expected import expected_input
from lq.corrections.ranges import peeked
from lq.corrections.record import Applied, Corrections
from lq.graph import trace
from lq.groups import shared_parameters
from lq.nn.evaluating import evaluating
from lq.nn.example import example_inputs, positional_inputs
from lq.nn.fast_paths import without_fast_paths
from lq.nn.input_channels import add_to_bias_, channel_dim, has_input_channels
from lq.nn.quant_module import QuantMixin, QuantModule
from lq.surgery import unquantized

# Sum of a layer's errors for each output, float64, over how many places, and what says so.
Errors = tuple[Tensor, int, str]


@torch.no_grad()
def weights_bias_correction_(
    model: nn.Module, batches: Iterable[Any] | None = None, *, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> Corrections:
    """Add :math:`E[(W - Q(W)) x]` to the bias of every layer with quantized weights, in place.

    Rounded weights move the mean of what a layer gives, by more the fewer bits they have; a layer without a bias gets one (Nagel
    et al., 2019, arXiv:1906.04721, section 4.2: the expected error is subtracted).

    With ``batches`` the mean is over all their places: at the borders of a convolution's output, where part of the kernel lies
    on padding, it makes less of an error, and counts with that. x is what the float model gives, multiplied and shifted as the
    layer does. So one run serves all layers: what a layer sees once those before it are corrected has this mean, and correcting
    one after the other, each with the inputs that it then has, ends within 0.2 dB of it at 4 bits of weights. What the input
    loses by its own rounding is no error of the weights.

    Without ``batches``, a BatchNorm before the layer says what x is on average, through ReLU or ReLU6 as if it were normal there
    (:mod:`lq.corrections.expected`); the model runs once to find it. Other layers are left.

    The correction is for the weights as they are. A second time it would be added again. Where BatchNorm follows and is trained
    on, it takes the mean of its batch off, and the correction with it: it is for models whose statistics stay.

    Args:
        model: quantized and calibrated.
        batches: the model's positional inputs, each a tuple, list or tensor.
        args: without batches, positional inputs of one forward, a tuple or the only one; by default the model's
            ``example_input_array``. Only the shapes matter.
        kwargs: keyword inputs of it.

    Returns:
        What was done, by the layers; other modules with quantized weights are left.

    Raises:
        ValueError: no weight is quantized, ``batches`` has none, NaN or Inf in a layer, or no inputs without batches.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(2, 1)).requires_grad_(False)
    >>> model[0].weight[:], model[0].bias[:] = torch.tensor([[1.0, 0.4]]), torch.tensor([0.0])
    >>> _ = lq.quantize_(model, [lq.QuantRule("*", weight=lq.QuantDescriptor(2))])
    >>> with lq.calibrating(model):
    ...     _ = model(torch.ones(1, 2))
    >>> weights_bias_correction_(model, [torch.tensor([[3.0, 4.0], [5.0, 6.0]])]).applied[0].detail
    'bias of 1 outputs moved by up to 2, by the mean of 2 places in the batches'
    >>> model[0].bias, model(torch.tensor([[4.0, 5.0]]))  # 0.4 is rounded to 0, and the second input is 5 on average
    (Parameter containing: tensor([2.]), tensor([[6.]]))
    """
    holders = {name or type(m).__name__: m for name, m in model.named_modules() if _rounds_weights(m)}
    if not holders:
        raise ValueError(f"{type(model).__name__} has no quantized weights: quantize and calibrate it first.")
    shared = shared_parameters(model)
    left = {name: reason for name, m in holders.items() if (reason := _why_never(m, shared)) is not None}
    layers = {name: m for name, m in holders.items() if name not in left and isinstance(m, QuantMixin)}
    with ExitStack() as stack:
        for context in (evaluating, unquantized, without_fast_paths):
            stack.enter_context(context(model))
        found = _told_by_norms(model, layers, args, kwargs) if batches is None else _seen(model, layers, batches)
    if broken := [name for name, (total, _, _) in found.items() if not bool(total.isfinite().all())]:
        raise ValueError(f"NaN or Inf in `{broken[0]}` ({len(broken)} of {len(layers)} layers): look for bad samples.")
    unknown = "no BatchNorm tells the mean of its input" if batches is None else "no batch reached it"
    applied = []
    for name, layer in layers.items():
        total, places, source = found.get(name, (torch.zeros(()), 1, ""))
        if not bool(total.any()):
            left[name] = "rounding its weights moves no mean" if name in found else unknown
            continue
        values = total / places
        add_to_bias_(layer, values)
        moved = f"bias of {len(values)} outputs moved by up to {values.abs().max():.3g}"
        applied.append(Applied(name, f"{moved}, by {source}"))
    return Corrections(applied, {name: left[name] for name in holders if name in left})


def _seen(model: nn.Module, layers: Mapping[str, QuantMixin], batches: Iterable[Any]) -> dict[str, Errors]:
    """Errors in the batches of all ranks."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def look(name: str) -> Any:
        def hook(layer: QuantMixin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            total, places = _errors(layer, *args, **kwargs)
            before = sums.get(name, (torch.zeros_like(total), 0))
            sums[name] = before[0] + total, before[1] + places

        return hook

    with failing_together(), ExitStack() as stack:
        _, batches = peeked(batches)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(look(name), with_kwargs=True).remove)
        for batch in batches:
            model(*positional_inputs(model, batch))
    sync_calibrators([])  # a rank that failed says so here
    ranks = gather({name: (total.cpu(), places) for name, (total, places) in sums.items()})
    found: dict[str, Errors] = {}
    for name in layers:
        mine = [rank[name] for rank in ranks if name in rank]
        if mine:
            places = sum(n for _, n in mine)
            total = torch.stack([t for t, _ in mine]).sum(dim=0)
            found[name] = total, places, f"the mean of {places} places in the batches"
    return found


def _told_by_norms(
    model: nn.Module, layers: Mapping[str, QuantMixin], args: Any, kwargs: Mapping[str, Any] | None
) -> dict[str, Errors]:
    """Errors of the inputs that BatchNorms say there are."""
    flow = trace(model, *example_inputs(model, args, kwargs, "Without `batches` the model runs once"))
    names = {module: name for name, module in model.named_modules()}
    expected = {name: found for name, layer in layers.items() if (found := expected_input(flow, layer)) is not None}
    return {
        name: (*_errors(layers[name], mean.to(next(layers[name].parameters()).dtype)), f"BatchNorm `{names[norm]}`")
        for name, (mean, norm) in expected.items()
    }


def _errors(layer: QuantMixin, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
    """What rounding its weights takes off each output of a layer, float64 ``(outputs,)``, summed over how many places."""
    quantizer, run = layer.weight_quantizer, type(layer).forward
    exact = run(layer, *args, **kwargs)
    quantizer.enable_quant()
    try:
        rounded = run(layer, *args, **kwargs)
    finally:
        quantizer.disable_quant()
    lost = (exact.double() - rounded.double()).movedim(channel_dim(layer, exact.dim()), -1)
    return lost.reshape(-1, lost.shape[-1]).sum(dim=0), lost[..., 0].numel()


def _rounds_weights(module: nn.Module) -> bool:
    """Whether a module has weights that are quantized."""
    return isinstance(module, QuantModule) and any(module.quantizers()[role].active for role in module.weights())


def _why_never(module: nn.Module, shared: set[int]) -> str | None:
    """Why a module's bias cannot take up anything."""
    if not isinstance(module, QuantMixin) or not has_input_channels(module) or isinstance(module, nn.MultiheadAttention):
        return f"{type(module).__name__} is no linear layer or convolution"
    if id(module._parameters["bias"]) in shared:
        return "another module holds its bias too"
    return None
