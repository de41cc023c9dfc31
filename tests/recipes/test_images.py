"""Images of folders, archives and CIFAR-10's own files: decoded once, as they are, whole batches at a time."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lq.recipes.images import Images, ImagesDataModule, load_images, random_crop

CLASSES = ("cat", "dog")


def picture(split: str, label: str, i: int) -> np.ndarray:
    seed = hash((split == "train", label == "cat", i)) % 1000
    return np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for label in CLASSES:
            place = tmp_path / "pictures" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(split, label, i)).save(place / f"{i}.png")
    (tmp_path / "pictures" / "readme.txt").write_text("not a picture")
    return tmp_path / "pictures"


def zipped(folder, prefix=""):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def cifar(tmp_path):
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for k, name in enumerate(names):
        data = np.random.default_rng(k).integers(0, 256, (4, 3072), dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({b"data": data, b"labels": [k % 2, 1, 0, 1]}))
    (place / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}))
    return place


@pytest.mark.parametrize("source", ["folder", "zip", "zip with a folder more"])
def test_what_is_decoded(folder, tmp_path, source):
    path = folder if source == "folder" else zipped(folder, "" if source == "zip" else "all/")
    splits, classes = load_images(path, tmp_path / "cache")
    assert classes == list(CLASSES)
    for split, count in (("train", 5), ("test", 2)):
        pixels, labels = splits[split]
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [0] * count + [1] * count
        expected = np.stack([picture(split, label, i) for label in CLASSES for i in range(count)]).transpose(0, 3, 1, 2)
        assert np.array_equal(pixels.numpy(), expected)


def test_files_of_cifar(tmp_path):
    path = cifar(tmp_path)
    splits, classes = load_images(path, tmp_path / "cache")
    assert classes == ["cat", "dog"]
    pixels, labels = splits["train"]
    assert (pixels.shape, labels.tolist()[:5]) == ((20, 3, 32, 32), [0, 1, 0, 1, 1])
    data = pickle.loads((path / "data_batch_2").read_bytes())[b"data"]
    assert np.array_equal(pixels[4].numpy().ravel(), data[0])
    assert len(splits["test"][1]) == 4


def test_a_folder_that_the_files_of_cifar_are_in(tmp_path):
    expected, _ = load_images(cifar(tmp_path), tmp_path / "cache")
    found, classes = load_images(tmp_path, tmp_path / "cache")
    assert classes == ["cat", "dog"]
    assert torch.equal(found["train"][0], expected["train"][0])


class Pictures:
    """As a dataset of torchvision's."""

    classes = CLASSES

    def __init__(self, root, train=True, download=False):
        assert download
        self.split, self.root = "train" if train else "test", root

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == len(self):
            raise IndexError
        return Image.fromarray(picture(self.split, CLASSES[index % 2], index)), index % 2


def test_datasets_of_torchvision(tmp_path):
    data = ImagesDataModule(str(tmp_path), dataset=f"{__name__}.Pictures", batch_size=2)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == list(CLASSES)
    assert data.train_set.classes.tolist() == [0, 1] * 3
    for split, found in (("train", data.train_set), ("test", data.val_set)):
        expected = np.stack([picture(split, CLASSES[i % 2], i) for i in range(6)]).transpose(0, 3, 1, 2)
        assert np.array_equal(found.pixels.numpy(), expected)
    with pytest.raises(ImportError, match=r"`dataset` is 'no\.Such', which cannot be imported: install torchvision"):
        ImagesDataModule(str(tmp_path), dataset="no.Such").prepare_data()


def test_decoded_once_until_the_source_changes(folder, tmp_path, monkeypatch):
    first, _ = load_images(folder, tmp_path / "cache")
    with monkeypatch.context() as without:
        without.setattr("PIL.Image.open", None)
        again, classes = load_images(folder, tmp_path / "cache")
    assert classes == list(CLASSES)
    assert torch.equal(first["train"][0], again["train"][0])
    Image.fromarray(255 - picture("train", "cat", 0)).save(folder / "train" / "cat" / "new.png")
    assert len(load_images(folder, tmp_path / "cache")[0]["train"][1]) == 11
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what was decoded before is of no use


def test_jobs_that_start_together_do_not_take_each_others_files(folder, tmp_path, monkeypatch):
    save, found = torch.save, []

    def slow(*args):
        save(*args)
        monkeypatch.setattr(torch, "save", save)
        found.append(load_images(folder, tmp_path / "cache"))  # another job is as far, and done first

    monkeypatch.setattr(torch, "save", slow)
    found.append(load_images(folder, tmp_path / "cache"))
    assert torch.equal(found[0][0]["train"][0], found[1][0]["train"][0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_batches(folder, tmp_path):
    data = ImagesDataModule(str(folder), batch_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), padding=2, cache=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 8, 6)] * 2
    torch.manual_seed(0)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(batches, data.train_dataloader(), strict=True))
    ((images, labels),) = data.val_dataloader()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    expected = (data.val_set.pixels / 255 - mean) / std
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, data.val_set.classes)
    x, y = data.val_set[1]
    assert torch.equal(x, images[1])
    assert y == labels[1]


def test_crops_and_mirrors_are_of_the_image():
    x = torch.arange(1, 2 * 3 * 4 * 5 + 1).view(2, 3, 4, 5).to(torch.uint8)
    torch.manual_seed(0)
    seen = set()
    padded = torch.nn.functional.pad(x, [1] * 4)
    windows = {(i, j): padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)}
    for _ in range(60):
        for image, crop in enumerate(random_crop(x, 1)):
            (place,) = [at for at, window in windows.items() if torch.equal(window[image], crop)]
            seen.add((image, place))
    assert len(seen) == 18
    images = Images((x, torch.zeros(2)), (0, 0, 0), (1 / 255,) * 3, flip=True)
    kinds = {tuple(images[0][0].flatten().int().tolist()) for _ in range(20)}
    assert kinds == {tuple(t.flatten().int().tolist()) for t in (x[0], x[0].flip(-1))}


def test_errors(folder, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"which does not exist: give a folder or a .zip"):
        load_images(tmp_path / "nowhere", cache)
    (text := tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"which is no .zip"):
        load_images(text, cache)
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "train" / "dog" / "small.png")
    with pytest.raises(ValueError, match="whose images in train have several sizes"):
        load_images(folder, cache)
    (folder / "train" / "dog" / "small.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"small.png cannot be decoded"):
        load_images(folder, cache)
    (folder / "train" / "dog" / "small.png").unlink()
    for file in folder.glob("test/*/*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"which has no images as test/<class>/<name>.jpg"):
        load_images(folder, cache)
    assert not cache.exists()
