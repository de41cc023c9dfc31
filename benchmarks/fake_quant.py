"""Fake quantization, forward and backward, against a copy, torch's own operators and, where they are installed, peers.

    python benchmarks/fake_quant.py [--rounds 21] [--threads 1] [--reuse] [--device cuda] [--dtype bfloat16] [--gib 1]
                                    [--no-compile]

Forward reads a tensor and writes one, backward reads two and writes one: no implementation can be quicker than 2.5 copies of a
tensor take, once it lies in memory and not in a cache. Columns: milliseconds forward, and forward and backward together; their
ratio to torch's own operator (to the copies, where torch has none for the case); and ``bandwidth``: these 2.5 copies over the
time that it took. ``multiply`` is the least that autograd can do. On a CPU most of it all is the system, which hands out fresh
pages for each tensor of over 32 MiB; with ``--reuse`` memory that was freed is used again, as on a GPU. The last table is what a
call costs that has next to no data.

Peers belong into a virtual environment of their own: ``pip install -e . nvidia-modelopt requests huggingface_hub``.
(pytorch-quantization needs a compiled extension that it does not bring for present Pythons.)
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable

import torch
from timing import describe_machine, interleaved, reuse_memory
from torch import Tensor

import lq
from lq.analysis.tables import Table
from lq.functional.affine import fake_quant_affine
from lq.functional.amax import compute_amax
from lq.functional.blocks import block_axis, split_blocks
from lq.functional.fake_quant import fake_quant

Contenders = dict[str, Callable[[Tensor], Tensor]]
PEERS = {"ModelOpt": "modelopt.torch.quantization.tensor_quant", "pytorch-quantization": "pytorch_quantization.tensor_quant"}
BLOCK = 32
COLUMNS = ["Contender", "forward", "with backward", "ratio", "bandwidth"]


class _Copy(torch.autograd.Function):
    """One copy forward, one backward, and nothing that autograd has to look at."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.clone()


# Contenders of each case, given x


def integers(x: Tensor, amax: Tensor, compiled: bool = True) -> Contenders:
    """8 bits, with an amax ``()`` or one for each index of the first dimension."""

    def ours(x: Tensor) -> Tensor:
        return fake_quant(x, amax, 8, False, True)

    scale = (amax / 127).flatten()
    if amax.numel() == 1:
        zero, steps = torch.zeros(1, dtype=torch.int32, device=x.device), scale
        found: Contenders = {"torch": lambda x: torch.fake_quantize_per_tensor_affine(x, steps, zero, -127, 127)}
    else:
        zero = torch.zeros(len(scale), dtype=torch.int32, device=x.device)
        found = {"torch": lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -127, 127)}
    found |= {"lq": ours} | ({"lq, compiled": torch.compile(ours)} if compiled else {})
    for name, path in PEERS.items():
        if peer := _imported(path):
            arguments = (amax, None) if name == "ModelOpt" else (amax,)
            found[name] = lambda x, peer=peer, arguments=arguments: peer.fake_tensor_quant(x, *arguments, 8, False, True)
    return found


def affine(x: Tensor) -> Contenders:
    """8 bits between two numbers."""
    low, high = (float(v) for v in x.aminmax())
    scale, zero = (high - low) / 255, round(-low / (high - low) * 255)
    bounds = torch.tensor([low, high], device=x.device)
    return {
        "torch": lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255),
        "lq": lambda x: fake_quant_affine(x, bounds[0], bounds[1], 8),
    }


def floats(x: Tensor, compiled: bool = True) -> Contenders:
    """FP8 E4M3, for which torch has no operator."""
    amax = compute_amax(x, None)

    def ours(x: Tensor) -> Tensor:
        return fake_quant(x, amax, (4, 3), False, True)

    found: Contenders = {"lq": ours} | ({"lq, compiled": torch.compile(ours)} if compiled else {})
    for name, path in PEERS.items():
        if peer := _imported(path):
            arguments = (amax, None, 4, 3) if name == "ModelOpt" else (amax, 4, 3)
            found[name] = lambda x, peer=peer, arguments=arguments: peer.scaled_e4m3(x, *arguments)
    return found


def cases(device: str, dtype: torch.dtype, gib: float | None, compiled: bool) -> dict[str, tuple[Tensor, Contenders]]:
    """What is quantized, and by what."""
    rows = int(gib * 2**30 / dtype.itemsize / 4096) if gib else 4096
    images = torch.randn(round(64 * rows / 4096) if gib else 64, 256, 28, 28, device=device, dtype=dtype)
    matrix = torch.randn(rows, 4096, device=device, dtype=dtype)
    blocks = split_blocks(matrix, BLOCK).flatten(0, 1)
    return {
        "per tensor": (images, integers(images, compute_amax(images, None), compiled)),
        "per channel, axis 0": (matrix, integers(matrix, compute_amax(matrix, 0), compiled)),
        f"blocks of {BLOCK}": (blocks, integers(blocks, compute_amax(blocks, block_axis(None)), compiled)),
        "affine": (images, affine(images)),
        "FP8 E4M3": (images, floats(images, compiled)),
    }


def _imported(path: str) -> object | None:
    try:
        return importlib.import_module(path)
    except ImportError:
        return None


# What is measured


def measure(x: Tensor, contenders: Contenders, rounds: int) -> list[list[str]]:
    """Rows of a table."""
    x, grad = x.requires_grad_(), torch.randn_like(x)
    contenders = {"copy": _Copy.apply, "multiply": lambda x: x * 0.5, **contenders}
    forward = {name: lambda f=f: f(x) for name, f in contenders.items()}
    both = {f"{name}, both": lambda f=f: torch.autograd.grad(f(x), x, grad) for name, f in contenders.items()}
    # all in one run: what the machine does meanwhile, it does to all
    seconds = interleaved(forward | both, rounds)
    copy = seconds["copy, both"] / 2
    reference = seconds["torch, both"] if "torch" in contenders else 2 * copy
    rows = []
    for name in contenders:
        total = seconds[f"{name}, both"]
        times = [f"{1e3 * seconds[name]:.1f}", f"{1e3 * total:.1f}"]
        rows.append([name, *times, f"{total / reference:.2f}", "" if name == "copy" else f"{2.5 * copy / total:.0%}"])
    return rows


def overhead(device: str, calls: int = 500, repeats: int = 21) -> Table:
    """What a call costs on 16 values, in microseconds."""
    x, grad = torch.randn(4, 4, device=device, requires_grad=True), torch.randn(4, 4, device=device)
    quantizers = {
        "lq.TensorQuantizer": lq.QuantDescriptor(amax=1.0),
        "lq.TensorQuantizer, per channel": lq.QuantDescriptor(axis=0, amax=[1.0] * 4),
        "lq.TensorQuantizer, FP8": lq.QuantDescriptor(num_bits=(4, 3), amax=1.0),
        "lq.TensorQuantizer, blocks": lq.QuantDescriptor(axis=0, block_size=2, amax=[[[1.0]] * 2] * 4),
        "lq.TensorQuantizer, learned": lq.QuantDescriptor(amax=1.0, learn_amax="lsq"),
    }
    contenders: Contenders = {"clone": torch.clone}
    contenders["torch"] = lambda x: torch.fake_quantize_per_tensor_affine(x, 1 / 127, 0, -127, 127)
    contenders |= {name: lq.TensorQuantizer(desc).to(device) for name, desc in quantizers.items()}
    rows = []
    with torch.no_grad():
        evaluated = microseconds({name: lambda f=f: f(x) for name, f in contenders.items()}, calls, repeats)
    forward = microseconds({name: lambda f=f: f(x) for name, f in contenders.items()}, calls, repeats)
    both = microseconds({name: lambda f=f: torch.autograd.grad(f(x), x, grad) for name, f in contenders.items()}, calls, repeats)
    for name in contenders:
        rows.append([name, *(f"{kind[name]:.0f}" for kind in (evaluated, forward, both))])
    columns = ["Call on 4 x 4 values", "no grad (us)", "forward (us)", "with backward (us)"]
    return Table("Overhead", columns, rows)


def microseconds(contenders: dict[str, Callable[[], object]], calls: int, repeats: int) -> dict[str, float]:
    """Of one call: the median over turns of ``calls`` each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            taken[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on cores that others use too, take fewer")
    parser.add_argument("--reuse", action="store_true", help="on a CPU, use memory again that was freed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--gib", type=float, help="size of the tensors; without it 64x256x28x28 and 4096x4096")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.reuse:
        reuse_memory()
    print(describe_machine())
    for name, (x, contenders) in cases(arguments.device, dtype, arguments.gib, not arguments.no_compile).items():
        title = f"{name}, {'x'.join(map(str, x.shape))}, {arguments.dtype}"
        print(f"\n{title}\n\n{Table(title, COLUMNS, measure(x, contenders, arguments.rounds)).markdown()}")
    print(f"\n{overhead(arguments.device).markdown()}")


if __name__ == "__main__":
    main()
