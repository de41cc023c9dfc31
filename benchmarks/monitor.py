"""What QuantMonitor costs a train step: one that it logs, and spread over the Trainer's 50 steps between two logs.

    python benchmarks/monitor.py [--rounds 15] [--device cuda]

Both contenders are the same step (forward, backward, SGD) of the same quantized model, with the monitor's two hooks around it or
without. Its logger throws away what it gets: what a logger costs is the logger's.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from timing import describe_machine, interleaved
from torch import Tensor, nn

import lq
from lq.analysis.tables import Table
from lq.callbacks import QuantMonitor
from lq.recipes.resnet import BasicBlock, ResNet

EVERY = 50  # the Trainer's log_every_n_steps


class Module(LightningModule):
    """A quantized, calibrated net; its loss is the mean square of what comes out."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net = lq.quantize_(net).to(x.device).train()
        with lq.calibrating(self):
            self.net(x)
        self.optimizer = torch.optim.SGD(self.parameters(), 1e-6)

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.net(x).square().mean().backward()
        self.optimizer.step()


def models(device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """What is trained, and on which batch."""
    resnet = ResNet(BasicBlock, (3, 3, 3), width=16, small=True, channels=3, num_classes=10)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 4, enable_nested_tensor=False)
    return {
        "ResNet-20, 128x3x32x32": (resnet, torch.randn(128, 3, 32, 32, device=device)),
        "encoder (d=256, 4 layers), 8x64 tokens": (encoder, torch.randn(8, 64, 256, device=device)),
    }


def watched(module: Module, x: Tensor) -> Callable[[], None]:
    """A step that the monitor logs."""
    monitor, logger = QuantMonitor(every_n_steps=1, warn_saturated=None), SimpleNamespace(log_metrics=lambda metrics, step: None)
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=0, is_global_zero=True)

    def run() -> None:
        trainer.global_step += 1
        monitor.on_train_batch_start(trainer, module, x, 0)
        module.step(x)
        monitor.on_train_batch_end(trainer, module, None, x, 0)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, (net, x) in models(arguments.device).items():
        module = Module(net, x)
        seconds = interleaved({"plain": lambda m=module, x=x: m.step(x), "watched": watched(module, x)}, arguments.rounds)
        ratio = seconds["watched"] / seconds["plain"]
        quantizers = sum(1 for _ in lq.named_quantizers(module))
        figures = [f"{seconds['plain'] * 1e3:.1f}", f"{ratio:.3f}", f"{1 + (ratio - 1) / EVERY:.4f}"]
        rows.append([name, str(quantizers), *figures])
    columns = ["Model", "Quantizers", "Step (ms)", "Logged step (ratio)", f"Logged every {EVERY} (ratio)"]
    table = Table("QuantMonitor", columns, rows)
    print(f"{describe_machine()}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
