"""What a teacher and its student give in a run, and the parameters that they share."""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lq.callbacks.feeding import muted
from lq.functional.distill import relative_error

# What modules gave in one run, by name; "" is the whole module.
Outputs = dict[str, list[Tensor]]


def call(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    with muted(model):
        return model(*inputs[0], **inputs[1])


def outputs_of(model: Any, names: list[str], run: Callable[[Any, Any], Any], inputs: Any) -> Outputs:
    """What modules give while a model runs; random numbers are left as they were."""
    found, hooks = watch(model, names)
    try:
        with torch.no_grad(), isolate_rng():
            # on tensors of its own, so that a module that works in place on what it is given does so once
            output = run(model, tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs))
    finally:
        remove(hooks)
    return found if names else {"": [logits_of(output)]}


def mirrored(inputs: Any) -> Any:
    """Inputs whose images, ``(batch, channels, height, width)``, are mirrored from left to right.

    Raises:
        MisconfigurationException: there are none among them.
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not any(len(shape) == 4 for shape in shapes):
        raise MisconfigurationException(f"`mirror` is True, and there are no images (batch, channels, height, width): {shapes}.")
    return tree_map(lambda leaf: leaf.flip(-1) if isinstance(leaf, Tensor) and leaf.ndim == 4 else leaf, inputs)


def watch(model: nn.Module, names: list[str]) -> tuple[Outputs, list[RemovableHandle]]:
    found: Outputs = {name: [] for name in names}

    def keep(name: str, output: Any) -> None:
        # a copy, because the next layer may work in place
        found[name].append(_tensor(name, output).clone())

    def hook(name: str) -> RemovableHandle:
        return model.get_submodule(name).register_forward_hook(lambda _, args, output: keep(name, output))

    return found, [hook(name) for name in names]


def remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def _tensor(name: str, output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise MisconfigurationException(
            f"`{name}` gave a {type(output).__name__}, neither a tensor nor with `logits`: name `layers` that give tensors."
        )
    return found


def logits_of(output: Any) -> Tensor:
    found = _tensor("forward", output)
    if found.ndim < 2 or found.shape[-1] < 2:
        raise MisconfigurationException(
            f"`forward` gave the shape {tuple(found.shape)}, with no classes at its end: name `layers`."
        )
    return found


def warn_if_rescaled(student: Outputs, teacher: Outputs) -> None:
    for name, outputs in student.items():
        if any(relative_error(*pair) > 1e-3 for pair in zip(outputs, teacher[name], strict=False)):
            rank_zero_warn(
                f"`{name}` gives something else than in the teacher, before the first step and in float: if SmoothQuant scaled "
                "it, compare whole blocks, or use `alpha=None`."
            )


def matching(patterns: Sequence[str], model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise MisconfigurationException(f"The pattern {pattern!r} in `layers` matches no module: the closest are {close}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def share_frozen_(teacher: nn.Module, student: nn.Module) -> dict[str, nn.Parameter]:
    """Let the teacher have those of the student's frozen parameters that are the same still."""
    own, shared = dict(teacher.named_parameters(remove_duplicate=False)), {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        same = name in own and not parameter.requires_grad and parameter.dtype == own[name].dtype
        if same and torch.equal(parameter, own[name]):
            set_parameter(teacher, name, parameter)
            shared[name] = parameter
    return shared


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
