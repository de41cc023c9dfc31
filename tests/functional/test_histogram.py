"""`lq.functional.histogram` against a histogram of all data at once in NumPy: every comparison is of integers, and exact."""

import itertools
import math
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional import histogram
from lq.functional.amax import rows_amax
from lq.functional.histogram import MIN_EXPONENT, bin_width, bins_for, empty_histogram, grow, update

BINS = 16
MAGNITUDES = st.floats(width=32, allow_nan=False, allow_infinity=False)


def reference(row, bins=BINS):
    """Counts and exponent of one row of numbers: the smallest power of two above all of them, then floor."""
    row = [abs(float(v)) for v in row]
    exponent = max([MIN_EXPONENT] + [math.frexp(v)[1] for v in row if v])
    index = [int(math.ldexp(v, -exponent) * bins) for v in row]
    return np.bincount(index, minlength=bins).tolist(), exponent


def collect(batches, bins=BINS, skip_zeros=False):
    """Histogram of batches ``(rows, values)``."""
    counts, exponent = empty_histogram(batches[0].shape[0], bins)
    for batch in batches:
        counts, exponent = update(counts, exponent, batch, rows_amax(batch), histogram.zeros(batch) if skip_zeros else None)
    return counts, exponent


def assert_is_reference(result, rows):
    for i, row in enumerate(rows):
        counts, exponent = reference(row)
        assert result[1][i] == exponent
        assert result[0][i].tolist() == counts


@pytest.fixture(params=["fast", "general"])
def path(request, monkeypatch):
    """Run once as on a CPU, once in the way of other devices."""
    if request.param == "general":
        monkeypatch.setattr(histogram, "_count_on_cpu", histogram._count)
    return request.param


# Any split, any order


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_split_in_any_order_gives_the_same_integers(data):
    rows = data.draw(st.sampled_from([1, 3]))
    row = st.lists(MAGNITUDES, min_size=rows, max_size=rows)
    values = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=12)), dtype=torch.float32).T
    order = data.draw(st.permutations(range(values.shape[1])))
    cuts = sorted(data.draw(st.lists(st.integers(0, values.shape[1]), max_size=4)))
    batches = torch.tensor_split(values[:, order], cuts, dim=1)
    assert_is_reference(collect(batches), values)


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([[1e-6, 2e-6], [1e6, 3.0]], id="growth by 1e12"),
        pytest.param([[1e6, 3.0], [1e-6, 2e-6]], id="large first"),
        pytest.param([[0.0, 0.0], [1e-4, 3e-5]], id="zeros first"),
        pytest.param([[1e-4, 3e-5], [0.0]], id="zeros last"),
        pytest.param([[], [1e-4]], id="empty first"),
        pytest.param([[1e-4], []], id="empty last"),
        pytest.param([[], []], id="only empty"),
        pytest.param([[0.0]], id="only zeros"),
        pytest.param([[1e-45, 3e-40], [1e-38]], id="denormals"),
        pytest.param([[1e-45], [1.0]], id="denormals, then more"),
        pytest.param([[0.7] * 5, [0.7] * 3], id="constant"),
        pytest.param([[0.5, 1.0], [2.0, 4.0]], id="powers of two"),
        pytest.param([[-1.0, 1.0, -0.0]], id="signs"),
        pytest.param([[3.4028234663852886e38, 1.0], [1e38]], id="largest float32"),
        pytest.param([[1e36], [3e36, 5e35]], id="near the end of float32"),
    ],
)
@pytest.mark.usefixtures("path")
def test_equals_the_histogram_of_all_data(batches):
    assert_is_reference(collect([torch.tensor([b]) for b in batches]), [itertools.chain(*batches)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.usefixtures("path")
def test_every_float_dtype_is_counted_exactly(dtype):
    x = (torch.randn(1, 3000) * 3).to(dtype)
    assert_is_reference(collect([x[:, :1000], x[:, 1000:] * 2]), torch.cat([x[:, :1000], x[:, 1000:] * 2], dim=1))


@pytest.mark.parametrize("bins", [4096, 2**16])
@pytest.mark.parametrize("scale", [1e-44, 1e-36, 1.0, 1e36])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cpu_counts_as_other_devices_do(monkeypatch, rows, scale, bins):
    x = torch.randn(rows, 5000) * scale
    fast, _ = collect([x], bins)
    monkeypatch.setattr(histogram, "_count_on_cpu", histogram._count)
    general, _ = collect([x], bins)
    assert torch.equal(fast, general)
    assert fast.sum() == rows * 5000


def test_each_channel_is_counted_as_if_alone():
    x = torch.randn(4, 500) * torch.tensor([[0.0], [1e-6], [1.0], [1e6]])
    counts, exponent = collect([x[:, :100], x[:, 100:]])
    for i, row in enumerate(x):
        alone, alone_exponent = collect([row[None]])
        assert torch.equal(counts[i], alone[0])
        assert exponent[i] == alone_exponent[0]


# Counts


@pytest.mark.usefixtures("path")
def test_counts_do_not_stop_at_2_to_the_24():
    counts, exponent = collect([torch.tensor([[0.9, 0.1]])])
    counts[0] += 2**24 + 2**40
    more, _ = update(counts, exponent, torch.full((1, 3), 0.9), torch.tensor([0.9]))
    assert (more - counts)[0].sum() == 3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_counts_the_same_in_pieces(monkeypatch, threads):
    x = torch.randn(2, 999)
    expected, _ = collect([x])
    monkeypatch.setattr(histogram, "CHUNK", 70)
    monkeypatch.setattr(histogram, "PARALLEL", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    counts, _ = collect([x])
    assert torch.equal(counts, expected)


def count_in_a_fork(queue):
    queue.put(collect([torch.ones(1, 100)])[0].sum().item())


def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(histogram, "PARALLEL", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    collect([torch.ones(1, 100)])
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=count_in_a_fork, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == 100
    process.join()


@pytest.mark.usefixtures("path")
def test_zeros_are_skipped_on_request_and_small_values_are_not():
    batches = [torch.tensor([[0.0, -0.0, 1e-9, 1.0]]), torch.tensor([[0.0, 2.0]])]
    with_zeros, _ = collect(batches)
    without, _ = collect(batches, skip_zeros=True)
    assert (with_zeros - without).tolist() == [[3] + [0] * (BINS - 1)]
    assert without.sum() == 3


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_no_harm(bad, rows):
    good, x = torch.tensor([[0.3, 0.6]]).expand(rows, 2), torch.tensor([[0.3, bad, 0.6]]).expand(rows, 3)
    counts, exponent = collect([good, x, good])
    assert exponent.tolist() == [0] * rows
    assert (counts >= 0).all()
    assert 4 * rows <= counts.sum() <= 7 * rows


def test_the_given_counts_are_left_alone():
    counts, exponent = collect([torch.tensor([[0.5]])])
    before = counts.clone(), exponent.clone()
    update(counts, exponent, torch.tensor([[9.0]]), torch.tensor([9.0]))
    assert torch.equal(counts, before[0])
    assert torch.equal(exponent, before[1])


# Range


def test_growing_merges_neighbours_and_keeps_the_total():
    counts = torch.arange(1, 17).reshape(2, 8)
    exponent = torch.tensor([0, -3], dtype=torch.int32)
    grown = grow(counts, exponent, torch.tensor([1, -1], dtype=torch.int32))
    assert grown.tolist() == [[3, 7, 11, 15, 0, 0, 0, 0], [9 + 10 + 11 + 12, 13 + 14 + 15 + 16, 0, 0, 0, 0, 0, 0]]
    assert grow(counts, exponent, exponent).equal(counts)


def test_growing_by_more_than_all_bins_ends_in_the_first():
    grown = grow(torch.ones(1, 8, dtype=torch.int64), torch.tensor([-100]), torch.tensor([100]))
    assert grown.tolist() == [[8] + [0] * 7]


@pytest.mark.parametrize("exponent", [MIN_EXPONENT, -1, 0, 3, 128, 1000])
def test_bin_width_is_exact(exponent):
    assert bin_width(torch.tensor([exponent], dtype=torch.int32), 4096).tolist() == [2.0**exponent / 4096]


@pytest.mark.parametrize("num_bins", [2, 3, 100, 1000, 1024, 2048, 5000])
def test_half_of_the_bins_always_resolve_the_range_in_use(num_bins):
    bins = bins_for(num_bins)
    assert bins & (bins - 1) == 0
    for peak in (0.51, 1.0, 3.7, 4.0, 1e-3):
        _, exponent = collect([torch.tensor([[peak]])], bins)
        assert peak / bin_width(exponent, bins).item() >= num_bins
