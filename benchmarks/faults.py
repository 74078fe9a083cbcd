"""What four runners do with faulty notebooks: papermill, nbmake, `jupyter execute` (nbclient) and `tunebook run`.

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install -c constraints.txt papermill nbmake nbclient jupyter-core 'ipykernel<7' pytest
    python benchmarks/faults.py --peers /tmp/peers/bin/python

About ten minutes. Writes the table into benchmarks/README.md; raw facts, with the line each runner showed, stay in WORK/facts.json.
With --only or --runners the other facts are taken from that file. As root on Linux a full disk and a read-only one are tmpfs mounts.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench
from bench import Job, Outcome, write_notebook

MARK = "import os, pathlib, time; pathlib.Path(os.environ['BENCH_MARK']).touch(); "
EDIT = ("import json; nb = json.load(open('victim.ipynb')); nb['cells'][-1]['source'] = ['print(\"edited\")']; "
        "json.dump(nb, open('victim.ipynb', 'w'))")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    source: str = "x"  # of the cell it happens in
    cause: str = r"$^"  # a regular expression that a line naming the cause matches
    how: str = ""  # and one for the signal or exit status, when a kernel died
    content: str | None = None  # of the file, when it is no notebook
    kernel: str = "python3"
    tags: tuple[str, ...] = ()
    parameters: bool = False  # give a misspelt parameter
    place: str = "folder"  # where files go: folder, missing, read-only, full
    act: str = ""  # done from outside: kill, kill while writing, interrupt, twice
    timeout: int | None = None  # the runner's own limit for a cell, seconds
    limit: float = 60  # ours


DIED = r"[Kk]ernel (died|was killed|ended)|DeadKernel"
FAULTS = [
    Fault("kernel killed by SIGKILL", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", DIED, r"SIGKILL|signal 9\b|status -9\b"),
    Fault("os._exit(3) in a cell", "import os; os._exit(3)", DIED, r"exit (status|code) 3\b"),
    Fault("segmentation fault", "import ctypes; ctypes.string_at(0)", DIED, r"SIGSEGV|signal 11\b|status -11\b|[Ss]egmentation"),
    Fault("error in a cell", "1 / 0", r"ZeroDivisionError"),
    Fault("MemoryError", "len(bytearray(1 << 60))", r"MemoryError"),
    Fault("endless cell, limit 3 s", "while True: pass", r"[Tt]ime-?\s?out|longer than|timed out", timeout=3),
    Fault("expected error (tag raises-exception)", "1 / 0", tags=("raises-exception",)),
    Fault("file is not JSON", content="{", cause=r"JSON|valid notebook"),
    Fault("file is empty", content="", cause=r"JSON|valid notebook|empty"),
    Fault("no such kernel", kernel="fortran77", cause=r"fortran77"),
    Fault("misspelt parameter", parameters=True, cause=r"\bxx\b"),
    Fault("output folder is missing", place="missing", cause=r"[Nn]o such|does not exist|doesn't exist"),
    Fault("output folder is read-only", place="read-only", cause=r"[Rr]ead-only|[Pp]ermission"),
    Fault("disk is full (1 MB)", "print(('y' * 99 + '\\n') * 30_000)", r"No space", place="full"),
    Fault("a printed line of 3 MB", "print('y' * 3_000_000)"),
    Fault("100 MB of printed output", "for _ in range(1_000_000): print('y' * 99)", limit=300),
    Fault("SIGKILL of the runner in a cell", MARK + "time.sleep(60)", act="kill"),
    Fault("SIGKILL of the runner, 8 times", act="kill while writing"),
    Fault("Ctrl-C in a cell", MARK + "time.sleep(60)", r"[Ii]nterrupt", act="interrupt"),
    Fault("two runs into one folder at once", "import os; print((os.environ['BENCH_RUN'] * 99 + chr(10)) * 10_000)", act="twice"),
    Fault("notebook is edited while it runs", EDIT),
]


@dataclass(frozen=True)
class Runner:
    """How a peer is called."""

    name: str
    command: Callable[[Path, Fault], list[str]]  # (folder, fault) -> command line
    executed: str  # where the executed notebook stands, below the folder
    mark: str | None = None  # metadata key of a cell that tells its status
    many: bool = True  # takes several notebooks


def runners(peers: Path) -> list[Runner]:
    """The four, each with the options it has for writing what it ran, for a limit and for parameters."""
    both = ["victim.ipynb", "other.ipynb"]

    def limit(option: str, fault: Fault) -> list[str]:
        return [f"{option}={fault.timeout}"] if fault.timeout else []

    def given(fault: Fault) -> list[str]:
        return ["-p", "xx", "2"] if fault.parameters else []

    def papermill(_: Path, f: Fault) -> list[str]:
        return [f"{peers.parent}/papermill", *limit("--execution-timeout", f), *given(f), "victim.ipynb", "out/victim.ipynb"]

    def nbmake(_: Path, f: Fault) -> list[str]:
        options = ["--nbmake", "--overwrite", "-p", "no:cacheprovider"]
        return [str(peers), "-m", "pytest", *options, *limit("--nbmake-timeout", f), *both]

    def execute(_: Path, f: Fault) -> list[str]:
        return [f"{peers.parent}/jupyter-execute", "--inplace", *limit("--timeout", f), *both]

    def ours(_: Path, f: Fault) -> list[str]:
        return [str(bench.tunebook()), "run", *both, "--out", "out", *limit("--timeout", f), *given(f)]

    return [Runner("papermill", papermill, "out/victim.ipynb", "papermill", many=False), Runner("pytest --nbmake", nbmake, "victim.ipynb"),
            Runner("jupyter execute", execute, "victim.ipynb"), Runner("tunebook run", ours, "out/victim.ipynb", "tunebook")]


def mount(*options: str) -> None:
    """Call mount(8)."""
    subprocess.run(["mount", *options], check=True)


@contextlib.contextmanager
def prepared(fault: Fault, work: Path) -> Iterator[Path]:
    """A folder with the faulty notebook and a sound one, in the place the fault asks for."""
    folder = Path(tempfile.mkdtemp(dir=work)) / "run"
    folder.mkdir()
    mounted = fault.place in ("read-only", "full")
    if mounted:
        mount("-t", "tmpfs", "-o", "size=1m" if fault.place == "full" else "size=9m", "tmpfs", str(folder))
    try:
        sources = ["print(('y' * 99 + '\\n') * 30_000)"] * 12 if fault.act == "kill while writing" else [fault.source, "print('after')"]
        if fault.act == "kill while writing":
            sources[0] = MARK + sources[0]
        write_notebook(folder / "victim.ipynb", *sources, kernel=fault.kernel, tags=fault.tags)
        if fault.content is not None:
            (folder / "victim.ipynb").write_text(fault.content)
        write_notebook(folder / "other.ipynb", "print('other')")
        if fault.place != "missing":
            (folder / "out").mkdir()
        if fault.place == "read-only":
            mount("-o", "remount,ro", str(folder))
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder.parent)


def start(fault: Fault, runner: Runner, folder: Path, number: str = "1") -> Job:
    """Start the runner on the folder."""
    env = {"BENCH_MARK": str(folder.parent / "mark"), "BENCH_RUN": number}
    return Job(runner.command(folder, fault), folder, env, memory="100 MB" in fault.name)


def performed(fault: Fault, runner: Runner, folder: Path) -> list[Outcome]:
    """Run it, with what is done from outside."""
    if fault.act == "twice":
        return [job.finish(fault.limit) for job in [start(fault, runner, folder, n) for n in "12"]]
    job, mark = start(fault, runner, folder), folder.parent / "mark"
    if fault.act:
        job.wait(fault.limit, until=mark.exists)
        time.sleep(random.uniform(0.2, 3) if fault.act == "kill while writing" else 1)
    if fault.act.startswith("kill") and not job.ended():
        os.kill(job.process.pid, signal.SIGKILL)
    if fault.act == "interrupt":
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    return [job.finish(fault.limit)]


def parsed(path: Path) -> Any:
    """The JSON in a file; None when there is no file, False when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return False


def joined(source: str | list[str]) -> str:
    """A cell's source or a stream's text as one string."""
    return source if isinstance(source, str) else "".join(source)


def file_fact(fault: Fault, runner: Runner, folder: Path, before: str) -> str:
    """What the executed notebook says about the cell."""
    path = folder / runner.executed
    nb = parsed(path)
    if nb is None:
        return "no file"
    if path.read_text(errors="replace") == before and runner.executed == "victim.ipynb":
        return "file unchanged"
    if not nb:
        return f"file is not JSON ({path.stat().st_size} bytes)"
    cell = next((c for c in nb["cells"] if joined(c["source"]).startswith(fault.source)), None)
    if cell is None:
        return "file without that cell"
    status = cell["metadata"].get(runner.mark, {}).get("status") if runner.mark else None
    error = any(o["output_type"] == "error" for o in cell["outputs"])
    reached = bool(cell["outputs"]) or cell["execution_count"] is not None
    unmarked = "shows the error" if error else "has the cell's outputs" if reached and cell["outputs"] else "shows no sign of it"
    return f"file: cell {status}" if status else f"file {unmarked}"


def told(fault: Fault, lines: list[str]) -> tuple[str, str]:
    """What the lines name of notebook, cell and cause, and the line that names most."""
    wanted = {"notebook": r"victim", "cell": r"In \[\d+\]|\b[Cc]ell \d+", "cause": fault.cause}
    wanted |= {"exit status" if "status" in fault.how and "SIG" not in fault.how else "signal": fault.how} if fault.how else {}
    if fault.source == "x" or fault.place != "folder":
        del wanted["cell"]
    named = [([k for k, pattern in wanted.items() if re.search(pattern, line)], line) for line in lines]
    best, line = max(named, key=lambda n: (len(n[0]), -len(n[1])), default=([], ""))
    somewhere = [k for k in wanted if any(k in names for names, _ in named)]
    where = "in one line" if best == list(wanted) else f"over {len(lines)} lines"
    return f"names {', '.join(somewhere) or 'nothing'} {where}", line


def other_fact(runner: Runner, folder: Path, outcome: Outcome) -> str:
    """Whether the sound notebook was finished."""
    if not runner.many:
        return "own command"
    nb = parsed((folder / runner.executed).with_name("other.ipynb"))
    ran = bool(nb) and any(c.get("outputs") for c in nb["cells"])
    return "finished" if ran else "finished, not written" if re.search(r"✓ other|1 passed", outcome.text) else "not run"


def trial(fault: Fault, runner: Runner, work: Path) -> dict[str, Any]:
    """The facts of one fault under one runner."""
    if fault.parameters and not runner.mark:
        return {"text": "takes no parameters"}
    if fault.place == "missing" and runner.executed == "victim.ipynb":
        return {"text": "writes in place only"}
    if fault.act == "kill while writing":
        return many_kills(fault, runner, work)
    with prepared(fault, work) as folder:
        before = (folder / "victim.ipynb").read_text()
        outcomes = performed(fault, runner, folder)
        o = outcomes[0]
        facts = {"exit": [x.exit for x in outcomes], "seconds": round(o.seconds, 1), "file": file_fact(fault, runner, folder, before),
                 "all": o.lines[-100:], "other": other_fact(runner, folder, o), "orphans": o.orphans,
                 "runner_mb": round(sum(o.peaks.values())), "file_mb": round(size(folder / runner.executed) / 1e6, 1)}
        if fault.source == EDIT:
            last = (parsed(folder / "victim.ipynb") or {"cells": [{"source": ""}]})["cells"][-1]
            facts["edit"] = "edit kept" if joined(last["source"]) == 'print("edited")' else "edit lost"
    return facts


def size(path: Path) -> int:
    """Bytes, 0 when absent."""
    return path.stat().st_size if path.exists() else 0


def many_kills(fault: Fault, runner: Runner, work: Path, times: int = 8) -> dict[str, Any]:
    """How many files are not JSON when the runner dies while it prints and writes."""
    random.seed(0)
    states = []
    for _ in range(times):
        with prepared(fault, work) as folder:
            before = (folder / "victim.ipynb").read_text()
            killed = performed(fault, runner, folder)[0].exit == -signal.SIGKILL
            fact = file_fact(fault, runner, folder, before)
            state = {"no file": "absent", "file unchanged": "unchanged"}.get(fact, "not JSON" if "not JSON" in fact else "valid")
            states.append(state if killed else "written before the kill")
    counts = {s: states.count(s) for s in dict.fromkeys(states)}
    return {"states": counts, "text": "files: " + ", ".join(f"{n} {s}" for s, n in counts.items())}


def ending(code: int | None) -> str:
    """An exit status in words."""
    return "did not end" if code is None else f"exit {code}" if code >= 0 else signal.Signals(-code).name


def short(fault: Fault, facts: dict[str, Any]) -> str:
    """The facts as a table's cell."""
    if "text" in facts:
        return facts["text"]
    stopped = (fault.cause != r"$^" or fault.act == "kill") and fault.place == "folder" and not fault.parameters
    untrue = facts["file"] == "file: cell completed" if stopped else bool(fault.tags) and facts["file"] == "file: cell not run"
    parts = [" and ".join(map(ending, facts["exit"])) + (f", {facts['seconds']:.0f} s" if fault.timeout or fault.limit > 60 else "")]
    parts.append(facts["file"] + (" (false)" if untrue else ""))
    if "edit" in facts:
        parts.append(facts["edit"])
    elif fault.limit > 60:
        parts.append(f"runner {facts['runner_mb']} MB, file {facts['file_mb']:.0f} MB")
    elif fault.cause != r"$^" and (facts["exit"] != [0] or fault.parameters):
        parts.append(told(fault, facts["all"])[0])
    if facts["orphans"]:
        parts.append(f"{facts['orphans']} kernel left")
    if facts["other"] != "own command" and not fault.act and not fault.parameters:
        parts.append(f"other {facts['other']}")
    return "; ".join(parts)


def table(facts: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Markdown: a row for each fault, a column for each runner."""
    rows = [["fault", *names], ["---"] * (len(names) + 1)]
    rows += [[f.name, *(short(f, facts[f.name][n]) if n in facts[f.name] else "not run" for n in names)] for f in FAULTS if f.name in facts]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Run the trials and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    work = Path(tempfile.gettempdir()) / "tunebook-faults"
    parser.add_argument("--work", type=Path, default=work, help="folder for the runs and facts.json (default: %(default)s)")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--render", action="store_true", help="run nothing, write the table from facts.json")
    parser.add_argument("--runners", default="", help="runners whose name contains this")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    store = args.work / "facts.json"
    facts: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    peers = runners(args.peers.absolute())
    for fault in FAULTS:
        if args.render or args.only not in fault.name or (fault.place in ("read-only", "full") and os.geteuid() != 0):
            continue
        for runner in peers:
            if args.runners in runner.name:
                found = trial(fault, runner, args.work) | {"date": bench.today(), "fault": asdict(fault)}
                facts.setdefault(fault.name, {})[runner.name] = found
                line = told(fault, found.get("all", []))[1]
                print(f"{fault.name} | {runner.name} | {short(fault, found)}\n    {line}", flush=True)
                store.write_text(json.dumps(facts, indent=1))
    dates = sorted({r["date"] for row in facts.values() for r in row.values()})
    theirs = bench.versions(args.peers, "papermill", "nbmake", "pytest", "nbclient", "ipykernel")
    own = bench.versions(bench.tunebook().with_name("python"), "tunebook", "papermill", "nbclient", "ipykernel")
    about = (f"{bench.machine()}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Peers: {theirs}. Ours: {own}. "
             "One trial each, except where a count is given.")
    bench.put("faults", f"{about}\n\n{table(facts, [r.name for r in peers])}")


if __name__ == "__main__":
    main()
