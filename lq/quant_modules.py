"""pytorch-quantization's ``quant_modules``: replace classes of ``torch.nn`` by quantized ones, for models made afterwards.

The classes of torch stay patched until they are put back. The usual way is :func:`lq.quantize_`, on a model that exists.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType, TracebackType

from torch import nn

from lq.nn import QUANT_MODULES, QuantModule

# Where a class stands, its name there, and what replaces it.
Entry = tuple[ModuleType | type, str, type[QuantModule]]

# What pytorch-quantization replaces.
DEFAULT_NAMES = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear", "LSTM", "LSTMCell"),
    *("AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
)


class QuantModuleReplacementHelper:
    """Holds which classes are replaced at the moment, and what stood in their places."""

    def __init__(self) -> None:
        self.replaced: list[tuple[ModuleType | type, str, type[nn.Module]]] = []

    def prepare_state(
        self, float_module_list: Sequence[str] | None = None, custom_quant_modules: Iterable[Entry] | None = None
    ) -> list[Entry]:
        """What to replace, checked; see :func:`initialize`."""
        left = tuple(float_module_list or ())
        custom = list(custom_quant_modules or ())
        known = {*DEFAULT_NAMES, *(name for _, name, _ in custom)}
        if unknown := sorted(set(left) - known):
            raise ValueError(f"`float_module_list` has {', '.join(map(repr, unknown))}: known are {', '.join(sorted(known))}.")
        for parent, name, quant_class in custom:
            original = getattr(parent, name, None)
            if not isinstance(original, type) or not issubclass(original, nn.Module):
                raise ValueError(f"`custom_quant_modules` has {name!r}, which is no module class of {parent.__name__}.")
            if not isinstance(quant_class, type) or not issubclass(quant_class, nn.Module):
                raise TypeError(f"`custom_quant_modules` replaces {name} by {quant_class!r}, which is no module class.")
        named = {entry[1] for entry in custom if entry[0] is nn}
        defaults = [(nn, n, QUANT_MODULES[getattr(nn, n)]) for n in DEFAULT_NAMES if n not in {*left, *named}]
        return defaults + custom

    def apply_quant_modules(self, entries: Iterable[Entry]) -> None:
        """Replace, and remember what stood there."""
        for parent, name, quant_class in entries:
            self.replaced.append((parent, name, getattr(parent, name)))
            setattr(parent, name, quant_class)

    def restore_float_modules(self) -> None:
        """Put back what stood there before the first replacement."""
        while self.replaced:
            setattr(*self.replaced.pop())


_helper = QuantModuleReplacementHelper()


class _Initialized:
    """Undoes :func:`initialize` on leaving a ``with`` block."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        deactivate()


def initialize(
    float_module_list: Sequence[str] | None = None, custom_quant_modules: Iterable[Entry] | None = None
) -> _Initialized:
    """Let ``nn.Linear(...)`` and the like make quantized modules, until :func:`deactivate`, or to the end of a ``with`` block.

    Args:
        float_module_list: names of classes to leave as they are.
        custom_quant_modules: more replacements, or others, as ``(module, name, quantized class)``.

    Raises:
        ValueError: an unknown name; then nothing is replaced.
        TypeError: a replacement that is no module class.
        RuntimeError: classes are replaced already.

    >>> with initialize(float_module_list=["Conv2d"]):
    ...     model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2))
    >>> [type(m).__name__ for m in model], nn.Linear.__name__
    (['Conv2d', 'QuantLinear'], 'Linear')
    """
    if isinstance(float_module_list, str):
        raise TypeError(f"`float_module_list` is {float_module_list!r}: give a list of names, of one too.")
    if _helper.replaced:
        raise RuntimeError("Classes are replaced already: call `lq.quant_modules.deactivate()` first.")
    _helper.apply_quant_modules(_helper.prepare_state(float_module_list, custom_quant_modules))
    return _Initialized()


def deactivate() -> None:
    """Put the float classes back; without effect if none is replaced."""
    _helper.restore_float_modules()
