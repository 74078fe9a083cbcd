"""What timing.clock finds on this machine: equal calls, a planted 5 %, and how far its medians are from times known otherwise."""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import bench
import torch
from torch import Tensor

from tunebook.timing import clock


def spin(ns: int) -> Callable[[], int]:
    """A call that ends as soon as so many nanoseconds have passed."""
    def spinning() -> int:
        end = time.perf_counter_ns() + ns
        while time.perf_counter_ns() < end: pass
        return 0
    return spinning


def times(n: int) -> Callable[[Tensor], Tensor]:
    """The same softmax so many times."""
    def repeated(x: Tensor) -> Tensor:
        for _ in range(n): y = x.softmax(-1)
        return y
    return repeated


SHARE = 0.05  # of a core, for others
VERDICTS = ("faster", "slower", "no difference detected", "undecided")
ROWS = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
PAIRS = {"spin of 100 us": (spin(100_000), spin(105_000), ()), "20 softmaxes of 64 x 256": (times(20), times(21), (ROWS,))}


def trials(f: Callable[..., Any], g: Callable[..., Any], args: tuple, n: int, seconds: float) -> dict[str, Any]:
    """Comparisons during which others took less than a twentieth of a core, and how many were thrown away."""
    kept, thrown = [], 0
    while len(kept) < n and thrown < 2 * n:
        before = bench.others()
        found = clock.compare(f, g, *args, seconds=seconds)
        if bench.others(before) > SHARE: thrown += 1
        else: kept.append(found)
    if len(kept) < n: raise SystemExit(f"{thrown} trials were disturbed: run this when the machine is quiet")
    return {"said": Counter(c.verdict for c in kept), "ratio": [c.ratio for c in kept], "span": [(c.low, c.high) for c in kept],
            "thrown": thrown}


def measure_equal(n: int = 60) -> dict[str, Any]:
    """A call with itself."""
    return {name: trials(f, f, args, n, 1.0) for name, (f, _, args) in PAIRS.items()}


def measure_planted(n: int = 30) -> dict[str, Any]:
    """A call that does 5 % more with the one it is made of, two seconds each."""
    return {name: trials(g, f, args, n, 2.0) for name, (f, g, args) in PAIRS.items()}


def _loop(n: int, f: Callable[..., Any] | None, *args: Any) -> int:
    """Nanoseconds of n calls, or of a loop without a call."""
    turns = itertools.repeat(None, n)
    start = time.perf_counter_ns()
    if f is None:
        for _ in turns: pass
    else:
        for _ in turns: f(*args)
    return time.perf_counter_ns() - start


def measure_bias(n: int = 15) -> dict[str, Any]:
    """Medians of a spin over its length, and of an addition of 16 numbers over the time of one of 400,000 in a row, taken around it."""
    call, a, b, long = spin(100_000), torch.zeros(16), torch.ones(16), 400_000
    spun, added, thrown = [], [], 0
    while len(added) < n and thrown < 2 * n:
        before = bench.others()
        spins = clock.bench(call, seconds=0.5).median / 1e-4
        first = _loop(long, a.add_, b) - _loop(long, None)
        median = clock.bench(a.add_, b, seconds=0.5).median * 1e9
        second = _loop(long, a.add_, b) - _loop(long, None)
        if bench.others(before) > SHARE:
            thrown += 1
            continue
        spun.append(spins)
        added.append(median * 2 * long / (first + second))
    return {"a spin of 100 us": spun, "an addition of 16 numbers": added, "thrown": thrown}


def row(name: str, t: dict[str, Any], true: float) -> list[str]:
    """A row of the table of verdicts."""
    said, widths = Counter(t["said"]), [high / low - 1 for low, high in t["span"]]
    return [name, f"{len(t['ratio'])} ({t['thrown']})", *(str(said[v]) for v in VERDICTS),
            str(sum(low <= true <= high for low, high in t["span"])), f"{statistics.median(widths):.2%}",
            f"{statistics.median(t['ratio']):.4f} ({min(t['ratio']):.4f} to {max(t['ratio']):.4f})"]


def render(facts: dict[str, Any]) -> str:
    """The section."""
    told = [f"{bench.machine()}, {bench.today()}, {torch.get_num_threads()} thread. {bench.versions(bench.sys.executable, 'torch')}. "
            f"Trials in which others took more than {SHARE:g} of a core were thrown away (in brackets)."]
    for part, true, what in (("equal", 1.0, "A call compared with itself, a second each:"),
                             ("planted", 1.05, "A call that does 5 % more against the one it is made of, two seconds each:")):
        rows = [row(name, t, true) for name, t in facts.get(part, {}).items()]
        if rows: told += [what, bench.table(["", "trials", *VERDICTS, f"intervals with {true:g}", "their width", "ratio"], rows)]
    if found := facts.get("bias"):
        rows = [[name, f"{statistics.median(r):.4f}", f"{min(r):.4f} to {max(r):.4f}"] for name, r in found.items() if name != "thrown"]
        told += [f"The median of `bench` over a time known otherwise, {len(found['a spin of 100 us'])} trials ({found['thrown']}): a spin "
                 "ends when its time has passed; an addition is one of 400,000 in a row, timed before and after:",
                 bench.table(["", "measured over true", "least to most"], rows)]
    return "\n\n".join(told)


if __name__ == "__main__":
    bench.parts("clock", __doc__, {"equal": measure_equal, "planted": measure_planted, "bias": measure_bias}, render)
