"""Averages of weights, against their sum by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lq.callbacks import Quantize
from lq.callbacks.average import polynomial_average_
from tiny import Tiny, loader, trainer


@pytest.mark.parametrize("eta", [0, 2, 8])
def test_a_step_counts_by_the_power_of_its_number(eta):
    values = np.random.default_rng(0).normal(size=(50, 3))
    t = np.arange(1, 51)
    # the recursion's own weights, t (t + 1) ... (t + eta - 1), grow as t to the power of eta
    weights = np.array([np.prod([n + i for i in range(eta)], dtype=float) for n in t])
    expected = weights @ values / weights.sum()
    average = AveragedModel(nn.Linear(3, 1, bias=False), multi_avg_fn=partial(polynomial_average_, eta=eta))
    for value in values:
        model = nn.Linear(3, 1, bias=False)
        model.weight.data = torch.from_numpy(value[None]).float()
        average.update_parameters(model)
    np.testing.assert_allclose(average.module.weight.detach().numpy()[0], expected, rtol=1e-4, atol=1e-6)


def test_counters_are_those_of_the_model():
    average = AveragedModel(nn.BatchNorm1d(2), multi_avg_fn=polynomial_average_, use_buffers=True)
    for steps in (1, 5, 9):
        model = nn.BatchNorm1d(2)
        model.num_batches_tracked += steps
        average.update_parameters(model)
    assert average.module.num_batches_tracked == 9


def test_a_fit_leaves_the_average_that_the_config_names(tmp_path):
    with initialize_config_module("lq.conf", version_base="1.3"):
        averaging = instantiate(compose("run", ["callbacks/average=polynomial"]).callbacks.average)
    assert isinstance(averaging, WeightAveraging)
    seen = []

    class Look(Quantize):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.net[0].weight.detach().clone())

    model = Tiny()
    trainer(tmp_path, averaging, Look(alpha=None, stages=False), max_epochs=1).fit(model, loader())
    expected, t = torch.zeros_like(seen[0]), torch.arange(1, len(seen) + 1)
    factors = torch.stack([t + i for i in range(8)]).prod(0).double()
    for factor, weight in zip(factors / factors.sum(), seen, strict=True):
        expected += factor * weight
    torch.testing.assert_close(model.net[0].weight.detach(), expected)
