"""Correction: edits are few and round-trip, scores equal scikit-learn's, models are distributions, promises are kept, codespell's rows."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.data import locate
from tunebook.tasks.correct import (
    Channel,
    Edit,
    Near,
    Proposal,
    WordModel,
    accepted,
    apply,
    by_channel,
    by_tagger,
    edit_of,
    edits,
    f_beta,
    f_interval,
    from_tags,
    promised,
    replacing,
    shortened,
    slip,
    spoiled,
    steps,
    tally,
    text_of,
    to_tags,
    tokens_of,
    total,
)
from tunebook.tasks.tag import Score

quick = settings(deadline=None, max_examples=80, derandomize=True)
ROW = st.lists(st.sampled_from(["a", "b", "c", "the", "cat"]), max_size=7)
WORD = st.text("abc", max_size=6)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
real = pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")


def neighbours(word, letters="abc"):
    """All strings one step away (Norvig, 2007)."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    return ({a + b[1:] for a, b in cuts if b} | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
            | {a + c + b[1:] for a, b in cuts if b for c in letters} | {a + c + b for a, b in cuts for c in letters})


@quick
@given(WORD, WORD)
def test_one_step_is_a_neighbour(a, b):
    assert (len(steps(a, b)) == 1) == (a != b and b in neighbours(a))
    assert len(steps(a, b)) == len(steps(b, a)) and (not steps(a, b)) == (a == b)
    assert abs(len(a) - len(b)) <= len(steps(a, b)) <= max(len(a), len(b))


@quick
@given(ROW, ROW)
def test_edits_and_tags_lead_to_the_target(a, b):
    assert apply(a, steps(a, b)) == apply(a, edits(a, b)) == b  # edits at one place keep their order
    assert all(x.end < y.start for x, y in itertools.pairwise(edits(a, b)))  # touching ones are joined
    if a: assert from_tags(a, to_tags(a, b)) == b and (to_tags(a, b) == ["keep"] * len(a)) == (a == b)


@quick
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_tokens_keep_everything_but_spaces(text):
    assert "".join(tokens_of(text)) == "".join(c for c in text if not c.isspace())
    assert tokens_of(text_of(tokens_of(text))) == tokens_of(text) or not text.isascii() or "_" in text


@pytest.mark.parametrize("changes", [[Edit(0, 2, ()), Edit(1, 2, ())], [Edit(1, 3, ("x",))], [Edit(-1, 0, ())], [Edit(1, 0, ())]])
def test_edits_that_cannot_be_applied(changes):
    with pytest.raises(ValueError, match="overlaps another or leaves the 2 words"): apply(["a", "b"], changes)


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_f_equals_scikit_learn(pairs, beta):
    from sklearn.metrics import fbeta_score
    y, p = zip(*pairs)
    ours = f_beta(Score(sum(a and b for a, b in pairs), sum(p), sum(y)), beta)
    assert ours == pytest.approx(float(fbeta_score(y, p, beta=beta, zero_division=0)), abs=1e-12)


def test_f_one_is_the_f_of_names():
    for counts in itertools.product(range(3), range(3, 6), range(3, 6)):
        assert f_beta(Score(*counts), 1.0) == pytest.approx(Score(*counts).f1)
    assert f_beta(Score(0, 0, 0)) == f_beta(Score(0, 3, 0)) == f_beta(Score(0, 0, 3)) == 0.0


@quick
@given(st.lists(st.tuples(ROW, ROW, ROW), max_size=6))
def test_counts_of_edits(rows):
    counts = tally(*zip(*rows)) if rows else tally([], [], [])
    assert counts.shape == (len(rows), 3) and bool((counts[:, 0] <= counts[:, 1:].min(1).values).all())
    bad, fine = spoiled(counts)
    assert fine == sum(a == b for a, b, _ in rows) and bad == sum(a == b != c for a, b, c in rows)
    perfect = tally([a for a, _, _ in rows], [b for _, b, _ in rows], [b for _, b, _ in rows])
    assert total(perfect).right == total(perfect).gold == total(perfect).predicted and spoiled(perfect)[0] == 0


def test_rows_of_different_number():
    with pytest.raises(ValueError): tally([["a"]], [["a"]], [])


@pytest.mark.parametrize("device", DEVICES)
def test_the_interval_holds_the_value(device):
    counts = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 2], [0, 0, 1]] * 20, device=device).cpu()
    low, high = f_interval(counts)
    assert 0 < low < f_beta(total(counts)) < high < 1 and f_interval(counts) == (low, high) != f_interval(counts, seed=1)
    same = torch.tensor([[1, 2, 3]] * 5)
    assert f_interval(same) == (pytest.approx(f_beta(Score(1, 2, 3))),) * 2


@quick
@given(st.sets(WORD, max_size=12), WORD, st.integers(1, 2))
def test_near_words_by_brute_force(words, word, reach):
    most = min(reach, max(1, len(word) // 2))
    assert Near(words, reach)(word) == sorted(w for w in words if len(steps(w, word)) <= most)
    assert {len(word) - len(w) for w in shortened(word, 2)} <= {0, 1, 2}


@quick
@given(st.lists(st.tuples(WORD.filter(bool), WORD.filter(bool)), max_size=10), WORD.filter(bool))
def test_the_channel_gives_probabilities(pairs, word):
    channel = Channel(pairs)
    assert channel.logp(word, word) == pytest.approx(math.log((sum(a == b for a, b in pairs) + 1) / (len(pairs) + 2)))
    near = sum(math.exp(channel.logp(typed, word)) for typed in neighbours(word) - {word})
    assert near + math.exp(channel.logp(word, word)) <= 1 + 1e-9


def test_what_is_seen_often_is_likelier():
    channel = Channel([("teh", "the")] * 9 + [("the", "the")] * 90)
    assert channel.logp("teh", "the") > channel.logp("hte", "the") > channel.logp("thr", "the")
    kinds = [slip("from", e) for typed in ("form", "frim", "frrom", "frm", "xfrom") for e in steps("from", typed)]
    assert kinds == [("swapped", "ro"), ("replaced", "oi"), ("added", "rr"), ("dropped", "om"), ("added", "xf")]


@quick
@given(st.lists(ROW, max_size=5), st.lists(st.sampled_from(["a", "the", "dog", "<s>"]), max_size=2), st.integers(1, 3))
def test_the_word_model_is_a_distribution(sentences, before, order):
    model = WordModel(sentences, ["dog", "a"], order, unknown=0.0)
    assert sum(model.p(w, tuple(before[:order - 1])) for w in model.listed) == pytest.approx(1)
    open_model = WordModel(sentences, ["dog"], order)
    assert 0 < open_model.p("zebra", ()) < open_model.p("dog", ())


def test_words_around_hold_all_that_changes():
    model = WordModel([["a", "b", "c", "a"]], ["d"])
    def whole(words):
        row = model.padded(words)
        return sum(math.log(model.p(row[i], tuple(row[i - 2:i]))) for i in range(2, len(row)))
    for t in range(4):
        other = [*"abca"[:t], "d", *"abca"[t + 1:]]
        assert model.around(other, t) - model.around(list("abca"), t) == pytest.approx(whole(other) - whole(list("abca")))


PROPOSAL = st.builds(lambda g, s, n: Proposal(g, Edit(s, s + n, ("x",))), st.floats(-5, 5), st.integers(0, 8), st.integers(0, 3))
PROPOSALS = st.lists(PROPOSAL, max_size=8)


@quick
@given(PROPOSALS, st.floats(-3, 3))
def test_accepted_edits_can_be_applied(proposals, threshold):
    taken = accepted(proposals, threshold)
    apply(["w"] * 12, taken)
    assert bool(taken) == any(p.gain > threshold for p in proposals)
    if taken: assert max(proposals, key=lambda p: p.gain).gain in [p.gain for p in proposals if p.edit in taken]


@quick
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(0, 0.99))
def test_a_promise_is_kept_where_it_is_made(gains, share):
    at = promised(gains, share)
    assert at >= 0 and sum(g > at for g in gains) <= share * len(gains)
    if at > 0: assert sum(g >= at for g in gains) > share * len(gains)  # and no lower threshold keeps it


@pytest.mark.parametrize("gains, share", [([], 0.1), ([1.0], 1.0), ([1.0], -0.1)])
def test_a_promise_that_makes_no_sense(gains, share):
    with pytest.raises(ValueError, match="expected sentences, a share"): promised(gains, share)


def test_tags_at_the_edges():
    assert (replacing("knows", "know"), replacing("carry", "carries"), replacing("is", "are")) == ("-s+", "-y+ies", "=are")
    assert edit_of(0, "cats", "-s+") == Edit(0, 1, ("cat",)) and edit_of(0, "cat", "-s+") is None and edit_of(0, "as", "-s+") is None
    assert edit_of(3, "cat", "keep") is edit_of(3, "cat", "=cat") is None and edit_of(3, "cat", "+a b") == Edit(3, 3, ("a", "b"))
    with pytest.raises(ValueError, match="expected keep, delete, =words"): edit_of(0, "cat", "-s")
    with pytest.raises(ValueError, match="the source is empty, the target has 1 words"): to_tags([], ["a"])
    with pytest.raises(ValueError): from_tags(["a", "b"], ["keep"])
    assert to_tags([], []) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_the_tagger_proposes_what_changes(dtype, device):
    names = ["keep", "=cat", "-s+", "delete"]
    logp = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 2, device=device).log().to(dtype)
    found = by_tagger(["cat", "cats"], logp, names)
    assert [p.edit for p in found] == [Edit(0, 1, ()), Edit(1, 2, ("cat",))]
    assert found[1].gain == pytest.approx(math.log(0.5), abs=0.01)
    with pytest.raises(ValueError): by_tagger(["cat"], logp, names)


def test_the_channel_keeps_capitals_and_marks():
    words = WordModel([["their", "cat", "sat", "."]] * 3, ["there"])
    found = by_channel(["There", "cat", "sat", "."], Near(["their", "there"], 2), Channel([("there", "their")] * 50), words)
    assert [p.edit for p in found] == [Edit(0, 1, ("Their",))] and found[0].gain > 0


@real
def test_how_near_codespells_corrections_are():
    """Every seventh row of codespell: 96 % of misspellings are within two steps of a correction, 83 % within one."""
    rows = locate("codespell")[1]["train"][::7]
    far = [min(len(steps(right.lower(), r["wrong"].lower())) for right in r["right"]) for r in rows]
    one, two = (sum(d <= n for d in far) / len(rows) for n in (1, 2))
    assert len(rows) == 9285 and 0.82 < one < 0.85 and 0.95 < two < 0.98, (one, two)


@real
def test_how_often_the_nearest_word_is_codespells_correction():
    """The list has all corrections: its first word one step away is right for 78 % of misspellings, for 99 % of those with only one."""
    rows = locate("codespell")[1]["train"]
    near = Near({w.lower() for r in rows for w in r["right"]})
    sample = rows[::29]
    found = [(r, near(r["wrong"].lower())) for r in sample]
    lone = [(r, w) for r, w in found if len(w) == 1]
    right = sum(w[0] in map(str.lower, r["right"]) for r, w in lone) / len(lone)
    first = sum(bool(w) and w[0] in map(str.lower, r["right"]) for r, w in found) / len(found)
    assert 0.98 < right < 1 and 0.76 < first < 0.81, (right, first)


def test_the_import_is_light():
    heavy = "{'transformers', 'sklearn', 'datasets', 'seqeval'}"
    code = f"import sys, tunebook.tasks.correct; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert json.loads(told.replace("'", '"')) == []
