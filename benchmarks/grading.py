"""What grading costs: `tunebook grade` against papermill's command line, one submission after another, in one session.

    python benchmarks/grading.py                        # three rounds, some minutes; writes benchmarks/README.md
    python benchmarks/grading.py --rounds 1 --dry       # a quick look, writes nothing

A class of the first lab: a quarter each solved, with one wrong answer, with two tasks open, and untouched. Papermill runs four of them in a
round, one of each kind, and its time is multiplied; ours grades them all. Every other round runs in reverse order.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench

from tunebook.kit.editions import marks, student
from tunebook.kit.grading import Comparer, Course, collect, grade, tasks_of

ROOT = Path(__file__).parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def kinds() -> list[dict]:
    """Four notebooks of the first lab."""
    solved = json.loads((ROOT / "tutorial" / "solutions" / "L1_attention.ipynb").read_text(encoding="utf-8"))
    handed = student(solved)
    wrong, some = (json.loads(json.dumps(solved)) for _ in range(2))
    for c, empty in zip(some["cells"], handed["cells"]):
        if marks(c).get("grade_id") in ("L1-attend", "L1-split_heads"):
            c["source"] = empty["source"]
    for c in wrong["cells"]:
        if marks(c).get("grade_id") == "L1-softmax":
            c["source"] = "def softmax(x): return x.exp() / x.exp().sum(-1, keepdim=True)"
    return [solved, wrong, some, handed]


def checked(outcome: bench.Outcome, what: str) -> bench.Outcome:
    """The outcome of a run that did its work."""
    if outcome.exit != 0:
        raise SystemExit(f"{what}: exit {outcome.exit}: {outcome.lines[-1:]}")
    return outcome


def papermill(folder: Path) -> tuple[float, float]:
    """Four submissions, one after another: seconds by the clock and of CPU for one."""
    runs = []
    for i in range(4):
        command = [bench.tunebook().with_name("papermill"), folder / "class" / f"s{i:03}.ipynb", folder / f"p{i}.ipynb", "--cwd", folder]
        runs.append(checked(bench.run(command, folder, env=ONE_THREAD), "papermill"))
    return sum(r.seconds for r in runs) / 4, sum(r.cpu for r in runs) / 4


def ours(folder: Path, count: int, workers: int) -> tuple[float, float, float]:
    """All submissions graded anew: seconds by the clock and of CPU, all together; seconds of a second run."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [bench.tunebook(), "grade", folder / "class", "--lab", "L1", "--out", out / "grades.csv", "--workers", workers]
    done = checked(bench.run(command, ROOT, env=ONE_THREAD), "tunebook grade")
    totals = [r["total"] for r in json.loads((out / "grades.json").read_text())]
    if totals != [12, 10, 7, 0] * (count // 4):
        raise SystemExit(f"the grades are wrong: {totals[:8]}")
    again = checked(bench.run(command, ROOT, env=ONE_THREAD), "tunebook grade, again")
    return done.seconds, done.cpu, again.seconds


def fresh(folder: Path) -> float:
    """Four submissions, each in a sandbox that is started for it: seconds by the clock for one."""
    source = json.loads((ROOT / "tutorial" / "solutions" / "L1_attention.ipynb").read_text(encoding="utf-8"))
    comparer = Comparer()
    comparer.ask({"seed": 0, "tasks": ["L1.softmax"]})
    start = time.perf_counter()
    for s in collect(folder / "class", "L1")[:4]:
        course = Course(tasks_of(source), Path(tempfile.mkdtemp(dir=folder)), comparer=comparer)
        grade([s], course, workers=1, keep=True)
        for place in course.places:
            place.stop()
    seconds = time.perf_counter() - start
    comparer.stop()
    return seconds / 4


def spread(values: list[float], unit: str = "") -> str:
    """Median with the smallest and the largest."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})" if not unit else f"{middle:.2f}{unit} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Run the rounds and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--submissions", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="do not write the README")
    args = parser.parse_args()
    rows, loads = [], []
    with tempfile.TemporaryDirectory(prefix="tunebook-bench-") as folder:
        (Path(folder) / "class").mkdir()
        for i in range(args.submissions):
            (Path(folder) / "class" / f"s{i:03}.ipynb").write_text(json.dumps(kinds()[i % 4]))
        calls = {"papermill": lambda: papermill(Path(folder)), "ours": lambda: ours(Path(folder), args.submissions, 2),
                 "fresh": lambda: fresh(Path(folder))}
        for i in range(args.rounds):
            loads.append(f"{os.getloadavg()[0]:.1f}")
            rows.append({name: calls[name]() for name in list(calls)[:: -1 if i % 2 else 1]})
            print(rows[-1], flush=True)
    n = args.submissions
    wall = [r["ours"][0] / (n * r["papermill"][0]) for r in rows]
    cpu = [r["ours"][1] / (n * r["papermill"][1]) for r in rows]
    lines = ["| what | median (smallest to largest) | target at most | met |", "|---|---|---:|---|",
             f"| {n} submissions, two workers: seconds by the clock, to papermill's one after another | {spread(wall)} | 0.60 | "
             f"{'yes' if statistics.median(wall) <= 0.6 else 'no'} |",
             f"| the same: seconds of CPU | {spread(cpu)} | | |",
             f"| papermill, one submission, by the clock | {spread([r['papermill'][0] for r in rows], ' s')} | | |",
             f"| one submission in a sandbox started for it, by the clock | {spread([r['fresh'] for r in rows], ' s')} | | |",
             f"| `tunebook grade`, {n} submissions, by the clock | {spread([r['ours'][0] for r in rows], ' s')} | | |",
             f"| the same again, nothing changed | {spread([r['ours'][2] for r in rows], ' s')} | | |"]
    own = bench.versions(sys.executable, "tunebook", "papermill", "nbclient", "ipykernel", "torch")
    about = (f"{bench.machine()}, {bench.today()}. {own}. {args.rounds} rounds; papermill ran 4 of the {n} submissions in each; "
             f"load average before each round: {', '.join(loads)}.")
    text = f"{about}\n\n" + "\n".join(lines)
    print(text)
    if not args.dry:
        bench.put("grading", text)


if __name__ == "__main__":
    main()
