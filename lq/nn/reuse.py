"""Results of a quantizer that are used again: of one input for several layers, of a weight that does not change."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lq.functional.gradient import within_amax
from lq.functional.operators import in_pieces, is_unobserved

if TYPE_CHECKING:
    from lq.nn.tensor_quantizer import TensorQuantizer


def can_be_reused(x: Tensor) -> bool:
    """Whether what becomes of ``x`` may be used again: it has a version, and nothing records what is done with it."""
    if not is_unobserved(x) or in_pieces() or x.is_inference():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


class _Forgetful:
    """What is remembered belongs to one object: copies begin with nothing."""

    def _forgotten(self) -> tuple[Any, ...]:
        """What a new one is made with."""
        return ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(*self._forgotten())

    def __reduce__(self) -> Any:
        return type(self), self._forgotten()


class _Last:
    """What a tensor became: kept for as many layers as will ask for it, and then while it is in use elsewhere."""

    def __init__(self, result: Tensor, held: Tensor, key: tuple[Any, ...], layers: int) -> None:
        self.result, self.held, self.key, self.left = weakref.ref(result), held, key, layers - 1
        self.kept: Tensor | None = result
        # of the result: it may be changed in place by whoever got it
        self.version = result._version

    def take(self) -> Tensor | None:
        """The result, unless it is gone or changed."""
        result = self.result()
        self.left -= 1
        if self.left <= 0:
            self.kept = None
        return result if result is not None and result._version == self.version else None


class LastResult(_Forgetful):
    """The last result of a quantizer that several layers share, until all of them have it, or its input is gone.

    The layers of queries, keys and values take one tensor: it is collected once, quantized once, and its gradients masked once.

    Args:
        layers: how many share the quantizer.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._last: tuple[weakref.ref[Tensor], _Last] | None = None
        # what came last to be collected, its version, and how many layers have yet to hand it over
        self._seen: tuple[weakref.ref[Tensor], int | None, int] | None = None

    def _forgotten(self) -> tuple[Any, ...]:
        return (self.layers,)

    def get(self, x: Tensor, held: Tensor, key: tuple[Any, ...]) -> Tensor | None:
        """What ``x`` became by the amax that is ``held``, if it is what came last."""
        # read at once: other threads may set it
        last = self._last
        if last is None or last[0]() is not x or last[1].held is not held:
            return None
        return last[1].take() if last[1].key == self._key(x, held, key) else None

    def is_new(self, x: Tensor) -> bool:
        """Whether ``x`` has not been handed over by another of the layers: its statistics are taken once."""
        version = None if x.is_inference() else x._version
        if self._seen is not None:
            seen, of_version, left = self._seen
            if left and seen() is x and of_version == version:
                self._seen = seen, version, left - 1
                return False
        self._seen = weakref.ref(x), version, self.layers - 1
        return True

    def set(self, x: Tensor, result: Tensor, held: Tensor, key: tuple[Any, ...]) -> None:
        """Remember; but not for a leaf, of which there may be another backward when the graph behind the result is gone."""
        self._last = None
        if x.grad_fn is not None or not x.requires_grad:
            last = _Last(result, held, self._key(x, held, key), self.layers)
            self._last = weakref.ref(x, lambda gone: self._drop(last)), last

    def _key(self, x: Tensor, held: Tensor, key: tuple[Any, ...]) -> tuple[Any, ...]:
        return x._version, held._version, x.requires_grad, torch.is_grad_enabled(), *key

    def _drop(self, last: _Last) -> None:
        if self._last is not None and self._last[1] is last:
            self._last = None


class KeptWeight(_Forgetful):
    """A fake-quantized weight, until it or its amax changes."""

    def __init__(self) -> None:
        self._weight: weakref.ref[Tensor] | None = None
        self._held: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._values: Tensor | None = None

    def _is_of(self, weight: Tensor, held: Tensor, key: tuple[Any, ...]) -> bool:
        # addresses and versions alone do not tell one tensor from the next one in its place
        if self._values is None or self._weight is None or self._weight() is not weight or self._held is not held:
            return False
        return (*key, self._values._version) == self._key

    def of(
        self, weight: Tensor, amax: Tensor, held: Tensor, unsigned: bool, grid: tuple[Any, ...], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The values, with the gradient of clipping to amax where one is asked for; amax follows from what is ``held``."""
        key = (weight.data_ptr(), weight._version, weight.dtype, held.data_ptr(), held._version, *grid)
        if not self._is_of(weight, held, key):
            self._values = None  # before there is another
            with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode trains nothing afterwards
                self._values = compute()
            self._weight, self._held, self._key = weakref.ref(weight), held, (*key, self._values._version)
        assert self._values is not None
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self._values
        result: Tensor = _Kept.apply(weight, amax, unsigned, [self._values])  # type: ignore[no-untyped-call]
        return result


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, amax: Tensor, unsigned: bool, values: list[Tensor]) -> Tensor:
        ctx.save_for_backward(weight, amax)
        ctx.unsigned = unsigned
        # another tensor of the same memory: the graph belongs to this call
        return values[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return within_amax(grad, *ctx.saved_tensors, ctx.unsigned), None, None, None


def weight_quantizers(model: nn.Module) -> Iterator["TensorQuantizer"]:
    """Quantizers of weights."""
    from lq.nn.quant_module import QuantModule

    for module in model.modules():
        if isinstance(module, QuantModule):
            for role in module.weights():
                yield module.quantizers()[role]


def keep_weights_(model: nn.Module) -> None:
    """Quantize each weight once from now on, in place, and again only when it or its amax changes.

    For evaluation, and for the batches whose gradients are added up. Changes are seen by torch's version counters, which
    ``weight.data`` and fused optimizers go round: call :func:`keep_weights_` again after those.

    >>> import lq
    >>> model = lq.quantize_(nn.Linear(2, 2))
    >>> with lq.calibrating(model):
    ...     _ = model(torch.ones(1, 2))
    >>> keep_weights_(model)
    >>> before, after = model.weight_quantizer(model.weight), model.weight_quantizer(model.weight)
    >>> before.data_ptr() == after.data_ptr()
    True
    """
    for quantizer in weight_quantizers(model):
        quantizer._kept = KeptWeight()


def forget_weights_(model: nn.Module) -> None:
    """Undo :func:`keep_weights_`, in place; the memory is free."""
    for quantizer in weight_quantizers(model):
        quantizer._kept = None


@contextmanager
def keeping_weights(model: nn.Module) -> Iterator[None]:
    """:func:`keep_weights_` inside the block."""
    keep_weights_(model)
    try:
        yield
    finally:
        forget_weights_(model)
