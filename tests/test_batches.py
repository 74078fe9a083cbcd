"""Batches on drawn lengths and labels: every index once, padding that changes nothing, means per label, clear about bad input."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.checks import close
from tunebook.tuning.batches import IGNORED, Mean, check_labels, counted, encode, next_tokens, pad, padding, plan, shares

quick = settings(deadline=None, max_examples=60, derandomize=True)
ids = st.lists(st.integers(1, 100), min_size=1, max_size=12)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


def words(texts, truncation, max_length):
    """A tokenizer: a number for each word, between 1 and 2."""
    rows = [" ".join(t) if isinstance(t, tuple) else t for t in texts]
    rows = [[1, *(3 + len(w) for w in row.split()), 2] for row in rows]
    return {"input_ids": [row if len(row) <= max_length else [*row[: max_length - 1], 2] for row in rows]}


# Examples

@quick
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=8), limit=st.integers(3, 14))
def test_encode_counts_what_it_cuts(counts, limit):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        examples = encode(["ab " * n for n in counts], [i % 3 for i in range(len(counts))], words, limit)
    cut = sum(n + 2 > limit for n in counts)
    assert [len(e["input_ids"]) for e in examples] == [min(n + 2, limit) for n in counts]
    assert [e["label"] for e in examples] == [i % 3 for i in range(len(counts))]
    assert [str(t.message).split(" texts")[0] for t in told] == ([f"{cut} of {len(counts)}"] if cut else [])


def test_encode_takes_pairs_tensors_and_no_labels():
    assert encode([("a b", "c")], None, words) == [{"input_ids": [1, 4, 4, 4, 2]}]
    assert [e["label"] for e in encode(["a", "b"], torch.tensor([1, 0]), words)] == [1, 0]


@pytest.mark.parametrize("texts, labels, error", [
    (["a", " "], [0, 1], "row 1: expected a text, got ' '"), (["a", None], [0, 1], "row 1: expected a text, got None"),
    ([("a", "")], [0], "row 0: expected a text"), (["a", "b"], [0, 1.0], r"row 1: a label must be an integer from 0, got 1.0"),
    (["a"], ["good"], "row 0: a label must be an integer from 0, got 'good'"), (["a"], [-1], "row 0: a label .* got -1"),
    (["a", "b"], [0], "a label for each of 2 texts, got 1")])
def test_bad_texts_and_labels(texts, labels, error):
    with pytest.raises(ValueError, match=error):
        encode(texts, labels, words)
    with pytest.raises(TypeError, match="put it into a list"):
        encode("a text", None, words)


# Padding

@quick
@given(rows=st.lists(ids, min_size=1, max_size=6), filler=st.integers(0, 5))
def test_pad_gives_each_row_back(rows, filler):
    tags = [[i % 4 if i % 3 else IGNORED for i in row] for row in rows]
    kinds = [[1] * len(row) for row in rows]
    batch = pad([{"input_ids": r, "labels": t, "token_type_ids": k} for r, t, k in zip(rows, tags, kinds)], filler)
    for i, (row, tag) in enumerate(zip(rows, tags)):
        n = len(row)
        assert batch["input_ids"][i, :n].tolist() == row and (batch["input_ids"][i, n:] == filler).all()
        assert batch["labels"][i, :n].tolist() == tag and (batch["labels"][i, n:] == IGNORED).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["token_type_ids"][i].sum() == n
    assert batch["input_ids"].shape[1] == max(map(len, rows))
    assert sum(counted({"labels": t}) for t in tags) == int((batch["labels"] != IGNORED).sum())


def test_pad_keeps_further_columns():
    batch = pad([{"input_ids": [1, 2], "label": 1, "weight": 0.5}, {"input_ids": [3], "label": 0, "weight": 2.0}])
    assert batch["labels"].tolist() == [1, 0] and batch["weight"].tolist() == [0.5, 2.0] and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("examples, error", [
    ([], "at least one example"), ([{"input_ids": [], "label": 1}], "row 0 has no token"),
    ([{"input_ids": [1], "label": 0}, {"input_ids": [1]}], "the same keys"),
    ([{"input_ids": [1, 2], "labels": [1]}], "labels has 1 numbers for 2 tokens")])
def test_bad_examples(examples, error):
    with pytest.raises(ValueError, match=error):
        pad(examples)


@quick
@given(row=ids, prompt=st.integers(0, 14))
def test_next_tokens_never_counts_the_first_or_the_prompt(row, prompt):
    e = next_tokens(row, prompt)
    given_ = min(max(1, prompt), len(row))
    assert e["labels"] == [IGNORED] * given_ + row[given_:] and counted(e) == len(row) - given_


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [[3], [-1], [0, 5], [2, -99]])
def test_labels_out_of_range(wrong, device):
    check_labels(torch.tensor([0, 1, 2, IGNORED], device=device), 3)
    with pytest.raises(ValueError, match="0 to 2 or -100, got"):
        check_labels(torch.tensor(wrong, device=device), 3)
    with pytest.raises(ValueError, match="another loss"):
        check_labels(torch.tensor([1.0], device=device), 3)


# Order

@quick
@given(lengths=lengths, size=st.integers(1, 20), seed=st.integers(0, 99), epoch=st.integers(0, 9), bucket=st.booleans())
def test_each_index_once_in_an_order_of_seed_and_epoch(lengths, size, seed, epoch, bucket):
    batches = plan(lengths, size, seed, epoch, bucket)
    torch.rand(3)
    assert batches == plan(lengths, size, seed, epoch, bucket)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches)) == sorted([size] * (len(lengths) // size) + [len(lengths) % size] * bool(len(lengths) % size))


def test_seeds_and_epochs_differ_and_an_order_stays_from_version_to_version():
    orders = {(s, e): plan(range(1, 101), 8, s, e) for s in range(3) for e in range(3)}
    assert len({str(o) for o in orders.values()}) == 9
    assert plan([5, 2, 9, 3, 8, 2, 4], 2, 0, 0) == [[5, 1], [2], [0, 4], [3, 6]]  # a run kept on disk must find its place again


@quick
@given(lengths=lengths, size=st.integers(1, 20), seed=st.integers(0, 9))
def test_buckets_waste_no_more_than_any_order_within_a_pool(lengths, size, seed):
    whole = sorted(range(len(lengths)), key=lengths.__getitem__)
    least = padding(lengths, [whole[i:i + size] for i in range(0, len(whole), size)])
    assert padding(lengths, plan(lengths, size, seed, 0)) <= least + 1e-12  # fewer than a pool: sorted as a whole
    assert padding(lengths, plan(lengths, size, seed, 0), to=50) == pytest.approx(1 - sum(lengths) / (50 * len(lengths)))


def test_a_batch_needs_rows_and_a_cut_needs_parts():
    with pytest.raises(ValueError, match="at least 1 example, got size 0"):
        plan([1], 0, 0, 0)
    with pytest.raises(ValueError, match="at least 1 part, got 0"):
        shares([1], 0)


@quick
@given(n=st.integers(0, 40), parts=st.integers(1, 50))
def test_shares_are_even_and_complete(n, parts):
    cut = shares(list(range(n)), parts)
    assert list(itertools.chain(*cut)) == list(range(n)) and len(cut) == parts
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


# Means

@quick
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_the_mean_of_parts_is_the_mean_of_the_whole(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64), torch.randint(3, (sum(sizes),), generator=g)
    mean = Mean()
    for x, y in zip(logits.split(sizes), labels.split(sizes)):
        mean.add(F.cross_entropy(x, y, reduction="sum").item() if len(y) else 0.0, len(y))
    if not sum(sizes):
        assert mean.value != mean.value
        return
    close(torch.tensor(mean.value, dtype=torch.float64), F.cross_entropy(logits, labels), terms=2 * (sum(sizes) + 9), scale=8.0)


def test_nothing_of_transformers_is_loaded():
    import subprocess
    import sys
    code = ("import sys, tunebook.tuning.batches, tunebook.tuning.train; "
            "print(sorted({'transformers', 'accelerate', 'safetensors'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_model_s_logits_do_not_see_their_neighbours():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=101,
                        max_position_embeddings=40, initializer_range=0.2)
    model = BertForSequenceClassification(config).double().eval()
    rows = [{"input_ids": torch.randint(1, 101, (n,)).tolist()} for n in (3, 9, 1, 20)]
    with torch.no_grad():
        together = model(**pad(rows)).logits
        alone = torch.cat([model(**pad([row])).logits for row in rows])
        blind = model(input_ids=pad(rows)["input_ids"]).logits
    assert (together - alone).abs().max() < 1e-12 < 1e-2 < (blind - alone).abs().max()
