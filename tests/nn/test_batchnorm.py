"""BatchNorm into float layers of every kind."""

import pytest
import torch
from torch import nn

from lq.nn.batchnorm import fold_into_

CASES = [
    (nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 3)),
    (nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4), (2, 3, 5)),
    (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), CASES)
def test_the_layer_computes_what_both_did(layer, norm, shape):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape)
    expected = norm.eval()(layer(x))
    fold_into_(layer, norm)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in layer.parameters())
