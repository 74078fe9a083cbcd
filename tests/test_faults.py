"""What users do to a runner, and what it must say. Every fault ends in one line, and leaves nothing half-written."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tunebook.kit.cli import drift, main
from tunebook.kit.run import Spec, one_line, run_all, run_notebook, write_atomic

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
GOOD = "from tunebook.kit.ledger import claim, exact\nclaim('one', 1, 1, exact, 'identity')"


def write(path: Path, *sources: str, kernel: str = "python3") -> Path:
    cells = [new_code_cell("x = 1\nfast = True", metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {**KERNEL["kernelspec"], "name": kernel}}), path)
    return path


def run_one(path: Path, **options) -> dict:
    return run_notebook(Spec(str(path), path.stem, str(path.parent / "out"), **options))


FAULTS = {
    "cell error": ("1 / 0", "In [2] 1 / 0: cell error: ZeroDivisionError: division by zero; open the executed notebook at this cell"),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", "kernel died: the kernel was killed by SIGKILL;"),
    "SEGV": ("import ctypes; ctypes.string_at(0)", "kernel died: the kernel was killed by SIGSEGV;"),
    "os._exit": ("import os; os._exit(3)", "kernel died: the kernel ended with exit status 3;"),
    "claim": (GOOD.replace("1, 1", "1, 2"), "claim failed: 'one': exact, expected 2, got 1; mend the code, or the text"),
    "same name twice": (GOOD + "\n" + GOOD.splitlines()[1], "claim failed: two claims are called 'one'; give each its own name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line_and_the_file_does_not_lie(fault, tmp_path):
    source, line = FAULTS[fault]
    result = run_one(write(tmp_path / "bad.ipynb", source, "print('after')"))
    told = one_line(result)
    assert line in told and "\n" not in told and told.startswith("bad, ") or "two claims" in told
    executed = nbformat.read(tmp_path / "out" / "bad.ipynb", 4)
    states = [c.metadata["tunebook"]["status"] for c in executed.cells]
    goes_on = result["failure"]["kind"] == "claim failed"
    assert states == ["completed", "completed" if goes_on else "failed", "completed" if goes_on else "not run"]
    assert executed.cells[2].outputs if goes_on else not executed.cells[2].outputs
    assert json.loads((tmp_path / "out" / "bad.json").read_text())["status"] == "failed"


def test_an_endless_cell_times_out(tmp_path):
    result = run_one(write(tmp_path / "loop.ipynb", "while True: pass", "x"), timeout=2)
    assert one_line(result) == "loop, In [2] while True: pass: time-out: the cell ran longer than its limit; raise --timeout or split it"


def test_an_expected_error_is_not_a_failure(tmp_path):
    cell = new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]})
    nbformat.write(new_notebook(cells=[cell, new_code_cell("2 + 2")], metadata=KERNEL), tmp_path / "ok.ipynb")
    result = run_one(tmp_path / "ok.ipynb")
    assert result["failure"] is None and [c["status"] for c in result["cells"]] == ["failed", "completed"]
    executed = nbformat.read(tmp_path / "out" / "ok.ipynb", 4)
    assert [c.metadata["tunebook"]["status"] for c in executed.cells] == ["failed", "completed"]


BROKEN = {"{": "is not a valid notebook", "": "is not a valid notebook", '{"cells": 3}': "is not a valid notebook", None: "cannot be read"}


@pytest.mark.parametrize("content, cause", BROKEN.items())
def test_a_file_that_is_no_notebook(content, cause, tmp_path):
    path = tmp_path / "broken.ipynb"
    if content is not None:
        path.write_text(content)
    result = run_one(path)
    assert result["failure"]["kind"] == "input" and cause in one_line(result)


def test_a_kernel_that_cannot_start_says_why(tmp_path):
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    result = run_one(write(tmp_path / "k.ipynb", "1"), env={"PYTHONPATH": str(tmp_path)})
    assert one_line(result) == "k: start-up: the kernel did not start (no kernel today); run: tunebook doctor"


def test_a_missing_kernel(tmp_path):
    result = run_one(write(tmp_path / "k.ipynb", "1", kernel="fortran77"))
    assert one_line(result) == "k: start-up: no kernel is called 'fortran77'; run: pip install ipykernel"


@pytest.mark.parametrize("given, hint", [("xx", "did you mean 'x'?"), ("zebra", "it has x, fast")])
def test_an_unknown_parameter_is_refused_before_anything_runs(given, hint, tmp_path):
    result = run_one(write(tmp_path / "p.ipynb", "x"), parameters={given: 1})
    assert one_line(result) == f"p: parameters: no parameter is called {given!r}; {hint}"
    assert not (tmp_path / "out" / "p.ipynb").exists()


def test_parameters_arrive(tmp_path):
    result = run_one(write(tmp_path / "p.ipynb", "assert x == [1, 'two']"), parameters={"x": [1, "two"]})
    assert result["failure"] is None and result["parameters"]["x"] == [1, "two"]


def test_cells_marked_eval_false_do_not_run(tmp_path):
    result = run_one(write(tmp_path / "e.ipynb", "#| eval: false\n1 / 0", "#|eval: false\n1 / 0", "x"))
    assert result["failure"] is None and len(result["cells"]) == 2


def test_the_kernel_stands_in_the_notebooks_folder_and_the_process_does_not_move(tmp_path):
    before = os.getcwd()
    (tmp_path / "beside.txt").write_text("here")
    result = run_one(write(tmp_path / "w.ipynb", "assert open('beside.txt').read() == 'here'"))
    assert result["failure"] is None and os.getcwd() == before


def test_a_stale_output_never_survives_a_failed_run(tmp_path):
    path = write(tmp_path / "s.ipynb", "x")
    assert run_one(path)["status"] == "passed"
    path.write_text("{")
    run_one(path)
    assert not (tmp_path / "out" / "s.ipynb").exists()
    assert json.loads((tmp_path / "out" / "s.json").read_text())["status"] == "failed"


def test_an_output_folder_that_is_a_file(tmp_path):
    path = write(tmp_path / "o.ipynb", "x")
    (tmp_path / "out").write_text("in the way")
    result = run_one(path)
    assert result["failure"]["kind"] == "output" and "choose another folder with --out" in one_line(result)


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_worker_costs_one_notebook(tmp_path):
    killer = write(tmp_path / "a.ipynb", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    good = [write(tmp_path / f"{n}.ipynb", GOOD) for n in "bcd"]
    seen = []
    results = run_all([Spec(str(p), p.stem, str(tmp_path / "out")) for p in [killer, *good]], workers=2, on_done=seen.append)
    assert [r["status"] for r in results] == ["failed", "passed", "passed", "passed"]
    assert "a: worker died: the process that ran it was killed" in one_line(results[0])
    assert len(seen) == 4 and json.loads((tmp_path / "out" / "a.json").read_text())["status"] == "failed"


def test_a_memory_limit(tmp_path):
    source = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\nx = bytearray(2**32)"
    assert one_line(run_one(write(tmp_path / "m.ipynb", source))) == (
        "m, In [2] import resource: out of memory: MemoryError; use smaller batches, or a machine with more memory")


def test_a_notebook_without_a_kernelspec_runs_on_python(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), tmp_path / "n.ipynb")
    assert run_one(tmp_path / "n.ipynb")["failure"] is None


def test_a_parameter_without_a_parameters_cell(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")], metadata=KERNEL), tmp_path / "n.ipynb")
    result = run_one(tmp_path / "n.ipynb", parameters={"x": 1})
    assert one_line(result) == "n: parameters: no parameter is called 'x'; it has no cell tagged parameters"


def test_the_notebook_itself_is_never_the_output(tmp_path):
    path = write(tmp_path / "n.ipynb", "x")
    before = path.read_text()
    result = run_notebook(Spec(str(path), "n", str(tmp_path)))
    assert one_line(result) == "n: output: the output would replace the notebook itself; choose another folder with --out"
    assert path.read_text() == before


def test_a_stray_plugin_that_breaks_on_import_breaks_nothing(tmp_path):
    """papermill loads every package that calls itself its engine; one of them fails."""
    (tmp_path / "stray.py").write_text("raise RuntimeError('stray')")
    info = tmp_path / "stray-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[papermill.engine]\nstray = stray:Engine\n")
    write(tmp_path / "n.ipynb", GOOD)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    papermill = subprocess.run([sys.executable, "-c", "import papermill"], env=env, capture_output=True, text=True)
    assert papermill.returncode and "stray" in papermill.stderr, "the plugin must break papermill itself, or this proves nothing"
    command = "import sys; from tunebook.kit.cli import main; sys.exit(main(['run', 'n.ipynb']))"
    ours = subprocess.run([sys.executable, "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ours.returncode == 0, ours.stdout + ours.stderr


def test_a_hundred_megabytes_of_output_are_cut_visibly(tmp_path):
    source = "for i in range(100): print('x' * 10**6)\nprint('end')"
    result = run_one(write(tmp_path / "p.ipynb", source, "2 + 2"))
    assert result["failure"] is None
    executed = nbformat.read(tmp_path / "out" / "p.ipynb", 4)
    text = "".join(o["text"] for o in executed.cells[1].outputs)
    assert "[output cut here: a cell may leave 1 MB]" in text and len(text) < 1_100_000
    assert executed.cells[2].outputs[0]["data"]["text/plain"] == "4"


def kernels_below(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [(int(a), int(b), c) for a, b, c in (line.split(None, 2) for line in out)]
    below = {pid}
    for _ in range(5):
        below |= {a for a, b, _ in rows if b in below}
    return [a for a, _, c in rows if a in below and "ipykernel" in c]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_stops_the_suite_and_leaves_no_kernel(tmp_path):
    for n in "ab":
        write(tmp_path / f"{n}.ipynb", "import time; time.sleep(120)")
    command = ["run", *(str(tmp_path / f"{n}.ipynb") for n in "ab"), "--out", str(tmp_path / "out")]
    code = f"import sys; from tunebook.kit.cli import main; sys.exit(main({command!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, start_new_session=True)
    for _ in range(600):
        if len(kernels := kernels_below(process.pid)) == 2:
            break
        time.sleep(0.1)
    assert len(kernels) == 2
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    assert complaint.strip() == "tunebook: interrupted; the same command goes on from the results it kept"
    for n in "ab":
        assert json.loads((tmp_path / "out" / f"{n}.json").read_text())["failure"]["kind"] == "interrupted"
    for _ in range(100):
        if not any(map(alive, kernels)):
            break
        time.sleep(0.1)
    assert not any(map(alive, kernels)), "a kernel outlived the suite"


def test_exit_statuses(tmp_path, monkeypatch, capsys):
    write(tmp_path / "good.ipynb", GOOD)
    write(tmp_path / "bad.ipynb", "1 / 0")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "good.ipynb"]) == 0
    assert main(["run", "good.ipynb", "bad.ipynb"]) == 1
    report = Path("_run/index.html").read_text()
    assert "1 of 2 chapters passed" in report and "ZeroDivisionError" in report
    assert Path("_run/good.html").exists() and Path("_run/bad.html").exists()
    assert main(["run"]) == 2 and main(["verify"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 2 and all("no chapters here" in line for line in err)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small checkout with one chapter, recorded."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    (folder / "nbs" / "kit").mkdir(parents=True)
    source = ("from tunebook.kit.ledger import claim, exact, numeric, statistical\nimport torch\n"
              "claim('count', 4, 4, exact, 'w')\nclaim('sum', torch.tensor(0.3), torch.tensor(0.1) * 3, numeric(4), 'w')\n"
              "claim('mean', [0.70, 0.72, 0.71], 0.71, statistical, 'w')")
    write(folder / "nbs" / "kit" / "00_small.ipynb", source)
    with contextlib.chdir(folder):
        assert main(["record"]) == 0
    return folder


@pytest.fixture
def checkout(recorded, tmp_path, monkeypatch):
    """A copy of it to change."""
    copy = shutil.copytree(recorded, tmp_path / "checkout")
    monkeypatch.chdir(copy)
    return copy


def test_record_then_verify(checkout, capsys):
    nb = nbformat.read(checkout / "nbs/kit/00_small.ipynb", 4)
    assert "✓ count" in nb.cells[1].outputs[0]["text"] and "tunebook" not in nb.cells[1].metadata
    assert main(["verify"]) == 0
    assert main(["list"]) == 0
    assert "kit/00_small" in capsys.readouterr().out


CHANGES = {
    "count (exact): was 4, is 5": ("4, 4", "5, 5"),
    "sum (numeric): no longer holds": ("* 3", "* 3.1"),
    "mean (statistical): mean was 0.71, is 0.81": ("[0.70, 0.72, 0.71], 0.71", "[0.80, 0.82, 0.81], 0.81"),
    "mean (statistical): is recorded but was not made in this run": ("claim('mean'", "print('mean'"),
    "more (exact): is new": ("claim('mean'", "claim('more', 1, 1, exact, 'w'); claim('mean'"),
    "the source (exact): changed since": ("import torch", "import torch  # again"),
}


@pytest.mark.parametrize("told", CHANGES)
def test_verify_names_what_drifted(told, checkout, capsys):
    old, new = CHANGES[told]
    path = checkout / "nbs/kit/00_small.ipynb"
    path.write_text(path.read_text().replace(old, new))
    assert main(["verify"]) == 1
    printed = capsys.readouterr().out
    assert told in printed or ("sum" in told and "claim failed: 'sum'" in printed)


def test_record_keeps_the_old_baseline_when_something_fails(checkout, capsys):
    before = (checkout / "data/ledger/kit/00_small.json").read_text()
    path = checkout / "nbs/kit/00_small.ipynb"
    path.write_text(path.read_text().replace("4, 4", "4, 5"))
    assert main(["record"]) == 2
    assert "nothing was recorded" in capsys.readouterr().err
    assert (checkout / "data/ledger/kit/00_small.json").read_text() == before


def test_other_data_is_a_drift(checkout):
    recorded = json.loads((checkout / "data/ledger/kit/00_small.json").read_text())
    path = checkout / "data/ledger/kit/00_small.json"
    path.write_text(json.dumps({**recorded, "data": {"data reviews": "abc"}}))
    found = drift(checkout, {"name": "kit/00_small", **recorded, "data": {"data reviews": "def"}})
    assert [d.name for d in found] == ["data reviews"]


def test_docs_render_what_is_committed_without_running(checkout, capsys):
    path = checkout / "nbs/kit/00_small.ipynb"
    path.write_text(path.read_text().replace("✓ count", "✓ committed"))
    assert main(["docs", "--out", "pages"]) == 0
    assert "✓ committed" in Path("pages/kit/00_small.html").read_text()
    assert 'href="kit/00_small.html"' in Path("pages/index.html").read_text()


def test_the_table_of_claims_is_left_behind(checkout):
    assert main(["run"]) == 0
    lines = Path("_run/claims.csv").read_text().splitlines()
    assert lines[0] == "chapter,holds,claim,class,measured,why" and len(lines) == 4
    assert lines[1].startswith("kit/00_small,True,count,exact,4")


def test_a_broken_ledger_is_named(checkout, capsys):
    (checkout / "data/ledger/kit/00_small.json").write_text("{")
    assert main(["list"]) == 2
    assert "00_small.json is not valid JSON" in capsys.readouterr().err
