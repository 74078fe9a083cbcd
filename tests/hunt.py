"""Run chapters cell by cell and, ahead of a cell that a mutant changes, fork: the copy goes on with the wrong cell.

What comes before that cell runs once for all mutants of a chapter. Reads {chapter: [[name, right, wrong], ...]} from stdin and
writes {chapter: {name: the error that stopped it, "" when nothing did}} to the file named by the argument."""

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

SECONDS = 300  # that a mutant may run


def place(cells, right):
    """The one exported cell that holds a string."""
    hits = [i for i, source in enumerate(cells) if source.startswith("#| export") and right in source]
    if len(hits) != 1: raise ValueError(f"{right!r} stands in {len(hits)} exported cells: renew the mutant")
    return hits[0]


def run(shell, source):
    """What stopped a cell, "" when nothing did."""
    done = shell.run_cell(source, store_history=False)
    error = done.error_before_exec or done.error_in_exec
    return f"{type(error).__name__}: {error}"[:300] if error else ""


def copy(shell, sources):
    """Run cells in a forked copy; what stopped it. The folder is put back afterwards as it was."""
    here, kept = Path.cwd(), Path(f"{Path.cwd()}.kept")
    shutil.copytree(here, kept, symlinks=True)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(SECONDS)
        stopped = next((s for source in sources if (s := run(shell, source))), "")
        os.write(write, stopped.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe: stopped = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for p in here.iterdir(): shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
    for p in kept.iterdir(): p.rename(here / p.name)
    kept.rmdir()
    return stopped if status == 0 else f"crashed: status {status}"


def hunt(path, mutants):
    """Every mutant of one chapter."""
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    from tunebook.kit.run import runnable
    cells = [c.source for c in runnable(nbformat.read(path, 4)).cells if c.cell_type == "code"]
    shell, found = InteractiveShell.instance(), {}
    places = {name: place(cells, right) for name, right, _ in mutants}
    for i, source in enumerate(cells[:max(places.values()) + 1]):
        for name, right, wrong in mutants:
            if places[name] == i: found[name] = copy(shell, [source.replace(right, wrong), *cells[i + 1:]])
        if stopped := run(shell, source): raise RuntimeError(f"the chapter itself stopped at {source[:60]!r}: {stopped}")
    return found


def child(path, mutants, answer):
    """One chapter in a process of its own, quiet, in a folder of its own."""
    os.chdir(tempfile.mkdtemp(dir=answer.parent))
    tempfile.tempdir = os.environ["TMPDIR"] = os.getcwd()  # what the chapter writes
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    try: found = {"found": hunt(path, mutants)}
    except BaseException as e: found = {"failure": f"{type(e).__name__}: {e}"}
    answer.write_text(json.dumps(found))
    os._exit(0)


def main(out):
    """All chapters, two at a time, each forked from this process, which has imported the libraries."""
    from tunebook.kit.run import KERNEL_ENV
    os.environ.update(KERNEL_ENV, MPLBACKEND="module://matplotlib_inline.backend_inline")
    for name in ("matplotlib.figure", "matplotlib_inline.backend_inline", "scipy.stats", "sklearn.linear_model", "torch", "transformers",
                 "transformers.models.auto.modeling_auto", "IPython.core.interactiveshell", "nbformat"):
        importlib.import_module(name)
    jobs, running, answers = json.load(sys.stdin), {}, {}
    root, folder = Path(__file__).parent.parent, Path(out).parent
    for i, (chapter, mutants) in enumerate(jobs.items()):
        if len(running) == 2: del running[os.wait()[0]]
        answers[chapter] = folder / f"{i}.json"
        if (pid := os.fork()) == 0: child(root / "nbs" / f"{chapter}.ipynb", mutants, answers[chapter])
        running[pid] = chapter
    while running: del running[os.wait()[0]]
    Path(out).write_text(json.dumps({c: json.loads(a.read_text()) if a.exists() else {"failure": "killed"} for c, a in answers.items()}))


if __name__ == "__main__": main(sys.argv[1])
