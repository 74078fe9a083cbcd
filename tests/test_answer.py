"""Answering: scores as SQuAD's script gives them, offsets that come back, windows that lose nothing, legal spans, real sets aligned."""

import json
import math
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.data import locate
from tunebook.kit.models import load
from tunebook.tasks.answer import (
    Matcher,
    Prepared,
    answers,
    best,
    choose,
    curve,
    exact_match,
    f1,
    normalize,
    overlap_sentence,
    place,
    prepare,
    read,
    score,
    span_loss,
    span_scores,
    top_spans,
    trimmed,
    windows,
    words,
)
from tunebook.tuning.batches import pad
from tunebook.tuning.train import Recipe, fit

quick = settings(deadline=None, max_examples=60, derandomize=True)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
real = pytest.mark.skipif(not os.environ.get("TUNEBOOK_DATA"), reason="needs the real data: set TUNEBOOK_DATA")
TEXT = st.lists(st.sampled_from(["the", "The", "a", "an", "A-", "an.", "town", "Town,", "Œuvre", "é", "—", "U.S.", "1,958", "'s",
                                 "安", "athe", "_"]) | st.text(max_size=4), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer():
    return load("minilm")[1]


def slow(answer, gold):
    """Words kept one by one; F1 from precision and recall."""
    def split(text):
        kept = [c for c in text.lower() if c not in string.punctuation]
        return [w for w in re.sub(r"(?<!\w)(?:the|an|a)(?!\w)", " ", "".join(kept)).split() if w]
    a, g = split(answer), split(gold)
    if not a or not g: return float(a == g), float(a == g)
    shared = sum(min(n, Counter(g)[w]) for w, n in Counter(a).items())
    precision, recall = shared / len(a), shared / len(g)
    return float(a == g), 2 * precision * recall / (precision + recall) if shared else 0.0


@quick
@given(TEXT, TEXT)
def test_scores_equal_another_way_to_count(answer, gold):
    em, overlap = slow(answer, gold)
    assert exact_match(answer, gold) == em and f1(answer, gold) == pytest.approx(overlap, abs=1e-12)
    assert f1(answer, gold) == f1(gold, answer) and f1(answer, answer) == 1.0
    assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize("answer, gold, em, overlap", [
    ("The U.S.A.", "usa", 1, 1), ("a-team", "team", 0, 0), ("an apple a day", "apple day", 1, 1), ("red red", "red", 0, 2 / 3),
    ("the", "", 1, 1), ("", "Halden", 0, 0), ("été", "ete", 0, 0), ("“Halden”", "Halden", 0, 0), ("theatre", "atre", 0, 0)])
def test_known_scores(answer, gold, em, overlap):
    """As SQuAD's script has them: punctuation goes first, only ASCII's, and articles are whole words."""
    assert (exact_match(answer, gold), f1(answer, gold)) == (em, pytest.approx(overlap))


@quick
@given(st.lists(st.tuples(st.lists(TEXT, max_size=3), TEXT), min_size=1, max_size=6))
def test_a_set_is_scored_as_the_script_does(drawn):
    rows = [{"answers": golds} for golds, _ in drawn]
    found = score(rows, [a for _, a in drawn])
    each = [max((slow(a, g) for g in golds if normalize(g)), default=slow(a, "")) for golds, a in drawn]
    each_f1 = [max((slow(a, g)[1] for g in golds if normalize(g)), default=slow(a, "")[1]) for golds, a in drawn]
    assert found["exact"] == pytest.approx(100 * sum(e for e, _ in each) / len(rows))
    assert found["f1"] == pytest.approx(100 * sum(each_f1) / len(rows))
    for name, kept in (("HasAns", [bool(g) for g, _ in drawn]), ("NoAns", [not g for g, _ in drawn])):
        assert (f"{name}_f1" in found) == any(kept)
        if any(kept): assert found[f"{name}_f1"] == pytest.approx(100 * sum(e for e, k in zip(each_f1, kept) if k) / sum(kept))


def test_several_true_answers_and_none():
    assert best("halden town", ["Halden", "Halden town"]) == (1, 1) and best("", ["the"]) == (1, 1) and best("x", []) == (0, 0)
    for rows, given_ in (([], []), ([{"answers": []}], []), ([{"answers": []}], ["", ""])):
        with pytest.raises(ValueError, match="rows need one answer each"): score(rows, given_)


def test_chinese_words_are_characters():
    assert words("在1958年，Halden。", characters=True) == ["在", "1958", "年", "halden"]
    assert f1("哈尔登", "哈尔登市", characters=True) == pytest.approx(6 / 7) and f1("哈尔登", "哈尔登市") == 0


SPOTS = st.text(st.characters(blacklist_categories=("Cs",), max_codepoint=0x2FFFF), min_size=1, max_size=40)


@quick
@given(SPOTS, st.data())
def test_pieces_cover_the_answer_or_say_no(tokenizer, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    told = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if (found := place(told, start, stop)) is None:
        touched = [o for o in told if o[0] < stop and o[1] > start]
        assert not touched or touched[0][0] > start or touched[-1][1] < stop
        return
    first, last = found
    assert told[first][0] <= start < told[first][1] and told[last][0] < stop <= told[last][1]
    assert text[start:stop] in text[told[first][0]:told[last][1]]
    assert place(told, told[first][0], told[last][1]) == found


def test_white_space_at_the_ends_is_no_answer():
    assert trimmed(" 19 ", 4) == (5, 7) and trimmed("19", 4) == (4, 6)
    assert place([(0, 0), (0, 4), (5, 7), (0, 0)], 4, 5) is None and place([], 0, 1) is None


@quick
@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_short_answer_is_whole_in_a_window(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    cut = windows(length, size, overlap)
    assert cut[0][0] == 0 and cut[-1][1] == length and all(b - a <= size for a, b in cut)
    assert all(y[0] == x[0] + size - overlap and x[1] - y[0] == overlap for x, y in zip(cut, cut[1:]))
    for span in range(1, min(overlap + 1, length) + 1):
        assert all(any(a <= s and s + span <= b for a, b in cut) for s in range(length - span + 1))


@quick
@given(st.lists(st.sampled_from(["Halden", "is", "a", "town", "unbelievably", "old", "1958", "哈", "."]), min_size=1, max_size=60),
       st.integers(14, 30), st.integers(0, 6))
def test_windows_equal_the_tokenizers(tokenizer, bits, limit, overlap):
    context, question = " ".join(bits), "Where is it?"
    ready = prepare([{"context": context, "question": question, "answers": [], "starts": []}], tokenizer, limit, overlap)
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = limit - len(tokenizer(question, add_special_tokens=False)["input_ids"]) - 3
    assert [whole[a:b] for a, b in windows(len(whole), room, overlap)] == [[c for c in o if c != (0, 0)] for o in ready.offsets]
    assert all(e["label"] == e["end"] == 0 for e in ready.examples)


@pytest.mark.parametrize("change, message", [
    ({"starts": [1]}, "row 1: expected 'Halden' at character 1, found 'n Hald'"), ({"starts": [900]}, "at character 900, found ''"),
    ({"answers": [""]}, "row 1: the answer is empty"), ({"answers": ["  "], "context": "  x", "starts": [0]}, "the answer is empty")])
def test_offsets_that_do_not_point_at_the_answer(tokenizer, change, message):
    row = {"context": "In Halden.", "question": "Where?", "answers": ["Halden"], "starts": [3]}
    prepare([row], tokenizer)
    with pytest.raises(ValueError, match=message): prepare([row, row | change], tokenizer)


def test_a_question_that_leaves_no_room(tokenizer):
    row = {"context": "In Halden.", "question": "Where " * 30, "answers": [], "starts": []}
    with pytest.raises(ValueError, match="row 0: a question of 30 pieces leaves 7 of 40, the overlap takes 8"):
        prepare([row], tokenizer, 40, 8)
    for bad in ((4, 4), (4, 5), (4, -1)):
        with pytest.raises(ValueError, match="the overlap must be less"): windows(9, *bad)


def test_widened_and_lost_answers_are_counted(tokenizer):
    context = "Anna was unbelievably old. " * 4
    rows = [{"context": context, "question": "How?", "answers": [a], "starts": [context.index(a)]}
            for a in ("believ", context.strip(), "Anna")]
    whole, cut = prepare(rows, tokenizer), prepare(rows, tokenizer, limit=16, overlap=2)
    assert (whole.widened, whole.lost) == (1, 0) and (cut.widened, cut.lost) == (1, 1)


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_the_best_spans_are_those_of_a_search(length, most, k, seed):
    z = torch.randn(length, 2, generator=torch.Generator().manual_seed(seed))
    every = sorted(((float(z[i, 0] + z[j, 1]), i, j) for i in range(1, length) for j in range(i, min(i + most, length))), reverse=True)
    assert top_spans(z, most, k) == every[:k]
    assert top_spans(torch.full((length, 2), -torch.inf), most, k) == []


@quick
@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=12))
def test_the_threshold_is_the_best_one(rows):
    margins, gains, has = ([r[i] for r in rows] for i in range(3))
    def mean(t): return sum((g if a else 0) if m >= t else not a for m, g, a in rows)
    t = choose(margins, gains, has)
    assert mean(t) == max(mean(x / 2) for x in range(-8, 9))
    points = curve(margins, gains, has)
    assert points[0][0] == math.inf and points[0][1] == 0 and all(x[1] <= y[1] and x[2] >= y[2] for x, y in zip(points, points[1:]))


def test_windows_merge_by_score_and_the_lowest_no_answer():
    offsets = [[(0, 0), (0, 4), (5, 9)], [(0, 0), (5, 9), (10, 14)]]
    scores = [torch.tensor([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 4.0]])]
    found, = answers([{"context": "Anna left York"}], Prepared([{}] * 2, [0, 0], offsets, 0, 0), scores)
    assert (found.text, found.start, found.margin) == ("York", 10, 6.0)
    closed, = answers([{"context": "x"}], Prepared([{}], [0], [[(0, 0)]], 0, 0), [torch.zeros(1, 2)])
    assert closed.text == "" and closed.margin == -math.inf


class Fixed(torch.nn.Module):
    """A reader with scores of its own choosing."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, input_ids, attention_mask, token_type_ids):
        z = (input_ids % 7).to(self.w.dtype) * self.w
        return SimpleNamespace(start_logits=z, end_logits=-z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_scores_in_every_dtype(tokenizer, dtype, device):
    rows = locate("questions")[1]["train"][:5]
    ready = prepare(rows, tokenizer)
    reader = Fixed(dtype).to(device)
    batch = {k: v.to(device) for k, v in pad(ready.examples).items()}
    value, z = span_loss(reader, batch)
    wide = span_scores(reader, batch).double()
    expected = -sum(w[:, k].log_softmax(0)[e[name]] for w, e in zip(wide, ready.examples) for k, name in enumerate(("label", "end"))) / 2
    assert value.dtype == torch.promote_types(dtype, torch.float32) and value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (z.isfinite() == batch["open"].bool()).all()
    alone = read(reader, ready.examples, batch=2)
    assert all(torch.equal(a.double(), b[:len(a)].cpu()) for a, b in zip(alone, wide))


@pytest.mark.parametrize("device", DEVICES)
def test_padding_changes_nothing_for_the_matcher(tokenizer, device):
    rows = locate("questions")[1]["train"][:6]
    examples = prepare(rows, tokenizer).examples
    g = torch.Generator().manual_seed(0)
    reader = Matcher([torch.randn(len(e["input_ids"]), 16, generator=g) for e in examples], width=8).to(device)
    examples = [e | {"row": i} for i, e in enumerate(examples)]
    for a, b in zip(read(reader, examples, batch=6), read(reader, examples, batch=1)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_reader_learns_its_questions():
    """The whole way with MiniLM's own head: rows, pieces, training, spans, score."""
    rows = locate("questions")[1]["train"][:6]
    model, tokenizer = load("minilm", auto="AutoModelForQuestionAnswering", num_labels=2)
    ready = prepare(rows, tokenizer)
    examples = ready.examples
    fit(model, examples, None, Recipe(lr=5e-4, epochs=8, batch=6, seed=0), loss=span_loss)
    told = [a.text if a.margin >= 0 else "" for a in answers(rows, ready, read(model, examples))]
    assert score(rows, told)["exact"] > 80


@real
@pytest.mark.parametrize("name, total, lost", [("xquad_en", 1190, 0), ("cmrc2018_trial", 1002, 1)])
def test_real_sets_align_and_windows_hold_every_answer(tokenizer, name, total, lost):
    """Answers read back from their pieces, but one that is cut in each set, and a Hebrew one that ends in a mark with no piece."""
    rows = locate(name)[1]["test"]
    ready = prepare(rows, tokenizer, limit=512, overlap=200)
    assert len(rows) == total and ready.lost == lost and len(ready.examples) > total
    wide = set()
    for i, e, offsets in zip(ready.owner, ready.examples, ready.offsets):
        answer, context = rows[i]["answers"][0], rows[i]["context"]
        at = rows[i]["starts"][0]
        if not e["label"]: continue
        a, b = offsets[e["label"]][0], offsets[e["end"]][1]
        assert a <= at + len(answer) - len(answer.lstrip()) and b >= at + len(answer.rstrip()) and answer.strip() in context[a:b]
        if context[a:b] != answer.strip(): wide.add(i)
    assert len(wide) == ready.widened == 1


@real
@pytest.mark.parametrize("name, overlap, exact", [("xquad_en", 15.8, 0.0), ("cmrc2018_trial", 44.2, 16.8)])
def test_the_sentence_with_most_words_on_real_sets(name, overlap, exact):
    rows, chinese = locate(name)[1]["test"], name == "cmrc2018_trial"
    found = score(rows, [overlap_sentence(r["context"], r["question"], chinese) for r in rows], chinese)
    assert found["f1"] == pytest.approx(overlap, abs=1.0) and found["exact"] == pytest.approx(exact, abs=1.0)


def test_the_import_is_light():
    heavy = "{'transformers', 'tokenizers', 'sklearn', 'datasets'}"
    code = f"import sys, tunebook.tasks.answer; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert json.loads(told.replace("'", '"')) == []
