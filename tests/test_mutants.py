"""The claims can fail: a chapter whose code is made wrong in one place does not pass."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from tunebook.kit.run import Spec, run_all

FIRST_STOPS = new_code_cell("import os; os.environ.pop('TUNEBOOK_CLAIMS')")  # outside the runner's record, a claim that fails raises

MUTANTS = {  # name: (chapter, right, wrong)
    "scores without the scale": ("attention/10_scores", "q @ k.mT * (q.shape[-1] ** -0.5 if", "q @ k.mT * (1.0 if"),
    "softmax over the queries": ("attention/10_scores", "exps / exps.sum(-1,", "exps / exps.sum(-2,"),
    "causal aligned with the first key": ("attention/11_masks", "torch.arange(keys - queries, keys, device=device)[:, None]",
                                          "torch.arange(queries, device=device)[:, None]"),
    "documents that see one another": ("attention/11_masks", ":, None] == documents[", ":, None] >= documents["),
    "a checker without zero scores": ("attention/11_masks", '("zero", 0.0), ', ""),
    "turned the wrong way": ("attention/12_positions", "torch.cat((-b, a), -1) * sin", "torch.cat((b, -a), -1) * sin"),
    "angles in the dtype of the result": ("attention/12_positions", "turn = positions[..., None].to(angles) *",
                                          "turn = positions[..., None].to(dtype) *"),
    "key-value heads tiled": ("attention/13_heads", "x.repeat_interleave(times, dim=-3)", "torch.cat([x] * times, dim=-3)"),
    "keys and values swapped": ("attention/13_heads", 'zip(("query", "key", "value"), stacked', 'zip(("query", "value", "key"), stacked'),
    "the old mean not rescaled": ("attention/14_tiled", "mean = mean * shrink + weights @", "mean = mean + weights @"),
    "log-sum-exp without the top": ("attention/14_tiled", " / total.clamp(min=1), top + total.log()", " / total.clamp(min=1), total.log()"),
    "keys of the last tile dropped": ("attention/14_tiled", "range(first, last, plan.tile)",
                                      "range(first, last - plan.tile + 1, plan.tile)"),
    "row sums without the log-sum-exp's gradient": ("attention/14_tiled", ".sum(-1, keepdim=True) - d_lse[..., rows, :]",
                                                    ".sum(-1, keepdim=True)"),
    "log-sum-exp of the tuned form in base two": ("attention/14_tiled", "(t + sums.log2()) / _LOG2E", "t + sums.log2()"),
    "a window one key too wide": ("attention/14_tiled", "i + shift < j + window", "i + shift <= j + window"),
    "square Conv1D not transposed": ("attention/15_block", '".c_" in name and p.ndim == 2: p = p.mT',
                                     '".c_" in name and p.ndim == 2 and p.shape[0] != p.shape[1]: p = p.mT'),
    "places restart after a cache": ("attention/15_block", "torch.arange(past, past + tokens.shape[-1], device",
                                     "torch.arange(tokens.shape[-1], device"),
    "keys not rotated": ("attention/15_block", "q, k = rotate(q, *turn), rotate(k, *turn)", "q, k = rotate(q, *turn), k"),
    "positions count padding": ("attention/16_cache", "(mask.cumsum(-1) - 1).clamp(min=0)",
                                "torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)"),
    "beams keep another's cache": ("attention/16_cache", "cache.select((each + source.gather(1, kept)).flatten())",
                                   "cache.select((each + kept % K).flatten())"),
    "lens without the last norm": ("attention/17_lens", "model.head(model.norm(x)) for x", "model.head(x) for x"),
    "rollout without the residual": ("attention/17_lens", "in residual * eye + (1 - residual) * w: out", "in w: out"),
    "the last state normed twice": ("attention/17_lens", "model.head(states[-1])", "model.head(model.norm(states[-1]))"),
    "the next head ablated": ("attention/17_lens", "z[..., chosen[layer], :] = 0 if", "z[..., [h - 1 for h in chosen[layer]], :] = 0 if"),
    "induction looks at the copy itself": ("attention/17_lens", "nn.functional.pad(same[..., :-1], (1, 0)).tril(-1)", "same.tril(-1)"),
    "states added without rescaling": ("entropy/20_softmax", "a.total * fa + b.total * fb", "a.total + b.total"),
    "log1mexp without its inner switch": ("entropy/20_softmax", "(-torch.where(near, half, z).exp()).log1p()", "(-z.exp()).log1p()"),
    "a sure class loses its loss": ("entropy/20_softmax", "(shifted - _rest(shifted).log1p())",
                                    "(shifted - shifted.exp().sum(-1, keepdim=True).log())"),
    "a gradient one percent too large": ("entropy/21_xent", "q.sum(-1, keepdim=True) * p - q,", "q.sum(-1, keepdim=True) * p - 1.01 * q,"),
    "mean over all rows": ("entropy/21_xent", "rows.sum() / size +", "rows.sum() / kept.numel() +"),
    "a carry that is lost": ("entropy/23_coding", "bytes([self.out[at] + 1])", "bytes([self.out[at]])"),
    "the end below the interval": ("entropy/23_coding", "self.low += -self.low % (1 << SPARE)", "self.low -= self.low % (1 << SPARE)"),
    "frequency zero": ("entropy/23_coding", "(MAX_TOTAL - len(p))).long() + 1)", "(MAX_TOTAL - len(p))).long())"),
    "damage not looked for": ("entropy/23_coding", "len(body) < HEADER.size or _sum(body) != seal", "len(body) < HEADER.size"),
    "the gradient from above is dropped": ("entropy/22_linear_ce", "(g.mul_(upstream) if ctx.total else g)", "g"),
    "the bias is forgotten": ("entropy/22_linear_ce", "if bias is not None: z += bias", "pass"),
    "mean over the ignored rows too": ("entropy/22_linear_ce", "float(w[targets[kept]].sum())", "float(w[targets.clamp(min=0)].sum())"),
    "an evaluation makes gradients": ("entropy/22_linear_ce", "torch.is_grad_enabled() and x is not None and", "x is not None and"),
    "a grader that tolerates too much": ("entropy/25_gradient_checks", "torch.finfo(dtype).eps ** 0.5", "torch.finfo(dtype).eps ** 0.2"),
    "gradients from above of ones": ("entropy/25_gradient_checks", "Tensor: return torch.randn(shape, generator=g, dtype=torch.float64)",
                                     "Tensor: return torch.ones(shape, dtype=torch.float64)"),
    "a second call that is not made": ("entropy/25_gradient_checks", "try: _grade_once(function, case, names, truth)", "try: pass"),
    "differences to one side": ("entropy/25_gradient_checks", "(f(x + s) - f(x - s)) / (2 * h)", "(f(x + s) - f(x)) / h"),
    "every bin counts alike": ("entropy/24_calibration", "(self.count * (self.frequency - self.forecast).abs())",
                               "(self.count.mean() * (self.frequency - self.forecast).abs())"),
    "a temperature turned over": ("entropy/24_calibration", "<= 1e-15 * beta: return 1 / new", "<= 1e-15 * beta: return new"),
    "a KL without q minus p": ("entropy/24_calibration", "log_q.exp() - log_p.exp() * (1 + d))", "-log_p.exp() * d)"),
    "losses of ignored tokens in the count": ("entropy/24_calibration", ".double().sum().item(), len(y))",
                                              ".double().sum().item(), targets.numel())"),
    "the old weight not copied": ("tuning/28_methods", "layer.kept = weight.detach().clone(),", "layer.kept = weight.detach(),"),
    "targets that need not match": ("tuning/28_methods", "not any(hit(p, n) for p in found)", "False"),
    "a head that stays frozen": ("tuning/28_methods", "for top in tops: model.get_submodule(top).requires_grad_(True)", "pass"),
    "another base not noticed": ("tuning/28_methods", 'if told.get("base", a.base) != a.base:', "if False:"),
    "decay through the gradient": ("tuning/26_adamw", 'p.mul_(1 - group["lr"] * group["weight_decay"])',
                                   'g = g + group["weight_decay"] * p'),
    "epsilon inside the root": ("tuning/26_adamw", "(square.sqrt() / (1 - beta2**t) ** 0.5).add_(group[\"eps\"])",
                                "(square / (1 - beta2**t)).add_(group[\"eps\"]).sqrt()"),
    "corrections a step late": ("tuning/26_adamw", 't = state["step"].item()', 't = max(1, state["step"].item() - 1)'),
    "the schedule one update late": ("tuning/26_adamw", "return step / rise if step < rise", "return (step + 1) / rise if step < rise"),
    "a clip for each tensor": ("tuning/26_adamw", "for g in grads: g.mul_(factor.to(g.device))",
                               "for g, n in zip(grads, norms): g.mul_((limit / (n + 1e-6)).clamp(max=1.0))"),
    "norms that decay": ("tuning/26_adamw", '"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0',
                         '"params": [p for p in trained if p.ndim < 2], "weight_decay": weight_decay'),
    "a penalty once a batch": ("tuning/37_regularize", 'strength * (batch["labels"] != -100).sum().to(total) * penalty',
                               "strength * penalty"),
    "what survives dropout not rescaled": ("tuning/37_regularize", "(mask.to(x.dtype) / (1 - p) if", "(mask.to(x.dtype) if"),
    "one length of the move for the whole batch": ("tuning/37_regularize", "(flat / top[:, None]).norm(dim=1))",
                                                    "(flat / top[:, None]).norm())"),
    "a move down the loss": ("tuning/37_regularize", "out + next(moves)", "out - next(moves)"),
    "logits averaged, not probabilities": ("tuning/37_regularize", "stacked.log_softmax(-1).logsumexp(0) - math.log(len(stacked))",
                                           "stacked.mean(0).log_softmax(-1)"),
    "padding that counts as a label": ("tuning/27_batches", '"labels": IGNORED}\n', '"labels": 0}\n'),
    "a mask one position too wide": ("tuning/27_batches", "arange(max(lengths)) < torch.tensor", "arange(max(lengths)) <= torch.tensor"),
    "an order that remembers": ("tuning/27_batches", 'random.Random(f"{seed} {epoch}"), POOL', "random, POOL"),
    "a mean of means": ("tuning/27_batches", "self.total + total, self.count + count", "self.total + total / count, self.count + 1"),
    "each part by its own labels": ("tuning/30_train", "(scale / max(1, count))).backward()",
                                    "(scale / max(1, sum(map(counted, part))))).backward()"),
    "moments left behind": ("tuning/30_train", "        loop.optimizer.state[of[name]][what] = v.to(of[name].device)", "        pass"),
    "damage not looked at": ("tuning/30_train", "if sha256(path / name) != digest:", "if not digest:"),
    "trained in eval mode": ("tuning/30_train", "    loop.model.train()", "    loop.model.eval()"),
    "the fast form's A not scaled": ("tuning/33_lora", "u = (B.mT @ g.mT).mul_(ctx.scale)", "u = B.mT @ g.mT"),
    "DoRA scales the bias too": ("tuning/33_lora", "elif bias is not None: y = y - bias", "else: pass"),
    "PiSSA leaves the base whole": ("tuning/33_lora", "weight.data.copy_(weight - self.update())", "pass"),
    "importance without the gradient": ("tuning/33_lora", "now = (p * p.grad).abs()", "now = p.abs()"),
    "NF4 rounds up": ("tuning/33_lora", "torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)", "torch.bucketize(x, levels[:-1])"),
    "labels at visible places too": ("tuning/31_pretrain", "shown, ids), ids.masked_fill(~hidden, IGNORED)", "shown, ids), ids"),
    "a span's starts too rare": ("tuning/31_pretrain", "< 1 - (1 - rate) ** (1 / span)", "< rate / span"),
    "no hidden token stays as it is": ("tuning/31_pretrain", "torch.where(u < sum(split), drawn, ids)", "drawn"),
    "neighbours deleted together": ("tuning/31_pretrain", "gone = drawn & ~drawn.roll(1, 1) &", "gone = drawn &"),
    "the causal loss shifts twice": ("tuning/31_pretrain", "if causal: logits, labels = logits[:, :-1], labels[:, 1:]",
                                     "if causal: logits, labels = logits[:, :-2], labels[:, 2:]"),
    "the share of the text taken for the prefix's": ("tuning/35_prompts", "(scores(q, prefix_k).logsumexp(-1) - s.logsumexp(-1)).sigmoid()",
                                                     "(s.logsumexp(-1) - scores(q, prefix_k).logsumexp(-1)).sigmoid()"),
    "keys and values of a prefix exchanged": ("tuning/35_prompts", "cache.update(both[2 * layer], both[2 * layer + 1], layer)",
                                              "cache.update(both[2 * layer + 1], both[2 * layer], layer)"),
    "the mask grows behind the text": ("tuning/35_prompts", "torch.cat((mask.new_ones(shape[0], tokens), mask), 1)",
                                       "torch.cat((mask, mask.new_ones(shape[0], tokens)), 1)"),
    "the encoder missing from the file": ("tuning/35_prompts", 'return {"prompt_embeddings": self.values()}',
                                          'return {"prompt_embeddings": self.rows}'),
    "virtual tokens left in the output": ("tuning/35_prompts", "cut = output[0][:, len(self.rows):]", "cut = output[0]"),
    "embeddings as near as the head": ("tuning/32_full", "below = len(order) + 1", "below = 0"),
    "rates that grow downwards": ("tuning/32_full", "rate * decay**depth", "rate / decay**depth"),
    "decay for biases and norms": ("tuning/32_full", "weight_decay * matrix", "weight_decay"),
    "a bottleneck without its residual": ("tuning/34_adapters", "return h + self.up(", "return self.up("),
    "a bottleneck that starts at random": ("tuning/34_adapters", "for p in self.up.parameters(): nn.init.zeros_(p)", "pass"),
    "the first two layers that fit": ("tuning/34_adapters", "if out == width][-2:]", "if out == width][:2]"),
    "the feed-forward's outputs scaled": ("tuning/34_adapters", "Scale(layer, name, path in inputs)", "Scale(layer, name, False)"),
    "a bias that is not scaled": ("tuning/34_adapters", "None if bias is None else bias * self.by", "bias"),
    "a frozen matrix keeps its input": ("tuning/38_cost", "[x] * bool(w.source), flops=n", "[x], flops=n"),
    "a padding mask that costs nothing": ("tuning/38_cost", "[4 * B * H * T] + [4 * B * T * S] * mask", "[4 * B * H * T]"),
    "the scores are not computed again": ("tuning/38_cost", "flops = 5 * n", "flops = 4 * n"),
    "DoRA's length is not counted": ("tuning/38_cost", "lambda o, i: r * (i + o) + o)", "lambda o, i: r * (i + o))"),
    "the moments take no memory": ("tuning/38_cost", "return 8 * trained + max(4 * trained", "return max(4 * trained"),
    "labels numbered from the end": ("tuning/29_tune", "for i, x in enumerate(labels)}", "for i, x in enumerate(reversed(labels))}"),
    "a method's start not drawn from the seed": ("tuning/29_tune", "        torch.manual_seed(seed)\n        attach(", "        attach("),
    "a sample of its own for each size": ("tuning/29_tune", "sets.Dice(seed).shuffled(rows)[:count]",
                                          "sets.Dice(seed + count).shuffled(rows)[:count]"),
    "Holm's steps that may fall": ("tuning/36_compare", "top = max(top, min(1.0, (len(p) - rank) * value))",
                                   "top = min(1.0, (len(p) - rank) * value)"),
    "a p-value of one side": ("tuning/36_compare", "2 * float(t.sf(abs(mean) / se, df))", "float(t.sf(abs(mean) / se, df))"),
    "a search that sees the test split": ("tuning/36_compare", "[job(m, r, tuning_seed, **shared)",
                                          "[job(m, r, tuning_seed, test=True, **shared)"),
    "a coin that always falls alike": ("timing/40_clock", "first = coin.randrange(2)", "first = 0"),
    "the clock's own cost left in": ("timing/40_clock", "block(self.call, self.n, self.clock) - self.empty, 1)",
                                     "block(self.call, self.n, self.clock), 1)"),
    "an interval of one side's chance": ("timing/40_clock", "<= (1 - level) / 2).sum()", "<= 1 - level).sum()"),
    "noise that makes things equal": ("timing/40_clock", "if 1 / (1 + effect) <= low and high <= 1 + effect",
                                      "if 1 / far <= low and high <= far"),
    "outputs that follow their input": ("timing/40_clock", "[out.detach().clone() if", "[out.detach() if"),
    "a changed sample read": ("timing/40_clock", "if told != _digest(r):", "if not told:"),
    "bound that is too wide": ("kit/00_checks", "nu = terms * torch.finfo(dtype).eps / 2", "nu = terms * 1e-2"),
    "interval too narrow": ("kit/01_ledger", "t.ppf(0.5 + level / 2, n - 1)", "t.ppf(0.5 + level / 2, 1000)"),
    "digest not compared": ("kit/02_ladder", "if (got := sha256(path)) != expected:", "if (got := sha256(path)) == 'never':"),
    "another seed in the shipped set": ("kit/03_data", "seed: int = 0,  # the shipped", "seed: int = 1,  # the shipped"),
    "a multiply-add that counts as one": ("timing/41_roofline", "return 2 * a.numel() * (b.shape[-1]", "return a.numel() * (b.shape[-1]"),
    "attention's scores not computed again": ("timing/41_roofline", "q.shape[-1] * (3 if back else 1)", "q.shape[-1] * (2 if back else 1)"),
    "an unknown kernel counts as nothing": ("timing/41_roofline",
                                            "STEPS.get(name, 1 if plain else None)", "STEPS.get(name, 1 if plain else 0)"),
    "a row expanded is many rows": ("timing/41_roofline", "zip(t.shape, t.stride()) if step or not n)", "zip(t.shape, t.stride()))"),
    "a layer whose rows move nothing": ("timing/41_roofline", "1 - half * (1 / E + 1 / M)", "1 - half * (1 / E)"),
}
UNTOUCHED = ("entropy/21_xent", "def log_softmax(", "def log_softmax(")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("mutants")
    specs = []
    for i, (chapter, right, wrong) in enumerate([*MUTANTS.values(), UNTOUCHED]):
        nb = nbformat.read(root / "nbs" / f"{chapter}.ipynb", 4)
        hits = [c for c in nb.cells if c.cell_type == "code" and c.source.startswith("#| export") and right in c.source]
        assert len(hits) == 1, f"{right!r} stands in {len(hits)} exported cells of {chapter}: renew the mutant"
        hits[0].source = hits[0].source.replace(right, wrong)
        path = folder / f"{i}.ipynb"
        nb.cells.insert(0, FIRST_STOPS)
        nbformat.write(nb, path)
        specs.append(Spec(str(path), str(i), str(folder / "out")))
    return dict(zip([*MUTANTS, None], run_all(specs, workers=2)))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_chapter_does_not_pass(mutant, runs):
    failure = runs[mutant]["failure"]
    assert failure and failure["kind"] == "cell error", runs[mutant]["status"]


def test_an_untouched_chapter_passes(runs):
    assert runs[None]["failure"] is None
