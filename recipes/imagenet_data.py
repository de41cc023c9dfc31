"""ImageNet (ILSVRC 2012) in its folders, for those who have it and torchvision; and fake images, which take neither."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class _Loaders(LightningDataModule):
    """Loaders of ``train_set`` and ``val_set``; Lightning gives each rank its share. Test is validation."""

    train_set: Dataset[Any]
    val_set: Dataset[Any]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_set, train=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def _loader(self, images: Dataset[Any], train: bool) -> DataLoader[Any]:
        own: Any = self.hparams
        return DataLoader(
            images,
            own["batch_size"],
            shuffle=train,
            drop_last=train,
            num_workers=own["workers"],
            persistent_workers=own["workers"] > 0,
            pin_memory=torch.cuda.is_available(),
        )


class ImageNetDataModule(_Loaders):
    """ImageNet as ``(image, class)``: float32 ``(3, size, size)``, normalised, and int64, the place of its WordNet id in order.

    In training a random crop of 8 to 100 % of the image, half of them mirrored; in validation the middle of the image.

    Args:
        path: folder with ``train/<WordNet id>/*.JPEG`` and ``val/<WordNet id>/*.JPEG``.
        batch_size: images in a batch, of each rank.
        workers: processes that decode, of each rank.
        size: height and width of a crop.
        resize: length of the shorter side before the middle is cut out: 256, or 232 as torchvision's V2 weights are measured.
        mean: of each channel, in [0, 1].
        std: likewise.

    Raises:
        ImportError: torchvision is missing.
        FileNotFoundError: ``path`` has no ``train`` or ``val``, or one that has no folders.
        ValueError: the two have different folders.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 128,
        workers: int = 8,
        size: int = 224,
        resize: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        if hasattr(self, "val_set"):  # to list 1.3 million files takes its time
            return
        own: Any = self.hparams
        path = Path(own["path"]).expanduser()
        train, val = _folders(path / "train"), _folders(path / "val")
        if train != val:
            odd = sorted(set(train) ^ set(val))
            raise ValueError(f"`path` is '{path}', where only one of train and val has {odd[0]} ({len(odd)} such): complete it.")
        v2, folder = torchvision_module("transforms.v2"), torchvision_module("datasets").ImageFolder
        last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(own["mean"]), list(own["std"]))]
        crop = [v2.RandomResizedCrop(own["size"]), v2.RandomHorizontalFlip()]
        middle = [v2.Resize(own["resize"]), v2.CenterCrop(own["size"])]
        self.train_set = folder(path / "train", v2.Compose(crop + last))
        self.val_set = folder(path / "val", v2.Compose(middle + last))


def _folders(path: Path) -> list[str]:
    """Names of the classes of a split."""
    found = sorted(place.name for place in path.iterdir() if place.is_dir()) if path.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"'{path}' has no folders of images: `path` needs train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG. (ImageNet's "
            "own archive of validation images has no folders: sort them into such.)"
        )
    return found


def torchvision_module(name: str) -> Any:
    """``torchvision.<name>``, which is imported where it is used.

    Raises:
        ImportError: torchvision is missing.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ImportError as error:
        raise ImportError('`torchvision` is missing: this needs `pip install "lightning-lq[imagenet]"`.') from error


class FakeImages(Dataset[tuple[Tensor, int]]):
    """Normal noise over a pattern of 4 x 4 colours, which is that of the class; always the same for an index and a seed.

    Args:
        indices: of the images; the class of image ``i`` is ``i % classes``.
        size: height and width.
        classes: how many there are.
        seed: of patterns and noise.

    >>> image, label = FakeImages(range(8), size=32, classes=3)[5]
    >>> image.shape, image.dtype, label
    (torch.Size([3, 32, 32]), torch.float32, 2)
    """

    def __init__(self, indices: range, size: int = 224, classes: int = 10, seed: int = 0) -> None:
        self.indices, self.size, self.seed = indices, size, seed
        self.patterns = torch.randn(classes, 3, 4, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        index = self.indices[place]
        label = index % len(self.patterns)
        # patterns have the seed itself
        noise = torch.Generator().manual_seed((self.seed << 32) + 1 + index)
        pattern = F.interpolate(self.patterns[label : label + 1], size=self.size)[0]
        return pattern + torch.randn(3, self.size, self.size, generator=noise), label


class FakeImageNetDataModule(_Loaders):
    """Fake images in place of ImageNet: they show that a recipe runs, and what it costs; accuracies on them mean nothing.

    Args:
        size: height and width.
        train: how many images to train on.
        val: how many others to validate on.
        classes: how many there are; a net may have more logits.
        batch_size: images in a batch, of each rank.
        workers: processes that make them, of each rank.
        seed: of the images.
    """

    def __init__(
        self,
        size: int = 224,
        train: int = 256,
        val: int = 64,
        classes: int = 10,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        #: for the report
        self.notes = {"data": f"FAKE: {train} + {val} random images of {size} x {size}; accuracies on them mean nothing"}
        rank_zero_warn(f"The data are {self.notes['data']}.")

    def setup(self, stage: str) -> None:
        own: Any = self.hparams
        kind = {name: own[name] for name in ("size", "classes", "seed")}
        self.train_set = FakeImages(range(own["train"]), **kind)
        self.val_set = FakeImages(range(own["train"], own["train"] + own["val"]), **kind)
