"""The mean of a clipped normal variable, against quadrature."""

import math

import numpy as np
import pytest
import torch

from lq.functional.clipped_normal import clipped_normal_mean


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.7, 8.0])
@pytest.mark.parametrize("std", [0.05, 1.0, 4.0])
def test_against_quadrature(low, high, mean, std):
    z = np.linspace(-12, 12, 2_000_001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    expected = (np.clip(mean + std * z, low, high) * weights).sum()
    found = clipped_normal_mean(torch.tensor(mean).double(), torch.tensor(std).double(), low, high)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_a_constant_is_clipped():
    found = clipped_normal_mean(torch.tensor([-1.0, 2.0, 9.0]), torch.zeros(3), 0.0, 6.0)
    assert found.tolist() == [0, 2, 6]
    assert found.isfinite().all()
