"""pytest --tunebook: an item per notebook, what it says, and that Ctrl-C stops it. Each pytest here is a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
GOOD = "from tunebook.kit.ledger import claim, exact\nclaim('one', 1, 1, exact, 'identity')"
SLEEPER = """
import os, time
from pathlib import Path
Path('{0}.new').write_text(str(os.getpid()))
Path('{0}.new').rename('{0}.pid')
time.sleep(600)"""
# each plugin by its module: no other one that happens to be installed, and ours once, with or without its entry point
COMMAND = [sys.executable, "-m", "pytest", "-p", "tunebook.kit.plugin", "--color=no"]
ENV = {**{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TUNEBOOK"))}, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
WORKERS = pytest.mark.parametrize("workers", [(), ("-p", "xdist.plugin", "-n", "2")], ids=["one process", "xdist"])


def write(path: Path, *sources: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources], metadata=KERNEL), path)
    return path


def call(folder: Path, *args: str) -> tuple[int, str]:
    run = subprocess.run([*COMMAND, *args], cwd=folder, env=ENV, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def items(folder: Path, *args: str) -> list[str]:
    """What would run."""
    return [line for line in call(folder, "-q", "--co", *args)[1].splitlines() if "::" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same notebooks in one process and under xdist: workers -> (folder, exit status, what was said)."""
    done = {}

    def run(workers: tuple[str, ...]):
        if workers not in done:
            folder = tmp_path_factory.mktemp("suite")
            write(folder / "nbs" / "good.ipynb", "x = 1", GOOD)
            write(folder / "nbs" / "part" / "10_bad.ipynb", "x = 1", "1 / 0", "x")
            write(folder / "nbs" / "part" / "11_claim.ipynb", GOOD.replace("1, 1", "1, 2"))
            write(folder / "other" / "broken.ipynb").write_text("{")
            for aside in (".ipynb_checkpoints/good-checkpoint", "_run/good", "part/.hidden", "part/_draft"):
                write(folder / "nbs" / f"{aside}.ipynb", "1 / 0")
            done[workers] = folder, *call(folder, "--tunebook", "--junitxml=junit.xml", "--tunebook-out=out", *workers, "nbs", "other")
        return done[workers]

    return run


LINES = [
    "part/10_bad, In [2] 1 / 0: cell error: ZeroDivisionError: division by zero; open the executed notebook at this cell",
    "part/11_claim, In [1] from tunebook.kit.ledger import claim, exact: claim failed: 'one': exact, expected 2, got 1; "
    "mend the code, or the text",
]


@WORKERS
def test_an_item_per_notebook_and_one_line_per_failure(workers, runs):
    folder, status, said = runs(workers)
    lines = said.splitlines()
    assert status == 1 and lines[-1].strip("= ").startswith("3 failed, 1 passed in"), said
    assert all(line in lines for line in LINES), said
    assert any(line.startswith("other/broken: input: ") and "is not a valid notebook" in line for line in lines), said
    assert "Traceback" not in said and "plugin.py" not in said and "Captured" not in said, said
    left = sorted(p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*.ipynb"))
    assert left == ["good.ipynb", "part/10_bad.ipynb", "part/11_claim.ipynb"]


@WORKERS
def test_junit_has_properties_for_each_cell(workers, runs):
    folder, _, said = runs(workers)
    cases = {c.get("classname"): c for c in ElementTree.parse(folder / "junit.xml").iter("testcase")}
    assert set(cases) == {"nbs.good.ipynb", "nbs.part.10_bad.ipynb", "nbs.part.11_claim.ipynb", "other.broken.ipynb"}
    told = {n: {p.get("name"): p.get("value") for p in c.iter("property")} for n, c in cases.items()}
    bad, claim, broken = (told[n] for n in ("nbs.part.10_bad.ipynb", "nbs.part.11_claim.ipynb", "other.broken.ipynb"))
    assert [bad[f"cell In [{i}]"].split(", ")[-1] for i in (1, 2)] == ["completed", "failed"] and "cell In [3]" not in bad
    assert bad["status"] == "failed" and float(bad["seconds"]) > 0 and " s, " in bad["cell In [1]"]
    assert claim["claims"] == "0 of 1 hold" and told["nbs.good.ipynb"]["claims"] == "1 of 1 hold"
    assert broken["status"] == "failed" and broken["claims"] == "0 of 0 hold"
    assert cases["nbs.part.10_bad.ipynb"].find("failure").get("message") == LINES[0]
    if sys.platform == "linux":
        assert float(bad["peak_mb"]) > 1 and " MB, " in bad["cell In [1]"]


def test_the_last_failed_run_again_and_no_other(runs):
    folder, _, _ = runs(())
    failed = ["nbs/part/10_bad.ipynb::notebook", "nbs/part/11_claim.ipynb::notebook", "other/broken.ipynb::notebook"]
    assert items(folder, "--tunebook", "--lf", "nbs", "other") == failed
    assert items(folder, "--tunebook", "--lf", "-k", "10_bad or good", "nbs", "other") == failed[:1]
    write(folder / "other" / "broken.ipynb", "x = 1")
    status, said = call(folder, "--tunebook", "--lf", "other")
    assert status == 0 and "1 passed" in said


def test_without_the_flag_nothing_is_collected_and_nothing_is_loaded(tmp_path):
    write(tmp_path / "a.ipynb", "1 / 0")
    heavy = {"torch", "papermill", "nbformat", "nbclient", "numpy", "tunebook.kit.run"}
    (tmp_path / "test_light.py").write_text(f"def test_light():\n    import sys\n    assert not {heavy!r} & set(sys.modules)\n")
    status, said = call(tmp_path)
    assert status == 0 and "1 passed" in said and "ipynb" not in said
    assert items(tmp_path, "--tunebook") == ["a.ipynb::notebook", "test_light.py::test_light"]


def test_what_is_set_aside_runs_when_it_is_asked_for(tmp_path):
    folder = tmp_path / "_mine"
    for name in ("a", "_draft", "_run/old"):
        write(folder / f"{name}.ipynb", "x")
    assert items(folder, "--tunebook") == ["a.ipynb::notebook"]
    assert items(folder, "--tunebook", "_draft.ipynb", "_run") == ["_draft.ipynb::notebook", "_run/old.ipynb::notebook"]


def test_two_notebooks_of_one_name_do_not_write_over_each_other(tmp_path):
    for part in ("one", "two"):
        write(tmp_path / part / "nbs" / "same.ipynb", GOOD)
    status, said = call(tmp_path, "--tunebook", ".")
    assert status == 1 and "2 failed" in said and not (tmp_path / "_run").exists()
    assert said.splitlines().count("same: input: two notebooks of this run have this name; run them one at a time") == 2


def alive(pid: int) -> bool:
    out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(out) and not out.startswith("Z")


def wait_for(what, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (held := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


@WORKERS
def test_ctrl_c_stops_the_suite_and_leaves_no_kernel(workers, tmp_path):
    names = ("a", "b", "c", "d")
    for n in names:
        write(tmp_path / f"{n}.ipynb", SLEEPER.format(n))
    process = subprocess.Popen([*COMMAND, "--tunebook", *workers], cwd=tmp_path, env=ENV, stdout=-1, stderr=-1, text=True,
                               start_new_session=True)
    running = 2 if workers else 1
    assert wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == running)
    kernels = [int(p.read_text()) for p in tmp_path.glob("*.pid")]
    assert all(map(alive, kernels))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    said, complaint = process.communicate(timeout=30)
    assert process.returncode == 2 and "KeyboardInterrupt" in said and "failed" not in said, said + complaint
    assert wait_for(lambda: not any(map(alive, kernels)), 10), "a kernel outlived the suite"
    assert len(list(tmp_path.glob("*.pid"))) == running, "another notebook was started after Ctrl-C"
