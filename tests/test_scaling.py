"""Polynomials from counts, slopes and intervals against SciPy and by coverage, sweeps on simulated clocks, and refusals."""

import math
import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from tunebook.kit.plots import figure
from tunebook.timing.clock import Roof, Simulated, Timing
from tunebook.timing.roofline import Work, counted
from tunebook.timing.scaling import Exponent, Growth, Sweep, draw, exponent, fitted, predicted, slopes, steps, sweep, through

quick = settings(deadline=None, max_examples=60, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
parts = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).filter(any)
SIZES = [64, 128, 256, 512, 1024, 2048]


def around(R, N, noise=0.05, seed=0, lead=()):
    return torch.randn(*lead, R, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(noise).exp()


# Polynomials

@quick
@given(c=parts, ns=st.lists(st.integers(0, 500), min_size=7, max_size=9, unique=True))
def test_the_polynomial_through_its_own_values(c, ns):
    while len(c) > 1 and not c[-1]:
        c = c[:-1]
    found = through(ns, [sum(a * n**k for k, a in enumerate(c)) for n in ns])
    assert found.c == tuple(c) and all(isinstance(a, Fraction) for a in found.c)


@quick
@given(c=st.lists(st.fractions(-9, 9, max_denominator=7), min_size=3, max_size=3), n=st.integers(1, 1000))
def test_fractions_and_signs(c, n):
    assume(c[-1])
    g = Growth(tuple(c))
    assert through([1, 2, 3, 5], [g(k) for k in (1, 2, 3, 5)])(n) == g(n)


def test_a_count_off_by_one_is_refused():
    values = [100 + 10 * n + n * n for n in range(1, 7)]
    assert through(range(1, 7), values) == Growth((100, 10, 1))
    for i in range(6):
        with pytest.raises(ValueError, match=r"polynomial of degree below 5: count more sizes, or whole tiles"):
            through(range(1, 7), [v + (k == i) for k, v in enumerate(values)])
    with pytest.raises(ValueError, match="degree below 0"):
        through([3], [7])
    with pytest.raises(ValueError, match=r"different sizes and a count for each, got \[1, 1, 2\] and 3 counts: count each size once"):
        through([1, 1, 2], [1, 1, 2])


@quick
@given(c=parts, n=st.floats(0.01, 1e5), factor=st.floats(1.01, 100))
def test_local_exponents_rise_and_hold_the_doubling_between_them(c, n, factor):
    g = Growth(tuple(c))
    low, high = g.exponent(n), g.exponent(n * factor)
    powers = [k for k, a in enumerate(c) if a]
    assert powers[0] - 1e-9 <= low <= high + 1e-9 <= powers[-1] + 2e-9
    between = steps([n, n * factor], torch.tensor([float(g(n)), float(g(n * factor))], dtype=torch.float64)).item()
    assert low - 1e-6 <= between <= high + 1e-6


@quick
@given(a=st.floats(1e-3, 1e6), b=st.floats(1e-3, 1e6), low=st.integers(0, 2), more=st.integers(1, 3))
def test_at_the_crossover_two_terms_are_equal(a, b, low, more):
    c = [0.0] * (low + more + 1)
    c[low], c[-1] = a, b
    g = Growth(tuple(c))
    at = g.crossover(low, low + more)
    assert a * at**low == pytest.approx(b * at ** (low + more)) and g.exponent(at) == pytest.approx(low + more / 2)


def test_it_reads_as_a_sum():
    assert str(Growth((Fraction(1, 3), 0, 5, 1))) == "1/3 + 5 n^2 + 1 n^3" and str(Growth((0, 2))) == "2 n"


# Slopes

@quick
@given(p=st.floats(-2, 4), a=st.floats(1e-9, 1e9), ns=st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True).map(sorted))
def test_a_power_law_has_its_power(p, a, ns):
    costs = torch.tensor([a * float(n) ** p for n in ns], dtype=torch.float64)
    assert slopes(ns, costs).item() == pytest.approx(p, abs=1e-6)
    assert steps(ns, costs) == pytest.approx([p] * (len(ns) - 1), abs=1e-4)


@quick
@given(seed=st.integers(0, 999), N=st.integers(2, 8), scale=st.floats(1e-6, 1e6))
def test_slopes_are_scipy_s_and_numpy_s_and_lie_among_the_steps(seed, N, scale):
    ns = sorted(random.Random(seed).sample(range(1, 5000), N))
    costs = around(3, N, 1.0, seed)
    ours = slopes(ns, costs)
    for row, got in zip(costs, ours):
        assert got.item() == pytest.approx(stats.linregress(np.log(ns), row.log()).slope, abs=1e-8)
        assert got.item() == pytest.approx(np.polyfit(np.log(ns), row.log(), 1)[0], abs=1e-8)
    assert bool((steps(ns, costs).amin(-1) - 1e-9 <= ours).all() and (ours <= steps(ns, costs).amax(-1) + 1e-9).all())
    assert torch.allclose(slopes(ns, costs * scale), ours, atol=1e-9)  # units do not matter
    assert torch.allclose(slopes([n * 7 for n in ns], costs), ours, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_dtypes_are_widened(dtype):
    got = slopes([1, 2, 4], torch.tensor([1, 4, 16]).to(dtype))
    assert got.dtype == torch.float64 and got.item() == pytest.approx(2)


@pytest.mark.parametrize("ns, costs", [([1], [1.0]), ([2, 1], [1.0, 2.0]), ([1, 1], [1.0, 2.0]), ([0, 1], [1.0, 2.0]),
                                       ([-1, 1], [1.0, 2.0]), ([1, 2], [1.0, 2.0, 3.0]), ([], [])])
@pytest.mark.parametrize("f", [slopes, steps, fitted])
def test_sizes_that_do_not_rise_are_refused(f, ns, costs):
    with pytest.raises(ValueError, match=r"two or more rising sizes and costs \(..., N\) at each, got .*: sort them"):
        f(ns, torch.tensor(costs))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_costs_without_a_logarithm_are_refused(bad):
    with pytest.raises(ValueError, match="expected positive costs: a power law has no zero"):
        slopes([1, 2], torch.tensor([1.0, bad]))


# Intervals

@pytest.mark.parametrize("kind", ["equal", "smallest noisier", "slow rounds", "interruptions"])
@pytest.mark.parametrize("R", [6, 10, 20])
def test_coverage_is_what_is_promised_or_more(kind, R):
    trials, g = 1000, torch.Generator().manual_seed(R)
    log = around(R, 6, seed=R, lead=(trials,)).log()
    if kind == "smallest noisier":
        log[..., 0] *= 8
    if kind == "slow rounds":
        log += torch.randn(trials, R, 1, generator=g)
    if kind == "interruptions":
        log += 2.0 * (torch.rand(trials, R, 6, generator=g) < 0.15)
    costs = torch.tensor([n**1.5 for n in SIZES]) * log.exp()
    held = sum(e.low <= 1.5 <= e.high for e in (exponent(SIZES, c) for c in costs)) / trials
    assert 0.95 - 0.021 <= held <= {6: 1.0, 10: 0.972, 20: 0.972}[R]


def test_a_common_factor_of_a_round_changes_nothing():
    costs = around(8, 6)
    a, b = exponent(SIZES, costs), exponent(SIZES, costs * around(8, 1, 2.0, 1))
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-12)
    assert a.low < a.value < a.high


@pytest.mark.parametrize("low, high, want", [(1.95, 2.05, "consistent"), (1.9, 2.1, "consistent"), (2.11, 2.4, "not consistent"),
                                             (1.2, 1.89, "not consistent"), (1.85, 2.0, "undecided"), (2.05, 2.2, "undecided"),
                                             (0.0, 4.0, "undecided")])
def test_verdicts(low, high, want):
    assert Exponent((low + high) / 2, low, high).verdict(2.0) == want


def test_a_wider_margin_decides():
    e = Exponent(1.9, 1.8, 2.0)
    assert [e.verdict(2.0, m) for m in (0.05, 0.1, 0.3)] == ["undecided", "undecided", "consistent"]
    assert str(e) == "1.90 [1.80, 2.00]"


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="5 rounds are too few for an interval of 95%: sample longer"):
        exponent(SIZES, around(5, 6))


# The fit

@quick
@given(seed=st.integers(0, 9999), powers=st.sampled_from([(0, 1), (0, 1, 2), (1, 2), (0, 2), (0, 1, 2, 3)]))
def test_the_fit_is_scipy_s(seed, powers):
    rng = random.Random(seed)
    c = [rng.choice([0.0, 10 ** rng.uniform(-2, 4)]) for _ in powers]
    assume(any(c))
    clean = torch.tensor([sum(a * float(n) ** k for a, k in zip(c, powers)) for n in SIZES], dtype=torch.float64)
    costs = clean * around(1, 6, 0.2, seed)[0]
    ours = fitted(SIZES, costs, powers)
    a = np.array([[float(n) ** k / y for k in powers] for n, y in zip(SIZES, costs.tolist())])
    scale = np.linalg.norm(a, axis=0)
    _, norm = optimize.nnls(a / scale, np.ones(6))
    got = np.array([ours.c[k] for k in powers])
    assert (got >= 0).all() and np.linalg.norm(a @ got - 1) == pytest.approx(norm, abs=1e-6)


def test_a_cost_without_noise_is_found_and_units_do_not_matter():
    g = Growth((100, 10, 1))
    costs = torch.tensor([float(g(n)) for n in SIZES])
    for scale in (1e-9, 1.0, 1e9):
        assert fitted(SIZES, costs * scale).c == pytest.approx([scale * a for a in g.c], rel=1e-3)
    assert fitted(SIZES, costs, (0, 3)).c[1:3] == (0.0, 0.0)


# Sweeps

def test_a_sweep_recovers_a_planted_exponent_and_levels_its_rounds():
    clock = Simulated()
    s = sweep("planted", {n: clock.work(20.0 * n**1.5) for n in SIZES}, 0.5, clock=clock, seed=0)
    e = s.exponent
    assert (e.value, e.low, e.high) == pytest.approx((1.5, 1.5, 1.5), abs=2e-3)
    assert s.ns == SIZES and s.costs.shape == s.level.shape and len(s.costs) >= 8 and s.costs.shape[1] == 6
    assert {t.kind for t in s.timings.values()} == {"simulated"} and "planted, 64 to 2048: exponent 1.50" in repr(s)
    assert s.costs.log().mean(1).std() >= s.level.log().mean(1).std() and s.level.log().mean(1).std() < 1e-9


def test_the_order_is_drawn_and_turned_back():
    clock, seen = Simulated(), []
    def work(n):
        f = clock.work(1e6)
        return lambda: (seen.append(n), f())
    sweep("order", {n: work(n) for n in (1, 2, 3)}, 0.0, clock=clock, seed=3)
    rounds = [seen[-6 * k:][:6] for k in range(8, 0, -1)]
    assert all(r == r[::-1] and sorted(r[:3]) == [1, 2, 3] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


@pytest.mark.parametrize("slope", [-0.3, 0.3, 1.0])
def test_a_steady_drift_drops_out(slope):
    clock = Simulated(load=[1 + slope * k / 5000 for k in range(5000)])
    work = {n: clock.work(1e3 * n) for n in SIZES}
    e = sweep("drift", work, 2.0, clock=clock, seed=1).exponent
    assert e.low - 5e-3 <= 1.0 <= e.high + 5e-3 and abs(e.value - 1) < 5e-3


def test_it_ends_after_its_seconds_or_rounds():
    clock = Simulated()
    assert len(sweep("a", {1: clock.work(1e6), 2: clock.work(2e6)}, 0.0, clock=clock).costs) == 8
    assert len(sweep("b", {1: clock.work(1e4), 2: clock.work(2e4)}, 1.0, clock=clock, most=11).costs) == 11


def test_the_cost_of_a_round_is_a_geometric_mean():
    s = Sweep("x", {n: Timing("", [n * 1e-6, n * 4e-6] * 7, "simulated") for n in (1, 2)})
    assert torch.allclose(s.costs, torch.tensor([2e-6, 4e-6], dtype=torch.float64).expand(7, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_of_this_machine_says_so(device):
    s = sweep("copy", {n: torch.zeros(n, device=device).clone for n in (1000, 4000)}, 0.01, device)
    assert repr(s).endswith("measured here") and s.timings[1000].where["device"] != "a simulated clock"


# Theory

def test_the_prediction_is_the_roof_and_a_start():
    works, top = [Work(100, 0, 10), Work(100, 100, 1000)], Roof(10.0, 100.0)
    assert predicted(works, top).tolist() == [10.0, 20.0]
    assert predicted(works, top, 1.0).tolist() == [11.0, 21.0] and predicted(works, top, [1.0, 2.0]).tolist() == [11.0, 22.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_counts_of_a_product_are_a_polynomial(device, dtype):
    w = torch.ones(5, 7, dtype=dtype, device=device)
    def f(n):
        return counted(torch.mm, torch.ones(n, 5, dtype=dtype, device=device), w)
    assert through([1, 2, 5], [f(n).products for n in (1, 2, 5)]) == Growth((0, 70))
    assert through([1, 2, 5], [f(n).nbytes for n in (1, 2, 5)]) == Growth((35 * dtype.itemsize, 12 * dtype.itemsize))


# The picture

def test_a_panel_shows_points_curve_and_both_exponents():
    clock = Simulated()
    s = sweep("cube", {n: clock.work(1e3 * n**3) for n in (2, 4, 8)}, 0.1, clock=clock, seed=0)
    fig, ax = figure()
    draw(ax, s, torch.tensor([1e-6 * n**2 for n in (2, 4, 8)]))
    assert ax.texts[0].get_text() == f"cube {s.exponent}, theory 2.00" and ax.get_ylabel() == "seconds, simulated"
    assert ax.get_xscale() == ax.get_yscale() == "log" and len(ax.get_lines()) == 2
    fig, ax = figure()
    draw(ax, s)
    assert "theory" not in ax.texts[0].get_text() and len(ax.get_lines()) == 1


def test_doubling_is_two_to_the_exponent():
    g = Growth((0, 0, 3))
    assert all(g(2 * n) == 2 ** g.exponent(n) * g(n) for n in (1, 7, 100))
    assert all(b > a for a, b in pairwise([Growth((100, 10, 1)).exponent(n) for n in range(1, 50)]))
