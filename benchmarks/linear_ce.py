"""Cross-entropy from hidden states against plain cross-entropy and F.linear_cross_entropy: time, memory, error; N=2048, E=256.

    OMP_NUM_THREADS=1 python benchmarks/linear_ce.py            # everything, about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/linear_ce.py --only "32768 float32" errors

Writes the tables into benchmarks/README.md. The facts of parts that are not run are taken from --facts.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench
from bench import ratio, rounds, spread, table

os.environ["KINETO_LOG_LEVEL"] = "99"

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from tunebook.entropy.linear_ce import checkpointed_linear_cross_entropy, chunk_rows, linear_cross_entropy
from tunebook.timing.memory import peak

N, E, SMALL, LARGE = 2048, 256, 32768, 131072
SHARE = float(os.environ.get("BENCH_SHARE", "0.05"))  # of a core that other processes may take in a round
AUTO = "torch, automatic chunk"
Inputs = tuple[Tensor, Tensor, Tensor]


def plain(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy(h @ W.mT, y)


def automatic(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """PyTorch's own, its own chunk."""
    return F.linear_cross_entropy(h, W, y, options=LinearCrossEntropyOptions())


def same_chunk(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """PyTorch's own in our chunk."""
    return F.linear_cross_entropy(h, W, y, options=LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(W)))


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain, AUTO: automatic, "torch, our chunk": same_chunk, "ours": linear_cross_entropy,
    "ours, checkpointed": checkpointed_linear_cross_entropy}


def draw(seed: int, V: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states and a matrix that want gradients, and labels; logits have a deviation of 3."""
    g = torch.Generator().manual_seed(seed)
    h, W = torch.randn(N, E, generator=g), 3 * E**-0.5 * torch.randn(V, E, generator=g)
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), torch.randint(V, (N,), generator=g)


def both(f: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The loss and its gradients."""
    loss = f(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]


def memory(V: int, dtype: torch.dtype) -> dict[str, Any]:
    """Peak of forward with backward; only equal functions are compared."""
    inputs, most, peaks, results = draw(0, V, dtype), 1e-4 if dtype == torch.float32 else 0.02, {}, {}
    for name, f in FORMS.items():
        peaks[name] = peak(lambda name=name, f=f: results.update({name: both(f, inputs)}))
        if not all((a.float() - b.float()).norm() <= most * b.float().norm() for a, b in zip(results[name], results["plain"])):
            raise SystemExit(f"{name} differs from plain at V={V} in {dtype}: only equal functions are compared")
    print(V, dtype, {k: f"{b / 1e6:.0f} MB" for k, b in peaks.items()}, flush=True)
    return peaks


def times(V: int, dtype: torch.dtype, n: int, names: tuple[str, ...], least: int = 3, share: float = 0.05) -> dict[str, Any]:
    """CPU seconds of forward with backward, plain first."""
    inputs = draw(0, V, dtype)
    found = rounds({name: partial(both, FORMS[name], inputs) for name in names}, n, 150, least, max(share, SHARE), time.process_time)
    print(V, dtype, {name: round(ratio(found, name, "plain")[0], 2) for name in names}, "thrown:", found["thrown"], flush=True)
    return found


def errors() -> dict[str, Any]:
    """Root mean square error of loss and gradients against float64, over plain's; the median of three draws."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows: dict[str, list[list[float]]] = {name: [] for name in FORMS}
        for seed in range(3):
            inputs = draw(seed, SMALL, dtype)
            exact = (*(x.detach().double().requires_grad_() for x in inputs[:2]), inputs[2])
            want = both(plain, exact)
            for name, f in FORMS.items():
                rows[name].append([float((a.double() - b).square().mean().sqrt()) for a, b in zip(both(f, inputs), want)])
        found[str(dtype)[6:]] = {name: [statistics.median(a[i] / b[i] for a, b in zip(r, rows["plain"])) for i in range(3)]
                                 for name, r in rows.items()}
        print(dtype, found[str(dtype)[6:]], flush=True)
    return found


QUICK, SLOW = tuple(name for name in FORMS if name != AUTO), ("plain", AUTO)
CASES = ((8192, torch.float32, 15, 3), (SMALL, torch.float32, 9, 2), (LARGE, torch.float32, 4, 1), (SMALL, torch.bfloat16, 9, 2))
PARTS: dict[str, Callable[[], dict[str, Any]]] = {"errors": errors}
for V, dtype, n, few in CASES:
    key = f"{V} {str(dtype)[6:]}"
    PARTS |= {f"{key} memory": partial(memory, V, dtype), f"{key} time": partial(times, V, dtype, n, QUICK),
              f"{key} automatic": partial(times, V, dtype, few, SLOW, 1, 0.25)}


def verdicts(facts: dict[str, Any]) -> str:
    """Each target with the worst value measured."""
    rows: list[tuple[str, float, float]] = []
    for V in (SMALL, LARGE):
        if found := facts.get(f"{V} float32 time"):
            rows.append((f"ours, time over plain's, V={V}", ratio(found, "ours", "plain")[0], 0.85))
    if p := facts.get(f"{LARGE} float32 memory"):
        rows += [(f"ours, peak over plain's, V={LARGE}", p["ours"] / p["plain"], 1 / 15),
                 (f"ours, peak over F.linear_cross_entropy's at the same chunk, V={LARGE}", p["ours"] / p["torch, our chunk"], 0.7)]
    if found := facts.get("errors"):
        for name in ("ours", "ours, checkpointed"):
            rows.append((f"{name}, float32, error of gradients over plain's", max(found["float32"][name][1:]), 1.25))
    return table(["worst case", "measured", "target at most", "met"],
                 [[what, f"{value:.3f}", f"{target:.3g}", "yes" if value <= target else "no"] for what, value, target in rows])


def render(facts: dict[str, Any]) -> str:
    """All tables."""
    policy = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    texts = [f"{bench.machine()}, {bench.today()}. {bench.versions(os.sys.executable, 'torch')}, {torch.get_num_threads()} thread, "
             f"{torch.backends.cpu.get_cpu_capability()}, thread policy {policy or 'default'}. N={N} rows, width E={E}. "
             f"Others were allowed {SHARE:g} of a core.", verdicts(facts)]
    rows = []
    for V, dtype, *_ in CASES:
        key = f"{V} {str(dtype)[6:]}"
        peaks, chunk = facts.get(f"{key} memory", {}), chunk_rows(torch.empty(V, E, dtype=dtype, device="meta"))
        for name in FORMS:
            m = facts.get(f"{key} {'automatic' if name == AUTO else 'time'}")
            if not m and not peaks:
                continue
            told = ["", ""]
            if m and name == "plain":
                told[0] = f"{statistics.median(m['seconds'][name]):.2f} s"
            elif m:
                told[0] = spread(ratio(m, name, "plain"))
            if m:
                told[1] = f"{len(m['seconds'][name])} ({m['thrown']})"
            size = [f"{peaks[name] / 1e6:.0f}", *(f"{peaks[name] / peaks[x]:.{d}f}" for x, d in (("plain", 3), ("torch, our chunk", 2)))] \
                if peaks else [""] * 3
            rows.append([f"V={V}, {str(dtype)[6:]}, our chunk {chunk}: {name}", told[0], *size, told[1]])
    texts.append("Forward and backward. Time over plain's: median of the ratios within a round, smallest and largest in brackets. Peak "
                 "above the inputs, gradients included.\n\n" + table(["form", "time over plain's", "peak MB", "over plain's",
                                                                "over torch's at our chunk", "rounds (thrown away)"], rows))
    if "errors" in facts:
        texts.append(f"Root mean square error against float64 over plain's, V={SMALL}: loss / gradient of hidden states / gradient of the "
                     "matrix; median of three draws.\n\n" + table(["form", *facts["errors"]], [
                         [name, *(" / ".join(f"{x:.2f}" for x in e[name]) for e in facts["errors"].values())] for name in list(FORMS)[1:]]))
    return "\n\n".join(texts)


if __name__ == "__main__":
    bench.parts("linear_ce", __doc__, PARTS, render)
