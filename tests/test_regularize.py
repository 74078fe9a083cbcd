"""Wrappers of a loss, dropout and averaging: equal to torch's and to hand-made ones in drawn settings, and clear about bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunebook.kit.checks import bound, close, same
from tunebook.tuning.adamw import clip
from tunebook.tuning.regularize import average, dropout, fgm, l1, l2

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
inf, nan = math.inf, math.nan


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Words(nn.Module):
    """An embedding, a mixing layer, a head; the embedding may be asked twice."""

    def __init__(self, seed=0, twice=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.mix, self.head, self.twice = nn.Embedding(13, 4), nn.Linear(4, 5), nn.Linear(5, 3), twice
        self.to(dtype)

    def get_input_embeddings(self):
        return self.words

    def forward(self, tokens, e=None):
        e = self.words(tokens) if e is None else e
        h = self.mix(e).tanh().mean(1)
        return self.head(h + self.mix(self.words(tokens.flip(1))).sin().sum(1) if self.twice else h)


def classify(model, batch):
    logits = model(batch["tokens"])
    return F.cross_entropy(logits, batch["labels"], reduction="sum", ignore_index=-100), logits


def batch(seed=0, rows=6, length=5):
    g = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(13, (rows, length), generator=g), "labels": torch.randint(3, (rows,), generator=g)}


def slopes(loss, model, b, count=None):
    model.zero_grad()
    (loss(model, b)[0] / (count or len(b["labels"]))).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Penalties

@quick
@given(seed=seeds, strength=st.floats(0, 10), kind=st.sampled_from([l1, l2]))
def test_a_penalty_adds_its_slope_to_matrices_only(seed, strength, kind):
    model, b = Words(seed), batch(seed)
    plain, with_penalty = slopes(classify, model, b), slopes(kind(classify, strength), model, b)
    for n, p in model.named_parameters():
        p = p.detach()
        pull = strength * (p if kind is l2 else p.sign()) if p.ndim > 1 else torch.zeros_like(p)
        close(with_penalty[n], plain[n] + pull, terms=60, scale=10 * (1 + strength) * (1 + float(p.abs().max())))


@quick
@given(seed=seeds, cut=st.integers(1, 5), ignored=st.integers(0, 4), kind=st.sampled_from([l1, l2, lambda f, s: fgm(f, s)]))
def test_parts_of_a_batch_add_up(seed, cut, ignored, kind):
    model, b, loss = Words(seed), batch(seed), kind(classify, 0.7)
    b["labels"][:ignored] = -100
    count = 6 - ignored
    whole = slopes(loss, model, b, count)
    model.zero_grad()
    for part in (slice(0, cut), slice(cut, 6)):
        (loss(model, {k: v[part] for k, v in b.items()})[0] / count).backward()
    for n, p in model.named_parameters():
        close(p.grad, whole[n], terms=400, scale=50.0)


def test_l2_is_the_decay_of_sgd():
    a, c, b = Words(1), Words(1), batch(1)
    one = torch.optim.SGD(a.parameters(), lr=0.1)
    matrices = [p for p in c.parameters() if p.ndim > 1]
    two = torch.optim.SGD([{"params": matrices, "weight_decay": 0.4}, {"params": [p for p in c.parameters() if p.ndim < 2]}], lr=0.1)
    for _ in range(20):
        slopes(l2(classify, 0.4), a, b), one.step()
        slopes(classify, c, b), two.step()
    for p, q in zip(a.parameters(), c.parameters()):
        close(p, q, terms=20 * 100, scale=5.0)


def test_frozen_and_tied_weights():
    model, b = Words(), batch()
    model.words.requires_grad_(False)
    before = classify(model, b)[0]
    sizes = sum(float(p.detach().square().sum()) for p in (model.mix.weight, model.head.weight)) / 2
    close(l2(classify, 1.0)(model, b)[0] - before, torch.tensor(6 * sizes, dtype=torch.float64), terms=100, scale=6 * sizes + float(before))
    tied = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    def none(model, batch): return torch.zeros(()), torch.zeros(1, 2)
    total = l1(none, 1.0)(tied, {"labels": torch.zeros(1)})[0]
    assert total.item() == pytest.approx(tied["a"].weight.abs().sum().item())
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        l1(none, 1.0)(tied.requires_grad_(False), {"labels": torch.zeros(1)})


@pytest.mark.parametrize("wrap", [l1, l2, fgm])
def test_wrappers_act_in_training_only(wrap):
    model, b = Words(), batch()
    plain = classify(model, b)
    for model_mode, gradient in ((False, True), (True, False), (False, False)):
        model.train(model_mode)
        with torch.set_grad_enabled(gradient):
            for x, y in zip(wrap(classify, 0.5)(model, b), plain):
                same(x, y)
    model.train()
    assert wrap(classify, 0.5)(model, b)[0] > plain[0]
    same(wrap(classify, 0.5)(model, b)[1], plain[1])
    same(wrap(classify, 0.0)(model, b)[0], plain[0])


@pytest.mark.parametrize("wrap, word", [(l1, "strength"), (l2, "strength"), (fgm, "epsilon")])
@pytest.mark.parametrize("bad", [-1.0, nan, inf])
def test_bad_strength(wrap, word, bad):
    with pytest.raises(ValueError, match=f"{word} must be 0 or more, got {bad}"):
        wrap(classify, bad)


# Dropout

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1.0])
def test_dropout_is_torch_s_given_its_mask(p, dtype, device):
    x = (draw(0, 50, 7).abs() + 0.1).to(device, dtype)
    torch.manual_seed(3)
    theirs = F.dropout(x, p)
    ours = dropout(x, p, mask=theirs != 0)
    assert ours.dtype == dtype
    close(ours, theirs, terms=2)
    if device == "cpu" and dtype in (torch.float32, torch.float64):
        same(ours, theirs)


def test_dropout_of_its_own_mask():
    torch.manual_seed(0)
    x = torch.ones(200, 1000)
    for p in (0.1, 0.5, 0.9):
        y = dropout(x, p)
        kept = y != 0
        close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), terms=2)
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0) is x
    assert not dropout(torch.full((3,), 2.0), 1.0).any()
    same(*(torch.autograd.grad(f(w, 0.5, mask=m).sum(), w)[0] for f in (dropout, lambda w, p, mask: w * mask / (1 - p))
           for w, m in [(torch.ones(9, requires_grad=True), torch.arange(9) % 2 == 0)]))


@pytest.mark.parametrize("p", [-0.1, 1.1, nan])
def test_bad_dropout(p):
    with pytest.raises(ValueError, match="p must be 0 to 1, got"):
        dropout(torch.ones(2), p)


# FGM

def moved_by_hand(model, b, epsilon):
    """Loss where each row's embeddings are moved by epsilon along their gradient; for Words that ask once."""
    e = model.words(b["tokens"]).detach().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(b["tokens"], e), b["labels"], reduction="sum"), e)
    e = model.words(b["tokens"]) + epsilon * g / g.flatten(1).norm(dim=1)[:, None, None]
    return F.cross_entropy(model(b["tokens"], e), b["labels"], reduction="sum")


@quick
@given(seed=seeds, epsilon=st.floats(0, 5), share=st.floats(0, 1), frozen=st.booleans())
def test_fgm_is_the_move_by_hand(seed, epsilon, share, frozen):
    model, b = Words(seed), batch(seed)
    model.words.requires_grad_(not frozen)
    def by_hand(model, b): return (1 - share) * classify(model, b)[0] + share * moved_by_hand(model, b, epsilon), None
    ours, theirs = fgm(classify, epsilon, share), by_hand
    close(ours(model, b)[0], theirs(model, b)[0], terms=200, scale=50.0)
    one, two = slopes(ours, model, b), slopes(theirs, model, b)
    assert one.keys() == two.keys() and ("words.weight" in one) == (not frozen)
    for n in one:
        close(one[n], two[n], terms=1000, scale=50.0)


def test_rows_of_a_batch_do_not_see_one_another():
    model, b = Words(2), batch(2)
    alone = sum(fgm(classify, 2.0)(model, {k: v[i:i + 1] for k, v in b.items()})[0] for i in range(6))
    close(fgm(classify, 2.0)(model, b)[0], alone, terms=400, scale=50.0)


def test_an_embedding_that_is_asked_twice_moves_by_one_length():
    model, b, moves = Words(3, twice=True), batch(3), []
    hook = model.words.register_forward_hook(lambda m, a, out: moves.append(out.detach()))
    fgm(classify, 1.5)(model, b)
    hook.remove()
    plain = [model.words(b["tokens"]).detach(), model.words(b["tokens"].flip(1)).detach()]
    assert len(moves) == 4
    total = fgm(classify, 1.5, share=1.0)(model, b)[0]
    assert total > classify(model, b)[0]
    seen = []
    def record(model, b):
        handle = model.words.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
        try:
            return classify(model, b)
        finally:
            handle.remove()
    fgm(record, 1.5)(model, b)
    length = torch.cat([(x - y).flatten(1) for x, y in zip(seen[2:], plain)], 1).norm(dim=1)
    close(length, torch.full_like(length, 1.5), terms=200)


@quick
@given(seed=seeds, epsilon=st.floats(0.01, 3))
def test_the_move_is_the_worst_of_its_length_for_a_linear_score(seed, epsilon):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.w = nn.Identity(), nn.Parameter(draw(seed, 4))
        def forward(self, x):
            s = self.seen(x) @ self.w
            return torch.stack([s, -s], -1) / 2
    x, y, model = draw(seed + 1, 5, 4), torch.arange(5) % 2, Line()
    def loss(model, b): return F.cross_entropy(model(b["x"]), b["labels"], reduction="sum"), None
    worst = fgm(loss, epsilon, share=1.0, layer=model.seen)(model, {"x": x, "labels": y})[0]
    margins = (x @ model.w).detach() * (1 - 2 * y) - epsilon * model.w.detach().norm()
    close(worst, F.softplus(-margins).sum(), terms=200, scale=float(F.softplus(-margins).sum()) + 5 * (1 + epsilon) * 4)
    other = x + epsilon * F.normalize(draw(seed + 2, 5, 4), dim=-1)
    assert worst > loss(model, {"x": other, "labels": y})[0] - 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sure_model_gives_no_nan(dtype, device):
    model, b = Words(dtype=dtype).to(device), {k: v.to(device) for k, v in batch().items()}
    with torch.no_grad():
        model.head.weight.mul_(300)
        model.head.bias[1] = 1e4
    b["labels"][:] = 1  # every row sure and right: gradient 0
    total, _ = fgm(classify, 1.0)(model, b)
    total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_tiny_gradients_keep_their_direction():
    model, b = Words(dtype=torch.float32), batch()
    def faint(model, b): return 1e-25 * classify(model, b)[0], None
    ours, theirs = fgm(faint, 1.0, share=1.0)(model, b)[0] / 1e-25, fgm(classify, 1.0, share=1.0)(model, b)[0]
    close(ours, theirs, terms=4000, scale=50.0)


def test_the_hook_goes_and_the_weights_stay_when_the_loss_fails():
    model, b = Words(), batch()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    calls = []
    def fails(model, b):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return classify(model, b)
    with pytest.raises(RuntimeError, match="out of memory"):
        fgm(fails, 1.0)(model, b)
    assert not model.words._forward_hooks
    for n, p in model.state_dict().items():
        same(p, before[n])
    with pytest.raises(ValueError, match="Identity was not called in the forward pass: name the one to move with layer="):
        fgm(classify, 1.0, layer=nn.Identity())(model, b)


def test_wrappers_compose():
    model, b = Words(5), batch(5)
    close(fgm(l2(classify, 0.3), 1.0)(model, b)[0], l2(fgm(classify, 1.0), 0.3)(model, b)[0], terms=400, scale=100.0)
    slopes(l1(l2(fgm(classify, 1.0), 0.3), 0.1), model, b)
    assert clip(model.parameters(), 1.0).isfinite()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_fgm_on_transformers(kind):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification
    torch.manual_seed(0)
    small = {"vocab_size": 31, "num_labels": 2}
    if kind == "bert":
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **small)
        model = BertForSequenceClassification(config)
    else:
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, **small))
    b = {"input_ids": torch.randint(1, 31, (3, 6)), "labels": torch.tensor([0, 1, 1])}
    def loss(model, b):
        logits = model(input_ids=b["input_ids"]).logits
        return F.cross_entropy(logits, b["labels"], reduction="sum"), logits
    total, logits = fgm(loss, 1.0)(model.train(), b)
    total.backward()
    assert logits.shape == (3, 2) and total.isfinite()
    model.eval()  # without dropout the moved loss is above the plain one
    model.training = True
    assert fgm(loss, 0.1, share=1.0)(model, b)[0] > loss(model, b)[0]


# Averaging

@quick
@given(seed=seeds, K=st.integers(1, 6), C=st.integers(1, 9), scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_average_is_the_log_of_the_mean(seed, K, C, scale):
    z, y = scale * draw(seed, K, 7, C), torch.randint(C, (7,), generator=torch.Generator().manual_seed(seed))
    log_p = average(list(z))
    close(log_p.exp(), z.softmax(-1).mean(0), terms=4 * (C + K + 20) + int(4 * scale), scale=1.0)
    each = torch.stack([F.cross_entropy(k, y, reduction="none") for k in z])
    slack = bound(torch.float64, 4 * (C + K + 20)) * (1 + float(each.max()))
    assert (F.nll_loss(log_p, y, reduction="none") <= each.mean(0) + slack).all()
    if K == 1:
        close(log_p, z[0].log_softmax(-1), terms=20, scale=1.0 + float(each.max()) + 10 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_average_of_half_precision_is_computed_in_float32(dtype):
    z = draw(0, 3, 4, 5, dtype=dtype)
    assert average(list(z)).dtype == torch.float32
    close(average(list(z)).exp().sum(-1), torch.ones(4), terms=60)


def test_average_survives_certain_models_and_refuses_none():
    z = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert average(list(z)).exp().tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="average needs the logits of at least one model, got none"):
        average([])
