"""A train step with fake quantization against the same step in float: time, memory, and how both grow.

    python benchmarks/qat_step.py [--rounds 15] [--no-compile] [--no-eager] [--large] [--grow] [--processes 1 2]
                                  [--threads 1] [--reuse] [--device cuda] [--bf16] [--check]

A step is forward, backward and SGD with momentum, on random data. Networks: ResNet-20 on 128 images of 32 x 32, and an encoder
of 4 layers of width 256 on 32 x 64 tokens. With ``--large``, for GPUs, they are ResNet-50 on 128 images of 224 x 224, channels
last, and an encoder of 12 layers of width 768 on 64 x 512 tokens. Every convolution and linear layer quantizes its input per
tensor and its weight per channel; with ``target tensorrt`` layers that take one tensor quantize it once, and the shortcuts of
residual adds are quantized. All contenders of a table take turns in one process. Columns: the median of a step, the median of its
ratio to the float step of the same turn, and the most memory that a step allocates, against float's. ``with QuantMonitor`` logs
every 50th step, as the Trainer does; its ratio is spread over them. ``products`` multiplies by a number where the others
quantize: one read and one write each way, less than which nothing can do. ``--grow`` prints the ratio against
batch size, channels and layers, ``--processes`` under DDP. ``--check`` fails where a ratio has left wide bounds, in less than a
minute.

Peers belong into a virtual environment of their own: ``pip install -e . nvidia-modelopt requests huggingface_hub``.
"""

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from fake_quant import integers, measure
from monitor import EVERY, Module, watched
from networks import EncoderLayer
from timing import describe_machine, reuse_memory, timed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import lq
from lq.analysis.tables import Table
from lq.functional.amax import compute_amax
from lq.nn.recompute import recompute_
from lq.recipes.resnet import BasicBlock, ResNet, resnet50
from lq.surgery import named_quantizers

Step = Callable[[], object]
PEER = "ModelOpt" if importlib.util.find_spec("modelopt") else None
# what no change may make of a ratio on any machine, however busy: the first two are 0.2 to 0.6 on an idle one, and were 1.0 once
BOUNDS = {"per tensor": 0.9, "per channel": 0.9, "ResNet-20": 1.6, "encoder": 1.6, "memory": 1.8, "memory, recomputing": 1.2}


def resnet(batch: int = 128, width: int = 16, blocks: int = 3) -> tuple[nn.Module, Tensor]:
    """ResNet-20 and a batch: ``6 * blocks + 2`` layers."""
    model = ResNet(BasicBlock, (blocks,) * 3, width=width, small=True, channels=3, num_classes=10)
    return model, torch.randn(batch, 3, 32, 32)


def encoder(batch: int = 32, width: int = 256, layers: int = 4) -> tuple[nn.Module, Tensor]:
    """An encoder and a batch of 64 tokens each."""
    return nn.Sequential(*(EncoderLayer(width, 4, 4 * width) for _ in range(layers))), torch.randn(batch, 64, width)


def resnet_50() -> tuple[nn.Module, Tensor]:
    """ResNet-50 and 128 images, channels last."""
    images = torch.randn(128, 3, 224, 224).to(memory_format=torch.channels_last)
    return resnet50().to(memory_format=torch.channels_last), images


def encoder_12() -> tuple[nn.Module, Tensor]:
    """The encoder of BERT-base and 64 sequences."""
    return nn.Sequential(*(EncoderLayer(768, 12, 3072) for _ in range(12))), torch.randn(64, 512, 768)


NETWORKS = {"ResNet-20, 128 images": resnet, "encoder, 32x64 tokens": encoder}
LARGE = {"ResNet-50, 128 images": resnet_50, "encoder of 12 layers, 64x512 tokens": encoder_12}


def step(model: nn.Module, x: Tensor, teacher: nn.Module | None = None, bf16: bool = False) -> Step:
    """A train step of ``model``, towards zeros or what ``teacher`` says, which may compute in bfloat16."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        y = model(x)
        if teacher is not None:
            with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
                wanted = teacher(x)
            y = y - wanted
        y.square().mean().backward()
        optimizer.step()

    return run


def quantized(model: nn.Module, x: Tensor, target: str | None = None) -> nn.Module:
    """A calibrated copy."""
    model = lq.quantize_(copy.deepcopy(model), target=target, args=x)
    with lq.calibrating(model):
        model(x)
    return model.train()


def multiplying(model: nn.Module) -> nn.Module:
    """A copy of a quantized model in which each quantizer only multiplies: what eager operators cannot go below."""
    model = copy.deepcopy(model)
    for _, quantizer in named_quantizers(model):
        quantizer.forward = lambda x: x * 0.5  # type: ignore[method-assign]
    return model


def of_peer(model: nn.Module, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda m: m(x)).train()


# What is measured


def ratios(contenders: dict[str, Step], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds, and median ratio to the first contender of the same turn; they drift together."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            seconds[name].append(timed(run))
    first = next(iter(seconds.values()))[1:]
    return {
        name: (statistics.median(values[1:]), statistics.median(v / f for v, f in zip(values[1:], first, strict=True)))
        for name, values in seconds.items()
    }


def peak(run: Step, device: str) -> int:
    """Bytes that a step has allocated at most, beside what was there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def steps(name: str, model: nn.Module, x: Tensor, device: str, compiled: bool, rounds: int) -> Table:
    """A table of contenders."""
    model, x = model.to(device).train(), x.to(device)
    models, teacher = {"float": model, "lq": quantized(model, x)}, copy.deepcopy(model).eval()
    models["lq, target tensorrt"] = quantized(model, x, "tensorrt")
    models["lq, recomputing"] = recompute_(copy.deepcopy(models["lq"]))
    models["lq, target tensorrt, recomputing"] = recompute_(copy.deepcopy(models["lq, target tensorrt"]))
    if not compiled:
        models["products"] = multiplying(models["lq"])
    if PEER and not compiled:  # in compiled code they break the graph at each quantizer
        models[PEER] = of_peer(model, x)
    if compiled:
        models, teacher = {name: torch.compile(m) for name, m in models.items()}, torch.compile(teacher)
    runs = {name: step(m, x) for name, m in models.items()}
    for key, bf16 in {"lq, with a teacher": False, "lq, with a teacher in bfloat16": True}.items():
        runs[key] = step(models["lq"], x, teacher, bf16)
    if not compiled:
        runs["lq, a step that QuantMonitor logs"] = watched(Module(copy.deepcopy(model), x), x)
    found = ratios(runs, rounds)
    memory = {key: peak(run, device) for key, run in runs.items()}
    rows = []
    for key, (seconds, ratio) in found.items():
        rows.append([key, f"{1e3 * seconds:.0f}", f"{ratio:.2f}", f"{memory[key] / memory['float']:.2f}"])
    if not compiled:
        of_lq, logged = found["lq"][1], rows.pop()
        spread = of_lq + (float(logged[2]) - of_lq) / EVERY
        rows.append(["lq, with QuantMonitor", "", f"{spread:.2f}", ""])
    return Table(f"{name}, {'compiled' if compiled else 'eager'}", ["Step", "ms", "ratio", "memory"], rows)


GROWTH: dict[str, tuple[Callable[..., tuple[nn.Module, Tensor]], str, tuple[int, ...]]] = {
    "ResNet-20, images": (resnet, "batch", (8, 32, 128)),
    "ResNet-20, channels of the first stage": (resnet, "width", (8, 16, 32)),
    "ResNet, blocks of a stage": (resnet, "blocks", (1, 3, 6)),
    "encoder, sequences": (encoder, "batch", (4, 16, 64)),
    "encoder, width": (encoder, "width", (128, 256, 512)),
    "encoder, layers": (encoder, "layers", (2, 4, 8)),
}


def growth(device: str, rounds: int) -> Table:
    """Ratio of an eager step to float's, as work grows."""
    rows = []
    for name, (make, argument, values) in GROWTH.items():
        found = []
        for value in values:
            model, x = make(**{argument: value})
            model, x = model.to(device).train(), x.to(device)
            ratio = ratios({"float": step(model, x), "lq": step(quantized(model, x), x)}, rounds)["lq"][1]
            found.append(f"{value}: {ratio:.2f}")
        rows.append([name, *found])
    return Table("As work grows", ["Eager, against float", "small", "", "large"], rows)


def ddp(rank: int, processes: int, rounds: int) -> None:
    """Print the ratio of a step under DDP, on one thread a process, for 32 images each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = "tcp://localhost:29571"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    model, x = resnet(batch=32)
    contenders = {
        "float": step(DistributedDataParallel(model.train()), x),
        "lq": step(DistributedDataParallel(quantized(model, x)), x),
    }
    ratio = ratios(contenders, rounds)["lq"][1]
    if rank == 0:
        print(f"DDP, ResNet-20, 32 images each, {processes} processes: {ratio:.2f}", flush=True)
    torch.distributed.destroy_process_group()


def check() -> int:
    """Count of ratios beyond their bounds."""
    found = {}
    images, matrix = torch.randn(16, 256, 28, 28), torch.randn(2048, 2048)
    for name, x, axis in (("per tensor", images, None), ("per channel", matrix, 0)):
        contenders = {key: run for key, run in integers(x, compute_amax(x, axis)).items() if key in ("torch", "lq")}
        found[name] = float(measure(x, contenders, 11)[-1][3])
    for name, (model, x) in {"ResNet-20": resnet(batch=32), "encoder": encoder(batch=16)}.items():
        ours = quantized(model, x)
        runs = {"float": step(model.train(), x), "lq": step(ours, x), "recomputing": step(recompute_(copy.deepcopy(ours)), x)}
        found[name] = ratios(runs, 11)["lq"][1]
        memory = {key: peak(run, "cpu") for key, run in runs.items()}
        for key, of in {"memory": "lq", "memory, recomputing": "recomputing"}.items():
            found[key] = max(found.get(key, 0), memory[of] / memory["float"])
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}, at most {BOUNDS[name]}{' FAILED' if ratio > BOUNDS[name] else ''}")
    return sum(ratio > BOUNDS[name] for name, ratio in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--large", action="store_true", help="networks for a GPU")
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[], help="numbers of DDP processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on cores that others use too, take fewer")
    parser.add_argument("--reuse", action="store_true", help="on a CPU, use memory again that was freed")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.reuse:
        reuse_memory()
    print(describe_machine())
    if arguments.check:
        sys.exit(check())
    with torch.autocast(arguments.device, torch.bfloat16) if arguments.bf16 else nullcontext():
        for compiled in [False] * (not arguments.no_eager) + [True] * (not arguments.no_compile):
            for name, make in (LARGE if arguments.large else NETWORKS).items():
                table = steps(name, *make(), arguments.device, compiled, arguments.rounds)
                print(f"\n{table.title}\n\n{table.markdown()}", flush=True)
        if arguments.grow:
            print(f"\n{growth(arguments.device, arguments.rounds).markdown()}", flush=True)
    for processes in arguments.processes:
        torch.multiprocessing.spawn(ddp, (processes, arguments.rounds), processes)


if __name__ == "__main__":
    main()
