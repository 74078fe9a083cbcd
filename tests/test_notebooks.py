"""papermill over every notebook, one item each, without a network."""

import json

import nbformat
import pytest
from conftest import CHAPTERS
from nbformat.v4 import new_code_cell, new_notebook

from tunebook.kit.cli import drift, read_ledger
from tunebook.kit.run import Spec, one_line, run_notebook


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_passes_offline_as_recorded(name, suite, root):
    out, results = suite
    result = results[name]
    assert result["failure"] is None, one_line(result)
    assert json.loads((out / f"{name}.json").read_text())["status"] == "passed"
    assert result["claims"], "a chapter without a claim proves nothing"
    assert [f"{d.name}: {d.what}" for d in drift(root, result)] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_committed_outputs_are_those_of_the_run(name, suite, root):
    """Byte-stable: on the machine kind of the record every output but those that say "measured here", elsewhere which cells have any."""
    out, results = suite
    if results[name]["failure"]:
        pytest.fail("the chapter did not pass")
    committed = {c["id"]: c for c in nbformat.read(root / "nbs" / f"{name}.ipynb", 4).cells if c.cell_type == "code"}
    executed = {c["id"]: c for c in nbformat.read(out / f"{name}.ipynb", 4).cells if c.cell_type == "code"}
    then, now = read_ledger(root, name)["environment"], results[name]["environment"]
    same_machine = all(then[k] == now[k] for k in ("cpu", "isa", "packages", "python"))

    def seen(output):
        if not same_machine or "measured here" in json.dumps(output):
            return output.output_type, sorted(output.get("data", {}))
        return {k: v for k, v in output.items() if k != "execution_count"}

    def shown(cell):
        return [seen(o) for o in cell.outputs]

    assert {i: shown(c) for i, c in executed.items()} == {i: shown(committed[i]) for i in executed}


@pytest.mark.parametrize("kernels", ["cold", "fork"])
def test_the_network_is_really_refused(tmp_path, offline_env, kernels):
    """The guard works: a notebook that dials out fails, and only for that reason."""
    code = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=kernel), tmp_path / "dial.ipynb")
    result = run_notebook(Spec(str(tmp_path / "dial.ipynb"), "dial", str(tmp_path / "out"), env=offline_env, kernels=kernels))
    assert result["failure"]["kind"] == "cell error" and "no network: 192.0.2.1 refused" in result["failure"]["message"]
