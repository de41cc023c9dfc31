"""One small adapter per tool: ``quantized(model, weight_bits, input_bits, batches)`` is a calibrated copy that can be trained.

Every convolution and linear layer quantizes its weight per output channel and its input per tensor; the first convolution and the
classifier keep 8 bits. Inputs behind a ReLU are unsigned, those of the first convolution are signed.
"""

import contextlib
import copy
import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lq

Batches = Sequence[Tensor]
Quantized = Callable[[nn.Module, int, int, Batches], nn.Module]

FIRST, LAST = "conv1", "linear"


def run(model: nn.Module, batches: Batches) -> None:
    """Forwards without gradients."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def of_lq(model: nn.Module, weight_bits: int, input_bits: int, batches: Batches) -> nn.Module:
    """Amax by least squared error; below 8 bits it is then a parameter (LSQ): ``conf/quant/w4a4.yaml``.

    With 8 bits amax of weights is the largest value.
    """

    def described(bits: int, **options: Any) -> lq.QuantDescriptor:
        return lq.QuantDescriptor(bits, narrow_range=False, learn_amax="lsq" if bits < 8 else False, **options)

    rules = [
        lq.QuantRule("*", described(input_bits, unsigned=True), described(weight_bits, axis=0)),
        lq.QuantRule(FIRST, described(8), described(8, axis=0)),
        lq.QuantRule(LAST, described(8, unsigned=True), described(8, axis=0)),
    ]
    model = lq.quantize_(copy.deepcopy(model), rules)
    with lq.calibrating(model, method="mse"):
        run(model, batches)
    return model


def of_modelopt(model: nn.Module, weight_bits: int, input_bits: int, batches: Batches, algorithm: str = "max") -> nn.Module:
    """Amax by the largest value, of weights by least squared error with ``mse``; it is not trained.

    ModelOpt 0.47 learns scales (its algorithm ``lsq``) of NVFP4 blocks only.
    """
    import modelopt.torch.quantization as mtq

    def entry(name: str, bits: int, axis: int | None, unsigned: bool = False) -> dict[str, Any]:
        return {"quantizer_name": name, "cfg": {"num_bits": bits, "axis": axis, "unsigned": unsigned}}

    rules = [
        {"quantizer_name": "*", "enable": False},
        entry("*weight_quantizer", weight_bits, 0),
        entry("*input_quantizer", input_bits, None, unsigned=True),
        entry(f"{FIRST}.weight_quantizer", 8, 0),
        entry(f"{FIRST}.input_quantizer", 8, None),
        entry(f"{LAST}.weight_quantizer", 8, 0),
        entry(f"{LAST}.input_quantizer", 8, None, unsigned=True),
        {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(copy.deepcopy(model), {"quant_cfg": rules, "algorithm": algorithm}, lambda m: run(m, batches))


def of_brevitas(model: nn.Module, weight_bits: int, input_bits: int, batches: Batches, learned: bool = False) -> nn.Module:
    """Scales of inputs are parameters that start at a high percentile; scales of weights are the largest value, at every step.

    With ``learned`` those of weights are parameters too, and all start at the least squared error.
    """
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import scaled_int as quant

    weight, signed, unsigned = quant.Int8WeightPerChannelFloat, quant.Int8ActPerTensorFloat, quant.Uint8ActPerTensorFloat
    options: dict[str, Any] = {}
    if learned:
        weight, signed, unsigned = (
            quant.Int8WeightPerChannelFloatMSE,
            quant.Int8ActPerTensorFloatMSE,
            quant.Uint8ActPerTensorFloatMSE,
        )
        options["weight_scaling_impl_type"] = ScalingImplType.PARAMETER_FROM_STATS

    def layer(name: str, module: nn.Module) -> nn.Module:
        bits = (8, 8) if name in (FIRST, LAST) else (weight_bits, input_bits)
        own = {
            "weight_quant": weight,
            "weight_bit_width": bits[0],
            "input_quant": signed if name == FIRST else unsigned,
            "input_bit_width": bits[1],
            **options,
        }
        shape = {"bias": module.bias is not None, "device": module.weight.device}
        if isinstance(module, nn.Linear):
            new = qnn.QuantLinear(module.in_features, module.out_features, **shape, **own)
        else:
            sizes = (module.in_channels, module.out_channels, module.kernel_size)
            new = qnn.QuantConv2d(*sizes, stride=module.stride, padding=module.padding, **shape, **own)
        new.load_state_dict(module.state_dict(), strict=False)
        return new

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            model.set_submodule(name, layer(name, module))
    # the quantizers of inputs begin on the CPU
    model.to(batches[0].device).eval()
    with torch.no_grad(), calibration_mode(model):
        run(model, batches)
    return model


def of_torchao(model: nn.Module, weight_bits: int, input_bits: int, batches: Batches, learned: bool = False) -> nn.Module:
    """Scales from moving averages of the extremes, also while training; with ``learned`` parameters that start at the extremes.

    Convolutions have their BatchNorm's factors in the weight that is quantized, as torchao's training of graphs does it; its
    other training, ``torchao.quantization.qat``, is for linear layers and embeddings.
    """
    from pt2e import LayerQuantizer, ObservedInTraining
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    quantizer = LayerQuantizer((weight_bits, input_bits), {FIRST: (8, 8), LAST: (8, 8)}, (FIRST,), learned)
    # what cuDNN takes would bound the size of a batch
    twin, batch = copy.deepcopy(model).cpu().train(), torch.export.Dim("batch", min=2)
    graph = torch.export.export(twin, (batches[0].cpu(),), dynamic_shapes=({0: batch},)).module()
    graph = prepare_qat_pt2e(graph, quantizer).to(batches[0].device)
    pt2e.allow_exported_model_train_eval(graph)
    graph.eval()
    graph.apply(pt2e.disable_fake_quant)
    run(graph, batches)
    graph.apply(pt2e.enable_fake_quant)
    if learned:
        graph.apply(pt2e.enable_range_learning)
    return graph if learned else ObservedInTraining(graph)


TOOLS: dict[str, Quantized] = {
    "lq": of_lq,
    "lq-distilled": of_lq,
    "modelopt": of_modelopt,
    "modelopt-mse": partial(of_modelopt, algorithm="mse"),
    "brevitas": of_brevitas,
    "brevitas-mse": partial(of_brevitas, learned=True),
    "torchao": of_torchao,
    "torchao-learned": partial(of_torchao, learned=True),
}


def installed(tool: str) -> bool:
    """Whether what ``tool`` needs is there."""
    return importlib.util.find_spec(tool.split("-")[0]) is not None or tool == "float"
