"""Softmax on drawn rows and dtypes: equal to PyTorch's, to itself in any chunks, to fifty digits, and clear about bad input."""

import math
from decimal import Decimal, localcontext
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.entropy.softmax import (
    entropy,
    exp_limits,
    log1m_softmax,
    log1mexp,
    log1pexp,
    log_softmax,
    logaddexp,
    logsumexp,
    merge,
    observe,
    online_softmax,
    softmax,
)
from tunebook.kit.checks import bound, close, gradcheck, same

quick = settings(deadline=None, max_examples=60, derandomize=True)
seeds, classes = st.integers(0, 2**31), st.integers(1, 40)
scales = st.sampled_from([0.01, 1.0, 10.0, 300.0, 10_000.0])
wide = st.sampled_from([torch.float32, torch.float64])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
inf, nan = math.inf, math.nan


def draw(seed, *shape, scale=1.0, dtype=torch.float64, excluded=False):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=g, dtype=torch.float64)
    if excluded:
        x[..., 1::3] = -inf
    return x.to(dtype)


def alike(ours, theirs, terms):
    """Elementwise relative comparison; what is not finite must be the same."""
    tiny = torch.finfo(theirs.dtype).tiny
    fine = theirs.isfinite()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[theirs.isinf()], theirs[theirs.isinf()])
    if fine.any():
        sizes = theirs[fine].double().abs() + tiny
        ratio = (1 + (ours[fine].double() - theirs[fine].double()) / sizes).to(theirs.dtype)
        close(ratio, torch.ones_like(ratio), terms=terms)


# Equal to PyTorch

@quick
@given(seed=seeds, V=classes, scale=scales, dtype=dtypes, excluded=st.booleans())
def test_softmax_is_torch_s(seed, V, scale, dtype, excluded):
    x = draw(seed, 3, V, scale=scale, dtype=dtype, excluded=excluded)
    alike(softmax(x), F.softmax(x, -1), 4 if dtype.itemsize == 2 else 2 * (V + 6))


@quick
@given(seed=seeds, V=classes, scale=scales, dtype=dtypes, excluded=st.booleans())
def test_logs_are_torch_s_in_float32_at_least(seed, V, scale, dtype, excluded):
    x = draw(seed, 3, V, scale=scale, dtype=dtype, excluded=excluded)
    common = torch.promote_types(dtype, torch.float32)
    theirs = F.log_softmax(x, -1, dtype=common).to(dtype)
    terms = 4 if dtype.itemsize == 2 else 2 * (V + math.ceil(3 * math.log(V)) + 3) + 2
    seen = theirs > -inf
    size = 1 + theirs[seen].double().abs()
    close((log_softmax(x)[seen] / size).to(dtype), (theirs[seen] / size).to(dtype), terms=terms, scale=1.0)
    assert torch.equal(log_softmax(x) == -inf, ~seen)
    theirs = x.to(common).logsumexp(-1).to(dtype)
    size = 1 + theirs.double().abs()
    close((logsumexp(x) / size).to(dtype), (theirs / size).to(dtype), terms=terms, scale=1.0)


@pytest.mark.parametrize("row", [[-inf, -inf], [inf, 0.0], [inf, inf], [-inf, 0.0], [nan, 0.0], [1e4, 1e4], [-1e4, -1e4], [0.0, -1e4]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_corners_are_torch_s(row, dtype, device):
    for ours, theirs in ((softmax, F.softmax), (log_softmax, F.log_softmax), (logsumexp, torch.logsumexp)):
        x = torch.tensor(row, dtype=dtype, device=device, requires_grad=True)
        a, b = ours(x), theirs(x, -1)
        assert a.dtype == dtype and a.device == x.device
        torch.testing.assert_close(a, b, equal_nan=True)
        z, top = x.detach().double(), x.detach().double().amax()  # torch's own gradient of logsumexp is coarse at large logits
        z = (z - top if top.isfinite() else z).requires_grad_()
        mine, true = torch.autograd.grad(a.sum(), x)[0], torch.autograd.grad(theirs(z, -1).sum(), z)[0].to(dtype)
        torch.testing.assert_close(mine, true, equal_nan=True, rtol=0, atol=bound(dtype, 12))


@quick
@given(seed=seeds, V=classes, dtype=wide, scale=st.sampled_from([1.0, 10.0]), T=st.sampled_from([0.3, 1.0, 7.0]))
def test_gradients_are_torch_s(seed, V, dtype, scale, T):
    x = draw(seed, 2, V, scale=scale, dtype=dtype).requires_grad_()
    up, up_rows = draw(seed + 1, 2, V, dtype=dtype), draw(seed + 2, 2, dtype=dtype)
    pairs = [(softmax(x, T), F.softmax(x / T, -1), up), (log_softmax(x, T), F.log_softmax(x / T, -1), up),
             (logsumexp(x), x.logsumexp(-1), up_rows)]
    for ours, theirs, g in pairs:
        a, b = (torch.autograd.grad(y, x, g)[0] for y in (ours, theirs))
        close(a, b, terms=2 * (2 * V + 12 + math.ceil(20 * scale / T)), scale=float(g.abs().sum()) * (1 + 1 / T))


@quick
@given(seed=seeds, n=st.integers(1, 50), scale=scales, dtype=wide)
def test_two_terms(seed, n, scale, dtype):
    a, b = draw(seed, n, scale=scale, dtype=dtype), draw(seed + 1, n, scale=scale, dtype=dtype)
    close(logaddexp(a, b), torch.logaddexp(a, b), terms=16)
    same(logaddexp(a, b), logaddexp(b, a))
    alike(log1pexp(a), torch.logaddexp(a, torch.zeros_like(a)), 20)
    assert logaddexp(a[:, None], b).shape == (n, n)


# Exact

@quick
@given(exponent=st.floats(-30, 1.85), dtype=wide)
def test_log1mexp_against_fifty_digits(exponent, dtype):
    x = torch.tensor([-(10.0**exponent)], dtype=dtype)
    with localcontext() as c:
        c.prec = 100
        truth = (1 - Decimal(x.item()).exp()).ln()
        off = abs(Decimal(log1mexp(x).item()) / truth - 1)
    assert off < bound(dtype, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_log1mexp_and_its_slope_at_the_ends(dtype):
    x = torch.tensor([0.0, -inf, -1e-7, -2e4], dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    assert y.dtype == dtype and y[0] == -inf and y[1] == 0 and y[3] == 0
    x = x.detach()[1:].requires_grad_()
    slope, = torch.autograd.grad(log1mexp(x).sum(), x)
    assert slope[0] == slope[2] == 0 and slope[1].item() < -1e6  # -inf in float16
    assert log1mexp(torch.tensor(0.5, dtype=dtype)).isnan()


@quick
@given(seed=seeds, V=st.integers(2, 40), margin=st.sampled_from([0.0, 3.0, 17.0, 40.0, 85.0]))
def test_one_minus_a_probability_and_its_gradient_are_float64_s(seed, V, margin):
    x = draw(seed, V, dtype=torch.float32)
    x[V // 2] = x.max() + margin
    x.requires_grad_()
    z = x.detach().double().requires_grad_()
    truth = torch.stack([torch.cat([z[:c], z[c + 1:]]).logsumexp(0) for c in range(V)]) - z.logsumexp(0)
    ours, up = log1m_softmax(x), draw(seed + 1, V, dtype=torch.float32)
    close(ours, truth.float(), terms=4 * (V + 20), scale=1.0 + 2 * margin + 10)
    a, b = torch.autograd.grad(ours, x, up)[0], torch.autograd.grad(truth, z, up.double())[0].float()
    close(a, b, terms=8 * (2 * V + 12 + int(margin)), scale=float(up.abs().sum()) * 2)


@quick
@given(margin=st.floats(0.0, 80.0), V=st.integers(2, 9))
def test_a_sure_class_keeps_its_digits(margin, V):
    x = torch.zeros(V)
    x[0] = margin
    truth = -math.log1p((V - 1) * math.exp(-x[0].item()))
    assert abs(log_softmax(x)[0].item() / truth - 1) < bound(torch.float32, V + 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_limits_hold_for_every_number_of_sixteen_bits(dtype, device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    x = x[x.isfinite()]
    low, high = exp_limits(dtype)
    assert torch.equal(x.exp() > 0, x.double() > low)
    assert torch.equal(x.exp() < inf, x.double() < high)
    p = softmax(torch.stack([torch.zeros_like(x), -x.abs()], -1))[:, 1]
    total = (-x.double().abs()).exp().log1p()
    assert torch.equal(p > 0, -x.double().abs() - total > low)


# Any chunks, any order

@quick
@given(seed=seeds, V=st.integers(0, 60), D=st.integers(0, 3), scale=scales, dtype=wide, excluded=st.booleans(), data=st.data())
def test_any_chunks_in_any_order(seed, V, D, scale, dtype, excluded, data):
    x, v = draw(seed, 2, V, scale=scale, dtype=dtype, excluded=excluded), draw(seed + 1, 2, V, D, dtype=dtype)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, V), max_size=8))), V]
    states = data.draw(st.permutations([observe(x[:, i:j], v[:, i:j]) for i, j in zip(cuts, cuts[1:])]))
    while len(states) > 1:  # a random tree: two random neighbours become one
        i = data.draw(st.integers(0, len(states) - 2))
        states[i:i + 2] = [merge(states[i], states[i + 1])]
    state, terms = states[0], 2 * (2 * V + 40 + math.ceil(3 * math.log(V + 1)))
    if not V:
        assert (state.top == -inf).all() and (state.logsumexp == -inf).all() and state.mean.isnan().all()
        return
    size = 1 + x.logsumexp(-1).abs()
    close(state.logsumexp / size, x.logsumexp(-1) / size, terms=terms, scale=1.0)
    same(state.top, x.amax(-1))
    if D:
        close(state.mean, (F.softmax(x, -1)[:, None] @ v)[:, 0], terms=terms, scale=float(v.abs().max()))


@quick
@given(seed=seeds, V=st.integers(1, 30), scale=scales, dtype=wide, excluded=st.booleans(), data=st.data())
def test_merge_commutes_associates_and_has_an_identity(seed, V, scale, dtype, excluded, data):
    x, v = draw(seed, V, scale=scale, dtype=dtype, excluded=excluded), draw(seed + 1, V, 2, dtype=dtype)
    i, j = sorted(data.draw(st.integers(0, V)) for _ in range(2))
    a, b, c = (observe(x[s], v[s]) for s in (slice(0, i), slice(i, j), slice(j, V)))
    for p, q in zip(merge(a, b), merge(b, a)):
        same(p, q)
    for p, q in zip(merge(a, observe(x[:0], v[:0])), a):
        assert torch.equal(p, q)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    same(left.top, right.top)
    close(left.total, right.total, terms=4 * V + 40, scale=float(V))
    close(left.weighted, right.weighted, terms=4 * V + 40, scale=float(V * v.abs().max()))


@quick
@given(seed=seeds, V=classes, chunk=st.integers(1, 50), scale=scales, dtype=dtypes)
def test_softmax_in_chunks_is_softmax(seed, V, chunk, scale, dtype):
    x = draw(seed, 2, V, scale=scale, dtype=dtype)
    ours = online_softmax(x, chunk)
    assert ours.dtype == dtype
    close(ours, F.softmax(x, -1), terms=4 if dtype.itemsize == 2 else 2 * (4 * V + 12), scale=1.0)


def test_gradients_flow_through_merges():
    x, v = draw(0, 2, 9).requires_grad_(), draw(1, 2, 9, 3).requires_grad_()
    def attend(x, v): return reduce(merge, (observe(x[:, i:i + 2], v[:, i:i + 2]) for i in range(0, 9, 2))).mean
    gradcheck(attend, x, v)
    up = draw(2, 2, 3)
    a, b = (torch.autograd.grad(y, (x, v), up) for y in (attend(x, v), (F.softmax(x, -1)[:, None] @ v)[:, 0]))
    for ours, theirs in zip(a, b):
        close(ours, theirs, terms=200, scale=float(up.abs().sum() * v.detach().abs().max()))


# Temperature

@quick
@given(seed=seeds, V=classes, scale=scales, dtype=dtypes, excluded=st.booleans())
def test_temperature_from_zero_to_infinity(seed, V, scale, dtype, excluded):
    x = draw(seed, 3, V, scale=scale, dtype=dtype, excluded=excluded)
    top = x == x.amax(-1, keepdim=True)
    seen = x > -inf
    for T, expected in ((0.0, top), (1e-300, top), (inf, seen), (1e300, seen)):
        close(softmax(x, T), (expected.double() / expected.sum(-1, keepdim=True)).to(dtype), terms=4)
    assert (entropy(x, 0.0) - top.sum(-1).double().log().to(dtype)).abs().max() < bound(dtype, 8) * (1 + math.log(V))
    H = torch.stack([entropy(x.double(), 2.0**k) for k in range(-6, 14)])
    assert (H.diff(dim=0) >= -bound(torch.float64, 4 * V + 40) * (1 + math.log(V))).all()


@quick
@given(seed=seeds, V=classes, scale=scales, dtype=wide, excluded=st.booleans())
def test_entropy_is_torch_s(seed, V, scale, dtype, excluded):
    x = draw(seed, 3, V, scale=scale, dtype=dtype, excluded=excluded)
    p = F.softmax(x.double(), -1)
    theirs = -torch.special.xlogy(p, p).sum(-1)
    close(entropy(x).double(), theirs, terms=1, scale=bound(dtype, 4 * V + 40) / bound(torch.float64) * (1 + math.log(V)))
    assert (entropy(x) >= 0).all()


def test_a_learned_temperature_may_differ_by_row():
    x, T = draw(0, 3, 5).requires_grad_(), torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    for f in (softmax, log_softmax, entropy):
        gradcheck(f, x, T)
        assert f(x.float(), T).dtype == torch.float32
        close(f(x, T)[2], f(x[2], 3.0), terms=4)


# Bad input

@pytest.mark.parametrize("f", [softmax, log_softmax, logsumexp, entropy, log1m_softmax, observe, lambda x: online_softmax(x, 2)])
def test_bad_rows(f):
    with pytest.raises(TypeError, match=r"expected logits in float64, .*, got torch.int64: convert them with .float()"):
        f(torch.arange(3))
    with pytest.raises(ValueError, match=r"expected logits \(..., V\), V >= \d, got \(\): give it classes"):
        f(torch.tensor(1.0))


@pytest.mark.parametrize("f", [softmax, log_softmax, logsumexp, entropy, log1m_softmax, lambda x: online_softmax(x, 2)])
def test_no_classes(f):
    with pytest.raises(ValueError, match=r"V >= 1, got \(2, 0\)"):
        f(torch.empty(2, 0))


def test_no_rows():
    for f in (softmax, log_softmax, log1m_softmax, lambda x: online_softmax(x, 2)):
        assert f(torch.empty(0, 3)).shape == (0, 3)
    assert logsumexp(torch.empty(0, 3)).shape == entropy(torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize("T", [-1.0, nan, torch.tensor([1.0, -1.0])])
def test_bad_temperature(T):
    for f in (softmax, log_softmax, entropy):
        with pytest.raises(ValueError, match="temperature must be 0 or more, got .*: make it positive"):
            f(torch.ones(2), T)


def test_bad_pairs():
    with pytest.raises(TypeError, match=r"expected two tensors of one dtype, got torch.float32 and torch.float64: convert one"):
        logaddexp(torch.ones(2), torch.ones(2).double())
    for f in (log1mexp, log1pexp):
        with pytest.raises(TypeError, match=r"got torch.int64: convert them with .float\(\)"):
            f(torch.arange(3))


def test_bad_states():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"expected values \(2, 3\) \+ \(D,\) in torch.float32, got \(2, 3\) in .*: one for each logit"):
        observe(x, x)
    with pytest.raises(ValueError, match="got .* in torch.float64"):
        observe(x, torch.ones(2, 3, 4).double())
    for other in (observe(x.double()), observe(x[0]), observe(x, torch.ones(2, 3, 1))):
        with pytest.raises(ValueError, match="expected two states of one shape and dtype, got .*: observe the same rows"):
            merge(observe(x), other)
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0: pass a length"):
        online_softmax(x, 0)
