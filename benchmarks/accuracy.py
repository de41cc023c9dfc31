"""Top-1 of ResNet-20 with few bits: lq beside ModelOpt, Brevitas and torchao, on the same images, by the same training loop.

    python benchmarks/accuracy.py --data cifar10.zip --checkpoint resnet20.pt [--bits 8 4 3 2] [--tools lq modelopt ...]
                                  [--epochs 5] [--rate 0.01] [--mirror] [--compile] [--graph] [--seeds 0] [--device cuda]
                                  [--out rows.jsonl] [--limit-batches 3]
    python benchmarks/accuracy.py --table rows.jsonl ...

Every convolution and linear layer has a scale per output channel for its weight and one per tensor for its input; the first
convolution and the classifier keep 8 bits (``peers.py`` says what each tool makes of that). 8 bits are calibrated on 8 train
batches; fewer are then trained: SGD with Nesterov's momentum 0.9, weight decay 1e-4, half a cosine from 0.01 to 0.0001, batches
of 128 random crops and flips, the same ones in the same order for every tool. ``float`` is the float model trained by that
recipe, ``lq-distilled`` has the float model as a teacher beside it, in bfloat16, with ``--mirror`` one that looks at images
mirrored too. ``--epochs 0`` only calibrates, ``--rate`` is where the cosine starts. Every model is looked at as its tool leaves
it, and with statistics of BatchNorm that are estimated anew, as ``conf/experiment/cifar10_low_bits.yaml`` does: behind
calibration on its batches, after each epoch on 50 train batches, and after the last on an epoch of them. (torchao's graphs have
no BatchNorm to do so with.) With ``--graph``, on a GPU, forward and backward come out of a CUDA graph, as launching them one by
one takes longer than computing; not every peer can be captured.

Columns: top-1 on all test images after calibration and after the last epoch, both as they are and with BatchNorm anew, and
after the best epoch (means and standard deviations where there are several seeds), and the seconds of an epoch against those of
``float``, if it is asked for. ``--out`` gets a row as soon as it is known, so that several processes can share the work;
``--table`` prints one table of all their files.

Peers belong into a virtual environment of their own: ``pip install -e .[recipes] nvidia-modelopt brevitas torchao``.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import TOOLS, installed
from timing import describe_machine, timed
from torch import Tensor, nn

from lq.analysis.tables import Table
from lq.corrections import batchnorms, reestimate_batchnorm_
from lq.functional.distill import soft_targets_loss
from lq.recipes.images import Images, load_images
from lq.recipes.resnet_cifar import ResNetCifar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, EVAL_BATCH, CALIBRATION_BATCHES, BATCHNORM_BATCHES = 128, 500, 8, 50
FINAL_RATE = 0.01  # of the first
FLOAT, DISTILLED = "float", "lq-distilled"

Row = dict[str, Any]
Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Data:
    """Both splits on the device, where batches are cropped and flipped too.

    Args:
        path: as ``ImagesDataModule`` takes it.
        device: where to.
        limit: batches of an epoch, and of an evaluation; ``None`` takes all.
    """

    def __init__(self, path: str, device: str, limit: int | None) -> None:
        splits, classes = load_images(path, "~/.cache/lightning-lq")
        train, test = ((x.to(device), y.to(device)) for x, y in (splits["train"], splits["test"]))
        self.train, self.test = Images(train, MEAN, STD, padding=4, flip=True), Images(test, MEAN, STD)
        self.device, self.classes = device, len(classes)
        self.steps = min(len(self.train) // BATCH, limit or len(self.train))
        self.tests = min(-(-len(self.test) // EVAL_BATCH), limit or len(self.test))

    def epoch(self) -> Batches:
        """Train batches in random order."""
        order = torch.randperm(len(self.train), device=self.device)
        for i in range(self.steps):
            yield self.train.__getitems__(order[i * BATCH : (i + 1) * BATCH])

    def first(self, batches: int, seed: int) -> Iterator[Tensor]:
        """Images of so many train batches, in the order of ``seed``; other random numbers stay as they are."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for (images, _), _ in zip(self.epoch(), range(batches), strict=False):
                yield images

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        """Percentage of the test images that ``model`` is right about; with a limit, of some out of all classes."""
        model.eval()
        chosen = torch.arange(len(self.test), device=self.device)
        if self.tests * EVAL_BATCH < len(self.test):
            chosen = chosen[:: len(self.test) // (self.tests * EVAL_BATCH)]
        right = torch.zeros((), device=self.device)
        for indices in chosen.split(EVAL_BATCH)[: self.tests]:
            images, classes = self.test.__getitems__(indices)
            right += (model(images).argmax(1) == classes).sum()
        return 100 * right.item() / min(len(chosen), self.tests * EVAL_BATCH)


def hard(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(images), classes)


def distilled(teacher: nn.Module, mirror: bool) -> Loss:
    """Cross entropy plus that to the teacher's softened outputs: ``conf/callbacks/distill.yaml``."""

    def loss(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            wanted = teacher(images).float()
            if mirror:
                wanted = (wanted + teacher(images.flip(-1)).float()) / 2
        logits = model(images)
        return F.cross_entropy(logits, classes) + soft_targets_loss(logits, wanted, temperature=4.0)

    return loss


def gradients(model: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor], None]:
    """Forward and backward on a batch: gradients are new ones each time."""

    def run(images: Tensor, classes: Tensor) -> None:
        model.zero_grad()
        loss(model, images, classes).backward()

    return run


def captured(model: nn.Module, loss: Loss, images: Tensor, classes: Tensor) -> Callable[[Tensor, Tensor], None]:
    """:func:`gradients` on batches like the one given, out of a CUDA graph."""
    run = gradients(model, loss)
    x, y, before = images.clone(), classes.clone(), [(buffer, buffer.clone()) for buffer in model.buffers()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are chosen, and memory is there, before anything is captured
            run(x, y)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(model, x, y).backward()
    with torch.no_grad():
        for buffer, value in before:  # BatchNorm has seen the batch
            buffer.copy_(value)

    def replay(images: Tensor, classes: Tensor) -> None:
        x.copy_(images)
        y.copy_(classes)
        graph.replay()

    return replay


def looked_at(name: str, model: nn.Module, data: Data, batches: Iterable[Tensor]) -> dict[str, float]:
    """Top-1 as the model is, under ``name``, and with BatchNorm statistics of ``batches``, which stay."""
    found = {name: data.top1(model)}
    if batchnorms(model):
        reestimate_batchnorm_(model, batches)
        found[f"{name}, anew"] = data.top1(model)
    return found


def fit(
    model: nn.Module, data: Data, arguments: argparse.Namespace, seed: int, loss: Loss
) -> Iterator[tuple[dict[str, float], float]]:
    """Train; after each epoch what is :func:`looked_at`, and its seconds (of training alone)."""
    epochs, rate = arguments.epochs, arguments.rate
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * data.steps, eta_min=FINAL_RATE * rate)
    model.train()  # of exported graphs it returns nothing
    network: nn.Module = torch.compile(model) if arguments.compile else model
    compute = captured(network, loss, *next(data.epoch())) if arguments.graph else gradients(network, loss)
    torch.manual_seed(seed)

    def epoch() -> None:
        for images, classes in data.epoch():
            compute(images, classes)
            optimizer.step()
            schedule.step()

    for left in reversed(range(epochs)):
        model.train()
        seconds = timed(epoch)
        yield looked_at("last", model, data, data.first(BATCHNORM_BATCHES if left else data.steps, seed)), seconds


def measured(
    tool: str, bits: int | None, model: nn.Module, data: Data, arguments: argparse.Namespace, seed: int, of_float: float | None
) -> Row:
    """A row of the table; ``of_float``: seconds of a float epoch."""
    batches = list(data.first(CALIBRATION_BATCHES, seed))
    student = copy.deepcopy(model) if bits is None else TOOLS[tool](model, bits, bits, batches)
    row: Row = {"tool": tool, "bits": bits, "seed": seed, **looked_at("calibrated", student, data, batches)}
    row |= {"epochs": arguments.epochs, "rate": arguments.rate}
    teacher = torch.compile(model) if arguments.compile else model
    loss = distilled(teacher, arguments.mirror) if tool == DISTILLED else hard
    trains = bits != 8 and arguments.epochs
    found = []
    for top1, seconds in fit(student, data, arguments, seed, loss) if trains else ():
        found.append((top1, seconds))
        print(f"{tool}, {name_of(bits)}, after epoch {len(found)}: {top1}, {seconds:.1f} s", file=sys.stderr, flush=True)
    if found:
        row |= found[-1][0] | {"best": max(max(top1.values()) for top1, _ in found)}
        # the first epoch also chooses kernels
        row["seconds"] = statistics.median([s for _, s in found[1:] or found])
        row |= {"ratio": row["seconds"] / (of_float or row["seconds"])} if of_float or tool == FLOAT else {}
    return row | {"machine": describe_machine()}


# The table


def name_of(bits: int | None) -> str:
    return "float" if bits is None else f"W{bits}A{bits}"


def cell(rows: list[Row], key: str) -> str:
    """Mean, and standard deviation over seeds."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(rows: list[Row]) -> Table:
    groups: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["tool"]), []).append(row)
    order = [FLOAT, *TOOLS]
    keys = sorted(groups, key=lambda key: (-(key[0] or 99), order.index(key[1])))
    epochs = max((row["epochs"] for row in rows), default=0)
    measures = {
        "calibrated": "Calibrated",
        "calibrated, anew": "BatchNorm anew",
        "last": f"After {epochs} epochs",
        "last, anew": "BatchNorm anew",
        "best": "Best epoch",
        "ratio": "Epoch / float",
    }
    columns = ["Model", "Tool", "Seeds", *measures.values()]
    cells = [
        [name_of(bits), tool, str(len(found)), *(cell(found, key) for key in measures)]
        for (bits, tool), found in ((key, groups[key]) for key in keys)
    ]
    return Table("Top-1 on the test images, %", columns, cells)


def rows_of(arguments: argparse.Namespace) -> Iterator[Row]:
    """Train and evaluate all that is asked for."""
    data = Data(arguments.data, arguments.device, arguments.limit_batches)
    model = ResNetCifar(num_classes=data.classes)
    model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True, map_location="cpu"))
    model.to(data.device).eval()
    for seed in arguments.seeds:
        options = (model, data, arguments, seed)
        baseline = measured(FLOAT, None, *options, None) if FLOAT in arguments.tools else {}
        yield from [baseline] * bool(baseline)
        for bits in arguments.bits:
            for tool in arguments.tools:
                if tool != FLOAT and not (bits == 8 and tool == DISTILLED):
                    yield measured(tool, bits, *options, baseline.get("seconds"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a .zip or a folder of images")
    parser.add_argument("--checkpoint", help="the float state dict")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--tools", nargs="+", default=[FLOAT, *TOOLS], choices=[FLOAT, *TOOLS])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.01, help="the first learning rate; the last is a hundredth of it")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is trained, and the teacher")
    parser.add_argument("--mirror", action="store_true", help="the teacher looks at images mirrored too")
    parser.add_argument("--graph", action="store_true", help="forward and backward out of a CUDA graph")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--limit-batches", type=int, help="of an epoch and of an evaluation, to try things out")
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="files of --out to print; runs nothing")
    arguments = parser.parse_args()
    rows = [json.loads(line) for file in arguments.table for line in file.read_text().splitlines()]
    if not arguments.table:
        if arguments.data is None or arguments.checkpoint is None:
            parser.error("--data and --checkpoint are needed: images and the float weights to start from")
        missing = [tool for tool in arguments.tools if not installed(tool)]
        for tool in missing:
            print(f"{tool} is not installed: its rows are left out.")
        arguments.tools = [tool for tool in arguments.tools if tool not in missing]
        torch.backends.cudnn.benchmark = True
        for row in rows_of(arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    found = table(rows)
    print(f"\n{found.title}; {', '.join(sorted({row['machine'] for row in rows}))}\n\n{found.markdown()}")


if __name__ == "__main__":
    main()
