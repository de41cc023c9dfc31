"""Handwritten digits: a small convolutional net on scikit-learn's bundled 8x8 images, trained from scratch in seconds.

The recipe has the two parts that every recipe has, a ``LightningDataModule`` and a ``LightningModule``, and no line about
quantization: ``lq`` gets into the training through a callback. It needs no download and no GPU:

    trainer = Trainer(max_epochs=15)
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule())
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

# mean and standard deviation of a pixel (0 to 16) over the whole data set
MEAN, STD = 4.884, 6.017
BACKGROUND = -MEAN / STD


class DigitsDataModule(LightningDataModule):
    """1797 images of handwritten digits as ``(image, label)``: float32 ``(1, 8, 8)``, normalised, and int64.

    Args:
        batch_size: images in a train batch; validation takes its whole split at once.
        val_fraction: share of the images that is held out, the same for every digit.
        num_workers: processes that load; the data lies in memory, so none is fastest.
        seed: of the split, apart from the seed of the training, so that every run validates on the same images.
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.25, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) - MEAN) / STD
        digits = torch.tensor(labels, dtype=torch.int64)
        train, val = train_test_split(
            np.arange(len(digits)), test_size=self.hparams["val_fraction"], random_state=self.hparams["seed"], stratify=labels
        )
        self.train_set = TensorDataset(images[train], digits[train])
        self.val_set = TensorDataset(images[val], digits[val])

    def train_dataloader(self) -> DataLoader[Any]:
        # drop the short last batch: BatchNorm statistics of a few images are noise, and the next epoch shuffles others there
        return DataLoader(
            self.train_set, self.hparams["batch_size"], shuffle=True, drop_last=True, num_workers=self.hparams["num_workers"]
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=len(self.val_set), num_workers=self.hparams["num_workers"])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        return y


class DigitsClassifier(LightningModule):
    """Images ``(batch, 1, 8, 8)`` to ten logits.

    Args:
        width: channels at full resolution; twice as many after pooling.
        lr: peak learning rate, from which a cosine goes down to zero.
        weight_decay: of all parameters.
    """

    def __init__(self, width: int = 32, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = ResidualBlock(width)
        self.pool = nn.MaxPool2d(2)
        self.widen = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 10)
        # micro: the share of all images, not the mean of ten shares
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.block(self.stem(images)))
        logits: Tensor = self.head(self.average(self.widen(x)).flatten(1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(random_shift(images)), digits)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, digits = batch
        logits = self(images)
        self.val_acc(logits, digits)
        self.log("val_loss", F.cross_entropy(logits, digits), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self.parameters(), self.hparams["lr"], momentum=0.9, nesterov=True, weight_decay=self.hparams["weight_decay"]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def random_shift(images: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels along both sides, with background where nothing is left."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), value=BACKGROUND)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(3, (2, len(images)), device=images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]
