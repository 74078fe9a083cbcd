"""The sixth lab: ratios of rounds and their interval under changes that must not matter, or matter in a known way."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.labs import timing

times = st.floats(1e-3, 1e3)
rounds = st.lists(st.tuples(st.integers(0, 1), times, times, times, times), min_size=1, max_size=8)


@given(rounds, st.floats(0.5, 2))
@settings(max_examples=60, deadline=None)
def test_a_load_that_grows_by_a_factor_at_each_sample_is_not_in_a_ratio(drawn, factor):
    coins, samples = [c for c, *_ in drawn], [t for _, *four in drawn for t in four]
    grown = [t * factor**k for k, t in enumerate(samples)]
    assert timing.round_ratios(grown, coins) == pytest.approx(timing.round_ratios(samples, coins), rel=1e-9)
    other = timing.round_ratios(samples, [1 - c for c in coins])
    assert [1 / r for r in other] == pytest.approx(timing.round_ratios(samples, coins), rel=1e-9)


@given(st.lists(times, min_size=9, max_size=9), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_an_interval_moves_with_the_ratios_and_turns_with_them(ratios, factor):
    middle, low, high = timing.interval(ratios, 6)
    assert low <= middle <= high and min(ratios) <= low * (1 + 1e-12) and high <= max(ratios) * (1 + 1e-12)
    assert timing.interval([factor * r for r in ratios], 6) == pytest.approx([factor * x for x in (middle, low, high)], rel=1e-9)
    assert timing.interval([1 / r for r in ratios], 6) == pytest.approx([1 / middle, 1 / high, 1 / low], rel=1e-9)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_a_compiler_pays_at_the_first_call_whose_total_is_shorter(first, later, plain):
    def shorter(n): return first + (n - 1) * later < n * plain
    n = timing.pays_after(first, later, plain)
    if n is None: assert not any(map(shorter, (1, 2, 10, 10**6)))
    else: assert shorter(n) and (n == 1 or not shorter(n - 1))


def test_no_answer_of_the_lab_depends_on_infinite_or_missing_numbers():
    for e in timing.EXERCISES:
        for case in e.cases(5):
            got = e.solution(*case.args)
            for x in got if isinstance(got, list) else got.values() if isinstance(got, dict) else [got]:
                assert not isinstance(x, float) or math.isfinite(x), (e.name, case.about)
