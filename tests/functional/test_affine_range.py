"""The search for an affine range against loops over candidates and bins, written in NumPy from the formulas."""

import math

import numpy as np
import pytest
import torch

from lq.functional import affine_errors
from lq.functional.affine_range import COARSE, affine_range
from lq.functional.histogram import empty_histogram, update, zeros
from lq.functional.threshold import Search

BINS = 256


def rounded(x, low, high, num_bits):
    """Jacob et al.'s grid from ``-low`` to ``high``."""
    levels = 2**num_bits - 1
    scale = (low + high) / levels
    first = np.rint(-low / scale)
    return np.clip(np.rint(x / scale), first, first + levels) * scale


def norm(p):
    def error(counts, low, high, num_bits):
        x = np.arange(len(counts)) - len(counts) / 2 + 0.5
        return float((counts * np.abs(rounded(x, low, high, num_bits) - x) ** p).sum())

    return error


def kl(counts, low, high, num_bits):
    """KL(P || Q): P has the outliers in its outermost bins, Q each level's mass without them, over its non-empty bins."""
    half, counts = len(counts) // 2, counts.astype(np.float64)
    counts[half] = counts[half + 1]
    first, end = half - math.ceil(low), half + math.ceil(high)
    levels = 2**num_bits - 1
    scale = (low + high) / levels
    zero = np.rint(-low / scale)
    x = np.arange(first, end) - half + 0.5
    # half a step rounds up here, as the levels of the prefix sums do
    level = np.clip(np.floor(x / scale + 0.5), zero, zero + levels)
    p, q = counts[first:end].copy(), np.zeros(end - first)
    for k in np.unique(level):
        members = (level == k) & (p > 0)
        if members.any():
            q[members] = p[members].sum() / members.sum()
    if len(p) < 2:
        return np.inf
    p[0] += counts[:first].sum()
    p[-1] += counts[end:].sum()
    if not q.sum() or (q[p > 0] == 0).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


ERRORS = {"mse": norm(2), "mae": norm(1), "lp": norm(2.4), "kl": kl}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    outlier = x.clone()
    outlier[:2] = torch.tensor([30.0, -4.0])
    return {
        "normal": x,
        "shifted": x + 1.5,
        "gelu": torch.nn.functional.gelu(2 * x),
        "silu": torch.nn.functional.silu(3 * x),
        "relu": x.relu(),
        "negative": -x.exp(),
        "outliers": outlier,
        "few": x[:9],
    }


def histogram(x):
    """Both signs as the calibrator keeps them: counts ``(2, 1, bins)``, exponents and peaks ``(2, 1)``."""
    parts = []
    for side in ((-x).clamp_min(0), x.clamp_min(0)):
        counts, exponent = empty_histogram(1, BINS)
        peak = side.amax().reshape(1)
        parts.append((*update(counts, exponent, side[None], peak, zeros(side[None])), peak))
    return [torch.stack(part) for part in zip(*parts, strict=True)]


def signed(x):
    """One histogram with zero in its middle, in NumPy, and the width of its bins."""
    width = 2.0 ** math.frexp(float(x.abs().max()))[1] / BINS
    values = x[x != 0].double().numpy()
    index = np.where(values > 0, np.floor(values / width), np.ceil(values / width) - 1) + BINS
    return np.bincount(index.astype(int), minlength=2 * BINS), width


@pytest.mark.parametrize("num_bits", [2, 4, 6])
@pytest.mark.parametrize("name", data())
@pytest.mark.parametrize("method", ERRORS)
def test_every_candidate_has_the_error_of_the_formula(method, name, num_bits):
    counts, _ = signed(data()[name])
    stack = torch.from_numpy(counts).double()[None]
    of = {
        "mse": lambda: affine_errors.squared(stack, num_bits),
        "mae": lambda: affine_errors.absolute(stack, num_bits),
        "lp": lambda: affine_errors.power(stack, num_bits, 2.4),
        "kl": lambda: affine_errors.divergence(stack, num_bits),
    }[method]()
    generator = torch.Generator().manual_seed(1)
    low, high = torch.rand(2, 1, 40, generator=generator, dtype=torch.float64) * BINS
    low[:, :5] = 0
    found = of(low, high)[0].numpy()
    expected = np.array([ERRORS[method](counts, *ends, num_bits) for ends in zip(low[0].tolist(), high[0].tolist(), strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_bits", [3, 6])
@pytest.mark.parametrize("name", data())
@pytest.mark.parametrize("method", ERRORS)
def test_no_range_of_the_grid_has_less_error(method, name, num_bits):
    x = data()[name]
    parts = histogram(x)
    # without a largest value, which would bound the range more tightly than the edge of the outermost bin
    parts[2] = torch.full((2, 1), math.inf, dtype=torch.float64)
    low, high = affine_range(*parts, method, Search(num_bits, p=2.4))
    counts, width = signed(x)
    used = np.flatnonzero(counts) - BINS
    most = max(0, -used.min()), max(0, used.max() + 1)
    steps = np.arange(1, COARSE + 1) / COARSE
    grid = [(a * most[0], b * most[1]) for a in steps for b in steps]
    errors = [ERRORS[method](counts, *ends, num_bits) for ends in grid]
    found = ERRORS[method](counts, -low.item() / width, high.item() / width, num_bits)
    assert found <= min(errors) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("name", ["normal", "shifted", "gelu", "silu", "relu", "outliers"])
def test_mse_is_near_the_best_of_all_ranges_on_the_data_itself(name, num_bits):
    x = data()[name]
    parts = []
    for side in ((-x).clamp_min(0), x.clamp_min(0)):
        counts, exponent = empty_histogram(1, 4096)
        parts.append((*update(counts, exponent, side[None], side.amax().reshape(1), zeros(side[None])), side.amax().reshape(1)))
    low, high = affine_range(*(torch.stack(part) for part in zip(*parts, strict=True)), "mse", Search(num_bits))
    values = x.double().numpy()

    def error(a, b):
        return ((rounded(values, a, b, num_bits) - values) ** 2).sum()

    grid = np.arange(1, 49) / 48
    best = min(error(a * max(0.0, -values.min()), b * values.max()) for a in grid for b in grid)
    assert error(-float(low), float(high)) <= best * 1.03


def test_max_and_percentile():
    x = torch.cat([torch.linspace(-1, 3, 4001)])
    parts = histogram(x)
    low, high = affine_range(*parts, "max", Search())
    assert (low.item(), high.item()) == (-1, 3)
    assert affine_range(*parts, "noclipping", Search()) == (low, high)
    low, high = affine_range(*parts, "percentile", Search(percentile=90))
    width = 4 / BINS
    assert -0.8 - width <= low.item() <= -0.8 + width
    assert 2.8 - width <= high.item() <= 2.8 + width
    assert affine_range(*parts, "percentile", Search(percentile=100)) == (torch.tensor([-1.0]), torch.tensor([3.0]))


def test_rows_do_not_look_at_each_other():
    found = [histogram(data()[name]) for name in ("normal", "gelu", "negative")]
    together = [torch.cat(part, dim=1) for part in zip(*found, strict=True)]
    for method in ("mse", "mae", "lp", "kl", "percentile", "max"):
        low, high = affine_range(*together, method, Search(4))
        for i, alone in enumerate(found):
            # rows share no exponent, so bins of one row never become those of another
            one_low, one_high = affine_range(*alone, method, Search(4))
            assert (low[i], high[i]) == (one_low, one_high)


def test_zero_is_always_within_and_nothing_gives_nothing():
    low, high = affine_range(*histogram(data()["normal"].abs() + 5), "mse", Search(4))
    assert low == 0
    assert high > 5
    empty = torch.zeros(2, 1, BINS, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)
    for method in ("max", "mse", "mae", "lp", "kl", "percentile"):
        assert affine_range(*empty, method, Search(4)) == (torch.zeros(1), torch.zeros(1))


def test_options():
    parts = histogram(data()["outliers"])
    low, high = affine_range(*parts, "max", Search(z_threshold=6.0))
    assert -4.5 < low < -3.5
    assert 3.5 < high < 6.5
    low, high = affine_range(*histogram(torch.tensor([-0.01, 0.01])), "max", Search(min_threshold=1.0))
    assert high - low == pytest.approx(1.0)
    # as many levels as bins
    assert affine_range(*parts, "mse", Search(16)) == affine_range(*parts, "max", Search(16))


def test_what_has_no_affine_form_is_refused():
    parts = histogram(data()["few"])
    with pytest.raises(ValueError, match="`method` is 'entropy': for an affine range choose one of max"):
        affine_range(*parts, "entropy", Search())
    with pytest.raises(ValueError, match=r"`num_bits` is \(4, 3\): floats have no affine form"):
        affine_range(*parts, "mse", Search((4, 3)))
    with pytest.raises(ValueError, match="`power_of_two` is True"):
        affine_range(*parts, "mse", Search(power_of_two=True))
