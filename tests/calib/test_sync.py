"""Calibration on several ranks equals calibration of one process on the union of their batches, bit for bit."""

import datetime

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lq.calib import AffineCalibrator, HeldOutCalibrator, HistogramCalibrator, MaxCalibrator, sync_calibrators
from lq.calibration import calibrating
from lq.functional.histogram import grow
from lq.rescale import RescalingCalibrator
from lq.surgery import named_quantizers, quantize_
from processes import start_ranks

WORLDS = (2, 3)


def batches():
    """Batches of unequal size whose ranges differ by powers of ten, the first with zeros only."""
    generator = torch.Generator().manual_seed(0)
    scales = [0.0, 1e-3, 10.0, 1.0, 1e4]
    return [torch.randn(2 + i, 3, 4, 4, generator=generator) * scale for i, scale in enumerate(scales)]


def shares(world):
    """Who collects which batches: some more than others, and the last rank, or the first, none at all."""
    uneven = [batches()[r::world] for r in range(world)]
    last_none = [batches()[r :: world - 1] for r in range(world - 1)] + [[]]
    return {"uneven": uneven, "last has none": last_none, "first has none": last_none[::-1]}


def calibrators():
    kinds = [MaxCalibrator, HistogramCalibrator, AffineCalibrator]
    unused = [HistogramCalibrator(num_bins=8), MaxCalibrator()]
    return [kind(axis=axis) for kind in kinds for axis in (None, 1, (1, 3))] + unused


def collected(data):
    used = calibrators()
    for calibrator in used[:-2]:
        for batch in data:
            calibrator.collect(batch)
    return used


def statistics(used):
    return [(c.shape, {name: state.clone() for name, state in c.metric_state.items()}) for c in used]


def network(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)]
    return quantize_(nn.Sequential(*layers).train(), "int8")


def amaxs(model):
    return {name: quantizer.amax for name, quantizer in named_quantizers(model)}


def calibrated(data, method, norm):
    model = network(norm)
    with calibrating(model, method):
        for batch in data:
            model(batch)
    return amaxs(model)


def message(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# What each rank does


def fails_in_the_block(rank):
    model = network(nn.Identity())
    with calibrating(model):
        if rank == 1:
            raise KeyError("a bad sample")
        model(batches()[1])


def meets_nan(rank):
    model = network(nn.Identity())
    with calibrating(model):
        model(batches()[1] * (float("nan") if rank == 1 else 1))


def sees_another_shape(rank):
    calibrator = MaxCalibrator(axis=0)
    calibrator.collect(torch.ones(2 + rank, 3))
    sync_calibrators([calibrator])


def collectives(used):
    """How many all-reduces one synchronisation takes."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args: calls.append(args) or all_reduce(*args)
    sync_calibrators(used)
    dist.all_reduce = all_reduce
    return len(calls)


# Numbers of either sign that are zero, denormal, or up to 10^12 apart; batches of them may be empty.
NUMBERS = st.one_of(
    st.just(0.0),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.floats(-(2.0**20), -(2.0**-20), width=32),
    st.floats(0, 2.0**-127, width=32),
)
BATCHES = st.lists(st.lists(NUMBERS, max_size=6).map(torch.tensor), max_size=6)


def any_share(rank, world):
    """Any batches in any order, shared out in any way: the same on all ranks, whose random numbers are the same."""

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(BATCHES, st.data())
    def holds(batches, data):
        owner = [data.draw(st.integers(0, world - 1)) for _ in batches]
        ours, one = ([MaxCalibrator(), HistogramCalibrator(num_bins=8), AffineCalibrator(num_bins=8)] for _ in "ab")
        for batch, whose in zip(batches, owner, strict=True):
            for calibrator in (ours if whose == rank else []) + one:
                calibrator.collect(batch)
        sync_calibrators(ours)
        # the ranks have the same statistics by now, so they fail together, or not at all
        assert str(statistics(ours)) == str(statistics(one))

    holds()


def held_out(rank, world):
    """Each rank holds batches of its own out; the counts merge."""
    calibrator = HeldOutCalibrator(num_bins=8)
    for i in range(2 + 3 * rank):
        calibrator.collect(torch.tensor([10.0 ** (i - rank)]))
    sync_calibrators([calibrator])
    amax = calibrator.compute_amax("auto")
    return calibrator.counts.tolist(), calibrator.held_out.tolist(), amax, calibrator.method


def rescaled(rank, world):
    """SmoothQuant with the alpha that all ranks find together; the last rank saw nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)).eval()
    calibrator = RescalingCalibrator(model)
    if rank < world - 1:
        calibrator(torch.randn(32, 8, generator=torch.Generator().manual_seed(rank)) * 10.0**rank)
    calibrator.rescale("auto")
    return [group.alpha for group in calibrator.groups], calibrator.model.state_dict()


def everything(rank, world):
    results = {}
    for name, share in shares(world).items():
        sync_calibrators(used := collected(share[rank]))
        results[name] = statistics(used)
    for method in ("max", "mse"):
        for norm in (nn.Identity(), nn.BatchNorm2d(4)):
            results[method, type(norm)] = calibrated(shares(world)["last has none"][rank], method, norm)
    results["reported"] = message(sync_calibrators, collected([]), "no disk left" if rank == 1 else None)
    results["block"] = message(fails_in_the_block, rank)
    results["nan"] = message(meets_nan, rank)
    results["shapes"] = message(sees_another_shape, rank)
    results["any share"] = message(any_share, rank, world)
    results["held out"] = held_out(rank, world)
    results["rescaled"] = rescaled(rank, world)
    results["collectives"] = [collectives(collected([])[:n]) for n in (1, 3, 8)]
    return results


def work(rank, folder):
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            where = f"file://{folder}/store{world}"
            limit = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
            torch.save(everything(rank, world), f"{folder}/{world}-{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank found: ``results[world][rank][question]``."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, str(folder), ranks=max(WORLDS))
    return {w: [torch.load(folder / f"{w}-{r}.pt", weights_only=False) for r in range(w)] for w in WORLDS}


@pytest.fixture(scope="module")
def one():
    """What one process finds on all batches."""
    return statistics(collected(batches()))


# What must come out


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("share", ["uneven", "last has none", "first has none"])
def test_every_rank_has_the_statistics_of_one_process_on_the_union(results, one, world, share):
    for mine in results[world]:
        for (shape, states), (one_shape, one_states) in zip(mine[share], one, strict=True):
            assert shape == one_shape
            for name, state in one_states.items():
                assert states[name].dtype == state.dtype
                assert torch.equal(states[name], state)


@pytest.mark.parametrize("world", WORLDS)
def test_any_batches_shared_out_in_any_way_are_those_of_one_process(results, world):
    assert [mine["any share"] for mine in results[world]] == ["no error"] * world


@pytest.mark.parametrize("world", WORLDS)
def test_batches_held_out_on_any_rank_are_held_out_on_all(results, world):
    values = [(i, 10.0 ** (i - rank)) for rank in range(world) for i in range(2 + 3 * rank)]
    one, apart = HistogramCalibrator(num_bins=8), HistogramCalibrator(num_bins=8)
    one.collect(torch.tensor([value for _, value in values]))
    apart.collect(torch.tensor([value for i, value in values if i % 4 == 1]))
    expected = grow(apart.counts, apart.exponent, one.exponent)
    for mine in results[world]:
        assert mine["held out"][:2] == (one.counts.tolist(), expected.tolist())
    assert len({str(mine["held out"]) for mine in results[world]}) == 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_every_rank_has_the_amax_of_one_process(results, world, norm, method):
    one = calibrated(batches(), method, norm(4))
    assert len(one) == 4
    for mine in results[world]:
        assert mine[method, norm].keys() == one.keys()
        assert all(torch.equal(mine[method, norm][name], amax) for name, amax in one.items())


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_on_one_rank_stops_all_of_them(results, world):
    for mine in results[world]:
        assert mine["reported"] == "ValueError: Calibration failed on rank 1: no disk left"
        assert "NaN or Inf in calibration data, first at `0.input`" in mine["nan"]
        assert "rank 1" in mine["nan"]


@pytest.mark.parametrize("world", WORLDS)
def test_an_exception_in_the_block_of_one_rank_stops_all_of_them(results, world):
    for rank, mine in enumerate(results[world]):
        own = "KeyError: 'a bad sample'"
        assert mine["block"] == (own if rank == 1 else f"ValueError: Calibration failed on rank 1: {own}")


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_with_different_shapes_are_refused(results, world):
    for mine in results[world]:
        assert mine["shapes"].startswith("ValueError: amax has different shapes on the ranks: [(2, 1), (3, 1)")


@pytest.mark.parametrize("world", WORLDS)
def test_the_number_of_collectives_does_not_grow_with_the_model(results, world):
    # maxima only for a MaxCalibrator, and counts as well once there is a histogram
    assert [mine["collectives"] for mine in results[world]] == [[1, 1, 2]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_choose_the_same_alpha_and_have_the_same_weights(results, world):
    alphas, weights = results[world][0]["rescaled"]
    assert alphas
    for mine in results[world]:
        assert mine["rescaled"][0] == alphas
        assert all(torch.equal(mine["rescaled"][1][name], weight) for name, weight in weights.items())


# One process


def test_one_process_needs_no_process_group():
    used = collected(batches())
    before = statistics(used)
    sync_calibrators(used)
    assert str(statistics(used)) == str(before)
    sync_calibrators([])


def test_a_reported_error_is_raised_in_one_process_too():
    with pytest.raises(ValueError, match=r"^no disk left$"):
        sync_calibrators([MaxCalibrator()], "no disk left")


def test_one_process_has_the_statistics_of_any_batches():
    any_share(0, 1)
