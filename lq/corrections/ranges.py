"""The ranges of layers' inputs, and where a correction brings them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

from torch import nn

from lq.calib import Calibrator, HistogramCalibrator, failing_together, sync_calibrators
from lq.descriptor import QuantDescriptor
from lq.methods import check_options
from lq.nn.evaluating import evaluating
from lq.nn.example import as_args, positional_inputs
from lq.nn.fast_paths import without_fast_paths
from lq.nn.input_channels import factor_of, inputs_of

# A range, or what makes one of the range that was measured.
Target = float | Callable[[float], float]

# Ranges end up this much below their target: where rounding moves them above a power of two, the quantizer takes the next one.
MARGIN = 2.0**-10


def power_of_two(measured: float) -> float:
    """The power of two whose quotient with a range is nearest to 1.

    >>> power_of_two(4.1), power_of_two(6.0), power_of_two(0.3)
    (4.0, 8.0, 0.25)
    """
    return float(2.0 ** round(math.log2(measured)))


def ratio_to(target: Target, measured: float) -> float:
    """What a range has to be divided by to end up at ``target``; 1 where it lies there, or is 0.

    Raises:
        ValueError: a target that is no range.

    >>> round(ratio_to(4.0, 8.0), 6), ratio_to(power_of_two, 3.999)
    (2.001955, 1.0)
    """
    if measured == 0:
        return 1.0
    wanted = target(measured) if callable(target) else target
    if not (math.isfinite(wanted) and wanted > 0):
        raise ValueError(f"`target` is {wanted} for a range of {measured:g}: it must be a positive number.")
    ratio = measured / wanted
    return 1.0 if 1 - 2 * MARGIN < ratio <= 1 else ratio / (1 - MARGIN)


def why_none(measured: float) -> str:
    """Why a range stays that has a ratio of 1."""
    return f"its range is {measured:g} already" if measured else "it saw nothing but zeros"


def peeked(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterator[Any]]:
    """Positional inputs of the first batch, and all batches.

    Raises:
        ValueError: there is none.
    """
    rest = iter(batches)
    for first in rest:
        return as_args(first), chain([first], rest)
    raise ValueError("`batches` is empty: give at least one, as the model takes it.")


def input_ranges(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Iterable[Any],
    method: str,
    desc: QuantDescriptor | None,
    options: dict[str, Any],
) -> dict[nn.Module, float]:
    """The amax that a method finds for the inputs of layers, over all batches and ranks; 0 where nothing but zeros was seen.

    Raises:
        ValueError: NaN or Inf in an input.
    """
    desc = desc or QuantDescriptor()
    calibrators = {m: HistogramCalibrator(desc.num_bits, None, desc.unsigned, desc.num_bins) for m in layers}
    observe(model, calibrators, batches)
    amaxs = {module: calibrator.compute_amax(method, **options) for module, calibrator in calibrators.items()}
    return {module: 0.0 if amax is None else amax.item() for module, amax in amaxs.items()}


def observe(model: nn.Module, calibrators: Mapping[nn.Module, Calibrator], batches: Iterable[Any]) -> None:
    """Show calibrators what meets the weights of layers, in float, over all batches and ranks.

    Raises:
        ValueError: NaN or Inf in an input.
    """

    def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        factor = factor_of(module)
        for x in inputs_of(module, args, kwargs):
            calibrators[module].to(x.device).collect(x if factor is None else x * factor)

    with ExitStack() as stack:
        for context in (failing_together(), evaluating(model), without_fast_paths(model)):
            stack.enter_context(context)
        for module in calibrators:
            stack.callback(module.register_forward_pre_hook(collect, with_kwargs=True).remove)
        for batch in batches:
            model(*positional_inputs(model, batch))
    broken = any(c.collected and not c.finite for c in calibrators.values())
    sync_calibrators([*calibrators.values()], "NaN or Inf in an input: look for bad samples." if broken else None)


def check_method(method: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a method or option that does not exist, or makes a range that is no measured one."""
    check_options(method, options)
    if options.get("power_of_two"):
        raise ValueError("`power_of_two` is no option here: ranges are measured as they are, and `target` says where they go.")
