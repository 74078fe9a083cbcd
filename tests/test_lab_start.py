"""What lab 0 says of a notebook is what happens to it in an empty kernel."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.labs.start import hidden_names, names, out_of_order

LETTERS = st.sampled_from("abcd")
statement = st.one_of(
    st.builds("{} = {} + {}".format, LETTERS, LETTERS, LETTERS | st.just("1")), st.builds("{} = 1".format, LETTERS),
    st.builds("{} += 1".format, LETTERS), st.builds("for {} in [1]: {} = {}".format, LETTERS, LETTERS, LETTERS),
    st.builds("{} = [{} for {} in [1]][0]".format, LETTERS, LETTERS, LETTERS))
cells = st.lists(st.lists(statement, min_size=1, max_size=3).map("\n".join), max_size=5)


def stops(sources):
    """The place of the cell that asks for a name nobody set, and that name."""
    space = {}
    for i, source in enumerate(sources):
        try: exec(source, space)
        except NameError as e: return i, e.name
    return None


@given(cells)
@settings(max_examples=150, deadline=None)
def test_the_first_hidden_name_is_where_an_empty_kernel_stops(sources):
    found = hidden_names([names(source) for source in sources])
    where = next((i for i, hidden in enumerate(found) if hidden), None)
    stopped = stops(sources)
    assert where == (stopped and stopped[0]) and (stopped is None or stopped[1] in found[where])


@given(st.lists(st.none() | st.integers(1, 9), max_size=8))
@settings(max_examples=60, deadline=None)
def test_cells_that_are_in_order_rise_and_the_others_do_not_fit_between(counts):
    late = out_of_order(counts)
    kept = [n for i, n in enumerate(counts) if i not in late]
    assert kept == sorted(set(kept)) and all(counts[i] is None or counts[i] <= max(c for c in counts[:i] if c) for i in late)


@pytest.mark.parametrize(("source", "needs", "defines"), [
    ("def f(x, *, y=a): return x + y + b", ["a", "b"], ["f"]), ("x = 1\nprint(x)", [], ["x"]), ("import a.b as c, d.e", [], ["c", "d"]),
    ("with open(p) as f: t = f.read()", ["p"], ["f", "t"]), ("def f(): return f()", [], ["f"]), ("", [], [])])
def test_names(source, needs, defines):
    assert names(source) == {"needs": needs, "defines": defines}
