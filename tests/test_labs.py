"""A lab's editions are those of its source; the solved one passes, the one that is handed out runs to its end and says what is open."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from tunebook.kit.editions import BEGIN, END, STUB, build, cleared, instructor, marks, problems, student
from tunebook.kit.exercises import known
from tunebook.kit.run import Spec, run_notebook

SOURCES = sorted((ROOT / "tutorial" / "solutions").glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def tasks(nb):
    return [re.search(r'check\("([^"]+)"', "".join(c["source"]))[1] for c in nb["cells"] if marks(c).get("grade")]


def lines_of_solutions(nb):
    """Lines between the markers, without those that the stub has too."""
    found = []
    for c in nb["cells"]:
        source = "".join(c["source"])
        for part in re.findall(rf"{BEGIN}\n(.*?)\s*{END}", source, flags=re.DOTALL): found += [line.strip() for line in part.splitlines()]
    return [line for line in found if len(line) > 12]


@pytest.fixture(scope="module", params=SOURCES, ids=[p.stem for p in SOURCES])
def lab(request):
    return request.param


def test_the_editions_are_those_of_the_source(lab, tmp_path):
    assert read(ROOT / "tutorial" / lab.name) == student(read(lab)), "run: tunebook labs build"
    (tmp_path / "tutorial" / "solutions").mkdir(parents=True)
    (tmp_path / "tutorial" / "solutions" / lab.name).write_bytes(lab.read_bytes())
    assert build(tmp_path) == [f"tutorial/{lab.name}", f"_labs/{lab.name}"] and build(tmp_path) == []
    assert (tmp_path / "tutorial" / lab.name).read_bytes() == (ROOT / "tutorial" / lab.name).read_bytes()


def test_the_source_has_no_problems_and_its_tasks_are_known(lab):
    nb = read(lab)
    assert list(problems(nb)) == []
    number = lab.stem.split("_")[0]
    assert tasks(nb) == [n for n in known() if n.startswith(f"{number}.")], "each exercise of the lab is asked for, in its order"


def test_nothing_of_a_solution_is_handed_out(lab):
    nb, handed = read(lab), (ROOT / "tutorial" / lab.name).read_text(encoding="utf-8")
    assert lines_of_solutions(nb) and not [line for line in lines_of_solutions(nb) if json.dumps(line)[1:-1] in handed]
    assert BEGIN not in handed and END not in handed
    assert all(not c.get("outputs") for c in json.loads(handed)["cells"])


def outputs(nb):
    return [[o.get("text") or o.get("data", {}).get("text/plain") for o in c["outputs"]] for c in nb["cells"] if c["cell_type"] == "code"]


def test_the_solved_lab_passes_with_the_outputs_that_are_kept(lab, tmp_path, offline_env):
    result = run_notebook(Spec(str(lab), lab.stem, str(tmp_path), env=offline_env, kernels="fork"))
    assert result["status"] == "passed", result["failure"]
    assert [(c["name"], c["value"]) for c in result["claims"]] == [(n, "passed") for n in tasks(read(lab))]
    assert outputs(read(tmp_path / f"{lab.stem}.ipynb")) == outputs(read(lab)), "run it, and keep its outputs"


def test_the_lab_that_is_handed_out_runs_to_its_end_and_fails(lab, tmp_path, offline_env):
    result = run_notebook(Spec(str(ROOT / "tutorial" / lab.name), lab.stem, str(tmp_path), env=offline_env, kernels="fork"))
    assert result["status"] == "failed" and result["failure"]["kind"] == "claim failed", result["failure"]
    assert [(c["name"], c["value"], c["ok"]) for c in result["claims"]] == [(n, "not yet", False) for n in tasks(read(lab))]


def told(*words, cwd):
    """What a command says, in a shell without a server's words about a notebook."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JPY_", "TUNEBOOK_W"))} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


def test_the_command_names_what_is_open_and_says_so_in_its_status(tmp_path):
    path = ROOT / "tutorial" / "L2_cross_entropy.ipynb"
    main = "import sys; from tunebook.kit.cli import main; sys.exit(main())"
    run = told("-c", main, "run", str(path), "--out", str(tmp_path), "--no-cache", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert re.findall(r"(L2\.\w+) \(exact\): not yet", run.stdout) == tasks(read(path))


def test_plain_papermill_runs_it_to_its_end_and_moves_nothing(tmp_path):
    nb = read(ROOT / "tutorial" / "L2_cross_entropy.ipynb")
    last = {"cell_type": "code", "id": "last", "metadata": {}, "outputs": [], "execution_count": None}
    nb["cells"].append(last | {"source": "from tunebook.kit.widgets import live\nlive()"})
    (tmp_path / "in.ipynb").write_text(json.dumps(nb))
    run = told("-m", "papermill", "in.ipynb", "out.ipynb", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    done = outputs(read(tmp_path / "out.ipynb"))
    assert done[-1] == [["False"]] and sum("not yet" in "".join(o) for cell in done for o in cell) == len(tasks(nb))


@pytest.mark.parametrize("source", ["x = 1", f"def f():\n    {BEGIN}\n    return 1\n    {END}", f"{BEGIN}\na\n{END}\nb\n{BEGIN}\nc\n{END}"])
def test_clearing_twice_is_clearing_once(source):
    once = cleared(source)
    assert cleared(once) == once and BEGIN not in once
    assert once.count(STUB[1]) == source.count(BEGIN)


@pytest.mark.parametrize("source", [BEGIN, END, f"{BEGIN}\n{BEGIN}\n{END}", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}"])
def test_markers_without_a_partner_are_refused(source):
    with pytest.raises(ValueError, match="without its partner"): cleared(source)


def test_what_only_instructors_see(lab):
    nb = read(lab)
    secret = {"cell_type": "markdown", "id": "x", "metadata": {"tags": ["instructor"]}, "source": "the trap is in row two"}
    nb["cells"].append(secret)
    assert "the trap" not in json.dumps(student(nb)) and "the trap" in json.dumps(instructor(nb))
    points = sum(marks(c)["points"] for c in nb["cells"] if marks(c).get("grade"))
    assert points >= 10 and f"| all | {points} |" in instructor(nb)["cells"][1]["source"]


def test_a_source_with_problems_is_not_built(tmp_path):
    nb = read(ROOT / "tutorial" / "solutions" / "L1_attention.ipynb")
    nb["cells"] = [c for c in nb["cells"] if marks(c).get("grade_id") != "L1-softmax-check"]
    (tmp_path / "tutorial" / "solutions").mkdir(parents=True)
    (tmp_path / "tutorial" / "solutions" / "L1.ipynb").write_text(json.dumps(nb))
    with pytest.raises(ValueError, match="L1.ipynb: L1-softmax is not followed by L1-softmax-check"): build(tmp_path)
    assert not (tmp_path / "tutorial" / "L1.ipynb").exists()
