"""Layers of other libraries, known by their full names: registered once a model has one, so that nothing is imported for them."""

from typing import Any

from torch import Tensor, nn

from lq.nn.quant_module import QUANT_MODULES, QuantMixin, register


class QuantTransposedLinear(QuantMixin):
    """A linear layer that keeps its weight as ``(inputs, outputs)``, as transformers' ``Conv1D`` does.

    The weight is quantized as ``(outputs, inputs)``: axis 0 is that of the outputs, as in every linear layer.
    """

    weight: Tensor
    bias: Tensor | None

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight.mT}

    def forward(self, x: Tensor) -> Tensor:
        return self.on_quantized(lambda x, weight: nn.functional.linear(x, weight, self.bias), x, self.weight.mT)


ELSEWHERE: dict[str, type[QuantMixin]] = {"transformers.pytorch_utils.Conv1D": QuantTransposedLinear}


def register_known(model: nn.Module) -> None:
    """Register the classes of ``model`` that :data:`ELSEWHERE` names.

    >>> register_known(nn.Linear(2, 2))  # torch's own are registered from the start
    """
    for kind in {type(module) for module in model.modules()} - QUANT_MODULES.keys():
        mixin: Any = ELSEWHERE.get(f"{kind.__module__}.{kind.__qualname__}")
        if mixin is not None:
            register(kind)(type(f"Quant{kind.__name__}", (mixin, kind), {}))
