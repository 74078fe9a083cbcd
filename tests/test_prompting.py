"""Prompting: vectors on drawn texts, linear rules as sklearn's, label words by the chain rule, choices by brute force, clear errors."""

import itertools
import math

import numpy as np
import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from tunebook.attention.block import Config, Transformer
from tunebook.kit.checks import bound, close, same
from tunebook.tasks import prompting as P
from tunebook.tuning.pretrain import byte_bpe, tiny_bert, tiny_gpt, wordpiece

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
TEXTS = ["The soup was fresh.", "The waiters were slow, but the soup was hot.", "Nobody could call the soup bland.", "Soup."] * 6
DEEP = 2 * 4 * (64 + 128)  # sums on the longest path through two tiny layers


def gen(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed, n, e, classes):
    """Vectors and labels in which each class occurs."""
    g = gen(seed)
    y = torch.cat((torch.arange(classes), torch.randint(classes, (n,), generator=g)))
    return torch.randn(len(y), e, generator=g, dtype=torch.float64) + y[:, None] * torch.rand(e, generator=g), y


@pytest.fixture(scope="module")
def bert():
    words = wordpiece(TEXTS, 200)
    return tiny_bert(len(words)).eval(), words


@pytest.fixture(scope="module")
def gpt():
    words = byte_bpe(TEXTS, 300)
    return tiny_gpt(len(words)).eval(), lambda texts: words(texts).input_ids


# Vectors

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_vectors_do_not_depend_on_company_or_order(bert, batch, device):
    model, words = tr.BertModel(bert[0].config).eval().to(device), bert[1]
    texts = TEXTS[:7]
    found = P.sentence_vectors(model, words, texts, batch)
    alone = torch.cat([P.sentence_vectors(model, words, [t]) for t in texts])
    close(found, alone, DEEP, 1.0)
    close(found.norm(dim=1), torch.ones(7, device=device), 200)
    order = [3, 0, 6, 2, 5, 1, 4]
    close(P.sentence_vectors(model, words, [texts[i] for i in order], batch), found[order], DEEP, 1.0)


def test_vectors_are_means_of_states(bert):
    model, words = tr.BertModel(bert[0].config).eval(), bert[1]
    with torch.no_grad():
        states = model(**words("The soup was hot.", return_tensors="pt")).last_hidden_state[0].mean(0)
    close(P.sentence_vectors(model, words, ["The soup was hot."])[0], states / states.norm(), DEEP, 1.0)


# Linear rules

@quick
@given(seed=seeds, n=st.integers(1, 30), e=st.integers(1, 9), classes=st.integers(2, 5))
def test_the_nearest_mean_is_sklearns(seed, n, e, classes):
    x, y = drawn(seed, n, e, classes)
    theirs = NearestCentroid().fit(x.numpy(), y.numpy())
    means = P.prototypes(x, y, classes)
    close(means, torch.tensor(theirs.centroids_), 2 * len(y), float(x.abs().max()))
    assert P.nearest(x, means).argmax(1).tolist() == theirs.predict(x.numpy()).tolist()


@quick
@given(seed=seeds, e=st.integers(1, 6))
def test_scores_differ_by_distances(seed, e):
    x, means = (torch.randn(n, e, generator=gen(seed + n), dtype=torch.float64) for n in (5, 3))
    far = -torch.cdist(x, means).square()
    ours = P.nearest(x, means)
    close(ours - ours[:, :1], far - far[:, :1], 20 * e, float(far.abs().max() + means.square().sum(1).max() + 1))


@quick
@given(seed=seeds, n=st.integers(0, 25), e=st.integers(1, 40), classes=st.integers(2, 5), C=st.sampled_from([0.01, 0.3, 1.0, 10.0, 100.0]))
def test_the_probe_is_at_its_minimum(seed, n, e, classes, C):
    x, y = drawn(seed, n, e, classes)
    W, b = P.probe(x, y, classes, C)
    p = (x @ W.T + b).softmax(-1)
    slope = C * (p - torch.nn.functional.one_hot(y, classes)).T @ x + W
    size = C * float(x.abs().sum()) + float(W.abs().max())
    assert float(slope.abs().max()) <= bound(torch.float64, 1000 * len(y)) * size
    assert float((p.sum(0) - y.bincount(minlength=classes)).abs().max()) <= bound(torch.float64, 100_000 * len(y)) * len(y)
    assert abs(float(b.sum())) <= bound(torch.float64, 10_000) * (1 + float(b.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "e", "classes", "C"), [(20, 5, 3, 10.0), (4, 30, 4, 1.0), (60, 8, 2, 3.0), (30, 50, 6, 5.0)])
def test_the_probe_is_sklearns(n, e, classes, C, device):
    x, y = drawn(3, n, e, classes)
    theirs = LogisticRegression(C=2 * C if classes == 2 else C, solver="newton-cholesky", tol=1e-14, max_iter=1000)
    theirs.fit(x.numpy(), y.numpy())
    W, b = (t.cpu() for t in P.probe(x.to(device), y.to(device), classes, C))
    ours, coef = (W[1:] - W[:1] if classes == 2 else W), torch.tensor(theirs.coef_)
    terms = 15 * len(y) * classes * (e + 1)
    close(ours, coef, terms, C * float(coef.abs().max()))
    told = torch.tensor(theirs.predict_proba(x.numpy()))
    close((x @ W.T + b).softmax(-1), told, terms, C)


def test_the_probe_ignores_a_shift_of_the_weights_gauge_and_takes_the_same_row_twice():
    x, y = drawn(0, 10, 4, 3)
    W, b = P.probe(x, y, 3, 5.0)
    twice = P.probe(x.repeat(2, 1), y.repeat(2), 3, 2.5)
    close(twice[0], W, 10_000)
    close(twice[1], b, 10_000, 1 + float(b.abs().max()))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = P.probe(x.to(dtype), y, 3, 5.0)
        exact = P.probe(x.to(dtype).double(), y, 3, 5.0)
        same(low[0], exact[0])
    flat = P.probe(torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    assert float(flat[0].abs().max()) == 0
    close(flat[1].softmax(-1), torch.tensor([3, 2, 1]).double() / 6, 100)


def test_separable_examples_have_an_answer():
    W, b = P.probe(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([0, 1]), 2, C=1e6)
    assert W.isfinite().all() and (torch.tensor([[1.0, 0], [-1, 0]]).double() @ W.T + b).argmax(1).tolist() == [0, 1]


# Words in a gap

def test_a_gap_holds_one_word(bert):
    model, words = bert
    every = [[t] for t in words.get_vocab() if t.isalpha() and words.tokenize(t) == [t]]
    p = P.cloze(model, words, TEXTS[:5], "{text} {mask}", every).exp()
    assert p.shape == (5, len(every)) and float(p.sum(1).max()) <= 1 + 1e-5
    whole = P.cloze(model, words, TEXTS[:5], "{text} {mask}", [[w for g in every for w in g]]).exp()
    close(whole[:, 0], p.sum(1), 2 * len(every) + 100, 1.0)
    ids = words("The soup was fresh. [MASK]", return_tensors="pt")
    with torch.no_grad():
        own = model(**ids).logits[0, -2].log_softmax(-1)[words.convert_tokens_to_ids([g[0] for g in every])]
    close(P.cloze(model, words, TEXTS[:1], "{text} {mask}", every)[0], own, DEEP + len(words), 10.0)
    close(P.cloze(model, words, TEXTS[:5], "{text} {mask}", every, batch=1), p.log(), DEEP + len(words), 10.0)


@quick
@given(seed=seeds, c=st.integers(1, 6))
def test_calibration(seed, c):
    scores, blank = torch.randn(5, c, generator=gen(seed), dtype=torch.float64).tensor_split([4])
    blank = blank[0]
    found = P.calibrate(scores, blank)
    close(found.exp().sum(1), torch.ones(4, dtype=torch.float64), 10 * c)
    close(P.calibrate(blank[None], blank), torch.full((1, c), -math.log(c), dtype=torch.float64), 10 * c, 1.0)
    close(P.calibrate(scores + 3.0, blank - 1.0), found, 40, 20.0)
    assert (scores - blank).argmax(1).tolist() == found.argmax(1).tolist()


# Words after a prompt

@pytest.mark.parametrize("mean", [False, True])
def test_words_after_a_prompt_are_the_models_own_loss(gpt, mean):
    model, encode = gpt
    prompts, words = ["The soup was", "Nobody could call the waiters", "Soup", "The soup"], [" hot", " fresh", " bland and cold"]
    found = P.word_scores(model, encode, prompts, words, start=[1], mean=mean)
    for (i, p), (j, w) in itertools.product(enumerate(prompts), enumerate(words)):
        head, tail = [1, *encode([p])[0]], encode([w])[0]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1:-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="mean" if mean else "sum")
        close(found[i, j], -loss, DEEP + 300, 50.0)


def test_the_chain_rule(gpt):
    model, encode = gpt
    both = P.word_scores(model, encode, ["The soup"], [" was hot"])
    first = P.word_scores(model, encode, ["The soup"], [" was"])
    then = P.word_scores(model, encode, ["The soup was"], [" hot"])
    close(both, first + then, DEEP + 300, 50.0)


@pytest.mark.parametrize("device", DEVICES)
def test_any_model_with_logits(device):
    model = Transformer(Config(vocab=7, width=8, layers=1, heads=2, length=16)).eval().to(device)

    def encode(texts):
        return [[int(c) for c in t] for t in texts]

    p = P.word_scores(model, encode, ["12", "345", "6"], list("0123456")).exp()
    close(p.sum(1), torch.ones(3, device=device), 100)


def test_a_prompt_and_what_follows(gpt):
    examples = [("a", " good"), ("b", " bad")]
    assert P.few_shot_prompt(examples, "c") == "a = good\nb = bad\nc ="
    assert P.few_shot_prompt([], "c", "Q: {} A:{}.") == "Q: c A:"
    assert P.few_shot_prompt(examples, "{x}") + " good\n" == P.few_shot_prompt([*examples, ("{x}", " good")], "")[:-2]


# Choosing

@quick
@given(seed=seeds, n=st.integers(1, 8), pool=st.integers(1, 9), data=st.data())
def test_closest_by_brute_force(seed, n, pool, data):
    k = data.draw(st.integers(1, pool))
    x, among = torch.randn(n, 3, generator=gen(seed)), torch.randn(pool, 3, generator=gen(seed + 1))
    found, cosine = P.closest(x, among, k), x @ among.T
    assert found.tolist() == [sorted(range(pool), key=lambda j: float(row[j]))[-k:] for row in cosine]


@quick
@given(m=st.integers(1, 60), k=st.integers(1, 300), p=st.floats(0, 1))
def test_the_best_of_many(m, k, p):
    found = P.expected_best(m, k, p)
    assert found == pytest.approx(float((1 - binom.cdf(range(k), k, p) ** m).mean()), abs=1e-9)
    assert p - 1e-9 <= found <= 1 + 1e-9 and found <= P.expected_best(m + 1, k, p) + 1e-12
    assert P.expected_best(1, k, p) == pytest.approx(p, abs=1e-9)


def test_the_best_of_many_has_no_limit():
    assert 0.5 < P.expected_best(10, 20_000, 0.5) < 0.51 and P.expected_best(10**6, 3, 0.5) == pytest.approx(1, abs=1e-9)


@quick
@given(seed=seeds, m=st.integers(1, 6), n=st.integers(2, 12), data=st.data())
def test_picked_by_hand(seed, m, n, data):
    count = data.draw(st.integers(1, n - 1))
    hits = torch.rand(m, n, generator=gen(seed), dtype=torch.float64)
    best, inside, outside = P.picked(hits, count, gen(seed))
    order = torch.randperm(n, generator=gen(seed)).tolist()
    means = np.array([[float(hits[i, j]) for j in order[:count]] for i in range(m)]).mean(1)
    assert means[best] == pytest.approx(means.max()) and inside == pytest.approx(means.max())
    assert outside == pytest.approx(np.mean([float(hits[best, j]) for j in order[count:]]))
    assert (inside * count + outside * (n - count)) / n == pytest.approx(float(hits[best].mean()))


# Bad input

@pytest.mark.parametrize(("call", "told"), [
    (lambda b, g: P.sentence_vectors(b[0], b[1], "one text"), "a list of at least one text"),
    (lambda b, g: P.sentence_vectors(b[0], b[1], []), "a list of at least one text"),
    (lambda b, g: P.zero_shot(torch.eye(2), ["a"], lambda t: torch.eye(2), "no slot"), "template with {}"),
    (lambda b, g: P.prototypes(torch.eye(2), torch.tensor([0, 0]), 2), r"classes \[1\] have no example"),
    (lambda b, g: P.prototypes(torch.eye(2), torch.tensor([0, 3]), 1), r"classes \[3\] are not among 0 to 0"),
    (lambda b, g: P.probe(torch.eye(2), torch.tensor([0, 0]), 2), r"classes \[1\] have no example"),
    (lambda b, g: P.probe(torch.eye(2), torch.tensor([0, 1]), 2, C=0), "must be above 0"),
    (lambda b, g: P.cloze(*b, ["x"], "{text}", [["soup"]]), "lacks"),
    (lambda b, g: P.cloze(*b, ["x"], "{text} {mask}", [["soup"], ["soup soup"]]), "a gap holds one token"),
    (lambda b, g: P.cloze(*b, ["x"], "{text} {mask}", [["soup"], ["\u4f60"]]), r"\['\[UNK\]'\] to this tokenizer"),
    (lambda b, g: P.cloze(*b, [], "{text} {mask}", [["soup"]]), "at least one text"),
    (lambda b, g: P.cloze(*b, ["soup [MASK]"], "{text} {mask}", [["soup"]]), "marks the gap"),
    (lambda b, g: P.cloze(*b, ["soup " * 80], "{text} {mask}", [["soup"]]), "83 tokens, the model has room for 64"),
    (lambda b, g: P.calibrate(torch.zeros(2, 3), torch.zeros(2)), r"shape \(3,\)"),
    (lambda b, g: P.word_scores(*g, ["The soup was "], ["hot"]), "end the prompt without a space"),
    (lambda b, g: P.word_scores(*g, [], ["hot"]), "at least one prompt"),
    (lambda b, g: P.word_scores(*g, ["The"], [""]), "no word empty"),
    (lambda b, g: P.word_scores(*g, [""], [" hot"]), "give start"),
    (lambda b, g: P.word_scores(*g, ["soup " * 300 + "was"], [" hot"], strict=False), "room for 128"),
    (lambda b, g: P.few_shot_prompt([], "x", "{}"), "for the label"),
    (lambda b, g: P.closest(torch.eye(2), torch.eye(2), 3), "3 examples of 2"),
    (lambda b, g: P.closest(torch.eye(2), torch.eye(2), 0), "0 examples of 2"),
    (lambda b, g: P.expected_best(0, 5, 0.5), "at least 1"),
    (lambda b, g: P.expected_best(2, 5, 1.5), "a chance"),
    (lambda b, g: P.picked(torch.zeros(2, 5), 5, gen(0)), "some must be left")])
def test_clear_errors(call, told, bert, gpt):
    with pytest.raises(ValueError, match=told):
        call(bert, gpt)
