"""Augmentation: exact distributions by scripted dice, variants by brute force, families kept together, self-training as sklearn's."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import SelfTrainingClassifier

from tunebook.kit.checks import bound
from tunebook.kit.data import WORDS, Dice, locate
from tunebook.tasks import augment as A

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31)
rates = st.floats(0, 1)
words = st.lists(st.sampled_from("soup was not fresh but slow a".split()), min_size=1, max_size=6)
tables = st.dictionaries(st.sampled_from("soup fresh slow".split()), st.lists(st.sampled_from("x y z".split()), max_size=3, unique=True))
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


class Script:
    """Dice that show what they are told."""

    def __init__(self, faces):
        self.random = iter(faces).__next__

    def pick(self, items):
        return items[int(self.random() * len(items))]


# Rules

@quick
@given(st.lists(st.sampled_from(["is not", "it", "cannot", "will not", "Was not", "two", "now", "note"]), min_size=1, max_size=8))
def test_rules_are_taken_back(parts):
    text = " ".join(parts)
    for table in (A.SHORT, A.NUMBERS):
        once = A.rewrite(text, table)
        assert A.rewrite(once, A.inverse(table)).lower() == text.lower()
        assert not any(f" {phrase} " in f" {once.lower()} " for phrase in table)


def test_rules_leave_other_words_alone():
    assert A.rewrite("This notch, IS NOT; two twos: isn't", A.SHORT | A.NUMBERS) == "This notch, Isn't; 2 twos: isn't"
    assert A.rewrite("as it is", {}) == "as it is"
    assert A.inverse({}) == {}
    with pytest.raises(ValueError, match="more than one phrase"): A.inverse({"a": "c", "b": "c"})


# Lists

@quick
@given(st.lists(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4), max_size=4))
def test_synonyms_are_the_others_of_each_group(groups):
    table = A.synonyms(groups)
    for w, found in table.items():
        assert len(set(found)) == len(found) and set(found) == {v for g in groups if w in g for v in g} - {w}
        assert all(w in table[v] for v in found)


@quick
@given(tables, st.floats(0, 1), seeds)
def test_a_spoiled_list_has_exactly_so_many_wrong_entries(table, share, seed):
    before = {w: list(vs) for w, vs in table.items()}
    made = A.spoil(table, {w: ["wrong"] for w in table}, share, Dice(seed))
    assert table == before and {w: len(v) for w, v in made.items()} == {w: len(v) for w, v in table.items()}
    assert sum(v == "wrong" for vs in made.values() for v in vs) == round(share * sum(map(len, table.values())))


@quick
@given(words, tables, rates, seeds)
def test_replacing_gives_a_variant_and_the_chances_sum_to_one(text, table, rate, seed):
    every = A.variants(text, table)
    assert len(set(map(tuple, every))) == len(every) == math.prod(1 + len(table.get(w, ())) for w in text)
    assert A.replace(text, table, rate, Dice(seed)) in every
    chances = [A.chance(text, v, table, rate) for v in every]
    assert abs(math.fsum(chances) - 1) <= bound(torch.float64, 30)
    assert A.replace(text, table, rate, Dice(seed)) == A.replace(text, table, rate, Dice(seed))


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_chances_are_those_of_all_outcomes(rate):
    table, text = {"fresh": ["tasty", "good"], "slow": ["late"]}, "fresh not slow".split()
    found = Counter()
    for keep1, which, keep2 in itertools.product((True, False), (0, 1), (True, False)):
        faces = [0.99] if keep1 else [0.0, which / 2]
        faces += [0.99] if keep2 else [0.0, 0.0]
        p = (1 - rate if keep1 else rate) / 2 * (1 - rate if keep2 else rate)
        found[tuple(A.replace(text, table, rate, Script(faces)))] += p
    assert found == {tuple(v): pytest.approx(A.chance(text, v, table, rate)) for v in A.variants(text, table)}
    assert A.chance(text, "fresh but slow".split(), table, rate) == 0


def test_articles_follow_the_next_word():
    assert A.articles("an lovely soup and a idle waiter at a useful an".split()) == "a lovely soup and an idle waiter at a useful a".split()
    assert A.articles([]) == []


def test_the_shipped_list_never_crosses_the_sides_of_a_review():
    groups = [side.replace("|", " ").split() for pair in WORDS.values() for side in pair]
    praise = {w for pair in WORDS.values() for w in pair[0].replace("|", " ").split()}
    table = A.synonyms(groups)
    assert all((w in praise) == (v in praise) for w, vs in table.items() for v in vs)


# Drop, swap, insert

@quick
@given(words, rates, seeds, st.sets(st.sampled_from(["not", "but"])))
def test_dropping_keeps_order_and_cues_and_never_empties(text, rate, seed, keep):
    left = A.drop(text, rate, Dice(seed), keep)
    rest = iter(text)
    assert left and all(w in rest for w in left)  # a subsequence
    assert Counter(w for w in left if w in keep) == Counter(w for w in text if w in keep)
    assert len(A.drop(text, 1.0, Dice(seed), keep)) == max(1, sum(w in keep for w in text))
    assert A.drop(text, 0.0, Dice(seed)) == text


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (3, 0.1), (5, 0.9)])
def test_the_number_left_is_binomial_but_for_the_empty_text(n, p):
    found = Counter()
    for gone in itertools.product((0, 1), repeat=n):
        kept = A.drop(["w"] * n, p, Script([0.0 if g else 0.999 for g in gone] + [0.0]))
        found[len(kept)] += p ** sum(gone) * (1 - p) ** (n - sum(gone))
    for k in range(1, n + 1):
        assert found[k] == pytest.approx(math.comb(n, k) * (1 - p) ** k * p ** (n - k) + (k == 1) * p**n)
    assert 1 - sum(k * v for k, v in found.items()) / n == pytest.approx(p - p**n / n)


@quick
@given(words, st.integers(0, 5), tables, seeds)
def test_swapping_keeps_the_words_and_inserting_adds_synonyms(text, times, table, seed):
    once = A.swap(text, 1, Dice(seed))
    assert Counter(A.swap(text, times, Dice(seed))) == Counter(text) == Counter(once)
    assert sum(a != b for a, b in zip(text, once)) in (0, 2) and A.swap(text[:1], times, Dice(seed)) == text[:1]
    more = A.insert(text, table, times, Dice(seed))
    rest = iter(more)
    assert all(w in rest for w in text)
    added = Counter(more) - Counter(text)
    assert added.total() == (times if any(table.get(w) for w in text) else 0)
    assert set(added) <= {v for w in text for v in table.get(w, ())}


def test_a_swap_is_of_two_places():
    assert {tuple(A.swap("a b c".split(), 1, Dice(s))) for s in range(60)} == {("b", "a", "c"), ("c", "b", "a"), ("a", "c", "b")}


# Rows

@quick
@given(st.lists(words, min_size=1, max_size=6), st.integers(0, 3), seeds)
def test_copies_keep_label_and_source(texts, copies, seed):
    rows = [{"words": t, "label": i % 2} for i, t in enumerate(texts)]
    made = A.augment(rows, lambda ws: ["!", *ws], copies)
    assert len(made) == len(rows) * (copies + 1) and [r["words"] for r in made[:len(rows)]] == texts
    assert all(r["label"] == rows[r["source"]]["label"] and r["words"][-len(texts[r["source"]]):] == texts[r["source"]] for r in made)
    assert all("source" not in r for r in rows)
    cut = int(Dice(seed).random() * len(made))
    train, other = made[:cut], made[cut:]
    brute = sum(any(a["source"] == b["source"] or a["words"] == b["words"] for a in train) for b in other)
    assert A.leaks(train, other) == brute


def test_rows_without_a_source_leak_by_their_words():
    assert A.leaks([{"words": ["a"]}], [{"words": ["a"]}, {"words": ["b"]}]) == 1
    assert A.leaks([], [{"words": ["a"]}]) == 0


# There and back

def copies(n, seed):
    """Sentences of three of six words, and the same in capitals and turned round."""
    d = Dice(seed)
    rows = [[d.pick("abcdef") for _ in range(3)] for _ in range(n)]
    return [(r, [w.upper() for w in reversed(r)]) for r in rows]


@pytest.mark.parametrize("device", DEVICES)
def test_a_pair_learns_to_turn_words_round_and_comes_back(device):
    pairs = copies(150, 0)
    there, back = A.Translator(pairs, 3, width=32), A.Translator([(b, a) for a, b in pairs], 3, width=32)
    there.model, back.model = there.model.to(device), back.model.to(device)
    curves = [A.teach(t, 150, 32, 3e-2) for t in (there, back)]
    assert all(c[-1] < 0.3 < c[0] for c in curves)
    asked = [a for a, _ in copies(40, 1)]
    right = sum(x == [w.upper() for w in reversed(a)] for a, x in zip(asked, A.translate(there, asked)))
    assert right >= 36
    rows = [*asked, ["unknown"], [*"abcdef"]]
    out = A.round_trip(there, back, rows, torch.Generator(device).manual_seed(0))
    assert sum(a == b for a, b in zip(rows, out)) >= 36 and out[-2:] == rows[-2:]
    assert out == A.round_trip(there, back, rows, torch.Generator(device).manual_seed(0))


def test_a_translator_says_what_it_cannot_read():
    t = A.Translator([(["a"], ["b"]), (["a", "a", "a", "a"], ["b"])], 3)
    assert t.pairs == [(["a"], ["b"])] and not t.fits([]) and not t.fits(["a"] * 4)
    for row in (["stew"], [], ["a"] * 4):
        with pytest.raises(ValueError, match="cannot read"): t.prompt([row])
    assert A.translate(t, []) == []
    assert t.prompt([["a"], ["a", "b"]]).tolist() == [[0, 0, 3, 1], [0, 3, 4, 1]]


def test_two_translators_of_one_seed_are_the_same():
    a, b = (A.Translator(copies(20, 0), 3, width=32) for _ in range(2))
    torch.rand(3)
    assert A.teach(a, 3) == A.teach(b, 3)


# Self-training

def fit(x, y):
    model = LogisticRegression(C=1.0).fit(x.cpu().numpy(), y.cpu().numpy())
    return lambda z: torch.from_numpy(model.predict_proba(z.cpu().numpy())).to(z.device)


def clouds(seed, n, classes=2):
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=g)])
    return torch.randn(n, 3, generator=g, dtype=torch.float64) + y[:, None], y


@settings(deadline=None, max_examples=15, derandomize=True)
@given(seeds, st.sampled_from([0.0, 0.6, 0.9]), st.integers(2, 3), st.integers(1, 5))
def test_self_training_is_sklearns(seed, threshold, classes, rounds):
    x, y = clouds(seed, 40, classes)
    model, given_ = A.self_train(fit, x[:8], y[:8], x[8:], threshold, rounds=rounds)
    theirs = SelfTrainingClassifier(LogisticRegression(C=1.0), threshold=threshold, max_iter=rounds)
    theirs.fit(x.numpy(), torch.cat([y[:8], torch.full((32,), -1)]).numpy())
    assert given_.tolist() == theirs.transduction_[8:].tolist()
    assert model(x).argmax(1).tolist() == theirs.predict(x.numpy()).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_balance_gives_each_class_its_share_and_the_surest_first(device):
    x, y = (t.to(device) for t in clouds(3, 60))
    _, one = A.self_train(fit, x[:10], y[:10], x[10:], each=4, rounds=1)
    assert one.device.type == device and torch.bincount(one[one >= 0]).tolist() == [4, 4]
    p = fit(x[:10], y[:10])(x[10:])
    for c in (0, 1):
        mine = torch.where(p.argmax(1) == c)[0]
        assert set(torch.where(one == c)[0].tolist()) == set(mine[p[mine, c].argsort(descending=True)[:4]].tolist())
    _, none = A.self_train(fit, x[:10], y[:10], x[10:], threshold=1.0)
    assert (none == -1).all()


# Bad input

def test_bad_input_is_named():
    with pytest.raises(ValueError, match="from 0 to 1"): A.spoil({}, {}, 1.5, Dice(0))
    with pytest.raises(ValueError, match="at least one word"): A.drop([], 0.1, Dice(0))
    with pytest.raises(ValueError, match="0 or more"): A.augment([], list, -1)


def test_the_reviews_have_no_leak():
    rows = {s: [{"words": r["text"].split()} for r in part] for s, part in locate("reviews")[1].items()}
    assert A.leaks(rows["train"], rows["test"]) == A.leaks(rows["train"], rows["validation"]) == 0
