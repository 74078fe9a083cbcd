"""Summaries: sentences that lose nothing, ranks as networkx's, MMR by its definition, intervals by their formula, facts, real sets."""

import itertools
import math
import os
import re
from itertools import accumulate

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.checks import close
from tunebook.kit.data import locate
from tunebook.kit.models import load
from tunebook.tasks.generate import rouge, rouge_words
from tunebook.tasks.summarize import (
    agreement,
    bootstrap,
    central,
    closeness,
    facts,
    fitting,
    invented,
    mmr,
    oracle,
    overlap,
    pagerank,
    plain_words,
    ranked,
    sentences,
    summarize,
    told,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
real = pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
PIECES = ["The valve leaks", "see Fig", ". ", "! ", "? ", "… ", ".", "\n", "\n\n", "e.g. ", "Dr. ", "J. ", "U.S. ", "3.50", " ", '"', ")",
          "“", "”", "他说", "。", "！", "why", "Nine", "\t", "\u00a0", "etc. "]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)
WORDS = "valve leaks old the a Keller nine 9 pool".split()
LINES = st.lists(st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join), min_size=1, max_size=6)


def gen(seed):
    return torch.Generator().manual_seed(seed)


def graph(seed, n, dtype=torch.float64, share=0.5):
    """Weights of links, some missing, with a sentence that is like none when there are many."""
    w = torch.rand(n, n, generator=gen(seed), dtype=torch.float64) * (torch.rand(n, n, generator=gen(seed + 1)) < share)
    w = (w + w.T).fill_diagonal_(0)
    if n > 4:
        w[2] = w[:, 2] = 0
    return w.to(dtype)


# Sentences

@quick
@given(TEXT)
def test_no_character_is_lost(text):
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(s == s.strip() and s for s in found)
    assert [t for s in found for t in sentences(s)] == found


@pytest.mark.parametrize(("text", "found"), [
    ("", []), (" \n\t", []), ("One", ["One"]), ("One. Two.", ["One.", "Two."]), ("One.Two.", ["One.Two."]),
    ("It cost 3.5 crowns. Or 4?", ["It cost 3.5 crowns.", "Or 4?"]), ("Dr. Moss left. J. Kim, too.", ["Dr. Moss left.", "J. Kim, too."]),
    ("He said \"No.\" Then he left.", ["He said \"No.\"", "Then he left."]), ("Well... maybe not. So!", ["Well... maybe not.", "So!"]),
    ("Fruit, e.g. Apples. Two", ["Fruit, e.g. Apples.", "Two"]), ("(See Fig. 3.) 5 of them.", ["(See Fig. 3.)", "5 of them."]),
    ("a line\nanother line", ["a line", "another line"]), ("水位低。为什么？", ["水位低。", "为什么？"]),
    ("性能缺陷.该染料", ["性能缺陷.", "该染料"]), ("他说：“好。”然后走了。", ["他说：“好。”", "然后走了。"]),
    ("In the U.S. They met.", ["In the U.S. They met."])])
def test_where_a_sentence_ends(text, found):
    assert sentences(text) == found


def test_a_long_text_is_cut_in_little_time():
    """A step of each loop that looked at the whole rest would take minutes."""
    assert len(sentences("A valve leaks. " * 40_000)) == 40_000
    assert len(sentences("." * 200_000)) == len(sentences("it leaks. and " * 20_000)) == 1


# Likeness and rank

@quick
@given(LINES)
def test_overlap_by_the_formula(lines):
    near, n = overlap(lines), len(lines)
    assert near.shape == (n, n) and near.dtype == torch.float64
    for i, j in itertools.product(range(n), repeat=2):
        a, b = lines[i].lower().split(), lines[j].lower().split()
        below = math.log(len(a)) + math.log(len(b)) if a and b else 0
        assert near[i, j] == pytest.approx(0 if i == j or not below else len(set(a) & set(b)) / below)


def test_overlap_of_characters():
    assert overlap(["水位低", "水位高"], list)[0, 1] == pytest.approx(2 / (2 * math.log(3)))
    assert overlap(["水位低", "水位高"])[0, 1] == 0


@quick
@given(seed=seeds, n=st.integers(1, 12), damping=st.sampled_from([0.0, 0.3, 0.85, 0.95]))
def test_rank_as_networkx(seed, n, damping):
    near = graph(seed, n)
    rank, terms = pagerank(near, damping), round((3 * n * (1 + damping) + 10 * n) / (1 - damping)) + 8  # 10 n: their last step
    theirs = networkx.pagerank(networkx.from_numpy_array(near.numpy()), alpha=damping, max_iter=5000, tol=1e-15)
    close(rank, torch.tensor([theirs[i] for i in range(n)], dtype=torch.float64), terms, 1.0)
    close(rank.sum(), torch.tensor(1.0, dtype=torch.float64), terms)
    assert (rank > 0).all()
    close(pagerank(7.5 * near, damping), rank, 2 * terms, 1.0)
    order = torch.randperm(n, generator=gen(seed))
    close(pagerank(near[order][:, order], damping), rank[order], 2 * terms, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_rank_in_each_dtype(dtype, device):
    near = (8 * graph(0, 9)).round().to(dtype).to(device)  # small integers are exact in each
    rank = pagerank(near)
    assert rank.dtype == torch.float64 and rank.device.type == device
    close(rank.cpu(), pagerank(near.cpu().double()), 400, 1.0)


def test_rank_of_no_links_is_even():
    assert pagerank(torch.zeros(4, 4)).tolist() == pytest.approx([0.25] * 4)
    assert pagerank(torch.zeros(1, 1)).tolist() == [1.0]


# Choosing

@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(1, 12))
def test_ranked_takes_the_earlier_of_equals(scores, k):
    assert ranked(torch.tensor(scores), k) == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@quick
@given(seed=seeds, n=st.integers(1, 9), k=st.integers(1, 12), trade=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_mmr_by_its_definition(seed, n, k, trade):
    near, relevance = graph(seed, n), torch.rand(n, generator=gen(seed), dtype=torch.float64)
    chosen = []
    for _ in range(min(n, k)):
        def margin(i):
            return trade * float(relevance[i]) - (1 - trade) * (max(float(near[i, j]) for j in chosen) if chosen else 0.0)
        chosen.append(max((i for i in range(n) if i not in chosen), key=margin))
    assert mmr(near, relevance, trade, k) == chosen
    assert mmr(near, relevance, trade, n)[:k] == chosen
    if trade == 1:
        assert chosen == ranked(relevance, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mmr_in_each_dtype(dtype, device):
    x = torch.eye(3)[[0, 0, 1, 2]].to(dtype).to(device)
    chosen = mmr(x @ x.T, torch.tensor([0.9, 0.8, 0.5, 0.2], dtype=dtype, device=device), 0.5, 3)
    assert chosen == [0, 2, 3]
    assert mmr(x @ x.T, torch.ones(4, dtype=dtype, device=device), 1.0, 9) == [0, 1, 2, 3]


@quick
@given(LINES, st.sampled_from(["old valve leaks", "the pool", "Keller leaks nine"]), st.integers(1, 4))
def test_the_oracle_climbs(lines, target, k):
    chosen = oracle(lines, [target], k)
    steps = [agreement(told(lines, chosen[:i]), target) for i in range(len(chosen) + 1)]
    assert len(chosen) <= k and steps == sorted(set(steps))
    assert oracle(lines, target, 9)[:k] == chosen
    every = [agreement(told(lines, c), target) for r in range(k + 1) for c in itertools.combinations(range(len(lines)), r)]
    assert max(agreement(s, target) for s in lines) <= steps[-1] <= max(every) if chosen else max(every) == 0


@quick
@given(LINES, LINES)
def test_agreement_is_rouge_1(guess, targets):
    assert agreement(guess[0], targets) == rouge(guess[0], targets)["rouge1"].f1


# Vectors

@pytest.mark.parametrize("device", DEVICES)
def test_centre_and_links(device):
    x = torch.nn.functional.normalize(torch.randn(5, 8, generator=gen(0), dtype=torch.float64), dim=1).to(device)
    mean = x.mean(0)
    close(central(x), torch.stack([v @ mean / mean.norm() for v in x]), 40, 1.0)
    near = closeness(x)
    assert (near >= 0).all() and (near.diagonal() == 0).all()
    for i, j in itertools.product(range(5), repeat=2):
        assert float(near[i, j]) == pytest.approx(max(0.0, float(x[i] @ x[j])) if i != j else 0.0, abs=1e-14)


def bag(lines):
    """Sentences as normalized bags of five words."""
    words = "valve leaks lamps pool new".split()
    x = torch.tensor([[float(s.lower().count(w)) for w in words] for s in lines]) + 1e-3
    return torch.nn.functional.normalize(x, dim=1)


def test_summarize_says_it_once_and_in_order():
    text = "The pool. A valve leaks. The valve leaks! The lamps. A valve leaks."
    assert summarize(text, bag, k=1) == ["A valve leaks."]
    assert summarize(text, bag, k=3, trade=0.5) == ["The pool.", "A valve leaks.", "The lamps."]
    assert summarize(text, bag, k=9) == ["The pool.", "A valve leaks.", "The valve leaks!", "The lamps."]


# Limits

def test_fitting_is_what_the_tokenizer_keeps():
    tokenizer = load("minilm")[1]
    lines = ["An old valve leaks.", "Unbelievably!", "水位低。", "It cost 1,200 crowns.", "x" * 30]
    text, ends = " ".join(lines), [len(" ".join(lines[:i + 1])) for i in range(len(lines))]
    for limit in range(2, 50):
        kept = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
        assert fitting(lines, tokenizer, limit) == sum(e <= max(b for _, b in kept) for e in ends)


# Intervals

def test_bootstrap_as_the_formula():
    values = torch.rand(60, generator=gen(0), dtype=torch.float64)
    widths = [b - a for _, a, b in (bootstrap(values.tolist(), seed=s) for s in range(20))]
    assert sum(widths) / 20 == pytest.approx(2 * 1.96 * float(values.std(correction=0)) / math.sqrt(60), rel=0.05)
    assert bootstrap(values.tolist())[0] == pytest.approx(float(values.mean()))


@quick
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), seeds)
def test_bootstrap_of_groups(values, seed):
    mean, low, high = bootstrap(values, draws=200, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    alone = bootstrap(values, group=list(range(len(values))), draws=200, seed=seed)
    assert alone == (mean, low, high)
    doubled = bootstrap(values * 2, group=list(range(len(values))) * 2, draws=200, seed=seed)
    assert doubled == pytest.approx((mean, low, high))
    assert bootstrap(values, group=["one"] * len(values)) == pytest.approx((mean,) * 3)


def test_bootstrap_weighs_by_documents():
    assert bootstrap([1.0, 1.0, 0.0], group=["a", "a", "b"])[0] == pytest.approx(2 / 3)


# Facts

@pytest.mark.parametrize(("text", "plain", "found"), [
    ("", (), []), ("The Redfern mill", (), ["The", "Redfern"]), ("The Redfern mill", {"the"}, ["Redfern"]),
    ("Nine of 9, twelve", (), ["9", "12"]), ("1,200 and 3.5 and 1200", (), ["1200", "3.5"]), ("NASA's 2nd", (), ["NASA", "2"]),
    ("Élan vital", (), ["Élan"]), ("水位低 18 米", (), ["18"])])
def test_facts(text, plain, found):
    assert facts(text, plain) == found


@quick
@given(LINES, st.data())
def test_sentences_of_the_text_invent_nothing(lines, data):
    chosen = data.draw(st.sets(st.integers(0, len(lines) - 1)))
    assert invented(told(lines, chosen), " ".join(lines)) == []
    assert invented(told(lines, chosen) + " Varnholm 77", " ".join(lines)) == ["Varnholm", "77"]


def test_words_that_are_no_names():
    assert plain_words(["The old Mill", "a the 9"]) == {"old", "a", "the"}
    assert invented("Lorries stay off", "No lorries, stay", {"off"}) == [] and invented("Keller", "the kellers") == ["Keller"]


def test_the_shipped_titles_hold_no_invention():
    rows = locate("titles")[1]
    plain = plain_words(t for r in rows["train"] for t in (r["text"], *r["targets"]))
    for split in ("train", "validation", "test"):
        assert not [t for r in rows[split] for t in r["targets"] if invented(t, r["text"], plain)]


# Real texts

def one_target(guess, targets, words=rouge_words):
    """F1 of the three scores with the target that is best by ROUGE-1, in percent."""
    best = max((rouge(guess, t, words) for t in targets), key=lambda found: found["rouge1"].f1)
    return [100 * best[k].f1 for k in ("rouge1", "rouge2", "rougeL")]


def mean(rows):
    return [round(sum(v) / len(v), 1) for v in zip(*rows)]


@real
def test_scitldr():
    rows = locate("scitldr")[1]["test"]
    assert mean(one_target(r["sentences"][0], r["targets"]) for r in rows) == [28.2, 10.5, 22.4]
    each = [rouge(r["sentences"][0], r["targets"]) for r in rows]
    assert mean([100 * f[k].f1 for k in f] for f in each) == [28.2, 11.3, 23.1]
    central_ones = [r["sentences"][ranked(pagerank(overlap(r["sentences"])), 1)[0]] for r in rows]
    assert mean(one_target(s, r["targets"]) for s, r in zip(central_ones, rows)) == [31.6, 10.3, 23.3]
    assert mean(one_target(r["sentences"][-1], r["targets"]) for r in rows)[0] == 22.0
    assert mean(max(one_target(s, r["targets"]) for s in r["sentences"]) for r in rows)[0] == 45.8


@real
def test_sentences_of_scitldr():
    """Nearly all cuts are the set's; the set also cuts inside sentences."""
    ours = theirs = both = 0
    for r in locate("scitldr")[1]["test"]:
        given = [" ".join(s.split()) for s in r["sentences"] if s.strip()]
        a, b = ({*accumulate(len(re.sub(r"\s", "", s)) for s in cut)} for cut in (given, sentences(" ".join(given))))
        theirs, ours, both = theirs + len(a) - 1, ours + len(b) - 1, both + len(a & b) - 1
    assert both / ours > 0.99 and 0.8 < both / theirs < 0.9


@real
def test_chinese_titles():
    rows = locate("csl_zh_titles")[1]["test"][:200]
    cut = [sentences(r["text"]) for r in rows]
    assert 2 < sum(map(len, cut)) / len(cut) < 6
    chosen = [s[ranked(pagerank(overlap(s, list)), 1)[0]] for s in cut]
    by_characters = mean(one_target(s, r["targets"], list) for s, r in zip(chosen, rows))[0]
    assert by_characters > 15 > mean(one_target(s, r["targets"]) for s, r in zip(chosen, rows))[0]


# Bad input

EYE = torch.eye(2)

@pytest.mark.parametrize(("call", "told_so"), [
    (lambda: pagerank(torch.ones(2, 3)), r"weights \(N, N\), got \(2, 3\)"),
    (lambda: pagerank(torch.zeros(0, 0)), r"weights \(N, N\)"),
    (lambda: pagerank(torch.tensor([[0.0, -1.0], [-1.0, 0.0]])), "less than nothing"),
    (lambda: pagerank(torch.full((2, 2), math.nan)), "less than nothing"),
    (lambda: pagerank(EYE, damping=1.0), "below 1"),
    (lambda: pagerank(EYE, damping=-0.1), "below 1"),
    (lambda: ranked(torch.ones(3), 0), "at least one sentence"),
    (lambda: mmr(EYE, torch.ones(2), 1.5, 1), "must be 0 to 1"),
    (lambda: mmr(EYE, torch.ones(3), 0.5, 1), r"likeness \(3, 3\)"),
    (lambda: mmr(EYE, torch.ones(2), 0.5, 0), "at least one sentence"),
    (lambda: oracle(["a"], [], 1), "at least one reference summary"),
    (lambda: summarize(" \n ", bag), "no sentence"),
    (lambda: summarize("One. Two.", bag, k=0), "at least one sentence"),
    (lambda: bootstrap([]), "at least one document"),
    (lambda: bootstrap([1.0, 2.0], group=["a"]), "a group each")])
def test_clear_errors(call, told_so):
    with pytest.raises(ValueError, match=told_so):
        call()
