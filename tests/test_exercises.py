"""Checkers tell right from wrong whatever is handed in, and an answer cannot talk them round."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import exercises
from tunebook.kit.cli import main
from tunebook.kit.exercises import Case, Exercise, Failed, attempt, check, differ, examine, matrix, progress

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.floats(-1e6, 1e6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=3), max_leaves=6)


def drawn(seed):
    g = torch.Generator().manual_seed(seed)
    return [Case((torch.randn(s, generator=g),), f"{s}") for s in ((1, 1), (2, 3), (3, 2, 4))]


def answer(x): return x.sum(-1)


SUMS = Exercise("toy.sums", answer, drawn, {"the other axis": lambda x: x.sum(0), "a mean": lambda x: x.mean(-1)},
                {"a loop": lambda x: sum(x.unbind(-1))})


@given(plain)
@settings(max_examples=60, deadline=None)
def test_a_value_agrees_with_itself(value):
    assert differ(value, value) == ""


@given(plain, plain)
@settings(max_examples=80, deadline=None)
def test_types_are_told_apart_both_ways_and_values_of_one_type(a, b):
    if type(a) is not type(b) and {type(a), type(b)} not in ({int, float}, {list, tuple}):
        assert differ(a, b) and differ(b, a)
    elif type(a) in (int, str, bool):
        assert (differ(a, b) == "") == (type(a) is type(b) and a == b)


@given(st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_error_in_one_place_is_found_there(B, T, size, seed):
    g = torch.Generator().manual_seed(seed)
    want = torch.rand(B, T, generator=g) + 1
    i, j = int(torch.randint(B, (1,), generator=g)), int(torch.randint(T, (1,), generator=g))
    got = want.clone()
    got[i, j] += size
    assert f"at {[i, j]} expected" in differ(got, want)
    assert differ(got.double(), want) == "expected torch.float32, got torch.float64"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_in_every_dtype_and_a_percent_does_not(dtype):
    want = torch.linspace(1, 2, 9).to(dtype)
    assert differ(want * (1 + torch.finfo(dtype).eps), want) == "" and differ(want * 1.5, want)
    assert differ(want + 80 * torch.finfo(dtype).eps * 2, want)


def test_numbers_are_told_apart_in_words():
    assert differ(torch.tensor([1 + 1e-4]), torch.ones(1)) == "at [0] expected 1, got 1.0001"
    assert differ(torch.tensor([1 + 1e-9], dtype=torch.float64), torch.ones(1, dtype=torch.float64)).endswith("got 1.000000001")


@pytest.mark.parametrize(("got", "want", "words"), [
    (torch.tensor([1.0, math.nan]), torch.ones(2), "NaN at [1]"),
    (torch.ones(2), torch.tensor([1.0, math.nan]), "no NaN at [1]"),
    (torch.tensor([math.inf]), torch.tensor([-math.inf]), "expected -inf, got inf"),
    (torch.ones(2), torch.ones(2, dtype=torch.int64), "expected torch.int64"),
    ([1, 2], (1, 3), "part 1: expected 3, got 2"),
    ({"a": 1}, {"b": 1}, "expected keys ['b']"),
    (None, 1, "expected 1, got NoneType"),
    (1, None, "expected None, got 1"),
])
def test_the_sentence(got, want, words):
    assert words in differ(got, want)


def test_nan_where_nan_is_right_and_infinity_where_it_is():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert differ(x.clone(), x) == "" and differ(torch.empty(0, 3), torch.empty(0, 3)) == ""


class Yes(torch.Tensor):
    """Equal to all, and a tensor by inheritance."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return True


class YesFloat(float):
    def __eq__(self, other): return True
    def __hash__(self): return 0


class YesStr(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0


class YesDict(dict):
    def __eq__(self, other): return True
    def __iter__(self): return iter(["a"])


@pytest.mark.parametrize("want", [torch.ones(2), 1.0, 1, "yes", {"a": 1}, [1.0], None, True])
@pytest.mark.parametrize("lie", [torch.ones(2).as_subclass(Yes), YesFloat(9), YesStr("no"), YesDict(a=1)])
def test_nothing_that_agrees_with_everything_agrees(lie, want):
    assert differ(lie, want) and differ([lie], [want])


@pytest.mark.parametrize(("f", "status"), [
    (answer, "passed"), (lambda x: None, "not yet"), (lambda x: ..., "not yet"), (3, "wrong"), (lambda: 0, "wrong"),
    (lambda x: x.mean(-1), "wrong"), (lambda x: exit(), "wrong"), (lambda x: x.add_(1).sum(-1) - x.shape[-1], "wrong")])
def test_the_status(f, status):
    assert examine(SUMS, f).status == status


def test_a_partly_written_answer_is_wrong_not_unwritten():
    assert examine(SUMS, lambda x: answer(x) if x.dim() == 2 else None).status == "wrong"


def test_a_keyboard_interrupt_is_the_readers():
    def stops(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): attempt(stops, drawn(0)[0])


def test_a_call_leaves_the_generator_and_the_cases_alone():
    state, cases = torch.get_rng_state(), drawn(1)
    before = [c.args[0].clone() for c in cases]
    assert type(attempt(lambda x: (torch.rand(3), x.zero_())[1], cases[1])) is Failed
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(a, c.args[0]) for a, c in zip(before, cases))


def test_matrix_tells_a_mutant_that_passes_and_a_right_answer_that_is_refused():
    ones = Exercise("toy.ones", answer, lambda seed: [Case((torch.ones(2, 2),))], SUMS.mutants, {"negated": lambda x: -x.sum(-1)})
    found = matrix(ones)
    assert found.passed == ["the other axis"] and found.refused == ["negated"] and not found.perfect
    assert "passes: the other axis" in str(found) and "refuses: negated" in str(found)
    assert matrix(SUMS).perfect and matrix(SUMS).misnamed == {}


def test_check_finds_the_exercise_and_keeps_the_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "known", lambda lab="": {SUMS.name: SUMS})
    monkeypatch.setenv("TUNEBOOK_PROGRESS", str(tmp_path / "kept.json"))
    monkeypatch.delenv("TUNEBOOK_CLAIMS", raising=False)
    assert check("toy.sums", lambda x: x.mean(-1)).like == "a mean" and progress() == {"toy.sums": "wrong"}
    assert "passed" in check("toy.sums", answer)._repr_html_() and progress() == {"toy.sums": "passed"}
    with pytest.raises(KeyError, match="there are: toy.sums"): check("toy.product", answer)
    (tmp_path / "kept.json").write_text("not json")
    assert progress() == {}


def test_under_the_runner_a_check_is_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "known", lambda lab="": {SUMS.name: SUMS})
    monkeypatch.setenv("TUNEBOOK_CLAIMS", str(tmp_path / "claims.jsonl"))
    check("toy.sums", lambda x: ...)
    told = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    assert [(c["name"], c["ok"], c["value"]) for c in told if "kind" in c] == [("toy.sums", False, "not yet")]


def test_html_shows_text_as_text():
    v = exercises.Verdict("toy.sums", "wrong", "expected '<b>', got '<script>'")
    assert "<script>" not in v._repr_html_() and "&lt;script&gt;" in v._repr_html_()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUNEBOOK_PROGRESS", str(tmp_path / "kept.json"))
    monkeypatch.setattr(exercises, "known", lambda lab="": {SUMS.name: SUMS})
    assert main(["labs", "matrix"]) == 0 and "mutants refused 2 of 2" in capsys.readouterr().out
    assert main(["labs", "progress", "toy"]) == 1 and "toy.sums: not yet" in capsys.readouterr().out
    check("toy.sums", answer)
    assert main(["labs", "progress"]) == 0 and "toy.sums: passed" in capsys.readouterr().out
    assert main(["labs", "matrix", "L0"]) == 2 and "no lab is called L0; there are: toy" in capsys.readouterr().err
    careless = Exercise("toy.ones", answer, lambda seed: [Case((torch.ones(2, 2),))], SUMS.mutants, {})
    monkeypatch.setattr(exercises, "known", lambda lab="": {careless.name: careless})
    assert main(["labs", "matrix"]) == 1 and "passes: the other axis" in capsys.readouterr().out


def test_every_lab_is_held_against_its_answers():
    every = exercises.known()
    assert set(every) >= {"L1.scores", "L1.softmax", "L1.causal_mask", "L1.padding_mask", "L1.attend", "L1.split_heads"}
    assert all(n == e.name and len(e.mutants) >= 5 and len(e.others) >= 2 for n, e in every.items())


@pytest.mark.parametrize("name", sorted(exercises.known()))
def test_a_checker_of_a_lab_errs_in_neither_way_on_cases_not_seen(name):
    found = matrix(exercises.find(name), (11, 12))
    assert found.perfect and not found.misnamed, str(found)
