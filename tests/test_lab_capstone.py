"""What a reproduction stands on: rounding as decimal arithmetic has it, splits that share nothing, verdicts that exclude one another."""

import random
from decimal import ROUND_HALF_UP, Decimal

import pytest

from tunebook.labs.capstone import agrees, gains, ledger, row_cases, split, verdict


@pytest.mark.parametrize("digits", range(4))
def test_exactly_one_figure_of_so_many_digits_agrees_with_a_value(digits):
    unit, dice = Decimal(1).scaleb(-digits), random.Random(digits)
    for value in [dice.uniform(0, 100) for _ in range(50)] + [0.5, 2.5, 0.125, 7.0]:
        near = Decimal(value).quantize(unit, ROUND_HALF_UP)
        assert [agrees(str(near + n * unit), value) for n in (-1, 0, 1)] == [False, True, False], value


def test_a_split_shares_nothing_and_loses_nothing():
    dice = random.Random(0)
    labels, draws = [dice.randrange(4) for _ in range(90)], [dice.random() for _ in range(90)]
    parts = split(labels, draws, 3)
    assert sorted(parts["train"] + parts["test"]) == list(range(90))
    assert all(sum(labels[i] == c for i in parts["test"]) == labels.count(c) // 3 for c in range(4))
    assert split(labels, draws, 100)["test"] == []


def test_a_statement_and_its_contrary_never_hold_together():
    dice = random.Random(1)
    for _ in range(200):
        low, high = sorted(dice.sample(range(20), 2))
        end = dice.randrange(1, 19)
        both = verdict([low, high], [0, end]), verdict([low, high], [end + 0.5, 20])
        assert both in {("holds", "does not hold"), ("does not hold", "holds"), ("undecided", "undecided")} or low <= end <= high


def test_gains_of_a_method_over_itself_are_none():
    import torch
    answers, labels = torch.tensor([[0, 1, 2], [2, 2, 2]]), torch.tensor([0, 1, 1])
    assert gains(answers, answers, labels) == [0.0, 0.0]
    assert gains(answers, answers.flip(0), labels) == pytest.approx([200 / 3, -200 / 3])


def test_a_ledger_keeps_every_claim_and_can_be_written():
    import json
    for case in row_cases(5):
        kept = ledger(*case.args)
        assert [c["name"] for c in kept["claims"]] == [r["name"] for r in case.args[0]]
        assert (kept["status"] == "passed") == all(c["ok"] for c in kept["claims"]) and json.loads(json.dumps(kept)) == kept
