"""Writing: ROUGE as rouge-score gives it, labels of what is to be written, decoding as in transformers, names that return, plain code."""

import ast
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import RepetitionPenaltyLogitsProcessor

from tunebook.attention.block import Transformer
from tunebook.attention.cache import left_pad
from tunebook.kit.checks import close, same
from tunebook.kit.data import locate
from tunebook.tasks.generate import (
    NextToken,
    distinct,
    lcs,
    likelihood,
    nearest,
    ngrams,
    penalize,
    plain_code,
    prompt_masked,
    renamed,
    rouge,
    rouge_f1,
    rouge_l,
    rouge_n,
    rouge_words,
    slots,
    with_titles,
    write,
)
from tunebook.tuning.pretrain import END, PAD, byte_bpe, lm_loss, pad, pretrain, tiny_gpt

quick = settings(deadline=None, max_examples=25, derandomize=True)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
real = pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
PIECES = ["strike", "Strike", "at", "at.", "Talvik's", "2nd", "é", "安全", "—", "\n", "_", "İ", "²", "no-one"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map(" ".join)
TOKENS = st.lists(st.integers(2, 20), max_size=6)
WORDS = st.lists(st.sampled_from("abcd"), max_size=70)
KINDS = ("rouge1", "rouge2", "rougeL")


@pytest.fixture(scope="module")
def made():
    """A tokenizer and a tiny GPT that has seen a few titles."""
    rows = locate("titles")[1]["train"][:40]
    tokenizer = byte_bpe([r["text"] + " " + " ".join(r["targets"]) for r in rows], 600)
    gpt = tiny_gpt(len(tokenizer))
    learned = [r for r in with_titles(rows, tokenizer, 200) if len(r) <= 128]
    for _ in pretrain(gpt, learned, prompt_masked, 6, size=4): pass
    return rows, tokenizer, gpt


@quick
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_rouge_is_that_of_rouge_score(guess, targets):
    ours, theirs = rouge(guess, targets), RougeScorer(list(KINDS)).score_multi(targets, guess)
    assert {k: tuple(v) for k, v in ours.items()} == {k: tuple(map(float, v)) for k, v in theirs.items()}
    one = RougeScorer(list(KINDS)).score(targets[0], guess)
    assert {k: tuple(v) for k, v in rouge(guess, targets[0]).items()} == {k: tuple(map(float, v)) for k, v in one.items()}


@quick
@given(TEXT, TEXT)
def test_other_words_are_those_of_a_tokenizer_given_to_rouge_score(guess, target):
    class Characters:
        def tokenize(self, text): return [c for c in text if not c.isspace()]
    theirs = RougeScorer(list(KINDS), tokenizer=Characters()).score(target, guess)
    ours = rouge(guess, target, Characters().tokenize)
    assert {k: tuple(v) for k, v in ours.items()} == {k: tuple(map(float, v)) for k, v in theirs.items()}


@quick
@given(WORDS, WORDS)
def test_lcs_is_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b): table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert lcs(a, b) == lcs(b, a) == table[-1][-1]
    assert rouge_l(a, b).precision == rouge_l(b, a).recall and rouge_n(a, b, 2).f1 == rouge_n(b, a, 2).f1
    assert ngrams(a, 3).total() == max(0, len(a) - 2)


def test_rouge_at_its_ends():
    assert all(s.f1 == 1 for s in rouge("Strike at Talvik", "strike AT talvik!").values())
    assert all(tuple(s) == (0, 0, 0) for g, t in (("", "a b"), ("a b", ""), ("", ""), ("安全", "安全")) for s in rouge(g, t).values())
    assert rouge("one", "one")["rouge2"].f1 == 0  # no pair to share
    with pytest.raises(ValueError, match="at least one target"): rouge("a", [])
    with pytest.raises(ValueError): rouge_f1(["a"], [])
    assert rouge_f1(["a b", ""], [{"targets": ["a b"]}, {"targets": ["c"]}])["rougeL"] == [1.0, 0.0]
    assert rouge_words("Ångström's 3rd") == ["ngstr", "m", "s", "3rd"]


@quick
@given(st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_labels_are_what_is_to_be_written(texts):
    rows = [sum(([*t, 1] for t in (text, *titles)), []) for text, titles in texts]
    ids, labels = prompt_masked(pad(rows))
    for row, (text, titles), marks in zip(rows, texts, labels.tolist()):
        assert [m for m in marks if m != -100] == sum(([*t, 1] for t in titles), [])
        assert marks[:len(text) + 1] == [-100] * (len(text) + 1) and set(marks[len(row):]) <= {-100}


def test_labels_that_would_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="no text would end"): prompt_masked(torch.tensor([[2, 1, 3]]), end=1, pad=1)
    with pytest.raises(ValueError, match="row 1 has no end token"): prompt_masked(torch.tensor([[2, 1, 3], [2, 3, 4]]))


def test_rows_hold_every_title_first_once(made):
    rows, tokenizer, _ = made
    out = with_titles(rows, tokenizer, 200)
    parts = [tokenizer.decode(r).split(END) for r in out]
    assert [p[0] for p in parts] == [r["text"] for r in rows for _ in r["targets"]]
    assert [p[1] for p in parts] == [t for r in rows for t in r["targets"]]
    assert all(sorted(p[1:-1]) == sorted(r["targets"]) for p, r in zip(parts, [r for r in rows for _ in r["targets"]]))
    with pytest.raises(ValueError, match="row 0 has .* the model reads 9"): with_titles(rows, tokenizer, 9)
    with pytest.raises(ValueError, match="row 0 has no title"): with_titles([{"text": "a", "targets": []}], tokenizer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [{}, {"beams": 3}, {"beams": 2, "length_penalty": 0.0}])
def test_what_is_written_is_what_transformers_writes(made, device, how):
    rows, tokenizer, gpt = made
    gpt, texts = gpt.to(device), [r["text"][:60] for r in rows[:5]]
    tokens, mask = left_pad([tokenizer(t)["input_ids"] + [1] for t in texts], 0, device)
    theirs = gpt.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=1,
                          num_beams=how.get("beams", 1), length_penalty=how.get("length_penalty", 1.0))
    ours = write(Transformer.from_pretrained(gpt), tokenizer, texts, 9, **how)
    assert ours == tokenizer.batch_decode(theirs[:, tokens.shape[1]:], skip_special_tokens=True)
    assert PAD not in "".join(ours) and END not in "".join(ours)
    gpt.to("cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihood_is_the_loss_of_transformers(made, device, dtype):
    rows, tokenizer, gpt = made
    gpt = gpt.to(device, dtype)
    texts, titles = [r["text"][:50] for r in rows[:4]], [r["targets"][0] for r in rows[:4]]
    found = likelihood(Transformer.from_pretrained(gpt), tokenizer, texts, titles)
    for text, title, nats in zip(texts, titles, found):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 1, *tokenizer(title)["input_ids"], 1]], device=device)
        labels = prompt_masked(ids)[1]
        with torch.no_grad(): logits = gpt(ids).logits
        wanted = -lm_loss(logits.float(), labels, causal=True) * (labels != -100).sum()
        close(torch.tensor(nats), wanted.cpu(), terms=2 * (len(tokenizer) + 64 * 8))
    gpt.to("cpu", torch.float32)


@quick
@given(st.integers(0, 999), st.floats(0.2, 4.0), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(DEVICES))
def test_penalty_is_that_of_transformers(seed, penalty, dtype, device):
    g = torch.Generator().manual_seed(seed)
    z, tokens = torch.randn(3, 11, generator=g).to(device, dtype), torch.randint(11, (3, 6), generator=g).to(device)
    z[0, 0] = -torch.inf
    same(penalize(z, tokens, penalty), RepetitionPenaltyLogitsProcessor(penalty)(tokens, z))


def test_a_penalty_must_be_positive():
    with pytest.raises(ValueError, match="above 0"): penalize(torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.long), 0.0)


def test_distinct_counts_repetitions():
    assert distinct(["a b a b"]) == 0.5 and distinct(["a b a b"], 2) == 2 / 3 and distinct([""]) == 0 and distinct(["a", "a"]) == 0.5


@quick
@given(st.permutations(["Ann", "Anna Keller", "Anna", "Marlow", "Marlow Road"]), st.integers(0, 5))
def test_names_come_back(names, count):
    text = "In Marlow Road, Anna Keller (not Anna, nor Annabel) met Ann of Marlow."
    there = slots(text, names[:count])
    assert sorted(there.values()) == [f"N{i}" for i in range(1, count + 1)]
    assert renamed(renamed(text, there), {v: k for k, v in there.items()}) == text
    assert "Annabel" in renamed(text, there) and renamed(text, {}) == text
    assert slots("nobody", names) == {}


def test_the_nearest_text_is_the_most_alike():
    known = ["the pilots of Talvik strike", "a pool opens in Marlow", "a pool closes"]
    assert nearest(known, ["pilots strike", "in Marlow a pool", "a pool closes", "zzz"]) == [0, 1, 2, 0]


@pytest.mark.parametrize("name", ["bisect", "cmd", "contextlib", "dataclasses", "textwrap", "types", "enum"])
def test_plain_code_means_the_same(name):
    source = (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8")
    plain = plain_code(source)

    def bare(tree):
        for n in ast.walk(tree):
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(n, False) is not None:
                n.body = n.body[1:] or [ast.Pass()]
        return ast.dump(tree)

    assert bare(ast.parse(source)) == ast.dump(ast.parse(plain)) and not re.search(r"^\s*#", plain, re.MULTILINE)
    assert plain_code(plain) == plain or bare(ast.parse(plain_code(plain))) == bare(ast.parse(plain))


def test_code_that_does_not_parse_says_where():
    with pytest.raises(SyntaxError, match="line 2|invalid syntax"): plain_code("a = 1\nb = = 2\n")


@quick
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 4),
       st.lists(st.integers(0, 4), max_size=5))
def test_counts_make_a_distribution(rows, n, before):
    lm = NextToken(rows, 5, n)
    assert math.isclose(sum(lm.p(v, before) for v in range(5)), 1, rel_tol=1e-12)
    ones = [t for r in rows for t in r]
    uni = [(ones.count(v) + len(set(ones)) / 5) / (len(ones) + len(set(ones))) for v in range(5)]
    assert all(math.isclose(lm.p(v, []), u, rel_tol=1e-12) for v, u in enumerate(uni))
    assert lm.best(before) in ones


@real
def test_chinese_titles_by_characters():
    rows = locate("csl_zh_titles")[1]["test"][:30]

    class Characters:
        def tokenize(self, text): return list(text)
    leads = [r["text"][:20] for r in rows]
    theirs = [RougeScorer(["rougeL"], tokenizer=Characters()).score_multi(r["targets"], g)["rougeL"].fmeasure for g, r in zip(leads, rows)]
    assert rouge_f1(leads, rows, list)["rougeL"] == list(map(float, theirs)) and sum(theirs) > 0
    assert sum(rouge_f1(leads, rows)["rougeL"]) < sum(theirs)  # by ASCII words there is next to nothing to compare


def test_importing_the_module_costs_little_more_than_torch():
    heavy = ("transformers", "sklearn", "rouge_score", "nltk", "matplotlib")
    code = f"import sys, tunebook.tasks.generate; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
