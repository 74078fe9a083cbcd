"""What `tunebook compress` writes and how long it takes, against gzip, bzip2, xz, zstd and a trained model on the same texts."""

import bz2
import gzip
import lzma
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench
import torch
import torch.nn.functional as F

from tunebook.attention.block import Config, Transformer
from tunebook.entropy.coding import HEADER, FromLogits, NGrams, compress, decompress
from tunebook.kit.data import SPLITS, locate
from tunebook.kit.ledger import seed_everything

FRAME, OURS, STRONGEST = HEADER.size + 8, "tunebook compress", 9 | lzma.PRESET_EXTREME
Way = Callable[[bytes], bytes]


def read(name: str, splits: tuple[str, ...] = SPLITS, join: str = "") -> bytes:
    """A text of the catalogue."""
    found = locate(name)[1]
    return join.join(row["text"] for s in splits for row in found[s]).encode()


TEXTS = {"tinyshakespeare": partial(read, "tinyshakespeare"), "reviews": partial(read, "reviews", join="\n")}


def zstd(data: bytes, *options: str) -> bytes:
    """Through the command, one thread."""
    return subprocess.run(["zstd", "--single-thread", "-c", *options], input=data, capture_output=True, check=True).stdout


def peers() -> dict[str, tuple[Way, Way]]:
    """Each with its strongest setting: write, read."""
    found: dict[str, tuple[Way, Way]] = {
        "gzip -9": (lambda d: gzip.compress(d, 9, mtime=0), gzip.decompress), "bzip2 -9": (bz2.compress, bz2.decompress),
        "xz -9e": (lambda d: lzma.compress(d, preset=STRONGEST), lzma.decompress)}
    if shutil.which("zstd"):
        found["zstd -19"] = (lambda d: zstd(d, "-19"), lambda d: zstd(d, "-d"))
        found["zstd --ultra -22"] = (lambda d: zstd(d, "--ultra", "-22"), lambda d: zstd(d, "-d"))
    return found


def undisturbed(f: Callable[[], Any], n: int = 2, tries: int = 4) -> tuple[Any, list[float], int]:
    """The value of f, the seconds of n calls during which others were quiet, and how many calls were thrown away."""
    kept: list[float] = []
    for tried in range(1, tries + 1):
        before, start = bench.others(), time.perf_counter()
        value = f()
        took = time.perf_counter() - start
        if bench.others(before) <= max(0.05, 0.03 / took):
            kept.append(took)
        if len(kept) == n:
            return value, kept, tried - n
    raise SystemExit(f"{tries - len(kept)} of {tries} calls were disturbed: run this when the machine is quiet")


def files(name: str) -> dict[str, Any]:
    """Bytes and seconds of each method on one text; everything is read back and compared."""
    data, found = TEXTS[name](), {}
    (file, bits), writing, thrown = undisturbed(lambda: compress(data))
    back, reading, more = undisturbed(lambda: decompress(file))
    if back != data:
        raise SystemExit("tunebook compress lost something")
    found[OURS] = {"bytes": len(file), "predicted": bits / 8 + FRAME, "write": writing, "read": reading, "thrown": thrown + more}
    print(name, found[OURS], flush=True)
    for method, (write, back_again) in peers().items():
        file = write(data)
        if back_again(file) != data:
            raise SystemExit(f"{method} lost something")
        m = bench.rounds({"write": partial(write, data), "read": partial(back_again, file)}, 5, limit=60)
        found[method] = {"bytes": len(file), **m["seconds"], "thrown": m["thrown"]}
        print(name, method, len(file), flush=True)
    return {"size": len(data), "methods": found}


LENGTH, STEPS, PIECE = 128, 800, 2000


def trained(stream: torch.Tensor) -> Transformer:
    """A small causal transformer over bytes, one seed."""
    seed_everything(0)
    net = Transformer(Config(vocab=256, width=128, layers=3, heads=4, length=LENGTH, rotary=10_000.0))
    for p in net.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.08)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for step in range(STEPS):
        batch = stream[torch.randint(len(stream) - LENGTH, (16, 1)) + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(net(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, round(loss.item() / math.log(2), 3), flush=True)
    return net.eval()


@torch.no_grad()
def loss_bits(net: Transformer, data: bytes, fresh: int = LENGTH // 2) -> float:
    """Summed cross-entropy in bits; every byte after the LENGTH - fresh or more before it."""
    tokens = torch.tensor([10] * LENGTH + list(data) + [0] * (-len(data) % fresh))
    bits = []
    for w in tokens[fresh - 1 :].unfold(0, LENGTH + 1, fresh).split(64):
        rows = net(w[:, :-1]).logits[:, -fresh:]
        bits.append(F.cross_entropy(rows.flatten(0, 1), w[:, -fresh:].flatten(), reduction="none"))
    return torch.cat(bits)[: len(data)].double().sum().item() / math.log(2)


def transformer() -> dict[str, Any]:
    """A model that has read 90 % of the text, on the last 5 %: its loss, a piece really written, and its weights."""
    known, data = (read("tinyshakespeare", (s,)) for s in ("train", "test"))
    net = trained(torch.tensor(list(known)))

    @torch.no_grad()
    def predict(past: list[int]) -> torch.Tensor:
        return net(torch.tensor([([10] * LENGTH + past)[-LENGTH:]])).logits[0, -1]

    piece = data[:PIECE]
    start = time.process_time()
    file, _ = compress(piece, lambda: FromLogits(predict))
    took = time.process_time() - start
    if decompress(file, lambda: FromLogits(predict)) != piece:
        raise SystemExit("the transformer's file lost something")
    informed = NGrams()
    for byte in known:
        for k in range(7, -1, -1):
            informed.frequencies()
            informed.update(byte >> k & 1)
    knows = 0.0
    for byte in data:
        for k in range(7, -1, -1):
            knows -= math.log2(informed.frequencies()[byte >> k & 1] / 65536)
            informed.update(byte >> k & 1)
    found = {"size": len(data), "bits": loss_bits(net, data), "weights": sum(4 * p.numel() for p in net.parameters()),
             "piece": {"written": len(file) - FRAME, "predicted": loss_bits(net, piece, fresh=1) / 8, "seconds per MB": took / PIECE * 1e6},
             "informed": knows, "read": len(lzma.compress(known, preset=STRONGEST)),
             "alone": {m: len(write(data)) for m, (write, _) in peers().items()} | {OURS: len(compress(data)[0])}}
    print(found, flush=True)
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {**{name: partial(files, name) for name in TEXTS}, "transformer": transformer}


def files_table(name: str, facts: dict[str, Any]) -> str:
    """One text."""
    size, rows = facts["size"], []
    for method, m in sorted(facts["methods"].items(), key=lambda m: m[1]["bytes"]):
        speed = [f"{statistics.median(m[way]) / size * 1e6:.3g}" for way in ("write", "read")]
        calls = f"{len(m['write'])}, {len(m['read'])} ({m['thrown']})"
        rows.append([method, f"{m['bytes']:,}", f"{8 * m['bytes'] / size:.3f}", *speed, calls])
    written, predicted = (facts["methods"][OURS][k] for k in ("bytes", "predicted"))
    met = "met" if abs(written - predicted) <= 0.001 * predicted + 1 else "not met"
    about = (f"**{name}**, {size:,} bytes. The loss predicts {predicted:,.2f} bytes, {FRAME} of them the frame; written are {written:,}, "
             f"{written - predicted:.2f} more ({100 * (written / predicted - 1):.4f} %). Target: within 0.1 % plus a byte, {met}.")
    return about + "\n\n" + bench.table(["", "bytes", "bits per byte", "write, s per MB", "read, s per MB", "calls (thrown away)"], rows)


def transformer_table(facts: dict[str, Any]) -> str:
    """Trained models with and without what the reader needs."""
    size, piece = facts["size"], facts["piece"]
    rates = [(m, 8 * b / size, 0) for m, b in facts["alone"].items()]
    rates += [("tunebook compress, after the 90 %", facts["informed"] / size, facts["read"]),
              ("transformer, trained on the 90 %", facts["bits"] / size, facts["weights"])]
    best, rows = min(8 * b / size for b in facts["alone"].values()), []
    for method, rate, carried in sorted(rates, key=lambda r: r[1]):
        pays = f"{8 * carried / (best - rate):,.0f}" if carried and rate < best else ""
        rows.append([method, f"{rate:.3f}", f"{rate + 8 * carried / size:,.2f}", pays])
    about = (f"**The last 5 % of tinyshakespeare**, {size:,} bytes, with and without a model that has read the first 90 %: a causal "
             f"transformer over bytes ({facts['weights'] // 4:,} float32 weights, {STEPS} steps of 16 x {LENGTH} bytes, one seed), "
             "and the n-gram model of the command. The transformer's rate is its loss, each byte after 64 to 127 others; the first "
             f"{PIECE:,} bytes were really written and read back: {piece['written']:,} bytes, {piece['predicted']:,.1f} predicted, "
             f"{piece['seconds per MB'] / 60:.0f} CPU minutes per MB each way. The reader needs the weights, or the 90 % as xz packs it. "
             "The last column is the length at which a text of this kind pays for that, against the best of those that know nothing, "
             "at the rates of this table.")
    return about + "\n\n" + bench.table(["", "bits per byte", "with what the reader needs", "pays from, bytes"], rows)


def zstd_version() -> str:
    """As the command says."""
    if not shutil.which("zstd"):
        return "not installed"
    told = subprocess.run(["zstd", "--version"], capture_output=True, text=True, check=True).stdout
    return (re.search(r"v[\d.]+", told) or ["of unknown version"])[0]


def render(facts: dict[str, Any]) -> str:
    """All tables."""
    about = (f"{bench.machine()}, {bench.today()}. {bench.versions(sys.executable, 'torch')}, one thread; gzip, bzip2 and xz from Python's "
             f"standard library, zstd {zstd_version()} as a command. A MB is 10^6 bytes; seconds are medians.")
    return "\n\n".join([about, *(files_table(n, facts[n]) for n in TEXTS if n in facts),
                        *([transformer_table(facts["transformer"])] if "transformer" in facts else [])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench.parts("coding", __doc__, PARTS, render)
