"""What can take in a factor on each channel that it gives: norms, linear layers and convolutions, as modules or functions."""

from dataclasses import dataclass

from torch import Tensor, nn

from lq.channels import PRODUCTS
from lq.graph import Call, Flow, Value
from lq.nn.input_channels import channel_dim, is_layer, is_transposed
from lq.nn.quant_module import QuantModule

NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# The dimension of their channels, and the place of their weight among positional arguments; the bias comes next.
FUNCTIONS = {"layer_norm": (-1, 2), "rms_norm": (-1, 2), "group_norm": (1, 2), "batch_norm": (1, 3), "linear": (-1, 1)}
NO_BIAS = frozenset({"rms_norm"})


@dataclass(frozen=True)
class Producer:
    """Takes in factors by its parameters.

    Attributes:
        dim: dimension of the channels in what it gives.
        parameters: those that a factor divides, each with the dimension of its channels.
        module: the norm or layer, or the module whose code computes it.
    """

    dim: int
    parameters: tuple[tuple[nn.Parameter, int], ...]
    module: nn.Module


def producer_of(flow: Flow, call: Call, tied: set[int]) -> Producer | None:
    """The producer that ``call`` is the only call of, if it is one and has its parameters for itself.

    Args:
        flow: a recorded run.
        call: one of its calls.
        tied: identities of parameters that several modules hold.
    """
    if isinstance(call.target, nn.Module):
        producer = _norm(call.target) or _layer(flow, call.target)
        alone = len(flow.calls_of(call.target)) == 1
        used = tied | {id(p) for p in flow.parameters.values()}
    else:
        producer = _function(flow, call)
        alone, used = True, tied | {id(p) for v, p in flow.parameters.items() if len(flow.consumers(v)) > 1}
    if producer is None or not alone or any(id(p) in used for p, _ in producer.parameters):
        return None
    if isinstance(producer.module, QuantModule) and any(q.fixed for q in producer.module.quantizers().values()):
        return None
    return producer


def _norm(module: nn.Module) -> Producer | None:
    weight = module._parameters.get("weight")
    if not isinstance(module, NORMS) or weight is None or weight.dim() != 1:
        return None
    bias = module._parameters.get("bias")
    dim = -1 if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    return Producer(dim, tuple((p, 0) for p in (weight, bias) if p is not None), module)


def _layer(flow: Flow, module: nn.Module) -> Producer | None:
    if not is_layer(module):
        return None
    transposed = is_transposed(module)
    if transposed and getattr(module, "groups", 1) != 1:
        return None  # its rows belong to a group each
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    ndim = len(flow.shape[flow.calls_of(module)[0].outputs[0]])
    parameters = ((weight, int(transposed)), *([] if bias is None else [(bias, 0)]))
    return Producer(channel_dim(module, ndim), parameters, module)


def _function(flow: Flow, call: Call) -> Producer | None:
    """A function of a norm or linear layer with parameters, or a product with a vector over the last dimension."""
    if call.arguments is None or call.owner is None:
        return None
    args, kwargs = call.arguments
    if call.target in FUNCTIONS:
        dim, place = FUNCTIONS[str(call.target)]
        weight = kwargs.get("weight", args[place] if len(args) > place else None)
        bias = kwargs.get("bias", args[place + 1] if len(args) > place + 1 and call.target not in NO_BIAS else None)
    elif call.target in PRODUCTS and len(args) == 2:
        dim, bias = -1, None
        weight = next((a for a in args if isinstance(a, Value) and a.number in flow.parameters), None)
    else:
        return None
    given = [v for v in (weight, bias) if isinstance(v, Value)]
    parameters = [flow.parameters.get(v.number) for v in given]
    rows = 2 if call.target == "linear" else 1
    if weight is None or any(p is None or p.dim() != n for p, n in zip(parameters, (rows, 1), strict=False)):
        return None
    return Producer(dim, tuple((p, 0) for p in parameters if p is not None), call.owner)


def divide_(parameters: tuple[tuple[nn.Parameter, int], ...], factors: Tensor) -> None:
    """Divide parameters along their dimensions, in place."""
    for parameter, dim in parameters:
        shape = [-1 if i == dim else 1 for i in range(parameter.dim())]
        parameter.div_(factors.to(parameter.dtype).reshape(shape))
