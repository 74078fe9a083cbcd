"""The chapter gate over every chapter, and over chapters made wrong on purpose."""

import copy

import nbformat
import pytest
from conftest import CHAPTERS, ROOT
from gate import check_module, problems
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tunebook.kit.cli import catalogue, read_ledger


@pytest.mark.parametrize("name", CHAPTERS)
def test_gate(name):
    nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    assert problems(nb, name.split("/")[0], (read_ledger(ROOT, name) or {}).get("claims", [])) == []


@pytest.mark.parametrize("row", catalogue(ROOT), ids=lambda r: r["name"])
def test_module_imports_point_one_way(row):
    path = ROOT / row["module"].replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.exists(), f"{row['name']} exports nothing"
    assert list(check_module(path.read_text(), row["name"].split("/")[0])) == []


ALT = {"image/png": {"alt": "A line that rises from left to right."}}


def good():
    headings = ["Question", "Smallest example", "Derivation", "Code", "Check", "Picture", "When it breaks", "Exercises", "Recap"]
    cells = [new_markdown_cell("# Title\n\n> One line."),
             new_code_cell("fast = True\nseeds = [0]\ndevice = 'cpu'", metadata={"tags": ["parameters"]}),
             new_code_cell("#| default_exp attention.x")]
    for h in headings:
        tasks = "\n- one, 5 min\n- two, 10 min" if h == "Exercises" else ""
        cells.append(new_markdown_cell(f"## {h}\nThe share is 0.25.{tasks}"))
        if h == "Code":
            cells.append(new_code_cell('#| export\ndef f(\n    x: int,  # a number\n) -> int:\n    "Same."\n    return x'))
            cells.append(new_code_cell("f(1)"))
        if h == "Picture":
            image = new_output("display_data", {"image/png": "aGk="}, metadata=ALT)
            cells.append(new_code_cell("draw()", outputs=[image]))
    return new_notebook(cells=cells)


CLAIMS = [{"value": 0.2496, "expected": 0.25}]


def source(nb, old, new):
    for c in nb.cells:
        c.source = c.source.replace(old, new)


def swap(nb):
    nb.cells[3].source, nb.cells[4].source = nb.cells[4].source, nb.cells[3].source


def untag(nb):
    nb.cells[1].metadata = {}


def output(nb, **kwargs):
    cell = next(c for c in nb.cells if c.source == "draw()")
    cell.outputs = [new_output(**kwargs)]


WRONG = {
    "one line": lambda nb: source(nb, "> One line.", ""),
    "tag 'parameters'": untag,
    "parameters lack": lambda nb: source(nb, "seeds = [0]\n", ""),
    "out of order": swap,
    "headings missing": lambda nb: source(nb, "## Recap", "Recap"),
    "star import": lambda nb: source(nb, "f(1)", "from math import *"),
    "numbered comment": lambda nb: source(nb, "f(1)", "# 1. call it\nf(1)"),
    "no docstring": lambda nb: source(nb, '    "Same."\n', ""),
    "no type for": lambda nb: source(nb, "x: int", "x"),
    "lines at the median": lambda nb: source(nb, "    return x", "    x += 1\n" * 20 + "    return x"),
    "an exported cell of": lambda nb: source(nb, "    return x", "    x += 1\n" * 40 + "    return x"),
    "remote resource": lambda nb: source(nb, "The share", "![x](https://example.org/x.png) The share"),
    "words in one cell": lambda nb: source(nb, "The share", "word " * 300 + "The share"),
    "no claim stands for": lambda nb: source(nb, "0.25", "0.26"),
    "escaped backslash": lambda nb: source(nb, "The share", "$\\\\frac{1}{2}$ The share"),
    "two to four exercises": lambda nb: source(nb, "- two, 10 min", ""),
    "alt text": lambda nb: output(nb, output_type="display_data", data={"image/png": "aGk="}),
    "figure of": lambda nb: output(nb, output_type="display_data", data={"image/png": "aGlo" * 30_000}, metadata=ALT),
    "committed error": lambda nb: output(nb, output_type="error", ename="E", evalue="", traceback=[]),
    "stderr": lambda nb: output(nb, output_type="stream", name="stderr", text="warning"),
    "memory address": lambda nb: output(nb, output_type="stream", name="stdout", text="<f at 0x7f00aa11bb>"),
    "characters of output": lambda nb: output(nb, output_type="stream", name="stdout", text="x" * 7000),
    "asks the network": lambda nb: output(nb, output_type="display_data", data={"text/html": '<img src="http://e.org/x">'}),
    "not unique": lambda nb: nb.cells[0].update(id=nb.cells[1]["id"]),
    "three exported cells": lambda nb: nb.cells.__setitem__(slice(9, 9), [new_code_cell(
        f'#| export\ndef g{i}(x: int) -> int:\n    "Same."\n    return x') for i in range(3)]),
}


def test_the_gate_lets_a_good_chapter_pass():
    assert problems(good(), "attention", CLAIMS) == []


@pytest.mark.parametrize("word", WRONG)
def test_the_gate_stops_a_wrong_chapter(word):
    nb = copy.deepcopy(good())
    WRONG[word](nb)
    found = problems(nb, "attention", CLAIMS)
    assert any(word in p for p in found), found


@pytest.mark.parametrize("text", ["12 us", "a: 3.5e-3 s", "9.1 GB/s", "1,200 TFLOP/s", "fast: 4ms."])
def test_a_time_says_where_it_comes_from(text):
    nb = copy.deepcopy(good())
    output(nb, output_type="stream", name="stdout", text=f"{text}, measured here")
    assert problems(nb, "timing", CLAIMS) == []
    output(nb, output_type="stream", name="stdout", text=text)
    assert any("measured here" in p for p in problems(nb, "timing", CLAIMS)) and problems(nb, "attention", CLAIMS) == []
    nb = copy.deepcopy(good())
    source(nb, "## Code\n", f"## Code\nIt takes {text} ")
    assert any("measured here" in p for p in problems(nb, "timing", CLAIMS + [{"value": [12, 3.5e-3, 3.5, 9.1, 1200]}]))


@pytest.mark.parametrize("line", ["from tunebook.attention.heads import x", "import tunebook.tuning", "from ..attention import heads"])
def test_kit_may_not_import_chapters(line):
    assert list(check_module(line, "kit"))


@pytest.mark.parametrize("line", ["import numpy", "from transformers import AutoModel", "from tunebook.entropy.xent import x"])
def test_attention_stands_on_torch_and_kit(line):
    assert list(check_module(line, "attention"))
