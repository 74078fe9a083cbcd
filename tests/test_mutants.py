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
    "embeddings as near as the head": ("tuning/32_full", "below = len(order) + 1", "below = 0"),
    "rates that grow downwards": ("tuning/32_full", "rate * decay**depth", "rate / decay**depth"),
    "decay for biases and norms": ("tuning/32_full", "weight_decay * matrix", "weight_decay"),
    "a bottleneck without its residual": ("tuning/34_adapters", "return h + self.up(", "return self.up("),
    "a bottleneck that starts at random": ("tuning/34_adapters", "for p in self.up.parameters(): nn.init.zeros_(p)", "pass"),
    "the first two layers that fit": ("tuning/34_adapters", "if out == width][-2:]", "if out == width][:2]"),
    "the feed-forward's outputs scaled": ("tuning/34_adapters", "Scale(layer, name, path in inputs)", "Scale(layer, name, False)"),
    "a bias that is not scaled": ("tuning/34_adapters", "None if bias is None else bias * self.by", "bias"),
    "bound that is too wide": ("kit/00_checks", "nu = terms * torch.finfo(dtype).eps / 2", "nu = terms * 1e-2"),
    "interval too narrow": ("kit/01_ledger", "t.ppf(0.5 + level / 2, n - 1)", "t.ppf(0.5 + level / 2, 1000)"),
    "digest not compared": ("kit/02_ladder", "if (got := sha256(path)) != expected:", "if (got := sha256(path)) == 'never':"),
    "another seed in the shipped set": ("kit/03_data", "seed: int = 0,  # the shipped", "seed: int = 1,  # the shipped"),
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
