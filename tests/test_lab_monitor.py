"""Lab 9: what the functions promise holds on streams that were not in their cases."""

import math

import pytest
import torch

from tunebook.labs.monitor import _adjusted, _lowest, cusum, daily_index, discoveries, judge, level, smooth
from tunebook.tasks.classify import wilson


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "most", "of"), [(9, 1, 10), (30, 1, 4), (29, 2, 15), (40, 3, 40)])
def test_a_calm_time_rings_as_often_as_k_of_n_and_one(n, most, of):
    x = noise(n, 4000, n + 1)
    rung = sum(float(row[0]) > level(row[1:], most, of) for row in x) / len(x)
    k = (n + 1) * most // of
    assert k / (n + 1) <= most / of
    low, high = wilson(round(k / (n + 1) * len(x)), len(x), 4.0)[1:]
    assert low <= rung <= high


def test_false_discoveries_stay_below_q():
    """Of 20 questions 5 have an answer; over draws the share of false discoveries is q times the share without one (independent)."""
    g, q, shares, hits = torch.Generator().manual_seed(0), 0.2, [], 0
    for _ in range(2000):
        p = torch.rand(20, generator=g, dtype=torch.float64)
        p[:5] *= 0.01
        found = discoveries(p, q)
        shares.append(float(found[5:].sum()) / max(1, int(found.sum())))
        hits += int(found[:5].sum())
    mean, error = torch.tensor(shares).mean(), torch.tensor(shares).std() / len(shares) ** 0.5
    assert abs(float(mean) - q * 15 / 20) < 4 * float(error) and hits > 0.9 * 5 * 2000


@pytest.mark.parametrize("seed", range(5))
def test_discoveries_grow_with_q_and_are_the_adjusted_ones(seed):
    p = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    sets = [discoveries(p, q) for q in (0.01, 0.05, 0.2, 0.6)]
    assert all(bool((a <= b).all()) for a, b in zip(sets, sets[1:]))
    assert all(torch.equal(s, _adjusted(p) <= q) for s, q in zip(sets, (0.01, 0.05, 0.2, 0.6)))


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_with_a_floor_is_the_distance_from_the_lowest_point(seed):
    x = noise(seed, 3, 200).double()
    x[:, 50:60] = math.nan
    torch.testing.assert_close(cusum(x, 0.2), _lowest(x, 0.2))
    assert bool((cusum(x, 0.2) >= cusum(x, 0.4)).all()) and bool((cusum(x, 0.2) >= 0).all())


def test_the_weighted_mean_lies_among_its_values_and_forgets():
    x = noise(3, 60).double()
    x[::7] = math.nan
    s = smooth(x, 3.0)
    seen = x[~x.isnan()]
    assert s[0].isnan() and bool(((s[1:] >= seen.min()) & (s[1:] <= seen.max())).all())
    late = x.clone()
    late[:20] += 100
    assert float((smooth(late, 3.0) - s)[-1]) == pytest.approx(0, abs=100 * 2 ** (-39 / 3) * 2)
    torch.testing.assert_close(smooth(2 * x + 1, 3.0), 2 * s + 1, equal_nan=True)


def test_an_index_does_not_depend_on_the_order_of_the_headlines():
    days, values = torch.randint(30, (80,), generator=torch.Generator().manual_seed(4)), noise(4, 80).double()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(daily_index(days[order], values[order], 33), daily_index(days, values, 33), equal_nan=True)
    assert daily_index(days, values, 33)[30:].isnan().all()


def test_more_grace_finds_no_less_and_rings_false_no_more():
    alarms, events = [3, 11, 17, 25, 40], [[10, 12], [20, 23], [50, 60]]
    told = [judge(alarms, events, g) for g in range(6)]
    assert [t["false"] for t in told] == sorted((t["false"] for t in told), reverse=True)
    assert [sum(d is not None for d in t["delays"]) for t in told] == [1, 1, 2, 2, 2, 2]
    assert judge(alarms[::-1], events, 2) == told[2] == {"delays": [1, 5, None], "false": 3}
