"""`lq.functional.threshold` against searches that loop over candidates and bins, written in NumPy from the formulas."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional import divergence, rounding
from lq.functional.threshold import DIVERGENCES, METHODS, ROUNDING, Search, candidates, check_method, threshold

BINS = 256


# The formulas, candidate by candidate


def rounded(x, edge, num_bits, unsigned):
    """Magnitudes rounded to the grid that ends at ``edge``."""
    if num_bits == (4, 3):
        scale = edge / 448
        return torch.tensor(np.minimum(x / scale, 448)).to(torch.float8_e4m3fn).double().numpy() * scale
    qmax = 2 ** (num_bits - (not unsigned)) - 1
    scale = edge / qmax
    return scale * np.clip(np.rint(x / scale), 0, qmax)


def norm_error(p):
    def error(counts, edge, num_bits, unsigned, scale_amax=1.0):
        """Sum of ``|error|**p`` over the bin centres, rounded to the grid that the threshold at ``edge`` makes."""
        x = np.arange(len(counts)) + 0.5
        return float((counts * np.abs(x - rounded(x, scale_amax * edge, num_bits, unsigned)) ** p).sum())

    return error


def kl_error(counts, edge, num_bits, unsigned, scale_amax=1.0):
    """KL(P || Q) with the codes as levels, each with the bins that round to it."""
    qmax = 2 ** (num_bits - (not unsigned)) - 1
    x = np.arange(len(counts)) + 0.5
    x = x[x < edge * scale_amax]
    # half a step rounds up here, as the levels of the prefix sums do: a tie has no side that is right
    code = np.minimum(np.floor(x * (qmax / scale_amax) / edge + 0.5), qmax)
    return divergence_from_levels(counts, len(x), code)


def entropy_error(counts, edge, num_bits, unsigned, scale_amax=1.0):
    """KL(P || Q) of Migacz's talk, with levels of equal width."""
    levels = 2 ** (num_bits - (not unsigned))
    return divergence_from_levels(counts, edge, np.array([b * levels // edge for b in range(edge)]))


def divergence_from_levels(counts, edge, level):
    """KL(P || Q): P has the outliers in its last bin, Q has the mass of each level spread over its non-empty bins.

    The first bin counts as the second one.
    """
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    p, q = counts[:edge].copy(), np.zeros(edge)
    for j in np.unique(level):
        members = (level == j) & (p > 0)
        if members.any():
            q[members] = p[members].sum() / members.sum()
    p[-1] += counts[edge:].sum()
    if not q.sum() or (q[p > 0] == 0).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def grid(bins, search, method):
    if search.power_of_two:
        first = min(search.start_bin, bins) if method in DIVERGENCES else 1
        # as far as the grid needs it to have the last bin
        return [2**k for k in range(20) if first <= 2**k < 2 * bins / search.scale_amax]
    edges = list(range(min(search.start_bin, bins), bins + 1, search.stride))
    return edges if edges[-1] == bins else [*edges, bins]


ERRORS = {"mse": norm_error(2), "mae": norm_error(1), "lp": norm_error(2.4), "kl": kl_error, "entropy": entropy_error}


def assert_is_best(method, counts, search):
    search = dataclasses.replace(search, p=2.4)
    edge = int(METHODS[method](torch.from_numpy(counts)[None], search))
    edges = grid(len(counts), search, method)
    errors = np.array([ERRORS[method](counts, e, search.num_bits, search.unsigned, search.scale_amax) for e in edges])
    assert edge in edges
    if np.isinf(errors).all():
        assert edge == edges[-1]
    else:
        assert errors[edges.index(edge)] <= errors.min() * (1 + 1e-6) + 1e-9 * counts.any()


def histograms():
    rng = np.random.default_rng(0)

    def of(x):
        return np.histogram(np.abs(x), BINS, (0, np.abs(x).max()))[0].astype(np.int64)

    sparse = np.zeros(BINS, np.int64)
    sparse[rng.integers(0, BINS, 12)] = rng.integers(1, 1000, 12)
    single, outlier = np.zeros(BINS, np.int64), of(rng.exponential(size=9000)) // 2
    single[100], outlier[-1] = 1, 3
    spike = of(rng.normal(size=9000))
    spike[0] += 10**9
    return {
        "normal": of(rng.normal(size=20_000)),
        "laplace": of(rng.laplace(size=20_000)),
        "uniform": of(rng.random(20_000)),
        "heavy": of(rng.standard_t(2, size=20_000)),
        "sparse": sparse,
        "single count": single,
        "outlier": outlier,
        "zeros": spike,
        "huge counts": of(rng.normal(size=5000)) * 2**33,
    }


HISTOGRAMS = histograms()
SEARCHES = [
    Search(num_bits=8, start_bin=16),
    Search(num_bits=4, start_bin=8),
    Search(num_bits=8, unsigned=True, start_bin=200),
    Search(num_bits=4, unsigned=True, start_bin=20, stride=7),
    Search(num_bits=2, start_bin=1, stride=3),
    Search(num_bits=8, start_bin=1000),
    Search(num_bits=3, power_of_two=True),
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("method", ERRORS)
def test_finds_what_trying_every_candidate_finds(method, name, search):
    assert_is_best(method, HISTOGRAMS[name], search)


@pytest.mark.parametrize("scale_amax", ["one short of a power of two", 0.3, 1.25])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 7])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("method", ROUNDING)
def test_powers_of_two_are_those_of_the_grid_that_they_make(method, unsigned, num_bits, scale_amax):
    levels = 2 ** (num_bits - (not unsigned))
    share = scale_amax if isinstance(scale_amax, float) else (levels - 1) / levels
    for counts in HISTOGRAMS.values():
        assert_is_best(method, counts, Search(num_bits, unsigned, start_bin=8, power_of_two=True, scale_amax=share))


@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("method", ROUNDING)
def test_a_power_of_two_is_near_what_is_best_without_one(method, num_bits):
    counts, width = torch.from_numpy(HISTOGRAMS["normal"])[None], torch.tensor([1 / BINS], dtype=torch.float64)
    searches = [Search(num_bits, start_bin=16, power_of_two=power) for power in (True, False)]
    found, best = (threshold(counts, width, torch.ones(1), method, search).item() for search in searches)
    assert best / 2 < found < 2 * best


@pytest.mark.parametrize("method", ERRORS)
@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**9)), min_size=4, max_size=40),
    num_bits=st.integers(2, 8),
    unsigned=st.booleans(),
    start_bin=st.integers(1, 50),
    stride=st.integers(1, 5),
)
def test_finds_the_best_of_any_histogram(method, counts, num_bits, unsigned, start_bin, stride):
    counts = np.array(counts, np.int64)
    assert_is_best(method, counts, Search(num_bits, unsigned, start_bin=start_bin, stride=stride))


@pytest.mark.parametrize("method", ["mse", "mae", "lp"])
@pytest.mark.parametrize("num_bits", [16, 32, (4, 3)])
def test_norms_take_any_grid(method, num_bits):
    assert_is_best(method, HISTOGRAMS["heavy"], Search(num_bits=num_bits, start_bin=40, stride=3))


@pytest.mark.parametrize("method", DIVERGENCES)
def test_where_every_bin_has_a_level_divergences_clip_nothing(method):
    assert METHODS[method](torch.from_numpy(HISTOGRAMS["heavy"])[None], Search(num_bits=16)).item() == BINS


@pytest.mark.parametrize("method", DIVERGENCES)
def test_divergences_know_integers_only(method):
    with pytest.raises(ValueError, match=rf"'{method}', which counts the levels of integers, but `num_bits` is \(4, 3\)"):
        threshold(torch.ones(1, 4), torch.ones(1), torch.ones(1), method, Search(num_bits=(4, 3)))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
def test_lp_takes_any_exponent(p):
    counts = torch.from_numpy(HISTOGRAMS["normal"])[None]
    edge = METHODS["lp"](counts, Search(p=p, start_bin=40)).item()
    errors = {e: norm_error(p)(HISTOGRAMS["normal"], e, 8, False) for e in range(40, BINS + 1)}
    assert errors[edge] <= min(errors.values()) * (1 + 1e-6)


# Outliers, floors, powers of two


@pytest.mark.parametrize("z", [1.0, 3.0, 8.0])
def test_z_threshold_leaves_out_what_lies_far_from_the_mean(z):
    counts = HISTOGRAMS["outlier"]
    x = np.arange(BINS) + 0.5
    mean = (counts * x).sum() / counts.sum()
    std = np.sqrt((counts * (x - mean) ** 2).sum() / counts.sum())
    kept = np.where(np.abs(x - mean) > z * std, 0, counts)
    assert kept.sum() < counts.sum()
    for method in METHODS:
        amax = [
            threshold(torch.from_numpy(c)[None], torch.ones(1), torch.full((1,), 256.0), method, search)
            for c, search in ((counts, Search(z_threshold=z, start_bin=20)), (kept, Search(start_bin=20)))
        ]
        assert torch.equal(*amax), method
    assert amax[0] < BINS


@pytest.mark.parametrize("method", METHODS)
def test_min_threshold_is_the_least_result(method):
    counts = torch.from_numpy(HISTOGRAMS["normal"])[None]
    width, peak = torch.tensor([1 / BINS], dtype=torch.float64), torch.ones(1)
    assert threshold(counts, width, peak, method, Search(min_threshold=1.75)).item() == 1.75
    assert threshold(counts, width, peak, method, Search(min_threshold=0.01)).item() > 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HISTOGRAMS)
def test_powers_of_two_are_powers_of_two(method, name):
    counts, width = torch.from_numpy(HISTOGRAMS[name])[None], torch.tensor([2.0**-9], dtype=torch.float64)
    amax = threshold(counts, width, torch.tensor([0.49]), method, Search(power_of_two=True)).item()
    assert amax in [2.0**-k for k in range(1, 10)]
    if method in ("max", "noclipping"):
        top = (np.nonzero(HISTOGRAMS[name])[0].max() + 1) / 2**9
        assert amax / 2 < min(top, 0.49) <= amax


@pytest.mark.parametrize("method", METHODS)
def test_a_power_of_two_above_the_peak_is_for_grids_that_end_below_it(method):
    """Codes -1, 0 and 1, half a power of two each: 2 hits a peak near 1, and nothing is lost below half of one."""
    for peak, least, expected in ((0.99, 1.0, 2.0), (0.49, 0.5, 1.0), (0.5, 0.5, 1.0)):
        counts = torch.zeros(1, 16, dtype=torch.int64)
        counts[0, int(16 * peak)] = 9
        search = Search(2, power_of_two=True, scale_amax=0.5)
        amax = threshold(counts, torch.tensor([1 / 16], dtype=torch.float64), torch.tensor([peak]), method, search)
        assert amax.item() == (expected if method in ROUNDING else least)


def test_a_power_of_two_stays_what_it_is():
    counts = torch.tensor([[0, 1, 0, 0]])
    for peak, expected in ((0.5, 0.5), (0.26, 0.5), (0.25, 0.25), (0.0, 0.0)):
        amax = threshold(counts, torch.tensor([0.25]), torch.tensor([peak]), "max", Search(power_of_two=True))
        assert amax.item() == expected


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("percentile", [0, 0.1, 33.3, 50, 70, 90, 99, 99.9, 99.99, 99.999, 100])
def test_percentile_is_the_smallest_edge_that_keeps_enough(percentile, name):
    counts = HISTOGRAMS[name]
    enough = Fraction(str(percentile)) * int(counts.sum())
    expected = next(e for e in range(1, BINS + 1) if 100 * int(counts[:e].sum()) >= enough)
    assert int(METHODS["percentile"](torch.from_numpy(counts)[None], Search(percentile=percentile))) == expected


@pytest.mark.parametrize("percentile", [70, 90, 95, 99, 99.5, 99.9, 99.99])
def test_percentile_is_exact_where_the_number_of_values_is_whole(percentile):
    counts = torch.ones(1, 10_000, dtype=torch.int64)
    assert METHODS["percentile"](counts, Search(percentile=percentile)).item() == round(percentile * 100)
    thousand = torch.ones(1, 1000, dtype=torch.int64)
    if percentile != 99.99:
        assert METHODS["percentile"](thousand, Search(percentile=percentile)).item() == round(percentile * 10)


# Which of several equals


def test_entropy_takes_the_largest_of_equals():
    # one level a bin: nothing is lost at any edge beyond the data
    counts = torch.tensor([[5, 5, 5, 5, 0, 0, 0, 0]])
    assert METHODS["entropy"](counts, Search(start_bin=1)).item() == 8


def test_mse_takes_the_smallest_of_equals():
    assert METHODS["mse"](torch.zeros(1, 8, dtype=torch.int64), Search(start_bin=3)).item() == 3


def test_a_spike_of_zeros_does_not_decide_entropy():
    search = Search(start_bin=16)
    without = torch.from_numpy(HISTOGRAMS["zeros"]).clone()
    without[0] = 0
    stack = torch.stack([torch.from_numpy(HISTOGRAMS["zeros"]), without])
    spike, none = METHODS["entropy"](stack, search)
    assert spike == none


# Stacks of histograms


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_gives_what_each_histogram_gives_alone(method):
    counts = torch.from_numpy(np.stack([*HISTOGRAMS.values(), np.zeros(BINS, np.int64)]))
    width = torch.logspace(-3, 3, len(counts), dtype=torch.float64)
    peak = width * BINS * 0.9
    search = Search(start_bin=8, stride=3)
    together = threshold(counts, width, peak, method, search)
    alone = [threshold(counts[i : i + 1], width[i : i + 1], peak[i : i + 1], method, search) for i in range(len(counts))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", ERRORS)
def test_the_size_of_a_slice_does_not_matter(method, monkeypatch):
    counts = torch.from_numpy(np.stack(list(HISTOGRAMS.values())))
    whole = METHODS[method](counts, Search())
    monkeypatch.setattr(divergence, "SLICE", 1)
    monkeypatch.setattr(rounding, "SLICE", 1)
    assert torch.equal(METHODS[method](counts, Search()), whole)


def test_the_counts_are_left_alone():
    counts = torch.from_numpy(HISTOGRAMS["normal"])[None]
    before = counts.clone()
    for method in METHODS:
        threshold(counts, torch.ones(1), torch.ones(1), method)
    assert torch.equal(counts, before)


# Candidates


@pytest.mark.parametrize(
    ("start_bin", "stride", "expected"), [(2, 3, [2, 5, 8]), (3, 2, [3, 5, 7, 8]), (8, 1, [8]), (99, 5, [8])]
)
def test_candidates_begin_at_start_bin_and_end_with_the_whole_range(start_bin, stride, expected):
    assert candidates(torch.zeros(1, 8), Search(start_bin=start_bin, stride=stride)).tolist() == expected


# From edges to amax


@pytest.mark.parametrize("method", METHODS)
def test_no_amax_exceeds_the_peak(method):
    counts = torch.zeros(1, 16, dtype=torch.int64)
    counts[0, 9] = 4
    amax = threshold(counts, torch.tensor([0.1]), torch.tensor([0.93]), method, Search(start_bin=16))
    assert amax.item() == pytest.approx(0.93)


@pytest.mark.parametrize("method", METHODS)
def test_all_mass_in_the_first_bin_gives_no_more_than_the_peak(method):
    counts = torch.tensor([[10**6] + [0] * 15])
    amax = threshold(counts, torch.tensor([1.0]), torch.tensor([0.25]), method, Search(start_bin=1))
    assert amax.item() == 0.25


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_histogram_gives_its_peak(method):
    counts, peak = torch.zeros(2, 16, dtype=torch.int64), torch.tensor([0.0, 7.0])
    assert threshold(counts, torch.ones(2), peak, method, Search(start_bin=1)).tolist() == [0.0, 7.0]


def test_max_does_not_clip():
    counts = torch.from_numpy(HISTOGRAMS["heavy"])[None]
    for method in ("max", "noclipping"):
        assert threshold(counts, torch.ones(1), torch.tensor([250.5]), method).item() == 250.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_amax_has_the_dtype_of_the_peak(dtype):
    counts = torch.from_numpy(HISTOGRAMS["normal"])[None]
    assert threshold(counts, torch.ones(1), torch.ones(1, dtype=dtype), "mse").dtype == dtype


# Refusals


@pytest.mark.parametrize("percentile", [-0.1, 100.1, float("nan")])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match="`percentile`"):
        Search(percentile=percentile)


@pytest.mark.parametrize("option", ["start_bin", "stride", "p", "z_threshold", "scale_amax"])
def test_a_search_that_goes_nowhere_is_refused(option):
    with pytest.raises(ValueError, match=f"`{option}`"):
        Search(**{option: 0})


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_floor_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="`min_threshold`"):
        Search(min_threshold=bad)


def test_an_unknown_method_is_refused_with_the_known_ones():
    for refuse in (lambda: check_method("median"), lambda: threshold(*[torch.ones(1, 4)] * 3, "median")):
        with pytest.raises(ValueError, match=r"'median'.*percentile, mse, mae, lp, kl, entropy"):
            refuse()
