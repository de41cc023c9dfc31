"""Matrix products of two activations in a recorded run: those of attention."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lq.descriptor import QuantRule
from lq.graph import Call, Flow
from lq.nn.products import PRODUCTS
from lq.nn.tensor_quantizer import TensorQuantizer


def named_products(rules: Iterable[QuantRule]) -> set[str]:
    """Names of the classes of products that a rule quantizes.

    >>> sorted(named_products([QuantRule("*", {"num_bits": 8}, types=("Linear", "QuantMatmul"))]))
    ['QuantMatmul']
    """
    known = {operation.__name__ for operation in PRODUCTS.values()}
    return {name for rule in rules if rule.input is not None for name in rule.types or () if name in known}


def find_products(flow: Flow, classes: set[str]) -> tuple[dict[nn.Module, list[str | None]], list[nn.Module]]:
    """Functions that multiply, in the order in which a block's ``forward`` calls them; ``None`` for those that stay as they are.

    Those stay that have a weight for an operand, and those of other ``classes``. Blocks with quantizers of their own are left to
    their author.

    Returns:
        The products by their blocks, and blocks whose runs differ in their products, which are left.
    """
    weights = set(flow.parameters)
    found: dict[nn.Module, list[str | None]] = defaultdict(list)
    left = []
    for call in flow.calls:
        if call.inputs and weights.issuperset(call.inputs):
            weights.update(call.outputs)
        elif call.owner is not None and call.target in PRODUCTS:
            found[call.owner].append(_function(call, weights, classes))
    for block, functions in list(found.items()):
        runs = flow.entered.count(block)
        once, rest = divmod(len(functions), runs)
        if rest or functions != functions[:once] * runs:
            left.append(block)
        found[block] = functions[:once]
        if block in left or not any(functions) or any(isinstance(child, TensorQuantizer) for child in block.children()):
            del found[block]
    return dict(found), left


def _function(call: Call, weights: set[int], classes: set[str]) -> str | None:
    assert isinstance(call.target, str)
    operation = PRODUCTS[call.target]
    # a mask may be anything
    factors = call.inputs[: len(operation.operands)]
    return call.target if operation.__name__ in classes and weights.isdisjoint(factors) else None
