"""Calibration against plain torch and, where it is installed, ModelOpt: collecting, and choosing amax.

    python benchmarks/calibration.py [--rounds 7] [--peer-histograms 1]

A peer's search over all 22 histograms takes minutes, so it runs on ``--peer-histograms`` of them and is scaled up. Peers belong
into a virtual environment of their own: ``pip install -e . nvidia-modelopt requests huggingface_hub``. (pytorch-quantization
needs a compiled extension that it does not bring for present Pythons; ModelOpt's calibrators are its code.)
"""

import argparse
import importlib.util
import resource
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from timing import describe_machine, interleaved, timed
from torch import Tensor, nn

import lq
from lq.analysis.tables import Table
from lq.calib import AffineCalibrator, HistogramCalibrator, compute_amaxs
from lq.calibration import observe_
from lq.recipes.resnet import BasicBlock, ResNet, resnet50
from lq.surgery import unquantized

METHODS = {"entropy": {}, "kl": {}, "mse": {}, "mae": {}, "lp": {"p": 2.4}, "percentile": {}, "auto": {}}
PEER = "ModelOpt" if importlib.util.find_spec("modelopt") else None


def resnet20() -> ResNet:
    """22 convolution and linear layers on 32 x 32 images, with BatchNorm statistics of the data below."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (3, 3, 3), width=16, small=True, channels=3, num_classes=10)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 32, 32))
    return model.eval()


def input_histograms(model: nn.Module, x: Tensor) -> list[HistogramCalibrator]:
    """One calibrator for each quantized input of ``model``, after one batch."""
    quantized = lq.quantize_(model)
    with lq.calibrating(quantized, method="mse"):
        quantized(x)
    return [q.calibrator for _, q in lq.named_quantizers(quantized) if isinstance(q.calibrator, HistogramCalibrator)]


def peer_calibrator() -> Any:
    from modelopt.torch.quantization.calib import HistogramCalibrator as Peer

    return Peer(num_bits=8, axis=None, unsigned=False, num_bins=2048)


def of_peer(x: Tensor) -> Any:
    calibrator = peer_calibrator()
    calibrator.collect(x)
    return calibrator


# What is measured


def searches(rounds: int, peer_histograms: int) -> Table:
    """From the 22 histograms of a ResNet-20 to 22 amax."""
    ours = input_histograms(resnet20(), torch.randn(128, 3, 32, 32))
    run = {name: lambda name=name, o=options: compute_amaxs(ours, name, **o) for name, options in METHODS.items()}
    seconds = interleaved(run, rounds)
    rows = []
    for name in METHODS:
        row = [name, f"{seconds[name]:.3f}"]
        if PEER:
            row += peer_search(name, len(ours), peer_histograms, seconds[name])
        rows.append(row)
    affine = []
    for i in range(len(ours)):
        affine.append(AffineCalibrator())
        affine[-1].collect(torch.nn.functional.silu(torch.randn(100_000) * (i + 1)))
    for name in ("mse", "mae", "kl"):
        total = sum(interleaved({name: lambda c=c, name=name: c.compute_range(name)}, 1)[name] for c in affine)
        rows.append([f"{name}, affine range, one by one", f"{total:.3f}", *["-"] * (2 if PEER else 0)])
    columns = ["Method", "lq (s)", *([f"{PEER} (s)", "ratio"] if PEER else [])]
    return Table(f"{len(ours)} histograms of ResNet-20 to amax", columns, rows)


def peer_search(method: str, histograms: int, measured: int, ours: float) -> list[str]:
    if method not in ("entropy", "mse", "percentile"):
        return ["-", "-"]
    calibrator = of_peer(torch.randn(1_000_000))
    arguments = {"percentile": 99.99} if method == "percentile" else {}
    theirs = sum(timed(lambda: calibrator.compute_amax(method, **arguments)) for _ in range(measured)) * histograms / measured
    return [f"{theirs:.1f}", f"{ours / theirs:.4f}"]


def many(rounds: int) -> Table:
    """All methods on as many histograms as a ResNet-50 has quantizers, inputs and weights: 161."""
    calibrators = []
    for i in range(161):
        calibrators.append(HistogramCalibrator())
        calibrators[-1].collect(torch.randn(50_000) * (i + 1))
    before = peak_memory()
    seconds = interleaved(
        {"all": lambda: [compute_amaxs(calibrators, m, **o) for m, o in METHODS.items() if m != "auto"]}, rounds
    )
    rows = [["all methods but auto", f"{seconds['all']:.2f}", f"{peak_memory():.2f}", f"{peak_memory() - before:.2f}"]]
    return Table("161 histograms", ["Work", "lq (s)", "Peak of the process (GiB)", "of that, for the searches"], rows)


def peak_memory() -> float:
    """GiB that the process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def collecting(rounds: int, device: str) -> Table:
    """Three tensors into one histogram."""
    batches = list(torch.randn(3, 64, 256, 28, 28, device=device))

    def ours(make: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            calibrator = make()
            for batch in batches:
                calibrator.collect(batch)

        return run

    contenders = {
        "torch.histc(x.abs(), 2048)": lambda: [torch.histc(batch.abs(), 2048) for batch in batches],
        "lq, per tensor": ours(lambda: HistogramCalibrator().to(device)),
        "lq, per channel": ours(lambda: HistogramCalibrator(axis=1).to(device)),
        "lq, both signs (affine)": ours(lambda: AffineCalibrator().to(device)),
    }
    if PEER:
        contenders[PEER] = ours(peer_calibrator)
    return ratios("Collect 3 x 64x256x28x28", interleaved(contenders, rounds))


def passes(rounds: int) -> Table:
    """A pass of ResNet-20 over 128 images."""
    model, x = resnet20(), torch.randn(128, 3, 32, 32)
    largest, histograms = (lq.quantize_(resnet20()) for _ in range(2))
    observe_(largest, "max")
    observe_(histograms, "mse")
    with torch.no_grad(), unquantized(largest), unquantized(histograms), ExitStack() as hooks:
        contenders = {
            "float forward": lambda: model(x),
            "lq, max": lambda: largest(x),
            "lq, histograms": lambda: histograms(x),
        }
        if PEER:
            theirs = resnet20()
            for module in theirs.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    calibrator = peer_calibrator()
                    hook = module.register_forward_pre_hook(lambda _, args, c=calibrator: c.collect(args[0]))
                    hooks.callback(hook.remove)
            contenders[f"{PEER}, histograms"] = lambda: theirs(x)
        return ratios("Collecting pass over ResNet-20, batch 128", interleaved(contenders, rounds))


def gpu_pass(rounds: int) -> list[Table]:
    """A bf16 pass of ResNet-50 on the GPU, and how often it waits for the host."""
    from torch.profiler import profile

    x = torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    model = resnet50().cuda().bfloat16().eval()
    quantized = lq.quantize_(resnet50().cuda().bfloat16().eval())
    observe_(quantized, "mse")
    with torch.no_grad(), unquantized(quantized):
        table = ratios(
            "Collecting pass over ResNet-50, bf16, batch 64",
            interleaved({"bf16 forward": lambda: model(x), "lq, histograms": lambda: quantized(x)}, rounds),
        )
        with profile() as trace:
            quantized(x)
        waits = sum(event.count for event in trace.key_averages() if "Synchronize" in event.key)
    return [table, Table("Synchronizations in a collecting pass", ["Calls"], [[str(waits)]])]


def ratios(title: str, seconds: dict[str, float]) -> Table:
    """Times, and their ratios to the first one."""
    first = next(iter(seconds.values()))
    return Table(title, ["Contender", "ms", "ratio"], [[n, f"{1000 * s:.1f}", f"{s / first:.2f}"] for n, s in seconds.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-histograms", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(describe_machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = [many(arguments.rounds), searches(arguments.rounds, arguments.peer_histograms)]
    measured += [collecting(arguments.rounds, device), passes(arguments.rounds)]
    if device == "cuda":
        measured += gpu_pass(arguments.rounds)
    for table in measured:
        print(f"\n{table.title}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
