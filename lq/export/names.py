"""Names of nodes that lead back to the modules of the model. Import this module late: it needs the extra ``export``."""

import ast
from collections.abc import Container

import onnx_ir as ir


def name_nodes_(graph: ir.Graph) -> None:
    """``conv1/Conv``, ``conv1.input/QuantizeLinear``, in place: engines and profilers show these names."""
    taken: set[str] = set()
    for node in graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        # the first is the model, the last the function
        module = next((scope for scope in reversed(scopes[1:-1]) if scope), None)
        if module is not None:
            node.name = f"{module.removesuffix('_quantizer')}/{node.op_type}"
        node.name = free(str(node.name), taken)
        taken.add(node.name)


def free(name: str, taken: Container[str]) -> str:
    """``name``, or with the first number behind it that is not taken.

    >>> free("conv/Conv", {"conv/Conv"})
    'conv/Conv_1'
    """
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
