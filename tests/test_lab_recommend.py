"""What a recommender is measured by, against scikit-learn and against what must be so."""

import pytest
import torch

from tunebook.labs.recommend import click_cases, gain, list_cases, quality, rank, similarity, text_scores, vector_cases


@pytest.mark.parametrize("seed", range(4))
def test_ndcg_is_that_of_scikit_learn(seed):
    from sklearn.metrics import ndcg_score
    for case in list_cases(seed):
        ranked, relevant, k = case.args
        every = list(dict.fromkeys([*ranked, *relevant, *range(100, 120)]))  # what is not listed comes last
        truth, scores = [[float(i in relevant) for i in every]], [[-float(ranked.index(i)) if i in ranked else -99.0 for i in every]]
        if len(ranked) >= k: assert quality(*case.args)["ndcg"] == pytest.approx(ndcg_score(truth, scores, k=k))


def test_a_hit_that_moves_up_is_worth_more():
    worth = [quality([*range(r), 99, *range(r, 9)], [99, 98], 6)["ndcg"] for r in range(7)]
    assert worth == sorted(worth, reverse=True) and worth[5] > worth[6] == 0


@pytest.mark.parametrize("seed", range(4))
def test_cosines_are_those_of_scikit_learn(seed):
    from sklearn.metrics.pairwise import cosine_similarity
    for case in click_cases(seed):
        want = torch.tensor(cosine_similarity(case.args[0].T.double())).fill_diagonal_(0)
        torch.testing.assert_close(similarity(case.args[0]).double(), want)
    for case in vector_cases(seed):
        x, v = (t.double() for t in case.args)
        torch.testing.assert_close(text_scores(x, v), torch.tensor(cosine_similarity(x @ v, v)))


def test_a_list_does_not_depend_on_the_scale_of_the_scores():
    scores = torch.tensor([0.2, -0.4, 0.2, 0.9])
    assert rank(scores, [3], 3) == rank(8 * scores - 1, [3], 3) == [0, 2, 1]


def test_an_interval_is_turned_when_the_two_are_exchanged():
    g = torch.Generator().manual_seed(0)
    a, b, draws = torch.rand(9, generator=g).double(), torch.rand(9, generator=g).double(), torch.randint(9, (201, 9), generator=g)
    mean, low, high = gain(a, b, draws)
    assert low < mean < high and gain(b, a, draws) == pytest.approx([-mean, -high, -low])
    assert gain(a + 1, b, draws) == pytest.approx([mean + 1, low + 1, high + 1])
