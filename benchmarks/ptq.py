"""Post-training quantization of three networks: each field of the config alone and all together, beside MCT where installed.

    python benchmarks/ptq.py [--networks digits mobilenet transformer] [--bits 8 6 4]

All three are trained on scikit-learn's digits first, in about two minutes. MCT (Sony's Model Compression Toolkit) belongs into a
virtual environment of its own: ``pip install -e . model-compression-toolkit``. It quantizes what layers give, behind what it
fuses, and the sums of residual adds; here it is what layers take. Thresholds are symmetric, per channel for weights.
"""

import argparse
import copy
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from networks import EncoderLayer, MobileNetV2
from timing import describe_machine
from torch import Tensor, nn
from torch.nn import functional as F

from lq import QuantizationConfig, post_training_quantization
from lq.analysis.quantizer_stats import decibels
from lq.analysis.tables import NOTHING, Table
from lq.recipes.digits import DigitsClassifier, DigitsDataModule

PEER = importlib.util.find_spec("model_compression_toolkit") is not None
# What is switched on beside the thresholds; the names are those of our fields.
ALL = (
    "weights_bias_correction",
    "activation_channel_equalization",
    "relu_unbound_correction",
    "input_scaling",
    "shift_negative_activation_correction",
)
# The same in MCT for PyTorch, where one has another name and one does not exist.
THEIRS = {name: name for name in ALL if name != "input_scaling"} | {"relu_unbound_correction": "relu_bound_to_power_of_2"}
ROWS: dict[str, tuple[str, ...]] = {"none": (), **{name: (name,) for name in ALL}, "all": ALL}
RATIO = 0.25


class Small(MobileNetV2):
    """MobileNetV2 with fewer stages, for images of 32 x 32, with ReLU for ReLU6: factors pass through it."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 1))

    def __init__(self) -> None:
        super().__init__(num_classes=10)
        for block in [m for m in self.modules() if isinstance(m, nn.Sequential)]:
            for name, child in block.named_children():
                if isinstance(child, nn.ReLU6):
                    block[int(name)] = nn.ReLU()
        self.features[0][0] = nn.Conv2d(1, 32, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=4.0))


class Transformer(nn.Module):
    """A digit's eight rows as tokens, two encoder layers, their mean."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, 4, 4 * width) for _ in range(2)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embed(x.flatten(1, 2)) + self.place).mean(1))
        return y


@torch.no_grad()
def badly_scaled_(model: nn.Module, spread: float = 1.0) -> nn.Module:
    """Channels of widened convolutions by factors between ``10 ** -spread`` and ``10 ** spread``; the next layer undoes it."""
    generator = torch.Generator().manual_seed(2)
    for block in [m.conv for m in model.modules() if hasattr(m, "has_shortcut") and len(m.conv) == 4]:
        for first, second in ((block[0][1], block[1][0]), (block[1][1], block[2])):
            factors = 10 ** (spread * (2 * torch.rand(first.num_features, generator=generator) - 1))
            first.weight *= factors
            first.bias *= factors
            second.weight /= factors.reshape(-1, 1, 1, 1) if second.groups > 1 else factors.reshape(1, -1, 1, 1)
    return model


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 12) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(images) // 64 + 1))
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits": DigitsClassifier, "mobilenet": Small, "transformer": Transformer}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to test on."""
    data = DigitsDataModule()
    data.prepare_data()
    data.setup("fit")
    parts = [
        torch.utils.data.default_collate(list(part)) for part in (data.train_dataloader().dataset, data.val_dataloader().dataset)
    ]
    (x, y), (u, v) = parts
    return x, y, u, v


# Ours and MCT's


def ours(model: nn.Module, batches: list[Tensor], bits: int, fields: tuple[str, ...]) -> nn.Module:
    switched = {name: name in fields for name in ALL}
    config = QuantizationConfig(activation_n_bits=bits, weights_n_bits=bits, shift_negative_ratio=RATIO, **switched)
    quantized, _ = post_training_quantization(model, batches, config)
    return quantized


def of_peer(model: nn.Module, batches: list[Tensor], bits: int, fields: tuple[str, ...]) -> nn.Module:
    import model_compression_toolkit as mct

    logging.getLogger("MCT").setLevel(logging.ERROR)
    switched = {theirs: name in fields for name, theirs in THEIRS.items()}
    config = mct.core.QuantizationConfig(shift_negative_ratio=RATIO, **switched)
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        copy.deepcopy(model),
        lambda: ([batch] for batch in batches),
        core_config=mct.core.CoreConfig(config),
        target_platform_capabilities=platform(bits),
    )
    return quantized


def platform(bits: int) -> Any:
    """What MCT quantizes: symmetric activations behind what is fused, weights per channel."""
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.constants import FLOAT_BITWIDTH
    from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

    def attribute(enabled: bool, width: int) -> Any:
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=width,
            weights_per_channel_threshold=True,
            enable_weights_quantization=enabled,
        )

    def operators(attributes: dict[str, Any]) -> Any:
        return schema.OpQuantizationConfig(
            default_weight_attr_config=attribute(False, FLOAT_BITWIDTH),
            attr_weights_configs_mapping=attributes,
            activation_quantization_method=QuantizationMethod.SYMMETRIC,
            activation_n_bits=bits,
            supported_input_activation_n_bits=bits,
            enable_activation_quantization=True,
            quantization_preserving=False,
            fixed_scale=None,
            fixed_zero_point=None,
            simd_size=32,
            signedness=schema.Signedness.AUTO,
        )

    layers = operators({KERNEL_ATTR: attribute(True, bits), BIAS_ATTR: attribute(False, FLOAT_BITWIDTH)})
    kinds = schema.OperatorSetNames
    options = schema.QuantizationConfigOptions(quantization_configurations=(layers,))
    kernels = [
        schema.OperatorsSet(name=name, qc_options=options) for name in (kinds.CONV, kinds.DEPTHWISE_CONV, kinds.FULLY_CONNECTED)
    ]
    others = [schema.OperatorsSet(name=name) for name in (kinds.BATCH_NORM, kinds.RELU, kinds.GELU)]
    norm, *activations = others
    group = schema.OperatorSetGroup(operators_set=activations)
    fused = [(kernel, *rest) for kernel in kernels for rest in ((norm, group), (norm,), (group,))]
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(operators({}),)),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="benchmark",
        operator_set=(*kernels, *others),
        fusing_patterns=tuple(schema.Fusing(operator_groups=pattern) for pattern in fused),
        add_metadata=False,
    )


# What is measured


@torch.no_grad()
def measured(model: nn.Module, expected: Tensor, images: Tensor, labels: Tensor) -> list[str]:
    """SQNR of the output in dB, and accuracy in percent."""
    output = model(images)
    noise = (output.double() - expected.double()).square().sum()
    sqnr = decibels(float(expected.double().square().sum()), float(noise))
    return [f"{sqnr:.1f}", f"{100 * (output.argmax(1) == labels).float().mean():.2f}"]


def of_peer_or_why(
    model: nn.Module, batches: list[Tensor], bits: int, fields: tuple[str, ...], data: tuple[Tensor, Tensor, Tensor]
) -> list[str]:
    try:
        return measured(of_peer(model, batches, bits, fields), *data)
    except Exception as error:  # whatever it is, the other rows go on
        print(f"MCT: {type(error).__name__}: {str(error).splitlines()[-1].strip()}", file=sys.stderr)
        return ["fails", "fails"]


def table(name: str, bits: list[int]) -> Table:
    torch.manual_seed(0)
    x, y, images, labels = digits()
    model = trained(NETWORKS[name](), x, y)
    if name == "mobilenet":
        badly_scaled_(model)
    batches = list(x[:256].split(64))
    with torch.no_grad():
        expected = model(images)
    accuracy = 100 * (expected.argmax(1) == labels).float().mean()
    rows = []
    for width in bits:
        for row, fields in ROWS.items():
            cells = measured(ours(model, batches, width, fields), expected, images, labels)
            if PEER and fields == ("input_scaling",):
                cells += [NOTHING, NOTHING]
            elif PEER:
                cells += of_peer_or_why(model, batches, width, fields, (expected, images, labels))
            rows.append([str(width), row, *cells])
            print(name, *rows[-1], file=sys.stderr, flush=True)
    columns = ["Bits", "Switched on", "SQNR (dB)", "Accuracy (%)", *["MCT's SQNR (dB)", "MCT's accuracy (%)"] * PEER]
    return Table(f"{name}, float {accuracy:.2f} %", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 4])
    args = parser.parse_args()
    tables = [table(name, args.bits) for name in args.networks]
    print(f"\n{describe_machine()}\n")
    for found in tables:
        print(f"{found.title}\n\n{found.markdown()}\n")


if __name__ == "__main__":
    main()
