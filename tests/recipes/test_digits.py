"""The digits recipe: its data, its augmentation, and that it learns."""

import pytest
import torch

pytest.importorskip("sklearn")

from lightning import Trainer, seed_everything

from lq.recipes.digits import BACKGROUND, DigitsClassifier, DigitsDataModule, random_shift


@pytest.fixture
def data():
    data = DigitsDataModule()
    data.setup("fit")
    return data


def trainer(**kwargs):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def test_data(data):
    (images, digits), *rest = data.val_dataloader()
    assert not rest, "the whole split in one batch"
    assert images.shape == (450, 1, 8, 8)
    assert images.dtype == torch.float32
    assert digits.bincount().tolist() == pytest.approx([45] * 10, abs=2), "the same share of every digit"
    together = torch.cat([images, data.train_set.tensors[0]])
    assert len(together) == 1797
    assert together.mean().item() == pytest.approx(0, abs=1e-3)
    assert together.std().item() == pytest.approx(1, abs=1e-3)
    assert together.min().item() == pytest.approx(BACKGROUND)


def test_split_is_fixed_and_follows_its_seed(data):
    def labels(**kwargs):
        other = DigitsDataModule(**kwargs)
        torch.manual_seed(5)
        other.setup("fit")
        return other.val_set.tensors[1].tolist()

    assert labels() == data.val_set.tensors[1].tolist()
    assert labels(seed=1) != labels()
    assert len(labels(val_fraction=0.1)) == 180


def test_train_batches_are_full_and_shuffled(data):
    first, second = (list(data.train_dataloader()) for _ in range(2))
    assert [len(y) for _, y in first] == [64] * 21
    assert not torch.equal(first[0][1], second[0][1])


def test_random_shift_moves_each_image_by_at_most_one_pixel():
    torch.manual_seed(0)
    images = torch.full((200, 1, 8, 8), BACKGROUND)
    images[:, 0, 4, 5] = 1.0
    moved = random_shift(images)
    assert moved.shape == images.shape
    rows, columns = (moved[:, 0] == 1).nonzero()[:, 1:].T
    assert len(rows) == 200
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(r, c) for r in (3, 4, 5) for c in (4, 5, 6)}
    assert (moved == BACKGROUND).sum() == 200 * 63


def test_hyperparameters_are_saved():
    assert dict(DigitsClassifier(width=8).hparams) == {"width": 8, "lr": 0.1, "weight_decay": 5e-4}
    assert dict(DigitsDataModule(batch_size=8).hparams)["batch_size"] == 8


def test_learning_rate_ends_at_zero_and_everything_is_logged(data):
    fit = trainer(max_epochs=1, limit_train_batches=3)
    fit.fit(DigitsClassifier(width=8), datamodule=data)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert {"train_loss", "val_loss", "val_acc"} <= set(fit.callback_metrics)


@pytest.mark.slow
def test_it_learns(data):
    seed_everything(0, verbose=False)
    model = DigitsClassifier()
    fit = trainer(max_epochs=15)
    fit.fit(model, datamodule=data)
    assert fit.callback_metrics["val_acc"] >= 0.985
    images, digits = data.val_set.tensors
    with torch.no_grad():
        found = (model.eval()(images).argmax(1) == digits).double().mean().item()
    assert found == pytest.approx(fit.callback_metrics["val_acc"].item(), abs=1e-6)
