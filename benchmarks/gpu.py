"""Attention and cross-entropy of this kit on a GPU beside PyTorch's kernels, and LoRA beside full tuning: time, memory, error.

    python benchmarks/gpu.py --out data/timings/gpu.json     # a few minutes: measures, keeps every sample and where it comes from
    python benchmarks/gpu.py --render data/timings/gpu.json  # writes the section of benchmarks/README.md from it, on any machine

A call is timed by two events on the stream, after the cache was overwritten, in rounds that run every form once, every other round in
reverse order. Only forms whose results were found equal are timed; a step of LoRA, whose B starts as 0, must have full tuning's first loss.
"""

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunebook.attention.tiled import tiled_attention, tuned_attention
from tunebook.entropy import linear_ce
from tunebook.tuning.methods import attach

Call = Callable[[], list[Tensor]]  # returns result and gradients
BACKENDS = {"SDPA, flash": SDPBackend.FLASH_ATTENTION, "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
            "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, math": SDPBackend.MATH}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the norm of a difference over the norm of the float64 result


def provenance() -> dict[str, str]:
    """Where a number comes from."""
    smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    driver = subprocess.run(smi, capture_output=True, text=True).stdout.strip() if torch.cuda.is_available() else ""
    return {"device": torch.cuda.get_device_name(), "driver, clocks": driver, "torch": torch.__version__, "cuda": str(torch.version.cuda),
            "python": platform.python_version(), "tf32": str(torch.backends.cuda.matmul.allow_tf32),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": "python benchmarks/gpu.py --out FILE"}


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest norm of a difference over the norm of what is right."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want))


def peak(call: Call) -> int:
    """Bytes allocated above what was there, at most, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def sample(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    flush = torch.empty(64 * 2**20, device="cuda")  # 256 MB, more than any cache
    events: dict[str, list[Any]] = {name: [] for name in calls}
    for i in range(-2, rounds):  # two rounds to warm up
        for name in list(calls)[:: -1 if i % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            calls[name]()
            end.record()
            events[name] += [(start, end)] * (i >= 0)
        torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def measured(what: str, calls: dict[str, Call], want: list[Tensor], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row of the record: samples, memory and error of every form that this device can run; the reason for the others."""
    row: dict[str, Any] = {"what": what, "dtype": str(dtype)[6:], "error": {}, "peak": {}, "refused": {}}
    for name in list(calls):
        try:
            row["error"][name] = distance(calls[name](), want)
            row["peak"][name] = peak(calls[name])
        except (RuntimeError, torch.cuda.OutOfMemoryError) as e:
            row["refused"][name] = str(e).splitlines()[0][:120]
        if not row["error"].get(name, 2.0) <= TOLERANCE[dtype]:
            row["refused"].setdefault(name, f"other results, off by {row['error'].get(name)}: not timed")
            del calls[name]
    row["ms"] = sample(calls, rounds)
    print(what, dtype, {n: f"{statistics.median(t):.2f} ms, {row['peak'][n] / 1e6:.0f} MB" for n, t in row["ms"].items()}, row["refused"],
          flush=True)
    return row


def graded(f: Callable[..., Tensor], inputs: list[Tensor], up: Tensor) -> list[Tensor]:
    """The result and its gradients."""
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, up)]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a textbook writes."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return s.softmax(-1) @ v


def fused(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by one named kernel."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attention(T: int, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward at B=1, H=16, D=64."""
    g = torch.Generator("cuda").manual_seed(0)
    *qkv, up = (torch.randn(1, 16, T, 64, generator=g, device="cuda").to(dtype) for _ in range(4))
    wide, kernel = (torch.float64, SDPBackend.MATH) if T <= 4096 else (torch.float32, SDPBackend.EFFICIENT_ATTENTION)
    want = graded(partial(fused, kernel, causal), [x.to(wide).requires_grad_() for x in qkv], up.to(wide))
    inputs = [x.requires_grad_() for x in qkv]
    forms = {"plain": partial(plain, causal=causal), "readable": lambda *x: tiled_attention(*x, causal=causal, tile=512)[0],
             "tuned": lambda *x: tuned_attention(*x, causal=causal, tile=1024, heads=16)[0],
             **{name: partial(fused, backend, causal) for name, backend in BACKENDS.items()}}
    return measured(f"attention, T={T}{', causal' if causal else ''}", {n: partial(graded, f, inputs, up) for n, f in forms.items()},
                    [w.double() for w in want], dtype, 20 if T < 16384 else 10)


def plain_ce(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """All logits at once, in float32 from there on."""
    return F.cross_entropy((h @ w.T).float(), y)


def cross_entropy(N: int, E: int, V: int, dtype: torch.dtype) -> dict[str, Any]:
    """Loss, and gradients by hidden states (N, E) and matrix (V, E)."""
    g = torch.Generator("cuda").manual_seed(0)
    h, w = (torch.randn(n, E, generator=g, device="cuda").mul(s).to(dtype) for n, s in ((N, 1.0), (V, E**-0.5)))
    y, one = torch.randint(V, (N,), generator=g, device="cuda"), torch.ones((), device="cuda")
    wide = [x.double().requires_grad_() for x in (h, w)]
    want = graded(lambda a, b: F.cross_entropy(a @ b.T, y), wide, one.double())
    inputs = [h.requires_grad_(), w.requires_grad_()]
    forms = {"plain": plain_ce, "ours": linear_ce.linear_cross_entropy, "ours, checkpointed": linear_ce.checkpointed_linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        forms["F.linear_cross_entropy"] = F.linear_cross_entropy
    calls = {n: partial(graded, lambda a, b, f=f: f(a, b, y).float(), inputs, one) for n, f in forms.items()}
    return measured(f"cross-entropy, N={N}, E={E}, V={V}", calls, want, dtype, 20)


def minilm(dtype: torch.dtype) -> nn.Module:
    """A classifier of MiniLM's shape with random weights, without dropout: 22.7 million parameters."""
    from transformers import BertConfig, BertForSequenceClassification
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2, **quiet)
    return BertForSequenceClassification(shape).to("cuda", dtype)


def llama(dtype: torch.dtype) -> nn.Module:
    """A random Llama of 1.24 billion parameters, in the shape of Llama 3.2 1B."""
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, use_cache=False)
    with torch.device("cuda"):
        return LlamaForCausalLM(shape).to(dtype)


def step(model: nn.Module, ids: Tensor, labels: Tensor) -> Call:
    """One update by fused AdamW; the call returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def update() -> list[Tensor]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, -2).float(), labels.flatten())
        loss.backward()
        optimizer.step()
        return [loss.detach()]
    return update


def tuning(what: str, build: Callable[[torch.dtype], nn.Module], rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """A step of full tuning and of LoRA (rank 8); memory holds weights, optimizer and step."""
    g = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(1000, 30000, (rows, length), generator=g, device="cuda")
    labels = torch.randint(2, (rows,), generator=g, device="cuda") if what.startswith("MiniLM") else ids
    query, value = ("query", "value") if what.startswith("MiniLM") else ("q_proj", "v_proj")
    head = None if what.startswith("MiniLM") else ()
    forms: dict[str, Any] = {"full": None, "LoRA, query and value": [query, value], "LoRA, all linear": "all-linear"}
    row: dict[str, Any] = {"what": f"tuning, {what}, {rows} x {length}", "dtype": str(dtype)[6:], "error": {}, "peak": {}, "refused": {},
                           "trains": {}}
    calls, want = {}, None
    for name, targets in forms.items():
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = build(dtype).train()
        if targets is not None:
            attach(model, "lora", r=8, alpha=16, targets=targets, head=head)
        row["trains"][name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        calls[name] = step(model, ids, labels)
        first = calls[name]()
        want = want or [first[0].double()]
        row["error"][name] = distance(first, want)
        if not row["error"][name] <= TOLERANCE[dtype]:
            row["refused"][name] = f"another first loss, off by {row['error'][name]}: not timed"
            del calls[name]
            continue
        calls[name]()
        torch.cuda.synchronize()
        row["peak"][name] = torch.cuda.max_memory_allocated() - before
    row["ms"] = sample(calls, 20)
    print(row["what"], dtype, {n: f"{statistics.median(t):.2f} ms, {row['peak'][n] / 1e6:.0f} MB" for n, t in row["ms"].items()},
          row["refused"], flush=True)
    return row


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    f"attention {T} {causal} {str(dtype)[6:]}": partial(attention, T, causal, dtype)
    for dtype in (torch.float32, torch.bfloat16) for T in (1024, 4096, 16384) for causal in (False, True)}
PARTS |= {f"cross-entropy {V} {str(dtype)[6:]}": partial(cross_entropy, 8192, 2048, V, dtype)
          for dtype in (torch.float32, torch.bfloat16) for V in (32768, 131072)}

PARTS |= {f"tuning MiniLM {rows} {str(dtype)[6:]}": partial(tuning, "MiniLM's shape", minilm, rows, 128, dtype)
          for dtype in (torch.float32, torch.bfloat16) for rows in (32, 256)}
PARTS |= {"tuning Llama bfloat16": partial(tuning, "Llama of 1.24 billion", llama, 4, 1024, torch.bfloat16)}


def table(record: dict[str, Any]) -> str:
    """The record as tables of Markdown: attention, cross-entropy, tuning."""
    texts = [", ".join(f"{k} {v}" for k, v in record["from"].items()) + "."]
    kinds = {"attention": "forward and backward", "cross-entropy": "forward and backward", "tuning": "a step with its update"}
    for kind, head in kinds.items():
        rows = [r for r in record["rows"] if r["what"].startswith(kind)]
        forms = list(dict.fromkeys(n for r in rows for n in [*r["ms"], *r["refused"]]))
        lines = [f"| {kind}, {head} | " + " | ".join(forms) + " |", "|---" + "|---:" * len(forms) + "|"]
        for r in rows:
            cells = [f"{statistics.median(r['ms'][n]):.2f} ms, {r['peak'][n] / 1e6:.0f} MB" if n in r["ms"] else "refused" for n in forms]
            lines.append(f"| {r['what'].removeprefix(kind + ', ')}, {r['dtype']} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def main() -> None:
    """Measure, or write the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--render", type=Path, help="a record whose tables go into benchmarks/README.md")
    args = parser.parse_args()
    if args.render:
        import bench
        told = f"Recorded in `{args.render}`, sha256 `{hashlib.sha256(args.render.read_bytes()).hexdigest()[:16]}`: "
        return bench.put("gpu", told + table(json.loads(args.render.read_text())))
    if not torch.cuda.is_available() or args.out is None:
        raise SystemExit("expected a GPU and --out FILE; --render FILE needs no GPU")
    record: dict[str, Any] = {"from": provenance(), "rows": []}
    for part in PARTS.values():
        record["rows"].append(part())
        torch.cuda.empty_cache()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(hashlib.sha256(args.out.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
