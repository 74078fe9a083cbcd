"""What a run costs: `tunebook run` against sequential papermill command lines of the same notebooks, in one session.

    python benchmarks/runner.py                                   # three rounds, about 45 minutes; writes benchmarks/README.md
    python benchmarks/runner.py --rounds 1 --notebooks 2 --chapters kit/00 --dry    # a quick look, writes nothing

Both come from the environment of this Python. A round runs every variant once, and every other round in reverse order; a ratio is
taken within a round, and the table shows the median over rounds with the smallest and the largest. Options of `tunebook run` that this
version does not have are told as "not available".
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench
import nbformat
from bench import Outcome, write_notebook

from tunebook.kit.run import Spec, chapters, find_root, one_line, run_notebook, runnable

IMPORTS = "import torch\nfrom transformers import AutoModel, AutoTokenizer"
WORK = "a = torch.eye(256)\nfor _ in range({n}): a = a @ a\nprint(float(a.sum()))"
DEATH = "import os, pathlib, time\npathlib.Path({stamp!r}).write_text(str(time.time()))\nos.kill(os.getpid(), 9)"
PRINTED = "for _ in range(1_000_000): print('y' * 99)"
Values = dict[str, float]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def option(*flags: str) -> list[str] | None:
    """The flags when `tunebook run` knows the first of them, else None."""
    text = subprocess.run([str(bench.tunebook()), "run", "--help"], capture_output=True, text=True, check=True).stdout
    return list(flags) if flags[0] in text else None


def calibrate(seconds: float = 3) -> int:
    """How many products of 256 x 256 matrices fill these seconds of one thread's CPU time."""
    code = ("import time, torch; a = torch.eye(256); [a @ a for _ in range(50)]; t = time.process_time()\n"
            "for _ in range(2000): a = a @ a\nprint((time.process_time() - t) / 2000)")
    said = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=True)
    return round(seconds / float(said.stdout))


def papermill(jobs: list[tuple[Path, Path]], out: Path) -> Outcome:
    """One command line after another; a job is (notebook, folder it runs in)."""
    total = Outcome(exit=0)
    for source, folder in jobs:
        command = [bench.tunebook().with_name("papermill"), source, out / source.name, "--cwd", folder]
        one = bench.run(command, out, env=ONE_THREAD)
        total.exit, total.seconds, total.cpu = total.exit or one.exit, total.seconds + one.seconds, total.cpu + one.cpu
        total.text += one.text if one.exit else ""
    return total


def ours(notebooks: list[str], out: Path, *flags: str, memory: bool = False) -> Outcome:
    """One `tunebook run`."""
    return bench.run([bench.tunebook(), "run", *notebooks, "--out", out / "out", *flags], Path.cwd(), env=ONE_THREAD, memory=memory)


class Failed(Exception):
    """A run did not do its work: its time or memory is no measurement."""


def checked(outcome: Outcome, what: str) -> Outcome:
    """The outcome of a run that passed; a failure is quick, so it must never enter a ratio."""
    if outcome.exit != 0:
        shown = [line for line in outcome.lines if line.startswith("✗")] or outcome.lines[-1:]
        raise Failed(f"{what}: exit {outcome.exit}: {'; '.join(shown)[:300]}")
    return outcome


class Bench:
    """The variants, each a method that gives its values; files are made in a fresh folder."""

    def __init__(self, folder: Path, count: int, prefix: str) -> None:
        self.folder, root = folder, find_root(Path(__file__).parent)
        if root is None:
            raise SystemExit("not in a Tunebook checkout")
        os.chdir(root)
        self.products = calibrate()
        self.small = [write_notebook(folder / f"n{i}.ipynb", IMPORTS, WORK.format(n=self.products)) for i in range(count)]
        self.names = [n for n in chapters(root) if n.startswith(prefix)]
        self.copies: list[tuple[Path, Path]] = []
        for name in self.names:  # as our runner, papermill gets no cell marked `#| eval: false`
            source = root / "nbs" / f"{name}.ipynb"
            nbformat.write(runnable(nbformat.read(source, 4)), folder / source.name)
            self.copies.append((folder / source.name, source.parent))
        self.fresh, self.fork = option("--no-cache"), option("--kernels", "fork")

    def out(self) -> Path:
        """A new folder for outputs."""
        return Path(tempfile.mkdtemp(dir=self.folder, prefix="out-"))

    def papermill_small(self) -> Values:
        """The small notebooks under papermill."""
        o = checked(papermill([(p, self.folder) for p in self.small], self.out()), "papermill")
        return {"papermill wall": o.seconds, "papermill cpu": o.cpu}

    def ours_small(self, key: str, *flags: str) -> Values:
        """The small notebooks under ours."""
        o = checked(ours([*map(str, self.small)], self.out(), *(self.fresh or []), *flags), key)
        return {f"{key} wall": o.seconds, f"{key} cpu": o.cpu}

    def papermill_chapters(self) -> Values:
        """The chapters under papermill."""
        return {"papermill chapters": checked(papermill(self.copies, self.out()), "papermill, chapters").seconds}

    def ours_chapters(self) -> Values:
        """The chapters under ours, two cold workers."""
        return {"cold chapters": checked(ours(self.names, self.out(), *(self.fresh or []), "--workers", "2"), "chapters").seconds}

    def cached_chapters(self) -> Values:
        """The chapters a second time."""
        out = self.out()
        checked(ours(self.names, out), "chapters, filling the cache")
        return {"cached chapters": checked(ours(self.names, out), "chapters, from the cache").seconds}

    def death(self) -> Values:
        """From a kernel's SIGKILL to the result that names signal and cell."""
        stamp = self.folder / "stamp"
        source = write_notebook(self.folder / "dies.ipynb", DEATH.format(stamp=str(stamp)))
        told = one_line(run_notebook(Spec(str(source), "dies", str(self.out()))))
        seconds = time.time() - float(stamp.read_text())
        if "SIGKILL" not in told or "In [2]" not in told:
            raise Failed(f"death: signal or cell is not named: {told}")
        return {"death": seconds}

    def printed(self) -> Values:
        """Peak memory of the runner's own processes when a cell prints 100 MB."""
        source = write_notebook(self.folder / "prints.ipynb", PRINTED)
        own = checked(ours([str(source)], self.out(), *(self.fresh or []), "--workers", "1", memory=True), "100 MB")
        out = self.out()
        command = [bench.tunebook().with_name("papermill"), source, out / "p.ipynb"]
        theirs = checked(bench.run(command, out, env=ONE_THREAD, memory=True), "papermill, 100 MB")
        peaks = own.peaks.values()
        return {"memory": sum(peaks), "memory largest": max(peaks), "papermill memory": sum(theirs.peaks.values())}

    def absent(self) -> set[str]:
        """Values that this version of the command, or these settings, cannot give."""
        none = set() if self.fork else {"fork wall"}
        none |= set() if self.names else {"cold chapters", "cached chapters"}
        return none | (set() if self.fresh else {"cached chapters"})

    def variants(self) -> list[Callable[[], Values]]:
        """What a round runs."""
        all_ = [self.papermill_small, partial(self.ours_small, "cold", "--workers", "2"), partial(self.ours_small, "one", "--workers", "1")]
        if self.fork:
            all_.insert(2, partial(self.ours_small, "fork", *self.fork, "--workers", "2"))
        if self.names:
            all_ += [self.papermill_chapters, self.ours_chapters] + [self.cached_chapters] * bool(self.fresh)
        return [*all_, self.death, self.printed]


# what is measured, value, divided by, unit, target
ROWS = [
    ("small notebooks, cold kernels, two workers: wall", "cold wall", "papermill wall", "", 0.50),
    ("small notebooks, forked kernels, two workers: wall", "fork wall", "papermill wall", "", 0.35),
    ("small notebooks, cold kernels, one worker: CPU seconds", "one cpu", "papermill cpu", "", 0.75),
    ("chapters, cold kernels, two workers: wall", "cold chapters", "papermill chapters", "", 0.50),
    ("chapters, nothing changed, from the cache: wall", "cached chapters", None, "s", 3),
    ("from a kernel's SIGKILL to its line", "death", None, "s", 3),
    ("runner's memory while a cell prints 100 MB, all its processes", "memory", None, "MB", 200),
    ("the largest of them", "memory largest", None, "MB", None),
    ("papermill's memory with the same notebook", "papermill memory", None, "MB", None),
]


def spread(values: list[float], unit: str) -> str:
    """Median with the smallest and the largest."""
    digits = 0 if unit == "MB" else 2
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} {unit} ({low} to {high})".replace("  ", " ")


def table(rounds: list[Values], failures: list[str], absent: set[str]) -> str:
    """Markdown: what was measured beside its target; a row counts only when every round of it passed."""
    lines = ["| what | median (smallest to largest) | target at most | met | medians behind it |", "|---|---|---:|---|---|"]
    for what, key, base, unit, target in ROWS:
        found = [r for r in rounds if key in r and (base is None or base in r)]
        aim = "" if target is None else f"{target:g} {unit}"
        if len(found) < len(rounds):
            why = "not available" if key in absent else f"a run failed in {len(rounds) - len(found)} of {len(rounds)} rounds"
            lines.append(f"| {what} | {why} | {aim} | {'' if target is None else 'not measured'} | |")
            continue
        values = [r[key] / (r[base] if base else 1) for r in found]
        met = "" if target is None else "yes" if statistics.median(values) <= target else "no"
        behind = f"{statistics.median(r[key] for r in found):.1f} s / {statistics.median(r[base] for r in found):.1f} s" if base else ""
        lines.append(f"| {what} | {spread(values, unit)} | {aim} | {met} | {behind} |")
    told = [f"- failed: {f}" for f in dict.fromkeys(failures)]
    return "\n".join([re.sub(r" +\|", " |", "\n".join(lines)), *([""] if told else []), *told])


def main() -> None:
    """Run the rounds and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--notebooks", type=int, default=8, help="small notebooks (default: %(default)s)")
    parser.add_argument("--chapters", default="", metavar="PREFIX", help="chapters whose name begins so; '-' for none (default: all)")
    parser.add_argument("--dry", action="store_true", help="do not write the README")
    args = parser.parse_args()
    rounds: list[Values] = []
    loads: list[str] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tunebook-bench-") as folder:
        todo = Bench(Path(folder), args.notebooks, args.chapters)
        for i in range(args.rounds):
            loads.append(f"{os.getloadavg()[0]:.2f}")
            values: Values = {}
            for variant in todo.variants()[:: -1 if i % 2 else 1]:
                try:
                    values |= variant()
                except Failed as e:
                    failures.append(str(e))
                    print(f"FAILED {e}", flush=True)
                print(f"round {i + 1}:", ", ".join(f"{k} {v:.2f}" for k, v in values.items()), flush=True)
            rounds.append(values)
    own = bench.versions(sys.executable, "tunebook", "papermill", "nbclient", "ipykernel", "torch", "transformers")
    about = (f"{bench.machine()}, {bench.today()}. {own}. {args.rounds} rounds of {args.notebooks} small notebooks ({todo.products} "
             f"products each) and {len(todo.names)} chapters; load average before each round: {', '.join(loads)}.")
    text = f"{about}\n\n{table(rounds, failures, todo.absent())}"
    print(text)
    if not args.dry:
        bench.put("ratios", text)


if __name__ == "__main__":
    main()
