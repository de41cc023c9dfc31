"""The ImageNet recipe on fake images, on ImageNet's folders in small, and torchvision's names of ResNet-50's weights."""

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning import Trainer
from PIL import Image
from torch import nn

import lq
from lq.cli.main import register_resolvers
from lq.cli.run import load_float
from lq.recipes.imagenet import ImageNetClassifier, torchvision_net
from lq.recipes.imagenet_data import FakeImageNetDataModule, FakeImages, ImageNetDataModule
from lq.recipes.resnet import resnet8, resnet50
from processes import launched

WNIDS = ("n01440764", "n01443537")
HERE = find_spec("torchvision") is not None
COLOURS = {"n01440764": 40, "n01443537": 200}


def net():
    return resnet8(channels=3, num_classes=20)


def composed(*told):
    register_resolvers()
    with initialize_config_module("lq.conf", version_base="1.3"):
        return compose("run", list(told))


# torchvision's checkpoints


def torchvision_shapes():
    """Names and shapes in ``resnet50-*.pth``, from table 1 of the paper and the names of torchvision's modules."""
    shapes = {}

    def conv(name, outputs, inputs, size):
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)

    def norm(name, channels):
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            for i, (outputs, of, size) in enumerate(((width, inputs, 1), (width, width, 3), (4 * width, width, 1)), start=1):
                conv(f"{at}.conv{i}", outputs, of, size)
                norm(f"{at}.bn{i}", outputs)
            if block == 0:
                conv(f"{at}.downsample.0", 4 * width, inputs, 1)
                norm(f"{at}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def classifier():
    """With ResNet-50, whose weights are anything: random ones take long."""
    with torch.device("meta"):
        model = resnet50()
    return ImageNetClassifier(model.to_empty(device="cpu"))


def test_torchvisions_checkpoints_load(tmp_path):
    # a number for each tensor, of which the file holds one element
    weights = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(torchvision_shapes().items())}
    assert len(weights) == 320
    assert sum(not name.endswith(("running_mean", "running_var", "tracked")) for name in weights) == 161
    torch.save(weights, path := tmp_path / "resnet50-11ad3fa6.pth")
    model = classifier()
    load_float(model, str(path))
    loaded = model.net.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(loaded[name].shape == value.shape and (loaded[name] == value).all() for name, value in weights.items())
    # its own checkpoint, with the classifier's names
    again = classifier()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.net.fc.weight, weights["fc.weight"])
    del weights["layer4.2.conv3.weight"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"does not fit ImageNetClassifier.*net\.layer4\.2\.conv3\.weight"):
        load_float(model, str(path))


def test_the_stride_is_where_torchvision_has_it():
    with torch.device("meta"):
        strided = {name for name, m in resnet50().named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    assert strided == {"conv1"} | {f"layer{i}.0.{where}" for i in (2, 3, 4) for where in ("conv2", "downsample.0")}


# Data


def test_fake_images_are_the_same_for_an_index_and_a_seed():
    images = FakeImages(range(10, 16), size=16, classes=3, seed=1)
    twin, other = FakeImages(range(10, 16), size=16, classes=3, seed=1), FakeImages(range(10, 16), size=16, classes=3)
    x, label = images[0]
    assert (x.shape, x.dtype, label, len(images)) == ((3, 16, 16), torch.float32, 1, 6)
    assert torch.equal(x, twin[0][0])
    assert not torch.equal(x, other[0][0])
    # of one class: the pattern is the same, the noise is not
    same = images[3][0]
    assert images[3][1] == label
    patch_means = [image.unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)) for image in (x, same)]
    torch.testing.assert_close(*patch_means, atol=1.5, rtol=0)
    assert (x - same).std() == pytest.approx(2**0.5, abs=0.1)


def test_the_fake_data_say_that_they_are():
    with pytest.warns(UserWarning, match=r"FAKE: 32 \+ 8 random images of 16 x 16"):
        data = FakeImageNetDataModule(size=16, train=32, val=8, batch_size=8)
    assert data.notes["data"].startswith("FAKE")
    data.setup("fit")
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert [len(labels) for _, labels in train] == [8] * 4
    assert torch.cat([labels for _, labels in val]).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert not any(torch.equal(a, b) for x, _ in train for a in x for y, _ in val for b in y)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for wnid in WNIDS:
            place = tmp_path / "imagenet" / split / wnid
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((90, 120, 3), COLOURS[wnid], np.uint8)).save(place / f"{wnid}_{i}.JPEG")
    return tmp_path / "imagenet"


class StandIn:
    """As much of torchvision as the data module calls, where torchvision itself is not installed."""

    class ImageFolder:
        def __init__(self, root, transform):
            self.transform = transform
            self.classes = sorted(place.name for place in root.iterdir())
            self.samples = [(file, i) for i, c in enumerate(self.classes) for file in sorted((root / c).iterdir())]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            file, label = self.samples[index]
            return self.transform(Image.open(file)), label

    v2 = SimpleNamespace(
        Compose=lambda steps: lambda x: [x := step(x) for step in steps][-1],
        RandomResizedCrop=lambda size: lambda x: x.resize((size, size)),
        RandomHorizontalFlip=lambda: lambda x: x,
        Resize=lambda size: lambda x: x.resize([round(side * size / min(x.size)) for side in x.size]),
        CenterCrop=lambda size: lambda x: x.crop((0, 0, size, size)),
        ToImage=lambda: lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1),
        ToDtype=lambda dtype, scale: lambda x: x.to(dtype) / (255 if scale else 1),
        Normalize=lambda mean, std: lambda x: (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1),
    )


@pytest.fixture
def torchvision(monkeypatch):
    if HERE:
        return
    for name, content in {
        "": {},
        ".datasets": {"ImageFolder": StandIn.ImageFolder},
        ".transforms": {},
        ".transforms.v2": vars(StandIn.v2),
        ".models": {
            "get_model": lambda name, weights, **options: resnet8(channels=3, **options) if name == "resnet8" else {}[name]
        },
    }.items():
        module = ModuleType(f"torchvision{name}")
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_imagenets_folders(folder, torchvision):
    data = ImageNetDataModule(str(folder), batch_size=3, workers=0, size=32, resize=40)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 32, 32)] * 2
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert labels.tolist() == [0, 0, 1, 1]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    values = torch.tensor([COLOURS[WNIDS[label]] / 255 for label in labels.tolist()]).view(-1, 1, 1, 1)
    torch.testing.assert_close(images, ((values - mean) / std).expand(4, 3, 32, 32), atol=0.02, rtol=0)


@pytest.mark.skipif(HERE, reason="torchvision is installed")
def test_without_torchvision(folder):
    with pytest.raises(ImportError, match=r'`torchvision` is missing.*"lightning-lq\[imagenet\]"'):
        ImageNetDataModule(str(folder)).setup("fit")
    with pytest.raises(ImportError, match=r"lightning-lq\[imagenet\]"):
        torchvision_net("resnet50")


def test_nets_of_torchvision(torchvision):
    name = "resnet18" if HERE else "resnet8"
    cfg = composed("model=torchvision", f"model.net.name={name}", "model.net.weights=null", "model.num_classes=20")
    assert instantiate(cfg.model)(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    with pytest.raises(ValueError, match="nonsense with `weights` None"):
        torchvision_net("nonsense", weights=None)


def test_folders_that_are_not_imagenets(folder):
    with pytest.raises(FileNotFoundError, match=r"train' has no folders of images: `path` needs train/<WordNet id>"):
        ImageNetDataModule(str(folder / "nowhere")).setup("fit")
    (folder / "val" / "n09999999").mkdir()
    with pytest.raises(ValueError, match=r"only one of train and val has n09999999 \(1 such\)"):
        ImageNetDataModule(str(folder)).setup("fit")


# The classifier


def test_top_1_and_top_5_are_shares_of_all_images():
    class Ranked(nn.Module):
        """Logits in which the class that the image names comes first, the one below it second, and so on."""

        def forward(self, x):
            return -((x[:, 0, 0, :1] - torch.arange(20)) % 20)

    # the right class is in place 1, 1, 3, 5, 6, 9 of the images of two batches
    firsts, labels = torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([3, 4, 3, 2, 2, 0])
    images = firsts.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(ImageNetClassifier(Ranked(), num_classes=20), loader, verbose=False)
    assert (found["val_acc"], found["val_acc_top5"]) == (pytest.approx(2 / 6), pytest.approx(4 / 6))


def test_channels_last_changes_the_layout_and_nothing_else():
    torch.manual_seed(0)
    plain = ImageNetClassifier(net(), num_classes=20).eval()
    last = ImageNetClassifier(net(), num_classes=20, channels_last=True).eval()
    last.load_state_dict(plain.state_dict())
    seen = {}
    for model in (plain, last):
        lq.quantize_(model, target="tensorrt", args=(torch.zeros(2, 3, 32, 32),))
        conv = model.net.layer2[0].conv2
        conv.register_forward_pre_hook(lambda m, args, model=model: seen.update({model: (m.weight, args[0])}))
    images = torch.randn(4, 3, 32, 32)
    outputs = []
    for model in (plain, last):
        with lq.calibrating(model, method="max"):
            model(images)
        outputs.append(model(images))
    assert [all(t.is_contiguous(memory_format=torch.channels_last) for t in seen[m]) for m in (plain, last)] == [False, True]
    # another order of additions: at most a few codes differ by one
    torch.testing.assert_close(*outputs, atol=0.02, rtol=0)


# The command


def test_the_experiment_is_the_tutorials(tmp_path):
    cfg = composed("experiment=imagenet_resnet50", "data.path=/imagenet", "data.size=160", f"output_dir={tmp_path}")
    model, callbacks = instantiate(cfg.model), instantiate(cfg.callbacks)
    assert model.net.fc.out_features == 1000
    assert model.example_input_array.shape == (2, 3, 160, 160)
    quantize, schedule, freeze = (callbacks[name] for name in ("quantize", "schedule", "freeze"))
    assert (quantize.method, quantize.method_options["percentile"], quantize.alpha) == ("percentile", 99.99, None)
    assert quantize.batches * cfg.data.batch_size == 1024
    assert model.hparams["lr"] * schedule.lr_factor == pytest.approx(0.001)
    assert (freeze.refresh_every, freeze.freeze_after, freeze.batchnorm) == (None, 0, False)


@pytest.mark.slow
def test_two_processes_on_fake_images(tmp_path):
    told = [
        *("experiment=imagenet_resnet50", "data=imagenet_fake", "data.size=32", "data.train=64", "data.val=32"),
        *("trainer=ddp_cpu", "trainer.devices=2", "trainer.precision=bf16-mixed", "+trainer.limit_train_batches=2"),
        *("model.net._target_=lq.recipes.resnet.resnet8", "+model.net.channels=3", "model.channels_last=true"),
        *("float_epochs=0", "calib.batches=2", "export.batches=1", "logger=none", "trainer.enable_progress_bar=false"),
        "hydra.run.dir=out",
    ]
    result = launched(tmp_path, *told)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("FAKE") >= 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"float", "calibrated", "qat", "onnxruntime"} == {
        name.split("/")[0] for name in metrics if name.endswith("/val_acc_top5")
    }
    assert metrics["agreement"] > 0.9
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| data | FAKE: 64 + 32 random images of 32 x 32; accuracies on them mean nothing |" in report
    # on the first validation batch alone
    assert "of 16 predictions" in report
    assert not (tmp_path / "out" / "checkpoints" / "float.ckpt").exists()
