"""One quantizer for all that takes one tensor: TensorRT quantizes a tensor once, and wants what is joined to have one scale."""

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from lq.channels import JOINING_FUNCTIONS
from lq.descriptor import QuantDescriptor
from lq.graph import Flow
from lq.nn.quant_module import QuantModule
from lq.nn.reuse import LastResult
from lq.nn.tensor_quantizer import TensorQuantizer

# What hands on a whole tensor, value by value or the largest of some: quantization commutes with it.
COMMUTING_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
)
COMMUTING_FUNCTIONS = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d", "dropout", "contiguous", "clone", "view", "reshape", "flatten", "unflatten"),
        *("squeeze", "unsqueeze", "T", "mT", "t", "transpose", "swapaxes", "permute", "movedim", "pixel_shuffle"),
    }
)

# The value that a quantizer takes, the module it belongs to, and its role there.
Site = tuple[int, QuantModule, str]


def find_shared(flow: Flow, sites: list[Site]) -> list[list[tuple[QuantModule, str]]]:
    """Quantizers that take one tensor under one descriptor.

    A tensor is followed through reshapes and max pooling, and through concatenations, whose operands then share an amax. Only
    quantizers without an amax, or with the same one, are shared.

    Returns:
        The groups of two and more, each as modules and roles.
    """
    tensors = _Sets()
    for call in flow.calls:
        if call.target in COMMUTING_FUNCTIONS or isinstance(call.target, COMMUTING_MODULES):
            tensors.join(call.inputs[0], *call.outputs)
        elif call.target in JOINING_FUNCTIONS:
            tensors.join(*call.inputs, *call.outputs)
    for value, module, role in sites:
        # a layer that runs several times has one quantizer for all it takes
        tensors.join(value, (module, role))
    groups: dict[tuple[object, QuantDescriptor, object], dict[tuple[QuantModule, str], None]] = defaultdict(dict)
    for value, module, role in sites:
        quantizer = module.quantizers()[role]
        if not quantizer._disabled and quantizer.pre_quant_scale is None and quantizer.pre_quant_shift is None:
            amax = None if quantizer.amax is None else tuple(quantizer.amax.flatten().tolist())
            groups[tensors.root(value), quantizer.quant_desc, amax][module, role] = None
    return [list(group) for group in groups.values() if len(group) > 1]


def holders_of(model: nn.Module) -> dict[TensorQuantizer, list[tuple[QuantModule, str]]]:
    """Each quantizer of a layer with all layers that have it, and its role there."""
    holders: dict[TensorQuantizer, list[tuple[QuantModule, str]]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, QuantModule):
            for role, quantizer in module.quantizers().items():
                holders[quantizer].append((module, role))
    return holders


def share_(model: nn.Module, groups: Sequence[Sequence[tuple[QuantModule, str]]]) -> None:
    """Have the first quantizer of each group stand for all of it, in place."""
    for (first, first_role), *others in groups:
        first.quantizers()[first_role]._last = LastResult(1 + len(others))
        for module, role in others:
            setattr(module, f"{role}_quantizer", first.quantizers()[first_role])
    if groups:
        model.register_load_state_dict_pre_hook(separate_as_saved)  # type: ignore[no-untyped-call]


def separate_as_saved(model: nn.Module, state: dict[str, Tensor], prefix: str, *ignored: Any) -> None:
    """Hook of ``model`` before it loads a state dict: a quantizer that has several values there becomes several.

    SmoothQuant takes quantizers apart: a layer with a factor of its own has another input than those it shared one with.
    """
    _separate_(model, lambda path: _values(state, f"{prefix}{path}."))


def separate_as_placed_(model: nn.Module, shared: Sequence[Sequence[str]]) -> None:
    """A quantizer that is several in ``shared``, short names by groups, becomes several, in place, equal values or not.

    Statistics that two of them go on to collect are those of each alone.
    """
    groups = {name: i for i, names in enumerate(shared) for name in names}
    _separate_(model, lambda path: groups.get(name := path.removesuffix("_quantizer"), name))


def _separate_(model: nn.Module, kind: Callable[[str], Hashable]) -> None:
    """Have a quantizer be one for each kind of place that it stands in."""
    places: dict[TensorQuantizer, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TensorQuantizer):
            places[module].append(path)
    for quantizer, shared in places.items():
        kinds: dict[Hashable, list[str]] = defaultdict(list)
        for path in shared if len(shared) > 1 else ():
            kinds[kind(path)].append(path)
        for i, paths in enumerate(kinds.values() if len(kinds) > 1 else ()):
            one = copy.deepcopy(quantizer) if i else quantizer
            one._last = LastResult(len(paths)) if len(paths) > 1 else None
            for path in paths:
                owner, _, name = path.rpartition(".")
                setattr(model.get_submodule(owner), name, one)


def leave_sharing_(model: nn.Module) -> None:
    """Take the hook out again, in place."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is separate_as_saved]:
            del hooks[key]


def _values(state: dict[str, Tensor], prefix: str) -> Hashable:
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return tuple((name, tuple(value.shape), tuple(value.flatten().tolist())) for name, value in found.items())


class _Sets:
    """Disjoint sets."""

    def __init__(self) -> None:
        self.parent: dict[object, object] = {}

    def root(self, item: object) -> object:
        while item in self.parent:
            item = self.parent[item]
        return item

    def join(self, *items: object) -> None:
        first, *others = (self.root(item) for item in items)
        self.parent |= {other: first for other in others if other != first}
