"""Small modules, and a Trainer that is quiet, for the tests of callbacks."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, FEATURES, CLASSES = 32, 6, 3


class Tiny(LightningModule):
    """A net with BatchNorm and dropout on tuples ``(x, y)``; remembers the batches it was trained on."""

    def __init__(self, batchnorm: bool = True, lr: float = 0.1) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8) if batchnorm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, CLASSES))
        self.lr = lr
        self.trained_on: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.trained_on.append(x.clone())
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class EndsEpochs(Tiny):
    """Leaves out all but four batches of an epoch, and so Lightning the end of the fifth."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


class TensorBatches(Tiny):
    """Batches that are one tensor."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    validation_step = None


class DictBatches(Tiny):
    """Batches that are dicts with more than ``forward`` takes."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(x if mask is None else x * mask)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"], batch["mask"]), batch["y"])

    validation_step = None


class NoForward(LightningModule):
    """The quickstart's style: layers used in ``training_step``, no ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(FEATURES, 4), nn.Linear(4, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def dataset(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, FEATURES, generator=generator) * torch.tensor([1.0, 5, 1, 0.2, 1, 1])
    return TensorDataset(x, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def loader(shuffle: bool = False, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size, shuffle=shuffle, **options)


def trainer(folder: Any, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))
