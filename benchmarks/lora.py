"""A training step of MiniLM with an adapter of ours, with peft's, and with every weight trained: CPU time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/lora.py                 # about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/lora.py --only "16 x 32" memory

Writes the tables into benchmarks/README.md. The facts of parts that are not run are taken from --facts.
Another method is one more row of PAIRS.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench
from bench import ratio, rounds, spread, table

os.environ["KINETO_LOG_LEVEL"] = "99"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from tunebook.kit.models import load
from tunebook.timing.memory import peak
from tunebook.tuning.methods import attach

warnings.filterwarnings("ignore", category=FutureWarning)  # peft calls what transformers has renamed
warnings.filterwarnings("ignore", message="Unsupported layer type")  # peft's own LayerNorm-tuning says it of layer norms
SHAPES = [(rows, length) for rows in (16, 32) for length in (32, 64, 128)]
SHARE = float(os.environ.get("BENCH_SHARE", "0.05"))  # of a core that other processes may take in a round
FULL = "full"


@dataclass(frozen=True)
class Pair:
    """One method in both libraries, on a model that is given to each afresh."""

    ours: Callable[[nn.Module], nn.Module]
    peft: Callable[[nn.Module], nn.Module]
    worst: float  # the target for ours / peft at each shape
    median: float  # and for the median over shapes


def _lora(targets: Any, worst: float, median: float) -> Pair:
    """LoRA of rank 8."""
    return Pair(partial(attach, method="lora", r=8, alpha=16, targets=targets),
                lambda m: get_peft_model(m, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)),
                worst, median)


TAILS = [f"{i}.output.dense" for i in range(6)]  # the end of each feed-forward, not of the attention
PAIRS = {"LoRA, query and value": _lora(["query", "value"], 1.00, 0.97), "LoRA, all linear": _lora("all-linear", 0.92, 0.87),
         "IA3": Pair(partial(attach, method="ia3"), lambda m: get_peft_model(m, IA3Config(
             task_type="SEQ_CLS", target_modules=["key", "value", *TAILS], feedforward_modules=TAILS)), 1.00, 1.00),
         "LayerNorm": Pair(partial(attach, method="layernorm"), lambda m: get_peft_model(m, LNTuningConfig(
             task_type="SEQ_CLS", target_modules=["LayerNorm"])), 1.00, 1.00)}


def minilm() -> nn.Module:
    """MiniLM with a head, without dropout, in training mode."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return load("minilm", auto="AutoModelForSequenceClassification", num_labels=2, **quiet)[0].train()


def step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], float]:
    """One update, fused AdamW: a call without arguments that returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def update() -> float:
        optimizer.zero_grad()
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(out, batch["labels"])
        loss.backward()
        optimizer.step()
        return loss.item()

    return update


def draw(rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens and labels, nothing padded."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, length), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (rows,), generator=g)}


def plain_name(name: str) -> str:
    """A parameter's name without what peft adds to it."""
    for extra in ("base_model.model.", ".modules_to_save", ".default", "lora_", ".weight"):
        name = name.replace(extra, "")
    return name.replace("ia3_l", "by").replace("ln_tuning_layers", "own")


def models(names: list[str]) -> dict[str, nn.Module]:
    """Full fine-tuning, and each pair, ours and peft's with the same start."""
    found = {FULL: minilm()}
    for name in names:
        found[f"{name}, peft"] = theirs = PAIRS[name].peft(minilm())
        found[f"{name}, ours"] = ours = PAIRS[name].ours(minilm())
        source, mine = ({plain_name(n): p for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours))
        with torch.no_grad():
            for n, p in mine.items():
                p.copy_(source[n].view_as(p))
    return found


def times(rows: int, length: int, n: int, names: list[str] | None = None, limit: float = 90) -> dict[str, Any]:
    """CPU seconds of steps in interleaved rounds; only methods whose losses agree are compared."""
    names, batch = names or list(PAIRS), draw(rows, length)
    calls = {name: step(model, batch) for name, model in models(names).items()}
    for name in names:
        a, b = ([calls[f"{name}, {who}"]() for _ in range(2)] for who in ("ours", "peft"))
        if max(abs(x - y) for x, y in zip(a, b)) > 1e-5:
            raise SystemExit(f"{name}: losses differ, ours {a}, peft {b}: only equal methods are compared")
    found = rounds(calls, n, limit, share=SHARE, clock=time.process_time) | {"share": SHARE}
    print(rows, length, {m: round(ratio(found, f"{m}, ours", f"{m}, peft")[0], 3) for m in names}, flush=True)
    return found


def memory(names: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Peak bytes that a step allocates beyond the weights and the optimizer's state."""
    names, found = names or list(PAIRS), {}
    for rows, length in SHAPES[:3]:
        calls = {name: step(model, draw(rows, length)) for name, model in models(names).items()}
        for f in calls.values():
            f()
        found[f"{rows} x {length}"] = {name: peak(f) for name, f in calls.items()}
    print("memory", found, flush=True)
    return found


ROUNDS = {512: 24, 1024: 14, 2048: 9, 4096: 5}  # by rows times length
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"{rows} x {length}": partial(times, rows, length, ROUNDS[rows * length]) for rows, length in SHAPES},
    "memory": memory}


def render(facts: dict[str, Any]) -> str:
    """All tables."""
    shapes = [p for p in facts if p != "memory"]
    versions = bench.versions(os.sys.executable, "torch", "transformers", "peft")
    isa = torch.backends.cpu.get_cpu_capability()
    texts = [f"{bench.machine()}, {bench.today()}. {versions}, {torch.get_num_threads()} thread, {isa}."]
    rows = []
    for name, pair in PAIRS.items():
        values = [ratio(facts[s], f"{name}, ours", f"{name}, peft")[0] for s in shapes]
        both = (("the worst shape", max(values), pair.worst), ("median of the shapes", statistics.median(values), pair.median))
        for what, value, most in both:
            rows.append([f"{name}: time over peft's, {what}", f"{value:.3f}", f"at most {most:.2f}", "yes" if value <= most else "no"])
        for where, p in facts.get("memory", {}).items():
            value = p[f"{name}, ours"] / p[f"{name}, peft"]
            rows.append([f"{name}: peak over peft's, {where}", f"{value:.3f}", "at most 1", "yes" if value <= 1 else "no"])
    texts.append(table(["", "measured", "target", "met"], rows))
    rows = [[s, name, f"{1e3 * statistics.median(facts[s]['seconds'][FULL]):.0f} ms",
             *(spread(ratio(facts[s], f"{name}, {a}", b)) for a, b in (("ours", f"{name}, peft"), ("ours", FULL), ("peft", FULL))),
             f"{len(facts[s]['seconds'][FULL])} ({facts[s]['thrown']})", f"{facts[s].get('share', 0.05):.2f}"]
            for name in PAIRS for s in shapes]
    head = ["rows x length", "", "full", "ours / peft", "ours / full", "peft / full", "rounds (thrown away)", "others, at most"]
    texts.append("CPU time of a step: median of the ratios within a round, smallest and largest in brackets.\n\n" + table(head, rows))
    if "memory" in facts:
        texts.append("Peak MB that a step allocates beside weights and optimizer:\n\n" + table(
            ["rows x length", *next(iter(facts["memory"].values()))],
            [[s, *(f"{b / 1e6:.1f}" for b in p.values())] for s, p in facts["memory"].items()]))
    return "\n\n".join(texts)


if __name__ == "__main__":
    torch.manual_seed(0)
    bench.parts("lora", __doc__, PARTS, render)
