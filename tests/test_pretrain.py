"""Pretraining: corruptions on drawn texts, their rates, tokenizers on any text, models made once and found again, clear errors."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import models
from tunebook.kit.checks import close, same
from tunebook.kit.ladder import NotFound, survey
from tunebook.tuning import pretrain as P

quick = settings(deadline=None, max_examples=60, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
MARKS, MASK, V = (0, 1, 2, 3, 4), 4, 30
TEXTS = ["The soup was fresh.", "The waiters were slow, but the soup was hot.", "Nobody could call the soup bland."] * 8
rates, seeds = st.floats(0, 1), st.integers(0, 2**31)
texts = st.lists(st.lists(st.integers(5, V - 1), min_size=0, max_size=12), min_size=1, max_size=5)


def framed(rows):
    """[CLS] and [SEP] around each, padded."""
    return P.pad([[2, *r, 3] for r in rows])


def gen(seed):
    return torch.Generator().manual_seed(seed)


# Corruptions

@quick
@given(rows=texts, rate=rates, span=st.integers(1, 6), seed=seeds, a=st.floats(0, 1), b=st.floats(0, 1))
def test_masking_is_undone_by_its_labels(rows, rate, span, seed, a, b):
    ids = framed(rows)
    kept = ids.clone()
    inputs, labels = P.mask_tokens(ids, gen(seed), MARKS, MASK, V, rate, span, (a, (1 - a) * b))
    told = labels != P.IGNORED
    same(ids, kept)
    same(torch.where(told, labels, inputs), ids)
    assert not (told & torch.isin(ids, torch.tensor(MARKS))).any()
    assert ((inputs >= 0) & (inputs < V)).all()
    again = P.mask_tokens(ids, gen(seed), MARKS, MASK, V, rate, span, (a, (1 - a) * b))
    same(again[0], inputs)
    same(again[1], labels)


@quick
@given(rows=texts, span=st.integers(1, 6), seed=seeds)
def test_none_or_all_are_hidden_at_the_ends(rows, span, seed):
    ids = framed(rows)
    free = ~torch.isin(ids, torch.tensor(MARKS))
    for rate in (0.0, 1.0):
        inputs, labels = P.mask_tokens(ids, gen(seed), MARKS, MASK, V, rate, span, (1.0, 0.0))
        assert torch.equal(labels != P.IGNORED, free & (rate == 1))
        assert torch.equal(inputs, torch.where(free & (rate == 1), MASK, ids))


@quick
@given(T=st.integers(1, 30), rate=rates, span=st.integers(1, 6), seed=seeds)
def test_spans_are_contiguous(T, rate, span, seed):
    hidden, number = P.choose((3, T), rate, span, gen(seed))
    assert hidden.shape == number.shape == (3, T)
    for row, n in zip(hidden.tolist(), number.tolist()):
        runs = "".join("x" if h else " " for h in row)
        inner = runs.strip("x") if set(runs) != {"x"} else ""
        assert all(len(r) >= span for r in inner.split())  # those at an end may come from, or go on, outside
        assert all(n[i] <= n[i + 1] for i in range(T - 1))


@pytest.mark.parametrize("span", [1, 2, 5])
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_each_place_is_hidden_at_the_rate(rate, span):
    N = 40_000
    by_place = P.choose((N, 12), rate, span, gen(7))[0].double().mean(0)
    assert (by_place - rate).abs().max() < 4.5 * math.sqrt(rate * (1 - rate) / N)


def test_a_span_shares_its_draw():
    ids = torch.full((4000, 6), 9)
    inputs, labels = P.mask_tokens(ids, gen(0), MARKS, MASK, V, 0.2, 6, (0.5, 0.0))
    number = P.choose(ids.shape, 0.2, 6, gen(0))[1]
    pairs = (number[:, 1:] == number[:, :-1]) & (labels[:, 1:] != P.IGNORED) & (labels[:, :-1] != P.IGNORED)
    assert pairs.sum() > 1000
    assert torch.equal(inputs[:, 1:][pairs], inputs[:, :-1][pairs])
    different = (number[:, 1:] != number[:, :-1]) & (labels[:, 1:] != P.IGNORED) & (labels[:, :-1] != P.IGNORED)
    assert (inputs[:, 1:][different] != inputs[:, :-1][different]).any()


@quick
@given(rows=texts, rate=st.floats(0, 0.25), seed=seeds)
def test_deletion_is_undone_by_its_labels(rows, rate, seed):
    ids = framed(rows)
    inputs, labels = P.delete_tokens(ids, gen(seed), MARKS, 0, rate)
    back = [[t for pair in zip(*row) for t in pair if t not in (0, P.IGNORED)] for row in zip(inputs.tolist(), labels.tolist())]
    assert back == [[2, *r, 3] for r in rows]
    assert (labels[inputs == 0] == P.IGNORED).all() and not torch.isin(labels, torch.tensor(MARKS)).any()


def test_each_place_is_deleted_at_the_rate():
    ids = framed([list(range(5, 15))] * 40_000)
    for rate in (0.15, 0.25):
        labels = P.delete_tokens(ids, gen(3), MARKS, 0, rate)[1]
        shares = torch.stack([(labels == t).any(1).double().mean() for t in range(5, 15)])
        assert (shares - rate).abs().max() < 4.5 * math.sqrt(rate * (1 - rate) / len(ids))


@quick
@given(pairs=st.lists(st.tuples(*[st.lists(st.integers(5, V - 1), max_size=5)] * 2), min_size=1, max_size=9), seed=seeds)
def test_order_is_undone_by_its_label(pairs, seed):
    for (a, b), row in zip(pairs, P.swap_order(pairs, gen(seed), 2, 3), strict=True):
        ids, kinds = row["input_ids"], row["token_type_ids"]
        assert len(ids) == len(kinds) and ids[0] == 2 and ids.count(3) == 2 and sorted(kinds) == kinds
        segments = [[i for i, k in zip(ids, kinds) if k == s and i not in (2, 3)] for s in (0, 1)]
        assert (segments[row["label"]], segments[1 - row["label"]]) == (a, b)


def test_half_are_swapped():
    labels = [r["label"] for r in P.swap_order([([5], [6])] * 10_000, gen(0), 2, 3)]
    assert abs(sum(labels) / 10_000 - 0.5) < 4.5 / 200


# The loss

@quick
@given(seed=seeds, B=st.integers(1, 3), T=st.integers(2, 6), causal=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_loss_is_torch_s(seed, B, T, causal, dtype):
    g = gen(seed)
    logits, labels = torch.randn(B, T, 7, generator=g, dtype=dtype), torch.randint(7, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.5] = P.IGNORED
    z, y = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    theirs = F.cross_entropy(z.reshape(-1, 7), y.reshape(-1)).nan_to_num(0)
    close(P.lm_loss(logits, labels, causal), theirs, terms=2 * (7 + 6 + B * T), scale=10.0)


def test_a_batch_without_labels_has_gradient_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = P.lm_loss(logits, torch.full((1, 3), P.IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [P.tiny_bert, P.tiny_gpt])
def test_the_batch_loss_is_the_model_s_own(make, device):
    model = make(V, layers=1, width=16).to(device).eval()
    rows = [[2, 7, 8, 9, 3], [2, 7, 3]]
    ids = P.pad(rows, device=device)
    corrupt = P.causal_labels if make is P.tiny_gpt else partial(P.mask_tokens, special=MARKS, mask=MASK, vocab=V, rate=0.7)
    ours, n = P._loss(model, ids, corrupt, gen(1), 0)
    inputs, labels = corrupt(ids, gen(1))
    theirs = model(inputs, attention_mask=(ids != 0).long(), labels=labels).loss
    assert n == int((labels if make is P.tiny_bert else labels[:, 1:]).ne(P.IGNORED).sum()) > 0
    close(ours.detach(), theirs.detach(), terms=2 * (V + 6 + 16 * 20), scale=10.0)


# Tokenizers

@settings(deadline=None, max_examples=150, derandomize=True)
@given(text=st.text(max_size=40))
def test_bytes_give_any_text_back(bpe, text):
    assert bpe.decode(bpe(text).input_ids) == text


@pytest.fixture(scope="module")
def bpe():
    return P.byte_bpe(TEXTS, 300)


def test_the_same_text_gives_the_same_vocabulary_in_every_process():
    code = ("import hashlib\nfrom tunebook.tuning.pretrain import *\nfrom tunebook.kit.data import locate\n"
            "t = [r['text'] for r in locate('reviews')[1]['train']][:400]\n"
            "for f in (wordpiece, byte_bpe): print(hashlib.sha256(f(t).backend_tokenizer.to_str().encode()).hexdigest())")
    told = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(told) == 1 and len(told.pop().split()) == 2


def test_word_pieces():
    t = P.wordpiece(TEXTS, 60)
    assert [t.convert_tokens_to_ids(s) for s in P.SPECIAL] == [0, 1, 2, 3, 4]
    assert set(t.all_special_ids) == {0, 1, 2, 3, 4}
    made = t("The soup", "was FRESH")
    assert t.decode(made.input_ids) == "[CLS] the soup [SEP] was fresh [SEP]"
    assert sum(made.token_type_ids) == len(made.input_ids) - made.input_ids.index(3) - 1
    assert len(t) <= 60 and t("zzz").input_ids == [2, 1, 3]
    assert not any(s.startswith("##") for s in t.get_added_vocab())


# Training

def test_training_repeats_to_the_bit_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    corrupt = partial(P.mask_tokens, special=MARKS, mask=MASK, vocab=V, rate=0.5)
    rows = [[2, *range(5 + i, 9 + i), 3] for i in range(20)]
    made = []
    for _ in range(2):
        model = P.tiny_bert(V, seed=1, layers=1, width=16)
        losses = list(P.pretrain(model, rows, corrupt, 5, size=4, seed=2))
        made.append((losses, torch.cat([p.flatten() for p in model.parameters()]).detach()))
    assert made[0][0] == made[1][0] and not model.training
    same(made[0][1], made[1][1])
    same(torch.get_rng_state(), before)


def test_held_out_bits_do_not_train_and_do_not_depend_on_the_mode():
    model = P.tiny_bert(V, layers=1, width=16)
    rows, corrupt = [[2, 7, 8, 3]] * 70, partial(P.mask_tokens, special=MARKS, mask=MASK, vocab=V, rate=0.5)
    model.train()
    a = P.bits(model, rows, corrupt)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    assert a == P.bits(model, rows, corrupt) and not model.training


@quick
@given(rows=st.lists(st.lists(st.integers(5, 9), min_size=1, max_size=6), min_size=1, max_size=20), size=st.integers(1, 7), seed=seeds)
def test_an_epoch_sees_each_text_once(rows, size, seed):
    queue, n = P.batches(rows, size, gen(seed)), math.ceil(len(rows) / size)
    for _ in range(2):
        got = [next(queue) for _ in range(n)]
        assert sorted(r for b in got for r in b) == sorted(rows)
        by_length = sorted(got, key=lambda b: (len(b[0]), len(b[-1])))
        assert all(max(map(len, a)) <= min(map(len, b)) for a, b in zip(by_length, by_length[1:]))


def test_it_learns_what_is_certain():
    rows = [[2, 5, 6, 7, 8, 3], [2, 9, 10, 11, 12, 3]]
    model, corrupt = P.tiny_bert(V, layers=1), partial(P.mask_tokens, special=MARKS, mask=MASK, vocab=V, rate=0.3)
    losses = list(P.pretrain(model, rows, corrupt, 120, size=2))
    assert losses[0] > 2 and P.bits(model, rows * 20, corrupt) < 0.3


# Bad input

@pytest.mark.parametrize("call, words", [
    (lambda ids: P.mask_tokens(ids, gen(0), MARKS, MASK, V, rate=1.1), "rate must be a share from 0 to 1, got 1.1"),
    (lambda ids: P.mask_tokens(ids, gen(0), MARKS, MASK, V, split=(0.9, 0.2)), "the sum of split must be a share"),
    (lambda ids: P.mask_tokens(ids, gen(0), MARKS, MASK, V, span=0), "span counts tokens, 1 or more, got 0"),
    (lambda ids: P.delete_tokens(ids, gen(0), MARKS, 0, rate=0.3), "rate must be a share from 0 to 0.25, got 0.3"),
    (lambda ids: next(P.batches([], 2, gen(0))), "no text to train on: give at least one row"),
    (lambda ids: P.build("tiny-t5", "x"), "known are tiny-bert and tiny-gpt")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(framed([[5, 6]]))


# Served by the kit

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(P.build, "__defaults__", (1,))  # one step, to be quick
    return tmp_path / "tunebook"


@pytest.mark.parametrize("name, auto", [("tiny-bert", "AutoModelForMaskedLM"), ("tiny-gpt", "AutoModelForCausalLM")])
def test_made_once_and_found_again(name, auto, cache, capsys):
    assert [ok for _, ok, _ in survey(models.rungs(name))] == [False, True]
    model, tokenizer = models.load(name, auto=auto)
    assert "pretraining it now" in capsys.readouterr().err
    (folder,) = cache.iterdir()
    assert folder.name.startswith(f"{name}-") and (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    again, _ = models.load(name, auto=auto)
    assert capsys.readouterr().err == ""
    ids = torch.tensor([tokenizer("The soup was fresh.").input_ids])
    same(model(ids).logits.detach(), again(ids).logits.detach())
    assert model(ids).logits.shape[-1] == len(tokenizer) and not model.training
    classifier, _ = models.load(name, auto="AutoModelForSequenceClassification", num_labels=2)
    assert classifier(ids).logits.shape == (1, 2)
    json.loads((folder / "config.json").read_text())


def test_damage_is_refused(cache):
    models.locate("tiny-gpt")
    (folder,) = cache.iterdir()
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not the file it should be"):
        models.locate("tiny-gpt")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NotFound, match="set XDG_CACHE_HOME to a folder of yours"):
        models.locate("tiny-bert")


def test_the_text_is_the_training_split_only():
    from tunebook.kit.data import locate
    splits = locate("reviews")[1]
    assert P.corpus() == [r["text"] for r in splits["train"]]
    assert not set(P.corpus()) & {r["text"] for s in ("validation", "test") for r in splits[s]}


def test_importing_costs_little_more_than_torch():
    heavy = ("transformers", "tokenizers", "datasets", "sklearn", "matplotlib")
    code = f"import sys, tunebook.tuning.pretrain; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                cwd=Path(__file__).parent).stdout == "[]\n"
