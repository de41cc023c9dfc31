"""What SmoothQuant is worth on a trained encoder, all-MiniLM-L6-v2, and what it does to the ranges of its channels.

    python benchmarks/minilm.py [--peers] [--figure docs/channels.png]

Model, text and fidelity are those of ``lq experiment=minilm`` (:mod:`lq.recipes.minilm`): 128 sentences to calibrate on, 400 held
out. All linear layers are quantized, inputs per tensor and weights per channel, amax by ``max``. ``--peers`` does the same with
ModelOpt's configurations, and needs ``nvidia-modelopt``.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import describe_machine
from torch import Tensor, nn
from torchmetrics.regression import CosineSimilarity

import lq
from lq.analysis.tables import Table
from lq.corrections import weights_bias_correction_
from lq.recipes.minilm import Batch, MiniLM, SentencesDataModule, SimilarityOrder

LAYER = "encoder.encoder.layer.0.intermediate.dense"  # behind a LayerNorm, with the loudest channel of all
PEERS = ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "FP8_DEFAULT_CFG")


def inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def fidelity(model: nn.Module, batches: list[Batch]) -> tuple[float, float, float]:
    """Mean and least cosine to the float embeddings, and the correlation of all pairs' similarities."""
    cosine, order = CosineSimilarity(reduction="none"), SimilarityOrder()
    for batch in batches:
        found = model(*inputs(batch))
        cosine.update(found, batch["embedding"])
        order.update(found, batch["embedding"])
    cosines = cosine.compute()
    return float(cosines.mean()), float(cosines.min()), float(order.compute())


def rescaled(model: nn.Module, batches: list[Batch], alpha: float | str) -> nn.Module:
    calibrator = lq.RescalingCalibrator(model)
    for batch in batches:
        calibrator(*inputs(batch))
    return calibrator.rescale(alpha)


def quantized(model: nn.Module, batches: list[Batch], rules: Any = "int8", target: str | None = None) -> nn.Module:
    model = copy.deepcopy(model)
    model.example_input_array = inputs(batches[0])
    lq.quantize_(model, rules, target=target)
    with lq.calibrating(model, method="max"):
        for batch in batches:
            model(*inputs(batch))
    return model


def candidates(model: nn.Module, batches: list[Batch]) -> Iterator[tuple[str, nn.Module]]:
    yield "INT8, not rescaled", quantized(model, batches)
    for alpha in (0.5, 0.7, 0.85, 0.9, "auto"):
        smooth = rescaled(model, batches, alpha)
        yield f"INT8, alpha {alpha}", (found := quantized(smooth, batches))
    weights_bias_correction_(found, map(inputs, batches))
    yield "INT8, alpha auto, biases corrected", found
    found = quantized(smooth, batches, "int8_attention", target="tensorrt")
    weights_bias_correction_(found, map(inputs, batches))
    yield "INT8, alpha auto, biases corrected, int8_attention", found
    yield "FP8", quantized(model, batches, "fp8")
    yield "FP8, alpha auto", quantized(smooth, batches, "fp8")


def of_modelopt(model: nn.Module, batches: list[Batch]) -> Iterator[tuple[str, nn.Module]]:
    import modelopt
    import modelopt.torch.quantization as mtq

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(*inputs(batch))

    for name in PEERS:
        yield f"ModelOpt {modelopt.__version__}, {name}", mtq.quantize(copy.deepcopy(model), getattr(mtq, name), run)


def channel_ranges(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each input channel of one layer, where they meet the weights, and of the weights."""
    layer, seen = model.get_submodule(LAYER), []

    def collect(module: Any, args: tuple[Tensor, ...]) -> None:
        x = module.input_quantizer(args[0]) if hasattr(module, "input_quantizer") else args[0]
        seen.append(x.abs().flatten(0, -2).amax(0))

    handle = layer.register_forward_pre_hook(collect)
    for batch in batches:
        model(*inputs(batch))
    handle.remove()
    return torch.stack(seen).amax(0), layer.weight.abs().amax(0)


def draw(path: Path, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lq.analysis.figures import BLUE, ORANGE, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.2))
        order = before[0].argsort(descending=True)
        for ax, title, old, new in zip(figure.subplots(1, 2), ("Inputs", "Weights"), before, after, strict=True):
            for values, color, label in ((old, ORANGE, "before"), (new, BLUE, "after")):
                ax.plot(values[order], color=color, linewidth=1, label=label)
            ax.set(title=title, xlabel="channel, the loudest input first", ylabel="largest magnitude", yscale="log")
            ax.legend()
        figure.suptitle(f"all-MiniLM-L6-v2, {LAYER}", fontsize=9)
        figure.savefig(path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="ModelOpt's configurations in place of lq's")
    parser.add_argument("--figure", type=Path, help="draw the ranges of a layer's channels into this PNG")
    arguments = parser.parse_args()
    data, model = SentencesDataModule(), MiniLM().eval()
    data.setup("fit")
    seen = [data.collate(batch) for batch in data.train_batches]
    held_out = list(data.val_dataloader())
    rows = []
    for name, candidate in (of_modelopt if arguments.peers else candidates)(model, seen):
        rows.append([name, *(f"{value:.4f}" for value in fidelity(candidate, held_out))])
        print(*rows[-1], flush=True)
    columns = ["", "mean cosine", "least", "Spearman of all pairs"]
    table = Table("Embeddings of held-out sentences beside the float ones", columns, rows)
    print(f"{describe_machine()}\n\n{table.title}\n\n{table.markdown()}")
    if arguments.figure:
        draw(arguments.figure, channel_ranges(model, seen), channel_ranges(rescaled(model, seen, "auto"), seen))


if __name__ == "__main__":
    main()
