"""Classification: scores equal scikit-learn's and scipy's, thresholds keep their promise where they were chosen, bad input is told."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunebook.kit.data import known, locate
from tunebook.tasks.classify import auroc, breakdown, confused, confusion, per_class, threshold, trade, wilson

quick = settings(deadline=None, max_examples=60, derandomize=True)
LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)
SCORED = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=30)


@quick
@given(LABELS)
def test_scores_of_classes_equal_sklearn(rows):
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
    gold, told = (torch.tensor(x) for x in zip(*rows))
    n = confusion(gold, told, 5)
    assert n.tolist() == confusion_matrix(gold, told, labels=range(5)).tolist()
    theirs = precision_recall_fscore_support(gold, told, labels=range(5), zero_division=0)[:3]
    for ours, other in zip(per_class(n).mT.tolist(), theirs): assert ours == pytest.approx(other.tolist(), abs=1e-6)


@pytest.mark.parametrize("gold, told", [((3,), (3, 1)), ((3, 1), (3, 1)), ((2,), (3,)), ((), ())])
def test_shapes_that_do_not_fit(gold, told):
    with pytest.raises(ValueError, match="expected two rows of N classes"):
        confusion(torch.zeros(gold, dtype=torch.long), torch.zeros(told, dtype=torch.long), 2)


@pytest.mark.parametrize("gold, told", [([0, 5], [0, 0]), ([0, 0], [0, -1]), ([0, -100], [0, 0])])
def test_a_class_that_is_none(gold, told):
    with pytest.raises(ValueError, match="classes must be from 0 to 4"): confusion(torch.tensor(gold), torch.tensor(told), 5)


@quick
@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_equals_scipy(k, n):
    from scipy.stats import binomtest
    assume(k <= n)
    p, low, high = wilson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12) and 0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1


@pytest.mark.parametrize("right, of", [(1, 0), (3, 2), (-1, 2)])
def test_no_share(right, of):
    with pytest.raises(ValueError, match="expected 0 <= right <= of"): wilson(right, of)


@quick
@given(SCORED)
def test_auroc_equals_sklearn(rows):
    from sklearn.metrics import roc_auc_score
    s, inside = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    assume(0 < int(inside.sum()) < len(rows))
    found = auroc(s[inside], s[~inside])
    assert found == pytest.approx(roc_auc_score(inside, s), abs=1e-12)
    assert auroc(s[~inside], s[inside]) == pytest.approx(1 - found, abs=1e-12)


@quick
@given(SCORED, st.floats(0.05, 1.0))
def test_a_threshold_keeps_its_promise_where_it_was_chosen(rows, promised):
    s, right = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    limit = threshold(s, right, promised)
    if math.isinf(limit):
        assert all(a.right < promised for a in trade(s, right))
        return
    kept = s >= limit
    assert right[kept].double().mean() >= promised
    lower = [v for v in s.unique().tolist() if v < limit]
    assert all(right[s >= v].double().mean() < promised for v in lower)  # none answers more


@quick
@given(SCORED, st.randoms(use_true_random=False))
def test_the_trade_does_not_depend_on_the_order(rows, dice):
    other = rows[:]
    dice.shuffle(other)
    a, b = (trade(torch.tensor([r[0] for r in x]), torch.tensor([r[1] for r in x])) for x in (rows, other))
    assert a == b and a[-1].coverage == 1.0
    assert [x.threshold for x in a] == sorted({x.threshold for x in a}, reverse=True)


def test_bad_promises_and_empty_sides():
    for share in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"): threshold(torch.ones(2), torch.ones(2) > 0, share)
    with pytest.raises(ValueError, match="nothing to part"): auroc(torch.ones(2), torch.ones(0))


def test_breakdown_and_confusions():
    rows = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}]
    found = breakdown(rows, [True, False, True], "a")
    assert [(k, n) for k, n, _ in found] == [((1,), 2), ((2,), 1)] and found[0][2][0] == 0.5
    assert sum(n for _, n, _ in breakdown(rows, [True] * 3, "a", "b")) == 3
    with pytest.raises(ValueError): breakdown(rows, [True], "a")
    with pytest.raises(KeyError): breakdown(rows, [True] * 3, "c")
    n = torch.tensor([[5, 2, 0], [2, 0, 3], [0, 0, 1]])
    assert confused(n, "abc") == [(3, "b", "c"), (2, "a", "b"), (2, "b", "a")] and confused(n, "abc", 1) == [(3, "b", "c")]


def test_intents_hold_their_out_of_scope_label_last():
    labels = known("intents").labels
    rows = locate("intents")[1]
    assert labels[-1] == "oos" and max(r["label"] for r in rows["test"]) == len(labels) - 1


def test_the_import_is_light():
    heavy = "{'transformers', 'sklearn', 'datasets', 'scipy'}"
    code = f"import sys, tunebook.tasks.classify; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert json.loads(told.replace("'", '"')) == []
