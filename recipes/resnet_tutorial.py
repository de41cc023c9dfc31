"""Quantize a ResNet step by step, in plain PyTorch: NVIDIA's ResNet-50 tutorial with ``lq`` in place of pytorch-quantization.

    python -m lq.recipes.resnet_tutorial

It trains a small ResNet on scikit-learn's digits (a minute on two CPU cores, no download), and then does what the tutorial does:
quantized modules and residual quantizers, histograms from two batches, several calibrations of the same histograms, fine-tuning,
export. On ImageNet, with ResNet-50 and on several GPUs, they are one command, in Lightning:

    lq experiment=imagenet_resnet50 data.path=/imagenet ckpt_path=resnet50-0676ba61.pth
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from lq import calib
from lq import nn as quant_nn
from lq.recipes.digits import DigitsDataModule
from lq.recipes.resnet import resnet8
from lq.tensor_quant import QuantDescriptor

Batches = Iterable[tuple[Tensor, Tensor]]


def train_one_epoch(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """One pass of gradient descent."""
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> float:
    """Accuracy in percent."""
    model.eval()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    return 100 * correct.float().mean().item()


@torch.no_grad()
def collect_stats(model: nn.Module, batches: Batches, num_batches: int) -> None:
    """Run batches through the float model and let every calibrator collect."""
    quantizers = [module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    model.eval()
    for _, (images, _) in zip(range(num_batches), batches, strict=False):
        model(images)
    for quantizer in quantizers:
        quantizer.enable_quant()
        quantizer.disable_calib()


def compute_amax(model: nn.Module, **kwargs: Any) -> None:
    """Set every amax from what was collected; ``kwargs`` are for histograms."""
    for module in model.modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            module.load_calib_amax(**({} if isinstance(module.calibrator, calib.MaxCalibrator) else kwargs))


def make_quantized(float_model: nn.Module) -> nn.Module:
    """The net with quantizers and the weights of the float one: histograms for activations, the maximum for weights."""
    before = quant_nn.QuantConv2d.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_input
    # [-128, 127], which is where TensorRT and ONNX saturate
    desc = QuantDescriptor(calib_method="histogram", narrow_range=False)
    quant_nn.QuantConv2d.set_default_quant_desc_input(desc)
    quant_nn.QuantLinear.set_default_quant_desc_input(desc)
    model = resnet8(quantize=True)
    quant_nn.QuantConv2d.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_input = before
    model.load_state_dict(float_model.state_dict(), strict=True)
    return model


def main(path: str | Path = "resnet8.onnx", float_epochs: int = 12, qat_epochs: int = 3) -> dict[str, float]:
    """Do all steps, print the accuracy after each, and return them."""
    torch.manual_seed(0)
    data = DigitsDataModule()
    data.setup("fit")
    train, val = data.train_dataloader(), data.val_dataloader()
    accuracy: dict[str, float] = {}

    def report(step: str, model: nn.Module) -> None:
        accuracy[step] = evaluate(model, val)
        print(f"{step:28} {accuracy[step]:6.2f} %")

    float_model = resnet8()
    optimizer = torch.optim.SGD(float_model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float_epochs)
    for _ in range(float_epochs):
        train_one_epoch(float_model, train, optimizer)
        schedule.step()
    report("float", float_model)

    model = make_quantized(float_model)
    collect_stats(model, train, num_batches=2)
    # other calibrations come from the same histograms
    for kwargs in ({"method": "percentile", "percentile": 99.9}, {"method": "mse"}, {"method": "entropy"}):
        compute_amax(model, **kwargs)
        report(f"calibrated, {kwargs['method']}", model)
    compute_amax(model, method="percentile", percentile=99.99)
    report("calibrated, percentile 99.99", model)
    for name in ("conv1.input_quantizer", "conv1.weight_quantizer", "layer1.0.residual_quantizer"):
        print(f"    {name:29}: {model.get_submodule(name)}")

    # a hundredth of the learning rate, down half a cosine; scales stand still
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0005, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, qat_epochs, eta_min=5e-6)
    for _ in range(qat_epochs):
        train_one_epoch(model, train, optimizer)
        schedule.step()
    report("fine-tuned", model)

    images, _ = next(iter(val))
    lq.export.to_onnx(model, images[:2], path)
    print(f"{'ONNX graph':28} {path}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:2])
