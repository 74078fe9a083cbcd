"""What the cache of keys and values saves: seconds per token with and without it, against the length of the text, and against transformers.

    OMP_NUM_THREADS=1 python benchmarks/generation.py           # about a minute; writes benchmarks/README.md
    OMP_NUM_THREADS=1 python benchmarks/generation.py --dry     # writes nothing

A round runs every variant once, every other round in reverse order; a ratio is taken within a round, and the table shows the median over
rounds with the smallest and the largest. Nothing is timed before its logits or tokens have been found equal to those of the other variants.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench
import torch
import transformers

from tunebook.attention.block import Transformer
from tunebook.attention.cache import KVCache, Recompute, feed, generate

VOCAB, WIDTH, LAYERS, HEADS, TABLE = 4096, 256, 4, 8, 1024
LENGTHS, PROMPT, NEW = (32, 128, 512, 1000), 64, 64
Call = tuple[Callable[[], torch.Tensor], Callable[[], object]]  # what is timed, and what undoes it, which is not


def models() -> tuple[transformers.GPT2LMHeadModel, Transformer]:
    """Make a random GPT-2 of transformers, and ours with its weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=TABLE,
                                     bos_token_id=None, eos_token_id=None, initializer_range=0.1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    return theirs, Transformer.from_pretrained(theirs)


def steps(theirs: transformers.GPT2LMHeadModel, ours: Transformer, S: int) -> tuple[dict[str, Call], int]:
    """Logits after S tokens, of which S - 1 are cached, three ways; and the bytes that the cache holds."""
    tokens = torch.randint(VOCAB, (1, S), generator=torch.Generator().manual_seed(S))
    cache, other = KVCache(), transformers.DynamicCache()
    feed(ours, tokens[:, :-1], cache)
    theirs(tokens[:, :-1], past_key_values=other, use_cache=True)

    def library() -> torch.Tensor:
        return theirs(tokens[:, -1:], past_key_values=other, use_cache=True).logits[:, -1]

    return {"with": (lambda: feed(ours, tokens, cache)[:, -1], lambda: cache.crop(1)),
            "without": (lambda: feed(ours, tokens, Recompute())[:, -1], lambda: None),
            "transformers": (library, lambda: other.crop(-1))}, cache.nbytes()


def texts(theirs: transformers.GPT2LMHeadModel, ours: Transformer, beams: int) -> dict[str, Call]:
    """Write a text, three ways."""
    tokens = torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def library() -> torch.Tensor:
        return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False,
                               num_beams=beams, pad_token_id=0)

    return {"with": (lambda: generate(ours, tokens, NEW, beams=beams), lambda: None),
            "without": (lambda: generate(ours, tokens, NEW, beams=beams, cache=Recompute()), lambda: None),
            "transformers": (library, lambda: None)}


def measured(todo: dict[str, Call], rounds: int, limit: float) -> list[dict[str, float]]:
    """Time each variant in each round, after one untimed; stop after `limit` seconds but not before three rounds."""
    results = {}
    for name, (call, undo) in todo.items():  # also warms up
        results[name] = call()
        undo()
    for name, got in results.items():
        torch.testing.assert_close(got, results["without"], rtol=1e-4, atol=1e-3 if got.is_floating_point() else 0,
                                   msg=lambda m, name=name: f"{name} computes something else: {m}")
    found: list[dict[str, float]] = []
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > limit:
            break
        one = {}
        for name in list(todo)[:: -1 if i % 2 else 1]:
            call, undo = todo[name]
            began = time.perf_counter()
            call()
            one[name] = time.perf_counter() - began
            undo()
        found.append(one)
    return found


def row(what: str, found: list[dict[str, float]], per: int, size: str) -> str:
    """One line of the table; times are for `per` tokens."""
    def ratio(a: str, b: str) -> str:
        values = [r[a] / r[b] for r in found]
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    def ms(name: str) -> str:
        return f"{statistics.median(r[name] for r in found) * 1000 / per:.2f} ms"

    cells = [what, ms("with"), ms("without"), ratio("with", "without"), ratio("with", "transformers"), size, str(len(found))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--limit", type=float, default=9, metavar="S", help="seconds for each row (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="do not write the README")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    load, began, lines = os.getloadavg()[0], time.perf_counter(), []
    theirs, ours = models()
    with torch.no_grad():
        for S in LENGTHS:
            todo, held = steps(theirs, ours, S)
            lines.append(row(f"next token after {S}", measured(todo, args.rounds, args.limit), 1, f"{held / 2**20:.2f} MiB"))
            print(lines[-1], flush=True)
        for beams in (1, 4):
            what = f"{NEW} tokens after {PROMPT}, {'greedy' if beams == 1 else f'{beams} beams'}"
            lines.append(row(what, measured(texts(theirs, ours, beams), args.rounds, args.limit), NEW, ""))
            print(lines[-1], flush=True)
    head = ["| what | with the cache, per token | without | with / without | with / transformers | cache | rounds |",
            "|---|---:|---:|---|---|---:|---:|"]
    about = (f"{bench.machine()}, {bench.today()}. {bench.versions(Path(sys.executable), 'tunebook', 'torch', 'transformers')}. "
             f"{torch.get_num_threads()} thread; load average before: {load:.2f}; {time.perf_counter() - began:.0f} s in all. "
             f"A random GPT-2: {LAYERS} layers, width {WIDTH}, {HEADS} heads, {VOCAB} tokens, float32.")
    text = "\n".join([about, "", *head, *lines])
    print(text)
    if not args.dry:
        bench.put("generation", text)


if __name__ == "__main__":
    main()
