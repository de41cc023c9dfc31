"""Who feeds whom in a model, found by running it once: works on any Python code, control flow included.

Forward hooks see the calls of leaf modules, a ``TorchFunctionMode`` sees every function that code outside of them calls. A tensor
is followed by its identity, and an operation in place makes a new value of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from lq.nn.branches import branching, choose
from lq.nn.evaluating import evaluating
from lq.nn.quant_module import QUANT_MODULES, QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

# Functions and properties that look at a tensor's form and not at its values.
LOOKS = frozenset(
    {
        *(
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "is_cuda",
            "is_leaf",
            "is_quantized",
            "is_meta",
            "names",
        ),
        *("size", "dim", "numel", "nelement", "stride", "__len__", "is_contiguous", "is_floating_point", "get_device"),
        *("_version", "is_inference"),
    }
)


@dataclass(frozen=True)
class Value:
    """Stands for a tensor among the arguments of a call."""

    number: int


@dataclass(frozen=True)
class Call:
    """A call of a leaf module, or of a function (by its name), in terms of values.

    Attributes:
        target: the module, or the name of the function.
        inputs: values that it took, as often as it took them.
        outputs: values that it returned.
        function: the function itself.
        arguments: positional and keyword arguments of the function, with a :class:`Value` for each tensor.
        owner: the module whose ``forward`` calls the function; ``None`` outside of the model.
    """

    target: nn.Module | str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    function: Any = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    owner: nn.Module | None = None


@dataclass
class Flow:
    """The calls of one run, in order.

    Attributes:
        calls: of leaf modules and functions; a value is a number.
        shape: of each value.
        returned: values that the model returned.
        parameters: parameters that functions took, outside of leaf modules, by the values they are.
        buffers: buffers that functions took, as long as nothing was written into them.
        entered: modules that are no leaves, once for each of their runs.
    """

    calls: list[Call] = field(default_factory=list)
    shape: dict[int, torch.Size] = field(default_factory=dict)
    returned: set[int] = field(default_factory=set)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    buffers: set[int] = field(default_factory=set)
    entered: list[nn.Module] = field(default_factory=list)

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Calls of a module."""
        return [call for call in self.calls if call.target is module]

    def consumers(self, value: int) -> list[Call]:
        """Calls that take a value, once for each time they take it."""
        return [call for call in self.calls for taken in call.inputs if taken == value]

    def only_consumer(self, module: nn.Module) -> nn.Module | None:
        """The leaf module that alone takes the output of ``module``; ``None`` if there is more to it than one call each."""
        calls = self.calls_of(module)
        if len(calls) != 1 or len(calls[0].outputs) != 1 or calls[0].outputs[0] in self.returned:
            return None
        takers = self.consumers(calls[0].outputs[0])
        if len(takers) != 1 or isinstance(takers[0].target, str) or len(self.calls_of(takers[0].target)) != 1:
            return None
        return takers[0].target


class _Tracer(TorchFunctionMode):
    """Fills a :class:`Flow` while it is active."""

    def __init__(self, flow: Flow, buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self.flow = flow
        # the number of each tensor, and the version that has it
        self.values = WeakIdKeyDictionary()
        self.inside = 0
        self.owners: list[nn.Module] = []
        # nothing was written into them as long as they have this version
        self.buffers = {id(buffer): _version(buffer) for buffer in buffers}

    def value(self, tensor: Tensor) -> int:
        # a version changes also where a view of the tensor is written into
        if tensor not in self.values or self.values[tensor][1] != _version(tensor):
            self._renew(tensor)
        return int(self.values[tensor][0])

    def _renew(self, tensor: Tensor) -> None:
        number = len(self.flow.shape)
        self.flow.shape[number] = tensor.shape
        self.values[tensor] = number, _version(tensor)

    def record(
        self, target: nn.Module | str, taken: tuple[int, ...], output: Any, function: Any = None, arguments: Any = None
    ) -> None:
        outputs = tensors_in(output)
        for tensor in outputs:
            # also for a tensor that was changed in place: from here on it is another value
            self._renew(tensor)
        owner = self.owners[-1] if self.owners else None
        self.flow.calls.append(Call(target, taken, tuple(self.value(t) for t in outputs), function, arguments, owner))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if self.inside or name in LOOKS:
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        self.flow.parameters.update({self.value(t): t for t in tensors if isinstance(t, nn.Parameter)})
        self.flow.buffers.update(self.value(t) for t in tensors if self.buffers.get(id(t)) == _version(t))
        taken = tuple(self.value(t) for t in tensors)
        arguments = tree_map(lambda leaf: Value(self.value(leaf)) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        output = func(*args, **kwargs)
        if taken:
            self.record(name, taken, args[0] if name == "__setitem__" else output, func, arguments)
        return output

    def cond(self, pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        """``torch.cond`` as one call that nobody looks into: the branch that does not run takes values too."""
        captured = [cell.cell_contents for fn in (true_fn, false_fn) for cell in getattr(fn, "__closure__", None) or ()]
        taken = tuple(self.value(t) for t in tensors_in((pred, operands, captured)))
        self.inside += 1
        try:
            output = choose(pred, true_fn, false_fn, operands)
        finally:
            self.inside -= 1
        if not self.inside:
            self.record("cond", taken, output)
        return output

    def enter(self, module: nn.Module) -> list[RemovableHandle]:
        """Know what is called by the code of ``module``."""

        def come(module: nn.Module, args: Any) -> None:
            self.owners.append(module)
            self.flow.entered.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # where an error was caught by the model's code, modules inside were never left
            while self.owners.pop() is not module:
                pass

        return [
            module.register_forward_pre_hook(come),
            module.register_forward_hook(leave),
        ]

    def attach(self, leaf: nn.Module) -> list[RemovableHandle]:
        """Record the calls of ``leaf``."""
        taken: list[tuple[int, ...]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                taken.append(tuple(self.value(t) for t in tensors_in((args, kwargs))))
            self.inside += 1

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if not self.inside:
                self.record(module, taken.pop(), output)

        return [
            leaf.register_forward_pre_hook(before, with_kwargs=True),
            leaf.register_forward_hook(after, with_kwargs=True),
        ]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def function_name(func: Any) -> str:
    """Name of what a ``TorchFunctionMode`` was called for."""
    name: str = getattr(func, "__name__", str(func))
    # a property: x.shape looks at the form, x.mT and x.data are the values
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def tensors_in(tree: Any) -> list[Tensor]:
    """Tensors in what a function takes or returns, nested as they may be."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is looked at from outside: one of torch's, of ours or registered, without children but quantizers.

    Into modules of other origin the tracer looks, so that a norm that is written by hand is what it computes.
    """
    known = type(module).__module__.startswith("torch.") or type(module) in QUANT_MODULES or isinstance(module, QuantModule)
    return known and all(isinstance(child, TensorQuantizer) for child in module.children())


@contextmanager
def tracing(model: nn.Module) -> Iterator[Flow]:
    """Record what runs in the block: leaf modules of ``model``, and every torch function outside of them.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with tracing(model) as flow:
    ...     _ = model(Tensor([[1.0, 1.0]])) + 1
    >>> [call.target if isinstance(call.target, str) else type(call.target).__name__ for call in flow.calls]
    ['Linear', 'ReLU', 'add']
    """
    flow = Flow()
    tracer = _Tracer(flow, model.buffers())
    handles: list[RemovableHandle] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not tracer.inside:
            flow.returned.update(tracer.value(t) for t in tensors_in(output))

    modules = [m for m in model.modules() if not isinstance(m, TensorQuantizer)]
    try:
        for module in modules:
            handles += tracer.attach(module) if is_leaf(module) else tracer.enter(module)
        handles.append(model.register_forward_hook(leave))
        with tracer, branching(tracer.cond):
            yield flow
    finally:
        for handle in handles:
            handle.remove()


def untraced() -> AbstractContextManager[None]:
    """What runs in the block is not recorded: for hooks, which are no part of the model."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def trace(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Flow:
    """Run ``model`` once, in evaluation mode and without gradients, and say who feeds whom."""
    with evaluating(model), tracing(model) as flow:
        model(*args, **(kwargs or {}))
    return flow
