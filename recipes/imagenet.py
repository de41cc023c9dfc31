"""A classifier to fine-tune on ImageNet, as in NVIDIA's ResNet-50 tutorial:

    lq experiment=imagenet_resnet50 data.path=/imagenet ckpt_path=resnet50-11ad3fa6.pth

:mod:`lq.recipes.resnet_tutorial` has the same steps in plain PyTorch, on digits. The recipe has only been run on the fake images
of :mod:`lq.recipes.imagenet_data`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lq.recipes.imagenet_data import torchvision_module


class ImageNetClassifier(LightningModule):
    """Images ``(batch, 3, height, width)`` to logits, by any net; top-1 and top-5 of all ranks in validation.

    Trained by SGD from ``lr`` half a cosine down to 0. A state dict of ``net`` alone loads too, as torchvision's files have it.

    Args:
        net: images to logits ``(batch, num_classes)``.
        num_classes: logits, at least 5.
        image_size: height and width that the net is traced with.
        lr: the first learning rate.
        momentum: of SGD.
        weight_decay: of all parameters.
        channels_last: lay images and weights out as ``(batch, height, width, channels)``, which tensor cores are fastest with.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 1000,
        image_size: int = 224,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.layout)  # type: ignore[call-overload]
        # micro: the share of all images, not the mean of a share for each class
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.example_input_array = torch.zeros(2, 3, image_size, image_size)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.contiguous(memory_format=self.layout))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self(images), classes)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, classes = batch
        logits = self(images)
        self.val_acc(logits, classes)
        self.val_acc_top5(logits, classes)
        self.log("val_loss", F.cross_entropy(logits, classes), prog_bar=True, sync_dist=True)
        self.log_dict({"val_acc": self.val_acc, "val_acc_top5": self.val_acc_top5}, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        own: Any = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), own["lr"], own["momentum"], weight_decay=own["weight_decay"])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if not any(key.startswith("net.") for key in state_dict):
            state_dict = {f"net.{key}": value for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)


def torchvision_net(name: str = "resnet50", weights: str | None = "DEFAULT", **options: Any) -> nn.Module:
    """A classifier of torchvision's, with its weights, which are downloaded if they are not in torch's cache.

    Args:
        name: of a function in ``torchvision.models``.
        weights: ``"IMAGENET1K_V1"``, ``"IMAGENET1K_V2"``, ``"DEFAULT"`` (the best there are); ``None`` for random ones.
        options: of that function.

    Raises:
        ImportError: torchvision is missing.
        ValueError: it has no such net, or no such weights.
    """
    try:
        net: nn.Module = torchvision_module("models").get_model(name, weights=weights, **options)
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision's {name} with `weights` {weights}: {error}") from error
    return net
