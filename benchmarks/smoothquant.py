"""What SmoothQuant is worth on models of many builds, beside ModelOpt's where it is installed.

    python benchmarks/smoothquant.py [--rounds 5] [--seeds 3]

Models are transformers' own classes with random weights, and a U-Net; one channel in a hundred of every norm, at least one, is
made 50 times as large, as trained transformers have such channels. All linear layers and convolutions are quantized to INT8,
inputs per tensor and weights per channel, amax by ``max`` on the batch that is measured; "weights only" leaves the inputs of the
model that ``auto`` rescaled in float: no rescaling of inputs gets past it. Figures are means over seeds of weights and data.
Peers belong into a virtual environment of their own: ``pip install -e . transformers nvidia-modelopt requests huggingface_hub``.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import describe_machine, interleaved
from torch import Tensor, nn

import lq
from lq.analysis.quantizer_stats import decibels
from lq.analysis.tables import Table

PEER = "ModelOpt" if importlib.util.find_spec("modelopt") else None
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}


def build(kind: str, base: str | None = None, **config: Any) -> Callable[[], nn.Module]:
    import transformers

    def make() -> nn.Module:
        made = getattr(transformers, f"{kind}Config")(**config)
        if base is None:
            return getattr(transformers, f"{kind}Model")(made)
        return getattr(importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}"), base)(made)

    return make


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = block(3, 32), block(32, 64), nn.ConvTranspose2d(64, 32, 2, 2)
        self.out = nn.Sequential(block(64, 32), nn.Conv2d(32, 4, 1))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        skip = self.down(pixel_values)
        up = self.up(self.deep(nn.functional.max_pool2d(skip, 2)))
        return (self.out(torch.cat([skip, up], 1)),)


def with_outliers(model: nn.Module) -> nn.Module:
    """One channel in a hundred of each norm, 50 times as large."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            chosen = torch.randperm(len(weight))[: max(1, len(weight) // 100)]
            weight.data[chosen] *= 50
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 1000, (8, 64))}


def images(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(8, 3, size, size)}


def pairs() -> dict[str, Tensor]:
    return {**ids(), "decoder_input_ids": torch.randint(0, 1000, (8, 64))}


def models() -> dict[str, Case]:
    t5 = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 2, "num_heads": 8, "feed_forward_proj": "gated-gelu"}
    whisper = {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 8, "encoder_ffn_dim": 1024}
    conv_stages = {"hidden_sizes": [64, 128], "depths": [2, 2]}
    return {
        "ViT": (build("ViT", **SIZES, image_size=64, patch_size=8), images(64)),
        "BERT": (build("Bert", vocab_size=1000, **SIZES), ids),
        "GPT-2": (build("GPT2", vocab_size=1000, n_embd=256, n_layer=4, n_head=8), ids),
        "LLaMA": (build("Llama", vocab_size=1000, num_key_value_heads=2, **SIZES), ids),
        "T5": (build("T5", vocab_size=1000, **t5), pairs),
        "Whisper encoder": (
            build("Whisper", "WhisperEncoder", **whisper, max_source_positions=64, num_mel_bins=40),
            lambda: {"input_features": torch.randn(8, 40, 128)},
        ),
        "ConvNeXt": (build("ConvNext", **conv_stages, num_stages=2, image_size=128), images(128)),
        "ResNet": (build("ResNet", embedding_size=32, **conv_stages), images(128)),
        "MobileNetV2": (build("MobileNetV2", image_size=128, depth_multiplier=0.5), images(128)),
        "U-Net": (UNet, images(64)),
    }


def sqnr(output: Tensor, expected: Tensor) -> float:
    return decibels(expected.double().square().sum().item(), (output - expected).double().square().sum().item())


def quantized_output(model: nn.Module, inputs: dict[str, Tensor], rules: str = "int8") -> Tensor:
    lq.quantize_(model, rules)
    with lq.calibrating(model):
        model(**inputs)
    output: Tensor = model(**inputs)[0]
    return output


def peer_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    import modelopt.torch.quantization as mtq

    with contextlib.redirect_stdout(io.StringIO()):
        model = mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda m: m(**inputs))
    output: Tensor = model(**inputs)[0]
    return output


def fidelity(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """SQNR of the output of a model that is quantized in several ways."""
    outputs = {"not rescaled": quantized_output(copy.deepcopy(model), inputs)}
    for alpha in (0.5, "auto"):
        rescaled = lq.RescalingCalibrator(model, kwargs=inputs).rescale(alpha)
        outputs[f"alpha {alpha}"] = quantized_output(copy.deepcopy(rescaled), inputs)
    if PEER:
        outputs[PEER] = peer_output(copy.deepcopy(model), inputs)
    outputs["weights only"] = quantized_output(rescaled, inputs, "int8_weight_only")
    expected = model(**inputs)[0]
    return {name: sqnr(output, expected) for name, output in outputs.items()}


def measure(name: str, case: Case, rounds: int, seeds: int) -> list[str]:
    make, data = case
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, inputs = with_outliers(make().eval()), data()
        found.append(fidelity(model, inputs))
    calibrator = lq.RescalingCalibrator(model, kwargs=inputs)
    seconds = interleaved({"float": lambda: model(**inputs), "collect": lambda: calibrator(**inputs)}, rounds)
    calibrator.rescale(0.5)
    actions = [group.action for group in calibrator.groups]
    means = {key: sum(values[key] for values in found) / seeds for key in found[0]}
    cost = f"{seconds['collect'] / seconds['float']:.2f}"
    return [name, *(f"{mean:.1f}" for mean in means.values()), f"{actions.count('folded')} of {len(actions)}", cost]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(describe_machine())
    rows = [measure(name, case, arguments.rounds, arguments.seeds) for name, case in models().items()]
    columns = [
        "Model",
        "not rescaled",
        "alpha 0.5",
        "auto",
        *([PEER] if PEER else []),
        "weights only",
        "groups folded",
        "collect / float",
    ]
    table = Table("SQNR of the INT8 model's output, dB", columns, rows)
    print(f"\n\n{table.title}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
