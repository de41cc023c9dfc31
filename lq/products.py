"""Matrix products of two activations in a recorded run: those of attention."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lq.descriptor import QuantRule
from lq.graph import Call, Flow, Value
from lq.nn.products import PRODUCTS, operands_first
from lq.nn.tensor_quantizer import TensorQuantizer


def named_products(rules: Iterable[QuantRule]) -> set[str]:
    """Names of the classes of products that a rule quantizes.

    >>> sorted(named_products([QuantRule("*", {"num_bits": 8}, types=("Linear", "QuantMatmul"))]))
    ['QuantMatmul']
    """
    known = {operation.__name__ for operation in PRODUCTS.values()}
    return {name for rule in rules if rule.input is not None for name in rule.types or () if name in known}


def is_for_products(rule: QuantRule) -> bool:
    """Whether a rule is for products alone, wherever there are some."""
    return (
        rule.pattern == "*"
        and rule.types is not None
        and {*rule.types} <= {operation.__name__ for operation in PRODUCTS.values()}
    )


def find_products(flow: Flow, classes: set[str]) -> tuple[dict[nn.Module, list[str | None]], dict[nn.Module, str]]:
    """Functions that multiply, in the order in which a block's ``forward`` calls them; ``None`` for those that stay as they are.

    Those stay that have a weight or a buffer for an operand, and those of other ``classes``. Blocks with quantizers of their own
    are left to their author.

    Returns:
        The products by their blocks, and blocks that are left: why.
    """
    constants = {*flow.parameters, *flow.buffers}
    found: dict[nn.Module, list[str | None]] = defaultdict(list)
    left: dict[nn.Module, str] = {}
    for call in flow.calls:
        if call.inputs and constants.issuperset(call.inputs):
            constants.update(call.outputs)
        elif call.owner is not None and call.target in PRODUCTS:
            found[call.owner].append(function := _function(call, constants, classes))
            if function is not None and call.arguments is not None and "out" in call.arguments[1]:
                left[call.owner] = "a product writes into `out`"
    for block, functions in list(found.items()):
        runs = flow.entered.count(block)
        once, rest = divmod(len(functions), runs)
        if rest or functions != functions[:once] * runs:
            left[block] = "its runs differ in their matrix products"
        found[block] = functions[:once]
        if block in left or not any(functions) or any(isinstance(child, TensorQuantizer) for child in block.children()):
            del found[block]
    return dict(found), left


def _function(call: Call, constants: set[int], classes: set[str]) -> str | None:
    assert isinstance(call.target, str)
    assert call.arguments is not None
    operation = PRODUCTS[call.target]
    operands, _ = operands_first(call.target, *call.arguments)
    # a mask may be anything
    factors = {x.number for x in operands[: len(operation.operands)] if isinstance(x, Value)}
    return call.target if operation.__name__ in classes and constants.isdisjoint(factors) else None
