"""Lab 8: the promise of a threshold is kept on average over draws, and ranks do not depend on the order of a list."""

import math

import pytest
import torch

from tunebook.labs.service import _roots, centroid_scores, macro_f1, mean_pool, refusal_threshold, retrieval, wilson


@pytest.mark.parametrize(("n", "one_in"), [(9, 10), (19, 10), (25, 10), (30, 4)])
def test_a_new_message_is_refused_as_often_as_k_of_n_and_one(n, one_in):
    """Over all draws the share below the k-th lowest of n is k / (n + 1); it never passes the promise."""
    x = torch.rand(4000, n + 1, generator=torch.Generator().manual_seed(n))
    refused = sum(float(row[0]) < refusal_threshold(row[1:], one_in) for row in x) / len(x)
    k = (n + 1) // one_in
    assert k / (n + 1) <= 1 / one_in
    low, high = wilson(round(k / (n + 1) * len(x)), len(x), 4.0)[1:]
    assert low <= refused <= high


def test_of_equal_scores_none_is_refused():
    assert refusal_threshold(torch.full((30,), 0.5), 5) == 0.5 and not 0.5 < refusal_threshold(torch.full((30,), 0.5), 5)


def test_ranks_do_not_depend_on_the_order_of_the_answers():
    g = torch.Generator().manual_seed(0)
    s, right = torch.randint(4, (30, 6), generator=g).float(), torch.randint(6, (30,), generator=g)
    for _ in range(5):
        order = torch.randperm(6, generator=g)
        assert retrieval(s[:, order], order.argsort()[right], 2) == retrieval(s, right, 2)
    assert retrieval(torch.zeros(4, 5), torch.tensor([0, 1, 2, 4]), 4) == (0.0, pytest.approx(0.2))


@pytest.mark.parametrize(("right", "of"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 4000), (17, 31)])
def test_the_interval_solves_its_equation(right, of):
    share, low, high = wilson(right, of)
    assert (share, low, high) == pytest.approx(_roots(right, of), abs=1e-12) and 0 <= low <= share <= high <= 1
    for end in (low, high): assert (share - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / of, abs=1e-12)


def test_macro_f1_does_not_know_the_names_of_classes():
    g = torch.Generator().manual_seed(1)
    y, p = torch.randint(5, (40,), generator=g), torch.randint(5, (40,), generator=g)
    names = torch.tensor([9, 3, 30, 0, 4])
    assert macro_f1(names[y], names[p]) == pytest.approx(macro_f1(y, p), rel=1e-6)
    assert macro_f1(p, y) == pytest.approx(macro_f1(y, p), rel=1e-6), "F1 is symmetrical"


def test_lengths_do_not_change_a_cosine_and_padding_not_a_mean():
    g = torch.Generator().manual_seed(2)
    x, y, q = torch.randn(9, 5, generator=g), torch.arange(9) % 3, torch.randn(4, 5, generator=g)
    torch.testing.assert_close(centroid_scores(3 * x, y, q * 8, 3), centroid_scores(x, y, q, 3))
    states, mask = torch.randn(2, 3, 4, generator=g), torch.tensor([[1, 1, 1], [1, 0, 0]])
    longer, wider = torch.cat((states, torch.randn(2, 2, 4, generator=g)), 1), torch.cat((mask, torch.zeros(2, 2, dtype=torch.long)), 1)
    torch.testing.assert_close(mean_pool(longer, wider), mean_pool(states, mask))
    assert centroid_scores(x, y, q, 5)[:, 3:].eq(-math.inf).all()
