"""The seventh lab shows the functions that its checkers know as found; and its solutions have the properties that the tasks name."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.editions import marks
from tunebook.kit.exercises import Failed, attempt, differ
from tunebook.labs import bugs


def shown(folder):
    """The read-only cells of the lab: function number, source."""
    cells = json.loads((ROOT / folder / "L7_bugs.ipynb").read_text(encoding="utf-8"))["cells"]
    return [("".join(c["source"]), marks(c)) for c in cells if marks(c).get("grade_id", "").endswith("-found")]


@pytest.mark.parametrize("k", range(10))
def test_what_is_shown_is_what_is_refused_as_found(k, capsys):
    source, mark = shown("tutorial")[k]
    names = {"torch": torch, "F": F, "Tensor": torch.Tensor}
    exec(source, names)  # runs without an error, and shows the symptom
    assert capsys.readouterr().out.strip()
    exercise = bugs.EXERCISES[k]
    assert mark["grade_id"] == f"{exercise.name.replace('.', '-')}-found" and mark["locked"] and not mark["solution"] and not mark["grade"]
    for seed in range(3):
        for case in exercise.cases(seed):
            a, b = (attempt(f, case) for f in (names[f"found_{k + 1}"], exercise.mutants[bugs.FOUND]))
            assert (a.kind == b.kind) if isinstance(b, Failed) else differ(a, b) == "", case.about


def test_ten_are_shown_in_both_editions_and_none_is_its_own_repair():
    assert shown("tutorial") == shown("tutorial/solutions") and len(shown("tutorial")) == len(bugs.EXERCISES) == 10
    for source, mark in shown("tutorial"):
        task = mark["grade_id"].removesuffix("-found").split("-")[1]
        assert not re.search(rf"def {task}\(", source)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 9), max_size=5), st.integers(0, 9), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_a_row_learns_the_reply_and_one_end(prompt, reply, end, more):
    row = bugs.training_row(prompt, reply, end, len(prompt) + len(reply) + 1 + more)
    assert [t for t in row["labels"] if t != -100] == [*reply, end]
    assert all(label in (-100, t) for label, t in zip(row["labels"], row["input_ids"]))
    assert sum(row["attention_mask"]) == len(row["labels"]) - more


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_gradient_does_not_depend_on_how_rows_are_cut(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    parts = [{"x": torch.randn(n, 3, generator=g, dtype=torch.float64), "y": torch.randint(4, (n,), generator=g)} for n in sizes]
    w, whole = torch.randn(4, 3, generator=g, dtype=torch.float64), {k: torch.cat([p[k] for p in parts]) for k in "xy"}
    assert differ(bugs.gradient(w, parts), bugs.gradient(w, [whole])) == ""


@given(st.lists(st.integers(0, 3), max_size=8).map(sorted))
@settings(max_examples=40, deadline=None)
def test_each_word_that_has_a_piece_has_its_tag_once(words):
    labels = bugs.align([5, 6, 7, 8], [None, *words, None])
    assert [t for t in labels if t != -100] == [5 + w for w in sorted(set(words))]
