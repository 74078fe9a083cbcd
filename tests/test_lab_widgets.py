"""The slider without a browser: what it offers, what a move changes, what is left in the file."""

import html
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.widgets import bars, few, low_rank, nearest, picture, slide, slider

VALUES = [0.5, 1, 2, 4, 8]


def draw(ax, t):
    return bars(ax, (torch.tensor([2.0, 1.0, 0.0]) / t).softmax(-1), ["a<b", "b", "c"])


@pytest.fixture
def told(monkeypatch):
    """What is displayed, in order."""
    shown = []
    for name in ("JPY_SESSION_NAME", "TUNEBOOK_CLAIMS", "TUNEBOOK_WIDGETS"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("IPython.display.display", lambda data, **kw: shown.append(data))
    return shown


def alt(text):
    return html.unescape(re.search(r'alt="([^"]*)"', text)[1])


def test_a_move_draws_what_the_value_gives():
    chosen, shown = slider(draw, "temperature", VALUES).children
    assert [label for label, _ in chosen.options] == ["0.5", "1", "2", "4", "8"] and chosen.description == "temperature"
    for i, value in [(0, 0.5), (3, 4), (1, 1)]:
        chosen.value = i
        assert shown.value == picture(draw, "temperature", value) and alt(shown.value).startswith(f"temperature {value}: a<b has")


def test_values_that_are_equal_or_cannot_be_hashed_keep_their_places():
    chosen, shown = slider(lambda ax, v: draw(ax, v[0]), "pair", [[1, 2], [1, 2], [2, 1]]).children
    chosen.value = 2
    assert alt(shown.value).startswith("pair [2, 1]: ")


def test_the_row_alone_and_the_row_with_a_slider(told, monkeypatch):
    slide(draw, "Three choices", temperature=VALUES)
    assert [sorted(d) for d in told] == [["image/png", "text/plain"]]
    assert re.findall(r"temperature ([\d.]+):", told[0]["text/plain"]) == [str(v) for v in few(VALUES)]
    monkeypatch.setenv("JPY_SESSION_NAME", "lab.ipynb")
    slide(draw, "Three choices", temperature=VALUES)
    assert told[1] == told[0] and "application/vnd.jupyter.widget-view+json" in told[2]
    assert told[2]["text/plain"] == "Run this cell to move temperature."


@pytest.mark.parametrize("choice, error, words", [({}, TypeError, "one name"), ({"a": [1], "b": [2]}, TypeError, "['a', 'b']"),
                                                  ({"a": []}, ValueError, "values of a, got none")])
def test_what_cannot_be_moved_is_refused(choice, error, words):
    with pytest.raises(error, match=re.escape(words)): slide(draw, "Nothing", **choice)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(2, 6))
def test_few_keeps_the_ends_and_the_order(values, count):
    places = few(range(len(values)), count)
    assert few(values, count) == [values[i] for i in places]
    assert places == sorted(set(places)) and places[0] == 0 and places[-1] == len(values) - 1 and len(places) == min(count, len(values))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 8), st.integers(0, 2**31))
def test_what_the_nearest_product_leaves_is_the_rest_of_the_spectrum(m, n, rank, seed):
    x = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    left = (x - nearest(x, rank)).norm().square()
    assert abs(float(left - torch.linalg.svdvals(x)[rank:].square().sum())) < 1e-10
    assert int(torch.linalg.matrix_rank(nearest(x, rank))) <= rank


def test_a_matrix_of_zeros_is_drawn():
    from tunebook.kit.plots import figure
    assert low_rank(figure()[1], torch.zeros(3, 4), 1) == "0 percent of the matrix's norm is missing"
