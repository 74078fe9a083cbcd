"""Attention in tiles against F.scaled_dot_product_attention and plain attention: time, memory, error; two threads, float32, B=1 H=8 D=64.

    OMP_NUM_THREADS=2 python benchmarks/tiled.py            # everything, about seven minutes
    OMP_NUM_THREADS=2 python benchmarks/tiled.py --only "time 1024" memory

Writes the tables into benchmarks/README.md. The facts of parts that are not run are taken from --facts.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench
from bench import rounds, spread, table

os.environ["KINETO_LOG_LEVEL"] = "99"

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tunebook.attention.tiled import alibi_rule, document_rule, tiled_attention, tuned_attention
from tunebook.timing.memory import peak

H, D, LENGTHS, WINDOW, MASKED = 8, 64, (1024, 2048, 4096), 256, 2048
SMALL = "tuned, tiles of 128"
Attention = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a textbook writes."""
    s = q @ k.mT * D**-0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v


def first(f: Callable[..., tuple[Tensor, Tensor]]) -> Attention:
    """The output without the log-sum-exp."""
    return lambda *args, **kwargs: f(*args, **kwargs)[0]


FORMS: dict[str, Attention] = {"SDPA": lambda q, k, v, causal: sdpa(q, k, v, is_causal=causal), "plain": plain,
                               "readable": first(tiled_attention), "tuned": first(tuned_attention)}


def draw(seed: int, T: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """q, k and v that want gradients, and the gradient that arrives at the output."""
    g = torch.Generator().manual_seed(seed)
    *qkv, up = (torch.randn(1, H, T, D, generator=g).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in qkv], up


def forward(f: Attention, inputs: list[Tensor], up: Tensor) -> Any:
    """One call without a graph."""
    with torch.no_grad():
        return f(*inputs)


def both(f: Attention, inputs: list[Tensor], up: Tensor) -> Any:
    """One call and its gradients."""
    return torch.autograd.grad(f(*inputs), inputs, up)


def calls(run: Callable[..., Any], forms: dict[str, Attention], *args: Any) -> dict[str, Callable[[], Any]]:
    """Each form with its arguments bound."""
    return {name: partial(run, f, *args) for name, f in forms.items()}


def same(forms: dict[str, Attention], inputs: list[Tensor], up: Tensor) -> None:
    """Only equal functions are compared."""
    want = both(forms["SDPA"], inputs, up)
    for name, f in forms.items():
        if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(both(f, inputs, up), want)):
            raise SystemExit(f"{name} gives other gradients than SDPA: nothing to compare")


def times(T: int, causal: bool) -> dict[str, Any]:
    """Forward, and forward with backward."""
    inputs, up = draw(0, T)
    forms = {name: partial(f, causal=causal) for name, f in FORMS.items()}
    same(forms, inputs, up)
    found = {}
    for what, run in (("forward", forward), ("forward and backward", both)):
        found[what] = m = rounds(calls(run, forms, inputs, up), 40960 // T)
        print(T, "causal," if causal else "", what, {n: round(ratio(m, n)[0], 2) for n in FORMS}, "thrown:", m["thrown"], flush=True)
    return found


def ratio(measured: dict[str, Any], name: str, base: str = "SDPA") -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios within rounds."""
    return bench.ratio(measured, name, base)


def memory() -> dict[str, Any]:
    """Peak bytes of forward with backward, above the inputs."""
    found = {}
    for T in LENGTHS:
        for causal in (False, True):
            inputs, up = draw(0, T)
            forms = {name: partial(f, causal=causal) for name, f in FORMS.items()}
            found[f"{T} {causal}"] = {n: peak(call) for n, call in calls(both, forms, inputs, up).items()}
            print(T, "causal" if causal else "", {n: f"{b / 1e6:.1f} MB" for n, b in found[f"{T} {causal}"].items()}, flush=True)
    return found


def errors() -> dict[str, Any]:
    """Largest error of output and gradients against float64, over SDPA's; the median of five draws."""
    found = {}
    for T in LENGTHS[:2]:
        for causal in (False, True):
            rows: dict[str, list[list[float]]] = {n: [] for n in FORMS}
            for seed in range(5):
                inputs, up = draw(seed, T)
                exact = [x.detach().double().requires_grad_() for x in inputs]
                out = sdpa(*exact, is_causal=causal)
                want = [out, *torch.autograd.grad(out, exact, up.double())]
                for name, f in FORMS.items():
                    out = f(*inputs, causal=causal)
                    got = [out, *torch.autograd.grad(out, inputs, up)]
                    rows[name].append([float((a - b).detach().abs().max()) for a, b in zip(got, want)])
            found[f"{T} {causal}"] = {n: [statistics.median(a[i] / b[i] for a, b in zip(r, rows["SDPA"])) for i in range(4)]
                                      for n, r in rows.items()}
            print(T, "causal" if causal else "", found[f"{T} {causal}"], flush=True)
    return found


def masks() -> dict[str, Any]:
    """Window, packed documents and ALiBi, all causal: rules against SDPA with a dense mask."""
    T = MASKED
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    documents = (torch.arange(T)[None] >= torch.tensor([0, 250, 300, 700, 1100, 1300, 1900])[:, None]).sum(0)[None]
    slopes = 2.0 ** -torch.arange(1, H + 1)
    rules = {"window": {"window": WINDOW}, "packed documents": {"mask": document_rule(documents), "causal": True},
             "ALiBi": {"bias": alibi_rule(slopes, T), "causal": True}}
    dense: dict[str, Callable[[], Tensor]] = {
        "window": lambda: (j <= i) & (i - j < WINDOW),
        "packed documents": lambda: (j <= i) & (documents[:, i] == documents[:, j])[:, None],
        "ALiBi": lambda: (slopes[:, None, None] * (j - i)).masked_fill_(j > i, -math.inf)[None]}
    found = {}
    for name, options in rules.items():
        inputs, up = draw(0, T)
        forms: dict[str, Attention] = {
            "SDPA": partial(sdpa, attn_mask=dense[name]()), "readable": first(partial(tiled_attention, **options)),
            "tuned": first(partial(tuned_attention, **options)),
            SMALL: first(partial(tuned_attention, **options, tile=128))}
        same(forms, inputs, up)
        found[name] = rounds(calls(both, forms, inputs, up), 10)
        forms["SDPA"] = partial(lambda make, *x: sdpa(*x, attn_mask=make()), dense[name])
        found[name]["peak"] = {n: peak(call) for n, call in calls(both, forms, inputs, up).items()}
        found[name]["due"] = 4 * (sum(x.numel() for x in inputs) + up.numel() + H * T)  # gradients, output, log-sum-exp
        print(name, {n: (round(ratio(found[name], n)[0], 2), f"{found[name]['peak'][n] / 1e6:.1f} MB") for n in forms}, flush=True)
    return found


def exponentials() -> dict[str, Any]:
    """Microseconds of exp and of exp2 on a tile of the tuned form; medians of 100 interleaved calls."""
    scores, half = -torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(0)).abs(), torch.arange(256) < 128
    tiles = {"all keys seen": scores, "half of them hidden": scores.where(half, -math.inf),
             "half of them far below": scores.where(half, -200.0)}
    found, out = {}, torch.empty_like(scores)
    for kind, x in tiles.items():
        seconds: dict[str, list[float]] = {"exp": [], "exp2": []}
        for i in range(200):
            name = ("exp", "exp2")[i % 2]
            start = time.perf_counter()
            getattr(torch, name)(x, out=out)
            seconds[name].append(time.perf_counter() - start)
        found[kind] = {name: 1e6 * statistics.median(t) for name, t in seconds.items()}
    print("exponentials", found, flush=True)
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"time {T}{', causal' if causal else ''}": partial(times, T, causal) for T in LENGTHS for causal in (False, True)},
    "memory": memory, "errors": errors, "masks": masks, "exponentials": exponentials}


def name_of(key: str) -> str:
    """A row's name."""
    T, causal = key.split()
    return f"{T}{', causal' if causal == 'True' else ''}"


def verdicts(facts: dict[str, Any]) -> str:
    """Each target with the worst value measured."""
    runs = {part: facts[part]["forward and backward"] for part in facts if part.startswith("time")}
    rows: list[tuple[str, float, float, bool]] = []

    def add(what: str, values: list[float], target: float, least: bool = False) -> None:
        if values:
            rows.append((what, min(values) if least else max(values), target, least))

    for form, most, faster, causal in (("readable", 1.9, math.nan, math.nan), ("tuned", 1.45, 1.8, 2.5)):
        add(f"{form}, forward and backward, time over SDPA's", [ratio(m, form)[0] for m in runs.values()], most)
        gains = {part: ratio(m, "plain", form)[0] for part, m in runs.items()}
        add(f"{form}, plain attention's time over it", [gain for part, gain in gains.items() if "causal" not in part], faster, True)
        add(f"{form}, the same, causal", [gain for part, gain in gains.items() if "causal" in part], causal, True)
        peaks = facts.get("memory", {})
        add(f"{form}, peak over SDPA's", [p[form] / p["SDPA"] for p in peaks.values()], 1.1)
        add(f"{form}, peak per doubling of T", [peaks[f"{2 * T} {c}"][form] / peaks[f"{T} {c}"][form]
                                                for T in LENGTHS[:-1] for c in (False, True) if peaks], 2.2)
        add(f"{form}, error over SDPA's", [x for e in facts.get("errors", {}).values() for x in e[form]], 1.5)
    for mask, found in facts.get("masks", {}).items():
        due = found["due"]
        if mask == "window":
            add("window, tuned, time over SDPA's with a dense mask", [ratio(found, "tuned")[0]], 1.0)
            add("window, tiles of 128, the same", [ratio(found, SMALL)[0]], 1.0)
        working = {n: peak - due for n, peak in found["peak"].items()}
        add(f"{mask}, tiles of 128, working memory over SDPA's", [working[SMALL] / working["SDPA"]], 1 / 8)
        add(f"{mask}, tiles of 128, whole peak over SDPA's", [found["peak"][SMALL] / found["peak"]["SDPA"]], 1 / 8)
    told = []
    for what, value, target, least in rows:
        met = value >= target if least else value <= target
        aim = ["none", ""] if math.isnan(target) else [f"at {'least' if least else 'most'} {target:g}", "yes" if met else "no"]
        told.append([what, f"{value:.{3 if target < 1 else 2}f}", *aim])
    return table(["worst case", "measured", "target", "met"], told)


def render(facts: dict[str, Any]) -> str:
    """All tables."""
    policy = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    about = (f"{bench.machine()}, {bench.today()}. {bench.versions(os.sys.executable, 'torch')}, {torch.get_num_threads()} threads, "
             f"{torch.backends.cpu.get_cpu_capability()}, thread policy {policy or 'default'}. ")
    texts = [about, verdicts(facts)]
    rows = []
    for part in (p for p in facts if p.startswith("time")):
        for what, m in facts[part].items():
            base = 1e3 * statistics.median(m["seconds"]["SDPA"])
            rows.append([f"{part[5:]}, {what}", f"{base:.0f} ms", *(spread(ratio(m, n)) for n in ("plain", "readable", "tuned")),
                         f"{len(m['seconds']['SDPA'])} ({m['thrown']})"])
    texts.append("Time over SDPA's: median of the ratios within a round, smallest and largest in brackets.\n\n" + table(
        ["T", "SDPA", "plain", "readable", "tuned", "rounds (thrown away)"], rows))
    if "memory" in facts:
        texts.append("Peak MB above the inputs, forward and backward:\n\n" + table(
            ["T", *FORMS], [[name_of(k), *(f"{p[n] / 1e6:.1f}" for n in FORMS)] for k, p in facts["memory"].items()]))
    if "errors" in facts:
        texts.append("Largest error against float64 over SDPA's, of output and gradients by q, k, v; median of five draws:\n\n" + table(
            ["T", *list(FORMS)[1:]], [[name_of(k), *(" / ".join(f"{x:.2f}" for x in e[n]) for n in list(FORMS)[1:])]
                                      for k, e in facts["errors"].items()]))
    if "masks" in facts:
        rows = [[f"{mask}: {n}", spread(ratio(found, n)), f"{found['peak'][n] / 1e6:.1f}", f"{(found['peak'][n] - found['due']) / 1e6:.1f}"]
                for mask, found in facts["masks"].items() for n in found["peak"]]
        texts.append(f"Masks at T={MASKED}, all causal, forward and backward; SDPA has the dense mask, made beforehand for the time and "
                     "inside for the memory:\n\n" + table(["", "time over SDPA's", "peak MB", "working MB"], rows))
    if "exponentials" in facts:
        texts.append("Microseconds of `exp` and `exp2` on a tile (4, 256, 256); far below is -200, which underflows:\n\n" + table(
            ["", "exp", "exp2"], [[kind, *(f"{t:.0f}" for t in m.values())] for kind, m in facts["exponentials"].items()]))
    return "\n\n".join(texts)


if __name__ == "__main__":
    torch.set_num_threads(2)
    bench.parts("tiled", __doc__, PARTS, render)
