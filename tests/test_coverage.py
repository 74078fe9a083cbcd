"""The guard on what a tokenizer does not know: real Chinese, other tokenizers, drawn texts, and a small model end to end."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import data
from tunebook.kit.coverage import LIMIT, Coverage, characters, coverage, fitting, truncation
from tunebook.kit.models import locate

REAL = Path(os.environ.get("TUNEBOOK_DATA") or "/nonexistent").expanduser()
needs = {name: pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"TUNEBOOK_DATA names no folder that holds {name}/")
         for name in ("sib200", "csl_zh")}
quick = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(locate("minilm")[1], local_files_only=True)


@needs["sib200"]
def test_english_is_covered_and_chinese_is_not(minilm):
    found = {}
    for name in ("sib200_en", "sib200_zh"):
        texts = [r["text"] for r in data.locate(name)[1]["train"]]
        found[name] = coverage(texts, minilm, limit=1)
    assert found["sib200_en"].share < 0.001 and found["sib200_en"].lost / found["sib200_en"].characters < 0.001
    assert 0.6 < found["sib200_zh"].share < 0.9, found["sib200_zh"]


@needs["csl_zh"]
def test_characters_of_training_cover_the_test_split(minilm):
    rows = data.locate("csl_zh_topics")[1]
    train, test = ([r["text"] for r in rows[s]] for s in ("train", "test"))
    with pytest.warns(UserWarning, match=r"made for other text: .* % of \d+ tokens unknown"): tokenizer, found = fitting(train, minilm)
    assert found.share > 0.5 and coverage(train, tokenizer).unknown == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coverage(test, tokenizer).share < 0.01


@needs["sib200"]
def test_what_the_foreign_tokenizer_costs(minilm):
    """Topics of sib200_zh from a bag of tokens: word pieces that are mostly unknown against characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    rows = data.locate("sib200_zh")[1]
    train, test = ([[r["text"] for r in rows[s]], [r["label"] for r in rows[s]]] for s in ("train", "test"))
    score = {}
    for name, tokenizer in (("pieces", minilm), ("characters", characters(train[0]))):
        model = make_pipeline(TfidfVectorizer(analyzer=tokenizer.tokenize), LogisticRegression(max_iter=1000, C=10))
        score[name] = model.fit(*train).score(*test)
    assert score["characters"] > score["pieces"] + 0.1, score


@needs["sib200"]
def test_chinese_trains_end_to_end(minilm):
    """Text, guard, tokenizer of characters, a small model: the loss falls and other texts get other answers."""
    from transformers import BertConfig, BertForSequenceClassification
    rows = data.locate("sib200_zh")[1]["train"][:64]
    with pytest.warns(UserWarning, match="tokens unknown"): tokenizer = fitting([r["text"] for r in rows], minilm)[0]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                        num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(config)
    batch = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=48, return_tensors="pt")
    labels, losses = torch.tensor([r["label"] for r in rows]), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        out = model(**batch, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses[:: 13]
    assert (out.logits.argmax(-1) == labels).float().mean() > 0.6


def test_a_byte_level_tokenizer_has_no_unknown_token_and_pays_in_length():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["plain English text, nothing else"] * 3, vocab_size=300, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer)
    assert tokenizer.unk_token_id is None
    found = coverage(["睡眠有益于记忆。"], tokenizer)
    assert (found.unknown, found.lost, found.tokens) == (0, 0, 24)


def test_dropped_characters_are_lost_although_no_token_is_unknown(minilm):
    with pytest.warns(UserWarning, match="0.0 % of 1 tokens unknown, 66.7 % of 6 characters lost"):
        assert coverage(["\x00\x01\x02\x03ok"], minilm) == Coverage(tokens=1, unknown=0, characters=6, lost=4)


def test_the_limit_is_the_callers(minilm):
    texts = ["good food 好吃"]
    share = coverage(texts, minilm, limit=1).share
    assert share > LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coverage(texts, minilm, limit=1)
        assert fitting(["good food"], minilm)[0] is minilm
    with pytest.warns(UserWarning, match="the limit is 2 %"): coverage(texts, minilm, limit=0.02)


def test_bad_input_is_one_clear_error(minilm):
    for texts in ("a text", []):
        with pytest.raises(ValueError, match="expected a list of texts"): coverage(texts, minilm)
    with pytest.raises(ValueError, match="expected a fast tokenizer"): coverage(["a"], object())
    with pytest.raises(ValueError, match="at least one character"): characters([" ", ""])
    for limit in (0, -1, 10**30):
        with pytest.raises(ValueError, match="pass limit"): truncation(["a"], minilm, limit)


def test_texts_without_a_token(minilm):
    assert coverage(["", " "], minilm) == Coverage(0, 0, 0, 0) and str(coverage([""], minilm)).startswith("0.0 % of 0 tokens")


def test_truncation_is_what_the_tokenizer_does(minilm):
    texts, pairs = ["a b c d", "e", "f g " * 20], ["long context " * 9, "h", "i"]
    for second in (None, pairs):
        for limit in (5, 12, 512):
            more = {} if second is None else {"text_pair": second}
            full, kept = (minilm(texts, **more, **o)["input_ids"] for o in ({}, {"truncation": True, "max_length": limit}))
            found = truncation(texts, minilm, limit, second)
            assert found.cut == sum(map(len, full)) - sum(map(len, kept)) and found.tokens == sum(map(len, full))
            assert found.longer == sum(len(a) > len(b) for a, b in zip(full, kept)) and found.longest == max(map(len, full))
    assert truncation(texts, minilm).limit == minilm.model_max_length == 512


def test_a_smaller_vocabulary_keeps_the_frequent():
    tokenizer = characters(["aab", "aac"], size=6)
    assert tokenizer.get_vocab().keys() == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"}
    assert tokenizer.tokenize("abc") == ["a", "[UNK]", "[UNK]"] and tokenizer.pad_token_id == 0


drawn = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("中文 \n\u3000\u2028𫚭\u0301\x00"), max_size=12)


@quick
@given(texts=st.lists(drawn, min_size=1, max_size=4).filter(lambda ts: any(c.strip() for c in ts)))
def test_characters_are_tokens_at_their_offsets(texts):
    tokenizer = characters(texts)
    found = coverage(texts, tokenizer, limit=1)
    for text in texts:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert [text[a:b] for a, b in out["offset_mapping"]] == [c for c in text if not c.isspace()]
        assert tokenizer.decode(out["input_ids"]) == "".join(c for c in text if not c.isspace())
    assert found.unknown == found.lost == 0 and found.tokens == found.characters == sum(not c.isspace() for t in texts for c in t)
