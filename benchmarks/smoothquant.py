"""What SmoothQuant is worth on models of many builds, beside ModelOpt's where it is installed.

    python benchmarks/smoothquant.py [--rounds 5]

Models are transformers' own classes with random weights; one channel in a hundred of every norm, at least one, is made 50 times
as large, as trained transformers have such channels. All linear layers and convolutions are quantized to INT8, inputs per tensor
and weights per channel, amax by ``max`` on the batch that is measured. Peers belong into a virtual
environment of their own: ``pip install -e . transformers nvidia-modelopt requests huggingface_hub``.
"""

import argparse
import copy
import importlib.util
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


def build(kind: str, **config: Any) -> Callable[[], nn.Module]:
    import transformers

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
        return with_outliers(model.eval())

    return make


def with_outliers(model: nn.Module) -> nn.Module:
    """One channel in a hundred of each norm, 50 times as large."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            chosen = torch.randperm(len(weight))[: max(1, len(weight) // 100)]
            weight.data[chosen] *= 50
    return model


def models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    ids, images = {"input_ids": torch.randint(0, 1000, (8, 64))}, {"pixel_values": torch.randn(8, 3, 64, 64)}
    larger = {"pixel_values": torch.randn(8, 3, 128, 128)}
    t5 = {"vocab_size": 1000, "d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 2, "num_heads": 8}
    return {
        "ViT": (build("ViT", **SIZES, image_size=64, patch_size=8), images),
        "BERT": (build("Bert", vocab_size=1000, **SIZES), ids),
        "LLaMA": (build("Llama", vocab_size=1000, num_key_value_heads=2, **SIZES), ids),
        "T5": (build("T5", **t5, feed_forward_proj="gated-gelu"), {**ids, "decoder_input_ids": ids["input_ids"]}),
        "ConvNeXt": (build("ConvNext", hidden_sizes=[64, 128], depths=[2, 2], num_stages=2, image_size=128), larger),
        "ResNet": (build("ResNet", embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2]), larger),
    }


def sqnr(output: Tensor, expected: Tensor) -> float:
    return decibels(expected.double().square().sum().item(), (output - expected).double().square().sum().item())


def quantized_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    lq.quantize_(model, "int8")
    with lq.calibrating(model):
        model(**inputs)
    output: Tensor = model(**inputs)[0]
    return output


def peer_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    import modelopt.torch.quantization as mtq

    model = mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda m: m(**inputs))
    output: Tensor = model(**inputs)[0]
    return output


def measure(name: str, make: Callable[[], nn.Module], inputs: dict[str, Tensor], rounds: int) -> list[str]:
    model = make()
    expected = model(**inputs)[0]
    row = [name, f"{sqnr(quantized_output(make(), inputs), expected):.1f}"]
    for alpha in (0.5, "auto"):
        calibrator = lq.RescalingCalibrator(make(), kwargs=inputs, inplace=True)
        row.append(f"{sqnr(quantized_output(calibrator.rescale(alpha), inputs), expected):.1f}")
    if PEER:
        row.append(f"{sqnr(peer_output(make(), inputs), expected):.1f}")
    folded, groups = [group.action for group in calibrator.groups].count("folded"), len(calibrator.groups)
    calibrator = lq.RescalingCalibrator(copy.deepcopy(model), kwargs=inputs, inplace=True)
    seconds = interleaved({"float": lambda: model(**inputs), "collect": lambda: calibrator(**inputs)}, rounds)
    return [*row, f"{folded} of {groups}", f"{seconds['collect'] / seconds['float']:.2f}"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(describe_machine())
    columns = ["Model", "not rescaled (dB)", "alpha 0.5", "auto", *([PEER] if PEER else []), "groups folded", "collect / float"]
    rows = [measure(name, make, inputs, arguments.rounds) for name, (make, inputs) in models().items()]
    table = Table("SQNR of the INT8 model's output", columns, rows)
    print(f"\n{table.title}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
