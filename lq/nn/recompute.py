"""What layers quantized, computed again in the backward pass in place of being kept until then."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq.functional.fake_quant import fake_quant
from lq.functional.operators import in_pieces, is_unobserved, saves_elsewhere

if TYPE_CHECKING:
    from lq.nn.tensor_quantizer import TensorQuantizer

M = TypeVar("M", bound=nn.Module)


def recompute_(model: M, enabled: bool = True) -> M:
    """Have linear layers and convolutions keep nothing quantized for their backward pass, in place.

    A layer in float keeps its input, which what made it (a ReLU, say) keeps too: one tensor. With fake quantization there are
    two, the input and what it was rounded to, and the same goes for the weight. This leaves the second out, and rounds again
    when gradients are computed (Chen et al., 2016, arXiv:1604.06174, for a single cheap operation): the memory of float
    training, for another pass over the tensor.

    In compiled code every quantizer is computed again, and the compiler may compute cheap operations before it again as well. Not
    so in eager code, where both tensors are kept, if amax is learned or taken from each input, for affine and block-wise grids,
    for normalized weights, and for inserted factors; there a layer under autocast keeps its own cast of what was quantized, and
    whoever looks after saved tensors outside (``torch.utils.checkpoint``) decides. Both are kept in either where a quantizer has
    hooks or collects statistics.

    Args:
        model: quantized.
        enabled: ``False`` undoes it.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no quantized linear layer or convolution.

    >>> import lq
    >>> model = recompute_(lq.quantize_(nn.Linear(2, 2)))
    >>> model.recompute
    True
    """
    from lq.nn.quant_module import QuantMixin

    layers = [m for m in model.modules() if isinstance(m, QuantMixin)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized linear layer or convolution: call `lq.quantize_` first.")
    for layer in layers:
        layer.recompute = enabled
    return model


def computed_again(quantizer: "TensorQuantizer", x: Tensor) -> Tensor:
    """What the quantizer makes of ``x`` in compiled code, which makes it again in the backward pass."""
    if _is_watched(quantizer):
        return cast(Tensor, quantizer(x))
    if quantizer.active and not quantizer._fits:
        quantizer._fit(quantizer.blocks(x))  # nor may amax change its shape there
    return cast(Tensor, checkpoint(quantizer, x, use_reentrant=False, preserve_rng_state=False))


class _Again:
    """Rounds a tensor again, as it was rounded before."""

    __slots__ = ("amax", "grid", "versions", "x")

    def __init__(self, x: Tensor, amax: Tensor, grid: tuple[Any, ...]) -> None:
        self.x, self.amax, self.grid, self.versions = x, amax, grid, (x._version, amax._version)

    def __call__(self) -> Tensor:
        _check((self.x._version, self.amax._version), self.versions)
        with torch.no_grad():
            return fake_quant(self.x, self.amax, *self.grid)


def _check(versions: Any, before: Any) -> None:
    if versions != before:
        raise RuntimeError(
            "What a quantized layer took, or its amax, was changed in place between forward and backward, which needs it as it "
            "was: change a copy."
        )


def keeping_less(*tensors: "tuple[TensorQuantizer, Tensor, Tensor]") -> AbstractContextManager[Any]:
    """Inside, operations that keep what a quantizer made of a tensor keep how to make it again.

    Args:
        tensors: quantizer, tensor, and what became of it.
    """
    made = [_made(*each) for each in tensors if _is_made_again(*each[1:])]
    agains = {memory: again for memory, again in made if again is not None}
    # only the innermost hooks are called, and those around have plans of their own
    if not agains or saves_elsewhere():
        return nullcontext()

    def pack(saved: Tensor) -> Any:
        again = agains.get(_memory_of(saved))
        return (saved, saved._version) if again is None else (again, saved.shape, saved.stride())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed[0], Tensor):
            # torch leaves that to whoever packs
            _check(packed[0]._version, packed[1])
            return packed[0]
        # matrix products keep a view, or a transpose, of what lies in memory as it did
        again: Tensor = packed[0]().as_strided(*packed[1:])
        return again

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_made_again(x: Tensor, rounded: Tensor) -> bool:
    plain = is_unobserved(x) and not x.is_inference() and not in_pieces()
    return plain and rounded is not x and torch.is_grad_enabled()


def _made(quantizer: "TensorQuantizer", x: Tensor, rounded: Tensor) -> tuple[Any, _Again | None]:
    rounding = _rounding_of(quantizer)
    return _memory_of(rounded), None if rounding is None else _Again(x, *rounding)


def _memory_of(x: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from others that are there, without holding it."""
    return x.data_ptr(), x.numel(), x.dtype


def _is_watched(quantizer: "TensorQuantizer") -> bool:
    """Whether a second run would be seen: by statistics, or by hooks."""
    return bool(quantizer._if_calib or quantizer._forward_hooks or quantizer._forward_pre_hooks)


def _rounding_of(quantizer: "TensorQuantizer") -> tuple[Tensor, tuple[Any, ...]] | None:
    """amax and grid, if fake quantization with them is all that the quantizer does."""
    desc, amax = quantizer.quant_desc, quantizer._buffers.get("_amax")
    more = desc.affine or desc.normalize or desc.block_size is not None or not desc.fake_quant
    if amax is None or more or not quantizer.active or quantizer.clip is not None or _is_watched(quantizer):
        return None
    if quantizer.pre_quant_scale is not None or quantizer.pre_quant_shift is not None:
        return None
    return quantizer._scaled(amax), (desc.num_bits, desc.unsigned, desc.narrow_range)
