"""Properties over drawn shapes, dtypes and values: what the chapters claim on their cases must hold on any."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.heads import MultiHead, cache_bytes, from_torch, merge_heads, parameter_count, repeat_kv, split_heads
from tunebook.attention.scores import attention, attention_backward, softmax
from tunebook.entropy.xent import binary_cross_entropy_with_logits, cross_entropy, cross_entropy_grad, hessian
from tunebook.kit.checks import bound, close, gap, same
from tunebook.kit.ledger import exact, interval, judge, numeric, statistical

sizes, seeds, dtypes = st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64])
quick = settings(deadline=None, max_examples=60, derandomize=True)


def draw(seed, *shapes, dtype=torch.float64, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).mul(spread).to(dtype) for s in shapes]


def path(q, k):
    """Roundings on the way to an output, and the factor by which the exponential spreads an error of the scores."""
    size = float((q.abs() @ k.abs().mT).max()) * q.shape[-1] ** -0.5
    return math.ceil(2 * (q.shape[-1] + 2) * (1 + size) + 2 * k.shape[-2] + 8)


@quick
@given(seed=seeds, B=sizes, T=sizes, S=sizes, D=sizes, Dv=sizes, dtype=dtypes, masked=st.booleans())
def test_attention_is_the_library_s(seed, B, T, S, D, Dv, dtype, masked):
    q, k, v, m = draw(seed, (B, T, D), (B, S, D), (B, S, Dv), (B, T, S), dtype=dtype)
    mask = m > 0 if masked else None
    ours, weights = attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(ours, theirs, terms=path(q, k), scale=float(v.abs().max()))
    seen = torch.ones(B, T, 1, dtype=torch.bool) if mask is None else mask.any(-1, keepdim=True)
    close(weights.sum(-1, keepdim=True), seen.to(dtype), terms=2 * S + 1, scale=1.0)
    if mask is not None:
        assert not weights[~mask].any()


@quick
@given(seed=seeds, T=sizes, S=sizes, D=sizes, masked=st.booleans())
def test_the_gradient_by_hand_is_autograd_s(seed, T, S, D, masked):
    q, k, v, up, m = draw(seed, (T, D), (S, D), (S, 3), (T, 3), (T, S))
    mask = m > 0 if masked else None
    size = 4 * T * float((up.abs() @ v.abs().mT).max()) * max(1.0, float(q.abs().max()), float(k.abs().max()))
    by_hand = attention_backward(up, q, k, v, mask)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*(x[None] for x in inputs), attn_mask=mask)[0], inputs, up)
    for ours, other in zip(by_hand, theirs):
        close(ours, other, terms=4 * path(q.detach(), k.detach()) + 4 * (S + T), scale=max(size, float(up.abs().max()) * T))


@quick
@given(seed=seeds, S=sizes, shift=st.floats(-1e4, 1e4), dtype=dtypes)
def test_softmax_ignores_a_shift_and_survives_large_scores(seed, S, shift, dtype):
    (x,) = draw(seed, (3, S), dtype=dtype, spread=100.0)
    moved = x + shift
    w = softmax(moved)
    assert torch.isfinite(w).all() and (w >= 0).all()
    error = 2 * bound(dtype) * (float(moved.abs().max()) + float(x.abs().max()))  # rounding of the shift itself
    assert float((w - softmax(moved - moved[:, :1])).abs().max()) <= error + bound(dtype, 2 * S + 8)


@quick
@given(seed=seeds, B=st.integers(1, 3), T=sizes, S=sizes, G=st.integers(1, 3), times=st.integers(1, 3), D=st.integers(1, 4))
def test_grouped_heads_are_the_library_s(seed, B, T, S, G, times, D):
    q, k, v = draw(seed, (B, G * times, T, D), (B, G, S, D), (B, G, S, D))
    ours = attention(q, repeat_kv(k, times), repeat_kv(v, times))[0]
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(ours, theirs, terms=path(q, k.repeat_interleave(times, 1)), scale=float(v.abs().max()))


@quick
@given(seed=seeds, B=st.integers(1, 3), T=sizes, S=sizes, H=st.integers(1, 4), D=st.integers(1, 4), bias=st.booleans())
def test_multi_head_is_torch_s(seed, B, T, S, H, D, bias):
    E = H * D
    torch.manual_seed(seed % 2**31)
    theirs = torch.nn.MultiheadAttention(E, H, bias=bias, batch_first=True, dtype=torch.float64)
    x, c = draw(seed, (B, T, E), (B, S, E))
    ours, weights = from_torch(theirs)(x, c)
    other, w = theirs(x, c, c, average_attn_weights=False)
    size = float(ours.detach().abs().max()) + float(x.abs().sum(-1).max() + c.abs().sum(-1).max())
    close(ours, other, terms=4 * (E + S + D) + 40, scale=size)
    close(weights, w, terms=8 * (E + S + D) + 40, scale=1.0)


@quick
@given(H=st.integers(1, 6), D=st.integers(1, 6), bias=st.booleans(), data=st.data())
def test_parameters_and_cache_are_counted_right(H, D, bias, data):
    G = data.draw(st.sampled_from([g for g in range(1, H + 1) if H % g == 0]))
    module = MultiHead(H * D, H, G, bias=bias)
    assert parameter_count(H * D, H, G, bias) == sum(p.numel() for p in module.parameters())
    k = split_heads(module.key(torch.randn(1, 5, H * D)), G)
    assert cache_bytes(H * D, H, G, tokens=5, dtype=torch.float32) == 2 * k.numel() * 4


@quick
@given(seed=seeds, lead=st.lists(st.integers(1, 3), max_size=2), T=sizes, H=sizes, D=sizes)
def test_merging_undoes_splitting(seed, lead, T, H, D):
    (x,) = draw(seed, (*lead, T, H * D))
    same(merge_heads(split_heads(x, H)), x)


reductions, smoothings = st.sampled_from(["none", "sum", "mean"]), st.sampled_from([0.0, 0.1, 1.0])
options = st.fixed_dictionaries({"reduction": reductions, "label_smoothing": smoothings})


@quick
@given(seed=seeds, N=sizes, V=sizes, dtype=dtypes, spread=st.sampled_from([0.1, 1.0, 30.0]), weighted=st.booleans(),
       ignored=st.sampled_from(["none", "some", "all"]), opts=options)
def test_cross_entropy_is_the_library_s(seed, N, V, dtype, spread, weighted, ignored, opts):
    logits, w = draw(seed, (N, V), (V,), dtype=dtype, spread=spread)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(V, (N,), generator=g)
    if ignored != "none":
        y = torch.where((torch.rand(N, generator=g) < 0.5) | (ignored == "all"), -100, y)
    weight = w.abs() + 0.1 if weighted else None
    logits.requires_grad_()
    ours, theirs = cross_entropy(logits, y, weight, **opts), F.cross_entropy(logits, y, weight, **opts)
    assert torch.equal(ours.isnan(), theirs.isnan())
    size = (1 + 2 * float(logits.detach().abs().max()) + math.log(V)) * (float(weight.max()) if weighted else 1.0)
    span = 1.0 if weight is None or opts["reduction"] != "mean" else float(weight.max() / weight.min())
    rule = {"terms": 2 * (2 * V + 2 * N + 12), "scale": size * span * (N if opts["reduction"] == "sum" else 1)}
    if not theirs.isnan().any():
        close(ours, theirs, **rule)
    (up,) = draw(seed + 1, tuple(theirs.shape), dtype=dtype)
    (grad,) = torch.autograd.grad(theirs, logits, up)
    rule["scale"] *= 1 + float(up.abs().max())
    close(cross_entropy_grad(logits.detach(), y, up, weight, **opts), grad, **rule)


@quick
@given(seed=seeds, V=sizes, spread=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_hessian_is_flat_along_a_shift_and_never_negative(seed, V, spread):
    (z,) = draw(seed, (V,), spread=spread)
    H = hessian(z)
    close(H.sum(-1), torch.zeros(V, dtype=torch.float64), terms=2 * V + 8, scale=1.0)
    assert float(torch.linalg.eigvalsh(H).min()) >= -bound(torch.float64, 4 * V * V + 8)


@quick
@given(z=st.floats(-1e6, 1e6), y=st.sampled_from([0.0, 1.0, 0.3]))
def test_binary_cross_entropy_is_finite_for_every_logit(z, y):
    logit = torch.tensor([z], dtype=torch.float64)
    ours = binary_cross_entropy_with_logits(logit, torch.tensor([y], dtype=torch.float64))
    close(ours, F.binary_cross_entropy_with_logits(logit, torch.tensor([y], dtype=torch.float64)), terms=8, scale=max(abs(z), 1.0))


@quick
@given(values=st.lists(st.floats(-100, 100), min_size=3, max_size=8))
def test_an_interval_holds_its_mean_and_shrinks_with_the_level(values):
    mean, low, high = interval(values)
    assert low <= mean <= high
    _, low80, high80 = interval(values, level=0.8)
    assert low <= low80 + 1e-12 and high80 <= high + 1e-12


@quick
@given(seed=seeds, n=sizes, dtype=dtypes, factor=st.floats(2.5, 100))
def test_close_refuses_what_is_further_than_its_bound(seed, n, dtype, factor):
    (x,) = draw(seed, (n,), dtype=dtype)
    x[0] = 1.0 if not x.any() else x[0]
    close(x, x.clone())
    off = x.clone()
    at = int(off.abs().argmax())
    off[at] += factor * bound(dtype, 4) * float(x.abs().max())
    with pytest.raises(AssertionError):
        close(off, x, terms=4)
    assert gap(off, x, terms=4)[0] > gap(off, x, terms=4)[1]


@pytest.mark.parametrize("value, expected, tolerance", [
    (3, 4, exact), (True, 1, exact), ("a", "b", exact), (0.3, 0.30001, exact), (torch.ones(2), torch.ones(3), exact),
    (torch.tensor([0.0]), torch.tensor([-0.0]), exact), (torch.ones(2), torch.ones(2) + 1e-5, numeric(4)),
    (torch.ones(2), torch.ones(2).double(), numeric(4)), (torch.tensor([math.nan]), torch.tensor([math.nan]), numeric(4)),
    (torch.ones(0), torch.ones(0), numeric(4)), ([0.1, 0.11, 0.12], 0.2, statistical)])
def test_a_wrong_claim_is_judged_wrong(value, expected, tolerance):
    assert judge(value, expected, tolerance)["ok"] is False
