"""What the benchmarks share: small notebooks, measured commands, interleaved rounds, and marked sections of the README."""

import argparse
import atexit
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

README = Path(__file__).with_name("README.md")
signal.signal(signal.SIGINT, signal.default_int_handler)  # else a background shell hands "ignore Ctrl-C" to every child
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that jobs are stopped when the benchmark is


def write_notebook(path: Path, *sources: str, kernel: str = "python3", tags: Sequence[str] = ()) -> Path:
    """A notebook with a parameters cell and one cell per source; `tags` go to the first of them."""
    cells = [new_code_cell("x = 1", metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    if tags:
        cells[1].metadata["tags"] = list(tags)
    spec = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=spec), path)
    return path


@dataclass
class Outcome:
    """What a command did."""

    exit: int | None = None  # negative: the signal that ended it; None: stopped at the limit
    seconds: float = 0.0
    cpu: float = 0.0  # user + system, of the process and of the descendants that were waited for
    text: str = ""  # stdout and stderr
    peaks: dict[int, float] = field(default_factory=dict)  # MB by process, kernels left out
    orphans: int = 0  # kernels alive 5 s after the command ended

    @property
    def lines(self) -> list[str]:
        """What was printed, without colours and blank lines."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)
        return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def _read(pid: int | str, name: str) -> str:
    """A file of /proc, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


class Job:
    """A command in a session of its own; its descendants are found by a mark in their environment, orphans too."""

    def __init__(self, command: Sequence[str | Path], cwd: Path, env: dict[str, str] | None = None, memory: bool = False) -> None:
        self.mark, self.memory, self.outcome = f"BENCH_JOB={uuid.uuid4().hex}", memory, Outcome()
        name, value = self.mark.split("=")
        self.log = cwd.parent / f"{value}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(list(map(str, command)), cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True, env={**os.environ, name: value, **(env or {})})
        self.started = time.perf_counter()
        atexit.register(self.stop)  # when the benchmark itself is interrupted

    def stop(self) -> None:
        """End what this command started, and nothing else."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def family(self) -> list[int]:
        """Living processes that this command started."""
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        return [p for p in pids if self.mark in _read(p, "environ") and ") Z" not in _read(p, "stat")]

    def kernels(self) -> list[int]:
        """Those that are kernels."""
        return [p for p in self.family() if "ipykernel" in _read(p, "cmdline")]

    def _sample(self) -> None:
        for pid in self.family():
            peak = re.search(r"VmHWM:\s+(\d+)", _read(pid, "status"))
            if peak and "ipykernel" not in _read(pid, "cmdline"):
                self.outcome.peaks[pid] = int(peak[1]) / 1024

    def ended(self) -> bool:
        """Whether the command has ended; takes its status and times once."""
        if self.process.returncode is not None:
            return True
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return False
        self.process.returncode = self.outcome.exit = os.waitstatus_to_exitcode(status)
        self.outcome.seconds, self.outcome.cpu = time.perf_counter() - self.started, usage.ru_utime + usage.ru_stime
        return True

    def wait(self, limit: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end or for `until`; False at the limit."""
        while time.perf_counter() - self.started < limit:
            if self.ended() or until():
                return True
            if self.memory:
                self._sample()
            time.sleep(0.1 if self.memory else 0.01)
        return False

    def finish(self, limit: float) -> Outcome:
        """Wait, stop what is left at the limit, count the kernels that stay behind, and end them."""
        if not self.wait(limit):
            self.outcome.seconds = time.perf_counter() - self.started
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.outcome.exit = None
        for _ in range(50):
            if not (left := self.kernels()):
                break
            time.sleep(0.1)
        self.outcome.orphans = len(left)
        self.stop()
        atexit.unregister(self.stop)
        self.outcome.text = self.log.read_text(errors="replace")
        self.log.unlink()
        return self.outcome


def run(command: Sequence[str | Path], cwd: Path, limit: float = 600, env: dict[str, str] | None = None, memory: bool = False) -> Outcome:
    """Run a command to its end or to the limit."""
    return Job(command, cwd, env, memory).finish(limit)


def machine() -> str:
    """Processor, cores, memory and load."""
    info = Path("/proc/cpuinfo").read_text()
    model = (re.search(r"model name\s*:\s*(.+)", info) or ["", "unknown processor"])[1]
    gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model}, {os.cpu_count()} cores, {gb:.0f} GB"


def versions(python: str | Path, *names: str) -> str:
    """Versions of packages as another Python sees them."""
    code = "import sys, importlib.metadata as m; print('Python', sys.version.split()[0], *(f', {n} {m.version(n)}' for n in sys.argv[1:]))"
    out = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True).stdout
    return out.strip().replace(" ,", ",")


def today() -> str:
    """The date, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def others(since: tuple[float, float, float] | None = None) -> Any:
    """Clock, busy seconds of the machine, of this process and its children; or the others' share of one core since then."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    busy, own = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), os.times()
    now = time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
    return now if since is None else ((now[1] - since[1]) - (now[2] - since[2])) / (now[0] - since[0])


def rounds(calls: dict[str, Callable[[], Any]], n: int, limit: float = 90, least: int = 3, share: float = 0.05,
           clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Seconds of each call in n rounds, every other reversed; one in which others took more than a share of a core is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    kept, thrown, end = 0, 0, time.perf_counter() + limit
    for f in calls.values():
        f()
    while kept < n and time.perf_counter() < end:
        before, row = others(), {}
        for name in list(calls)[:: 1 if (kept + thrown) % 2 else -1]:
            start = clock()
            calls[name]()
            row[name] = clock() - start
        if others(before) > max(share, 0.03 / sum(row.values())):  # the machine counts in ticks of 10 ms
            thrown += 1
            time.sleep(0.2)
            continue
        kept += 1
        for name, t in row.items():
            seconds[name].append(t)
    if kept < least:
        raise SystemExit(f"{thrown} rounds were disturbed and {kept} were not: run this when the machine is quiet")
    return {"seconds": seconds, "thrown": thrown}


def ratio(measured: dict[str, Any], name: str, base: str) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios within rounds."""
    values = [a / b for a, b in zip(measured["seconds"][name], measured["seconds"][base])]
    return statistics.median(values), min(values), max(values)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] + ["---:"] * (len(head) - 1), *rows])


def spread(values: tuple[float, float, float]) -> str:
    """Median with its range."""
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def put(section: str, text: str) -> None:
    """Replace what stands between the README's markers of a section."""
    begin, end = f"<!-- {section} -->", f"<!-- end {section} -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def tunebook() -> Path:
    """The command beside this Python."""
    return Path(sys.executable).with_name("tunebook")


def parts(section: str, about: str | None, todo: dict[str, Callable[[], Any]], render: Callable[[dict[str, Any]], str]) -> None:
    """A command line that measures parts, keeps their facts in a file, and writes the tables into the README."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(todo), default=list(todo), metavar="PART", help=", ".join(todo))
    parser.add_argument("--facts", type=Path, default=Path(tempfile.gettempdir()) / f"tunebook-{section}.json", help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="do not write the README")
    args = parser.parse_args()
    facts = json.loads(args.facts.read_text()) if args.facts.exists() else {}
    for part in args.only:
        facts[part] = todo[part]()
        args.facts.write_text(json.dumps(facts))
    text = render({p: facts[p] for p in todo if p in facts})
    print(text)
    if not args.dry:
        put(section, text)
