"""What a training step of MiniLM is spent on: forward, gradients, optimizer, dropout, Python; CPU time, by ablation.

    OMP_NUM_THREADS=1 python benchmarks/step.py                 # about five minutes
    OMP_NUM_THREADS=1 python benchmarks/step.py --only "16 x 32"

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

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tunebook.kit.models import load
from tunebook.tuning.cost import count, sizes
from tunebook.tuning.methods import attach

SHAPES = [(16, length, n) for length, n in ((32, 9), (64, 7), (128, 4))]
SHARE = float(os.environ.get("BENCH_SHARE", "0.05"))  # of a core that other processes may take in a round
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}), "LoRA, query and value": ("lora", {}), "LoRA, all linear": ("lora", {"targets": "all-linear"}),
    "top 2 layers": ("top", {"k": 2}), "head": ("head", {})}
FIRST, DROPOUT, EMPTY = "full, only the first norm", "full, dropout 0.1", "full, of width 12"


def minilm(dropout: float = 0.0) -> nn.Module:
    """MiniLM with a head, in training mode."""
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return load("minilm", auto="AutoModelForSequenceClassification", num_labels=2, seed=0, **changes)[0].train()


def only(model: nn.Module, trains: Callable[[str], bool]) -> nn.Module:
    """The model with the gradients of some paths alone."""
    for path, p in model.named_parameters():
        p.requires_grad_(trains(path))
    return model


def parts_of(model: nn.Module, B: int, T: int) -> dict[str, Callable[[], None]]:
    """Forward; forward and backward; both and the update."""
    ids, y = torch.randint(1, 100, (B, T), generator=torch.Generator().manual_seed(0)), torch.arange(B) % 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def forward() -> torch.Tensor:
        optimizer.zero_grad()
        return F.cross_entropy(model(input_ids=ids).logits, y)

    def step() -> None:
        forward().backward()
        optimizer.step()
    return {"forward": lambda: (forward(), None)[1], "gradients": lambda: forward().backward(), "step": step}


def measure(B: int, T: int, n: int) -> dict[str, Any]:
    """CPU seconds, interleaved."""
    calls: dict[str, Callable[[], None]] = {}
    for name, (method, config) in METHODS.items():
        calls |= {f"{name}: {part}": f for part, f in parts_of(attach(minilm(), method, **config).train(), B, T).items()}
    first = only(minilm(), lambda path: path in ("bert.embeddings.LayerNorm.weight", "classifier.weight", "classifier.bias"))
    small = BertForSequenceClassification(BertConfig(
        hidden_size=12, num_hidden_layers=6, num_attention_heads=12, intermediate_size=48, vocab_size=101, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0))
    calls[FIRST] = parts_of(first, B, T)["gradients"]
    calls[DROPOUT] = parts_of(minilm(0.1), B, T)["step"]
    calls[EMPTY] = parts_of(small.train(), 1, 2)["step"]
    found = rounds(calls, n, 150, 3, SHARE, time.process_time)
    told = {name: round(ratio(found, f"{name}: step", "full: step")[0], 3) for name in METHODS}
    print(B, T, told, "thrown:", found["thrown"], flush=True)
    return found


PARTS = {f"{B} x {T}": partial(measure, B, T, n) for B, T, n in SHAPES}


def share(found: dict[str, Any], plus: str, minus: str | None = None) -> str:
    """Median over rounds of a difference, in percent of full tuning's step."""
    s = found["seconds"]
    less = s[minus] if minus else [0.0] * len(s[plus])
    return f"{round(100 * statistics.median((a - b) / c for a, b, c in zip(s[plus], less, s['full: step'])))} %"


def render(facts: dict[str, Any]) -> str:
    """All tables."""
    head = (f"{bench.machine()}, {bench.today()}. {bench.versions(os.sys.executable, 'torch', 'transformers')}, "
            f"{torch.get_num_threads()} thread, {torch.backends.cpu.get_cpu_capability()}. Rounds in which others took more than "
            f"{SHARE:g} cores were thrown away.")
    budget, methods = [], []
    quiet = sizes(minilm())
    for shape, found in facts.items():
        B, T = map(int, shape.split(" x "))
        s, full = found["seconds"], count(quiet, "full", B, T).flops
        counted = [f"{100 * full[p] / sum(full.values()):.0f} %" for p in full]
        parts = [("full: forward", None), (FIRST, "full: forward"), ("full: gradients", FIRST), ("full: step", "full: gradients"),
                 (EMPTY, None), (DROPOUT, "full: step")]
        budget.append([shape, f"{statistics.median(s['full: step']):.2f} s", *(share(found, *p) for p in parts), " / ".join(counted)])
        for name, (method, config) in METHODS.items():
            work = sum(count(quiet, method, B, T, **config).flops.values()) / sum(full.values())
            forward, gradients, step = (f"{name}: {part}" for part in ("forward", "gradients", "step"))
            methods.append([f"{shape}: {name}", spread(ratio(found, step, "full: step")), f"{work:.2f}", share(found, forward),
                            share(found, gradients, forward), share(found, step, gradients), f"{len(s[step])} ({found['thrown']})"])
    return "\n\n".join([
        head,
        "Full tuning by ablation, in percent of its step: the forward pass; what a backward pass adds when only the first norm trains "
        "(the gradients of the inputs); what it adds when everything trains (the gradients of the weights); the fused AdamW update. "
        "Python and dispatch are not a fifth part but lie in all of them: they are the step of a model with the same operations and width "
        "12, on two tokens. Dropout comes on top. Last, the same four parts in FLOPs, as chapter 38 counts them.\n\n" + table(
            ["batch x length", "step", "forward", "input gradients", "weight gradients", "optimizer", "of these, Python", "dropout adds",
             "FLOPs"], budget),
        "Each method's step over full tuning's, median of the ratios within a round with the smallest and the largest, beside the ratio of "
        "the FLOPs; its parts in percent of full tuning's step.\n\n" + table(
            ["method", "step over full's", "FLOPs over full's", "forward", "backward", "optimizer", "rounds (thrown away)"], methods)])


if __name__ == "__main__":
    bench.parts("step", __doc__, PARTS, render)
