"""A training step of MiniLM with each method that chapter 36 compares: CPU time and peak memory, full tuning = 1.

    OMP_NUM_THREADS=1 python benchmarks/methods.py                 # about five minutes
    OMP_NUM_THREADS=1 python benchmarks/methods.py --only "16 x 32"

Writes data/comparisons/minilm-steps.json with every sample and where it comes from, and the tables into benchmarks/README.md. The facts of
parts that are not run are taken from --facts.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import bench
import torch
from bench import ratio, rounds, spread, table
from lora import SHARE, draw, minilm, step

from tunebook.timing.memory import peak
from tunebook.tuning.cost import count, sizes
from tunebook.tuning.methods import attach

EIGHT = ("full", "top", "head", "lora", "houlsby", "ia3", "bitfit", "prefix")
SHAPES = {(16, 32): 15, (16, 128): 5}  # batch and length: rounds
OUT = Path(__file__).parent.parent / "data" / "comparisons" / "minilm-steps.json"


def measure(B: int, T: int, n: int) -> dict[str, Any]:
    """CPU seconds in interleaved rounds, and the peak that the allocator handed out beside weights and optimizer."""
    calls = {m: step(attach(minilm(), m).train(), draw(B, T)) for m in EIGHT}
    found = rounds(calls, n, 150, share=SHARE, clock=time.process_time)
    found["peak"] = {m: peak(f) for m, f in calls.items()}
    print(B, T, {m: (round(ratio(found, m, "full")[0], 3), found["peak"][m]) for m in EIGHT}, flush=True)
    return found


PARTS = {f"{B} x {T}": partial(measure, B, T, n) for (B, T), n in SHAPES.items()}


def render(facts: dict[str, Any]) -> str:
    """The tables; the record beside them."""
    where = {"device": bench.machine(), "isa": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads()),
             "versions": bench.versions(bench.sys.executable, "torch", "transformers"), "date": bench.today(),
             "command": "OMP_NUM_THREADS=1 python benchmarks/methods.py"}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"from": where, "shapes": facts}, indent=1) + "\n")
    rows, model = [], sizes(minilm())
    for shape, found in facts.items():
        B, T = map(int, shape.split(" x "))
        work = {m: sum(count(model, m, B, T).flops.values()) for m in EIGHT}
        for m in EIGHT:
            seconds, top = found["seconds"][m], found["peak"]
            rows.append([f"{shape}: {m}", f"{1e3 * statistics.median(seconds):.0f} ms", spread(ratio(found, m, "full")),
                         f"{work[m] / work['full']:.2f}", f"{top[m] / 1e6:.1f}", f"{top[m] / top['full']:.2f}",
                         f"{len(seconds)} ({found['thrown']})"])
    head = ["batch x length: method", "step", "over full's", "FLOPs over full's", "peak MB", "over full's", "rounds (thrown away)"]
    told = (f"{where['device']}, {where['date']}. {where['versions']}, {where['threads']} thread, {where['isa']}. CPU time of a step, "
            "median, and the median of the ratios within a round with the smallest and the largest; the peak is what a step allocates "
            f"beside weights and optimizer. Rounds in which others took more than {SHARE:g} cores were thrown away.")
    return told + "\n\n" + table(head, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    bench.parts("methods", __doc__, PARTS, render)
