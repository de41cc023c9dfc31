"""Small images in folders, a .zip or a dataset of torchvision's: kept as tensors, cropped and flipped a batch at a time."""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lq.staged import staged

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
# CIFAR-10's own archive: https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

# Images, uint8 ``(images, channels, height, width)``, and classes, int64 ``(images,)``.
Split = tuple[Tensor, Tensor]


class Images(Dataset[Split]):
    """A split, of which a loader takes whole batches; where the split is on a GPU, they are made there.

    Args:
        split: images and classes.
        mean: of each channel, in [0, 1].
        std: likewise.
        padding: crop randomly, from images with so many black pixels around them; 0 does not.
        flip: mirror half of the images.
    """

    def __init__(self, split: Split, mean: Sequence[float], std: Sequence[float], padding: int = 0, flip: bool = False) -> None:
        self.pixels, self.classes = split
        self.padding, self.flip = padding, flip
        device = self.pixels.device
        self._mean, self._std = (255 * torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Split:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int] | Tensor) -> Split:
        x, y = self.pixels[indices], self.classes[indices]
        if self.padding:
            x = random_crop(x, self.padding)
        if self.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        return (x - self._mean) / self._std, y


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Crops of the images' own size at random places of images with ``padding`` zeros around them: ``(n, c, h, w)`` both.

    >>> random_crop(torch.ones(2, 3, 5, 5), padding=1).shape
    torch.Size([2, 3, 5, 5])
    """
    n, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, [padding] * 4)

    def counted(size: int) -> Tensor:
        return torch.arange(size, device=x.device)

    rows, columns = (torch.randint(2 * padding + 1, (n, 1), device=x.device) + counted(size) for size in (height, width))
    image, channel = counted(n).view(-1, 1, 1, 1), counted(channels).view(1, -1, 1, 1)
    return padded[image, channel, rows.view(n, 1, -1, 1), columns.view(n, 1, 1, -1)]


class ImagesDataModule(LightningDataModule):
    """Images of one size as ``(image, class)``, float32 ``(3, height, width)``, normalised, and int64.

    What is decoded is kept in a file, which is made again when the source changes. Validation and test are the same images.

    Args:
        path: a folder or a .zip with ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (or .png ...); or the folder
            ``cifar-10-batches-py`` of CIFAR-10's own archive, or one that it is in.
        batch_size: images in a train batch.
        eval_batch_size: images in a batch of validation.
        mean: of each channel, in [0, 1].
        std: likewise.
        padding: crop randomly in training, from images with so many black pixels around them.
        flip: mirror half of the images in training.
        cache: folder for the file of decoded images.
        dataset: a class of torchvision's that takes ``root``, ``train`` and ``download``, as
            ``torchvision.datasets.CIFAR10`` and ``MNIST`` do: its images instead, loaded into ``path``. Untried with torchvision.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ImportError: ``dataset`` is not there to import.
        ValueError: no images of one of the splits, images of several sizes, an image that cannot be decoded (named).
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        padding: int = 4,
        flip: bool = True,
        cache: str = "~/.cache/lightning-lq",
        dataset: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        path, dataset = self.hparams["path"], self.hparams["dataset"]
        _datasets(dataset, path) if dataset else load_images(path, self.hparams["cache"])

    def setup(self, stage: str) -> None:
        path, dataset = self.hparams["path"], self.hparams["dataset"]
        splits, self.classes = _of_dataset(dataset, path) if dataset else load_images(path, self.hparams["cache"])
        mean, std = self.hparams["mean"], self.hparams["std"]
        self.train_set = Images(splits["train"], mean, std, self.hparams["padding"], self.hparams["flip"])
        self.val_set = Images(splits["test"], mean, std)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, self.hparams["batch_size"], shuffle=True, drop_last=True, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, self.hparams["eval_batch_size"], collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


def _as_it_is(batch: Any) -> Any:
    return batch


def load_images(path: str | Path, cache: str | Path) -> tuple[dict[str, Split], list[str]]:
    """The splits ``train`` and ``test``, and the names of the classes; from the cache where it is of the same source."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"`path` is '{path}', which does not exist: give a folder or a .zip of images.")
    path = path / CIFAR if (path / CIFAR).is_dir() else path
    source, version = (hashlib.sha256(str(of).encode()).hexdigest()[:8] for of in (path.resolve(), _changed(path)))
    kept = Path(cache).expanduser() / f"{path.stem}-{source}-{version}.pt"
    if kept.is_file():
        found = torch.load(kept, weights_only=True)
        return found["splits"], found["classes"]
    splits, classes = _of_cifar(path) if (path / "data_batch_1").is_file() else _decoded(path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    # jobs that start together may all decode
    with staged(kept) as file:
        torch.save({"splits": splits, "classes": classes}, file)
    for older in kept.parent.glob(f"*-{source}-*.pt"):
        if older != kept:
            older.unlink(missing_ok=True)
    return splits, classes


def _datasets(name: str, path: str) -> dict[str, Any]:
    """Both splits of a class of torchvision's, loaded into ``path`` where they are not there."""
    try:
        dataset = get_class(name)
    except ImportError as error:
        raise ImportError(f"`dataset` is {name!r}, which cannot be imported: install torchvision. ({error})") from error
    return {s: dataset(root=str(Path(path).expanduser()), train=s == "train", download=True) for s in ("train", "test")}


def _of_dataset(name: str, path: str) -> tuple[dict[str, Split], list[str]]:
    """What they hold, in memory as it is, so that no cache is needed."""
    found = _datasets(name, path)
    splits = {s: [(label, _rgb(image)) for image, label in images] for s, images in found.items()}
    return {split: _stacked(split, images, path) for split, images in splits.items()}, list(found["train"].classes)


def _changed(path: Path) -> tuple[int, int]:
    """When a source was changed last, and how large it is; of a folder, its images."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = [file.stat() for file in files]
    return max((s.st_mtime_ns for s in stats), default=0), sum(s.st_size for s in stats)


def _decoded(path: Path) -> tuple[dict[str, Split], list[str]]:
    found: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    for split, label, name, data in _files(path):
        found[split].append((label, _pixels(data, name)))
    classes = sorted({label for images in found.values() for label, _ in images})
    index = {label: i for i, label in enumerate(classes)}
    indexed = {split: [(index[label], x) for label, x in images] for split, images in found.items()}
    return {split: _stacked(split, images, path) for split, images in indexed.items()}, classes


def _stacked(split: str, images: list[tuple[int, Tensor]], path: str | Path) -> Split:
    if not images:
        raise ValueError(f"`path` is '{path}', which has no images as {split}/<class>/<name>.jpg.")
    if len(sizes := {tuple(x.shape) for _, x in images}) > 1:
        raise ValueError(f"`path` is '{path}', whose images in {split} have several sizes: {sorted(sizes)[:3]}.")
    return torch.stack([x for _, x in images]), torch.tensor([label for label, _ in images])


def _files(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Split, class, name and contents of each image, in the order of their names."""
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(f"`path` is '{path}', which is no .zip: give a folder or a .zip of images.")
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if (place := _place(Path(name))) is not None:
                    yield *place, name, archive.read(name)
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and (place := _place(file.relative_to(path))) is not None:
            yield *place, str(file), file.read_bytes()


def _place(name: Path) -> tuple[str, str] | None:
    """Split and class of an image by its path, which may begin with one folder more."""
    if name.suffix.lower() not in SUFFIXES or len(name.parts) not in (3, 4) or name.parts[-3] not in BATCHES:
        return None
    return name.parts[-3], name.parts[-2]


def _pixels(data: bytes, name: str) -> Tensor:
    """An encoded image as uint8 ``(3, height, width)``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except OSError as error:
        raise ValueError(f"{name} cannot be decoded ({error}): replace or delete it.") from error


def _rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _of_cifar(path: Path) -> tuple[dict[str, Split], list[str]]:
    """CIFAR-10's own files: pickled dictionaries of bytes, so only from where you trust."""

    def read(name: str) -> dict[bytes, Any]:
        with (path / name).open("rb") as file:
            found: dict[bytes, Any] = pickle.load(file, encoding="bytes")
        return found

    splits = {}
    for split, names in BATCHES.items():
        parts = [read(name) for name in names]
        pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        splits[split] = torch.from_numpy(pixels), torch.tensor([label for part in parts for label in part[b"labels"]])
    return splits, [name.decode() for name in read("batches.meta")[b"label_names"]]
