"""Tagging: spans and scores equal seqeval's, alignment keeps every tag, decoding is legal and best, real outputs score as published."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.data import locate
from tunebook.kit.models import load
from tunebook.tasks.tag import Score, Span, align, legal, listed, names_of, prior, ruled, score, spans, to_bio, to_bioes, viterbi
from tunebook.tuning.batches import IGNORED, pad
from tunebook.tuning.train import Recipe, fit, predict

quick = settings(deadline=None, max_examples=60, derandomize=True)
NAMES = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
TAGS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=9)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
WORD = st.text(st.characters(blacklist_categories=("Cs", "Zs", "Cc"), max_codepoint=0x2FFF), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def minilm():
    return load("minilm")


@quick
@given(st.lists(st.tuples(TAGS, st.randoms(use_true_random=False)), min_size=1, max_size=6), st.booleans())
def test_scores_equal_seqeval(drawn, strict):
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2
    gold = [tags for tags, _ in drawn]
    told = [[t if dice.random() < 0.6 else dice.choice(NAMES) for t in tags] for tags, dice in drawn]
    how = {"mode": "strict", "scheme": IOB2} if strict else {}
    found = score(gold, told, strict)
    for name, f in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert getattr(found["all"], name) == pytest.approx(float(f(gold, told, zero_division=0, **how)), abs=1e-12)
    from seqeval.metrics import classification_report
    by_kind = classification_report(gold, told, output_dict=True, zero_division=0, **how)
    for kind, s in found.items():
        if kind != "all" and s.gold: assert s.f1 == pytest.approx(float(by_kind[kind]["f1-score"]), abs=1e-12)


@quick
@given(TAGS)
def test_bioes_says_the_same(tags):
    there = to_bioes(tags)
    assert spans(to_bio(there)) == spans(tags)
    for head in "BIES": assert all(t in NAMES or t[0] in "ES" for t in there) and (head not in "ES" or len(there) == len(tags))
    assert sum(t[0] in "ES" for t in there) == len(spans(tags))
    assert spans(to_bio(there)) == spans(to_bio(there), strict=True)


@pytest.mark.parametrize("tag", ["X-PER", "PER", "O-PER", "B", "B-", "", "b-PER"])
def test_a_tag_that_is_none(tag):
    with pytest.raises(ValueError, match="word 1: expected O, B-KIND or I-KIND"): spans(["O", tag])


def test_lengths_that_differ():
    with pytest.raises(ValueError, match="sentence 1: 2 tags in gold, 1 predicted"): score([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError): score([["O"]], [["O"], ["O"]])


def test_nothing_found_and_nothing_there():
    assert score([["O"]], [["O"]]) == {"all": Score(0, 0, 0)}
    assert Score(0, 0, 3).precision == Score(0, 2, 0).recall == Score(0, 0, 0).f1 == 0.0


@quick
@given(st.lists(st.tuples(WORD, st.sampled_from(NAMES)), min_size=1, max_size=12), st.integers(3, 40))
def test_alignment_keeps_the_tag_of_every_word_or_counts_it(minilm, words, limit):
    row = {"tokens": [w for w, _ in words], "tags": [t for _, t in words]}
    (example,), lost = align([row], minilm[1], NAMES, limit)
    found = [NAMES[k] for k in example["labels"] if k != IGNORED]
    assert len(found) + lost == len(words)
    assert len(example["input_ids"]) == len(example["labels"]) <= limit
    left = iter(row["tags"])
    assert all(t in left for t in found)  # the same order
    if not lost: assert found == row["tags"]


def test_an_unknown_tag_names_row_and_tags(minilm):
    rows = [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["b"], "tags": ["B-DOG"]}]
    with pytest.raises(ValueError, match="row 1: the tag 'B-DOG' is not in training: known are O, B-LOC"): align(rows, minilm[1], NAMES)


def test_names_are_in_a_fixed_order():
    rows = [{"tags": ["I-PER", "O"]}, {"tags": ["B-LOC"]}]
    assert names_of(rows) == names_of(rows[::-1]) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert names_of([{"tags": ["O"]}]) == ["O"]


@quick
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_viterbi_is_the_best_row(length, seed):
    g = torch.Generator().manual_seed(seed)
    names = NAMES[:5]
    scores = torch.randn(length, 5, generator=g, dtype=torch.float64) * 3
    moves = legal(names).double() + torch.randn(6, 5, generator=g, dtype=torch.float64)
    def total(row): return sum(float(scores[t, k] + moves[row[t - 1] if t else -1, k]) for t, k in enumerate(row))
    row = viterbi(scores, moves)
    assert total(row) == pytest.approx(max(map(total, itertools.product(range(5), repeat=length))), abs=1e-9)
    tags = [names[k] for k in row]
    assert spans(tags) == spans(tags, strict=True)


@pytest.mark.parametrize("device", DEVICES)
def test_viterbi_leaves_a_legal_row_alone(device):
    best = torch.tensor([5, 6, 0, 1, 2, 2, 0])
    scores = torch.nn.functional.one_hot(best, 7).float().to(device)
    assert viterbi(scores, legal(NAMES).to(device)) == best.tolist()
    assert viterbi(scores[:0], legal(NAMES).to(device)) == []


def test_rules_and_lists_at_the_edges():
    assert ruled([], {"lake *": "LOC"}) == [] and ruled(["Lake"], {"lake *": "LOC"}) == []
    assert ruled("Lake 7".split(), {"lake *": "LOC"}) == []
    assert ruled("LAKE Ford".split(), {"lake *": "LOC"}) == [Span("LOC", 0, 2)]
    assert ruled("Mr York met Mr Kent".split(), {"(mr) *": "PER"}) == [Span("PER", 1, 2), Span("PER", 4, 5)]
    assert listed(["York"], {}) == [] and listed([], {("york",): "LOC"}) == []
    assert listed("New York York".split(), {("new", "york"): "LOC", ("york",): "PER"}) == [Span("LOC", 0, 2), Span("PER", 2, 3)]


def test_a_prior_speaks_only_where_it_knows():
    out = prior([Span("LOC", 1, 3), Span("CAT", 0, 1)], 4, NAMES)
    assert out.sum() == 2 and out[1, NAMES.index("B-LOC")] == out[2, NAMES.index("I-LOC")] == 1


def test_a_tagger_learns_its_sentences(minilm):
    """The whole way: rows, pieces, training, legal rows, score."""
    rows = locate("entities")[1]["train"][:48]
    names = names_of(rows)
    model, tokenizer = load("minilm", auto="AutoModelForTokenClassification", num_labels=len(names))
    examples, _ = align(rows, tokenizer, names)
    fit(model, examples, None, Recipe(lr=1e-3, epochs=8, seed=0))
    logits = predict(model, examples)
    told = [[names[k] for k in viterbi(z[torch.tensor(e["labels"]) != IGNORED], legal(names))]
            for z, e in zip(logits, examples)]
    assert score([r["tags"] for r in rows], told)["all"].f1 > 0.6
    assert pad(examples)["labels"].shape == pad(examples)["input_ids"].shape


@pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
@pytest.mark.parametrize("system, f1", [("spinningbytes", 40.78), ("arcada", 39.98)])
def test_the_published_scores_of_wnut17(system, f1):
    """Derczynski et al. (2017), table 5, for two systems whose outputs are kept."""
    rows = locate("wnut17_systems")[1][system]
    found = score([r["tags"] for r in rows], [r["predicted"] for r in rows])["all"]
    assert len(rows) == 1287 and round(100 * found.f1, 2) == f1


@pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
def test_o_everywhere_and_a_list_on_wnut17():
    splits = locate("wnut17")[1]
    gold = [r["tags"] for r in splits["test"]]
    lazy = [["O"] * len(g) for g in gold]
    right = sum(t == "O" for g in gold for t in g) / sum(map(len, gold))
    assert score(gold, lazy)["all"].f1 == 0 and round(100 * right, 1) == 92.6
    known = {tuple(w.lower() for w in r["tokens"][s.start:s.end]): s.kind for r in splits["train"] for s in spans(r["tags"])}
    told = []
    for r in splits["test"]:
        tags = ["O"] * len(r["tokens"])
        for s in listed(r["tokens"], known): tags[s.start:s.end] = [f"B-{s.kind}", *[f"I-{s.kind}"] * (s.end - s.start - 1)]
        told.append(tags)
    assert score(gold, told)["all"].f1 < 0.05  # names of the test are new by design


@pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
def test_chinese_entities_are_words_and_tags():
    splits = locate("uner_zh_gsdsimp")[1]
    assert set(names_of(splits["train"])) == set(NAMES)
    assert all(len(r["tokens"]) == len(r["tags"]) and spans(r["tags"]) == spans(r["tags"], strict=True) for r in splits["test"])


def test_the_import_is_light():
    heavy = "{'transformers', 'seqeval', 'sklearn', 'datasets'}"
    code = f"import sys, tunebook.tasks.tag; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert json.loads(told.replace("'", '"')) == []
