"""Cross-entropy from hidden states: equal to that of the whole logits for any shape, option, chunk, dtype and gradient from above."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tunebook.entropy.linear_ce import checkpointed_linear_cross_entropy, chunk_rows, linear_cross_entropy, soft_cap
from tunebook.entropy.xent import cross_entropy
from tunebook.kit.checks import same

FORMS = pytest.mark.parametrize("form", [linear_cross_entropy, checkpointed_linear_cross_entropy], ids=["ours", "checkpointed"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
quick = settings(deadline=None, max_examples=60, derandomize=True)
seeds, sizes = st.integers(0, 2**31), st.integers(1, 9)
REDUCTIONS = st.sampled_from(["none", "sum", "mean"])
inf, nan = math.inf, math.nan


def draw(seed, *shapes, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def plain(h, W, y, b=None, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean", z_loss=0.0, softcap=None):
    """PyTorch's cross-entropy of the whole logits, and the z-loss."""
    z = F.linear(h, W, b)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    loss = F.cross_entropy(z.reshape(-1, len(W)), y.reshape(-1), weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
                           reduction=reduction)
    extra = (z_loss * z.logsumexp(-1) ** 2).masked_fill(y == ignore_index, 0)
    if reduction == "none":
        return loss.reshape(y.shape) + extra
    return loss + (extra.sum() if reduction == "sum" else extra.sum() / (y != ignore_index).sum())


def example(seed, lead, V, E, bias=True, ignored=(), dtype=torch.float64, device="cpu"):
    *inputs, w = draw(seed, (*lead, E), (V, E), (V,), (V,), dtype=dtype, device=device)
    y = torch.randint(V, lead, generator=torch.Generator().manual_seed(seed)).to(device)
    y.view(-1)[list(ignored)] = -100
    return [x.requires_grad_() for x in inputs[: 2 + bias]], y, w.abs() + 0.5


def grads(loss, inputs, up=None, **more):
    return torch.autograd.grad(loss, inputs, torch.ones_like(loss) if up is None else up, **more)


def near(a, b, tol=1e-10):
    assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    assert torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=tol, atol=tol), (a - b).abs().max()


# Equal to the whole

@FORMS
@quick
@given(seed=seeds, lead=st.lists(st.integers(1, 4), max_size=3), V=sizes, E=sizes, bias=st.booleans(), weighted=st.booleans(),
       data=st.data(), smooth=st.sampled_from([0.0, 0.1, 1.0]), reduction=REDUCTIONS, z_loss=st.sampled_from([0.0, 0.03]),
       cap=st.sampled_from([None, 0.5, 30.0]), chunk=st.sampled_from([None, 1, 2, 3, 100]))
def test_values_and_gradients_are_those_of_the_whole(form, seed, lead, V, E, bias, weighted, data, smooth, reduction, z_loss, cap, chunk):
    ignored = data.draw(st.lists(st.integers(0, math.prod(lead) - 1)))
    inputs, y, w = example(seed, lead, V, E, bias, ignored)
    rest = dict(label_smoothing=smooth, reduction=reduction, z_loss=z_loss, softcap=cap)
    b = inputs[2] if bias else None
    want = plain(*inputs[:2], y, b, w if weighted else None, **rest)
    got = form(*inputs[:2], y, b, w if weighted else None, chunk=chunk, **rest)
    near(got, want)
    up, = draw(seed + 1, want.shape)
    for ours, theirs in zip(grads(got, inputs, up), grads(want, inputs, up)):
        near(ours, theirs)


@FORMS
@quick
@given(seed=seeds, N=sizes, V=sizes, reduction=REDUCTIONS, smoothing=st.sampled_from([0.0, 0.2]), z_loss=st.sampled_from([0.0, 0.1]),
       ignore=st.sampled_from([-100, 0, 3]))
def test_options_are_those_of_the_chapter_before(form, seed, N, V, reduction, smoothing, z_loss, ignore):
    (h, W, b), y, w = example(seed, (N,), V, 3)
    rest = dict(weight=w, ignore_index=ignore, label_smoothing=smoothing, reduction=reduction, z_loss=z_loss)
    near(form(h, W, y, b, chunk=2, **rest), cross_entropy(F.linear(h, W, b), y, **rest))


@quick
@given(seed=seeds, N=sizes, V=sizes, bias=st.booleans(), weighted=st.booleans(), reduction=REDUCTIONS, chunk=st.integers(1, 9))
def test_equal_to_torch_s_own(seed, N, V, bias, weighted, reduction, chunk):
    if not hasattr(F, "linear_cross_entropy"):
        print("this PyTorch has no F.linear_cross_entropy: not compared")
        return
    inputs, y, w = example(seed, (N,), V, 5, bias, ignored=range(0, N - 1, 3))
    b, w = inputs[2] if bias else None, w if weighted else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    want = F.linear_cross_entropy(*inputs[:2], y, linear_bias=b, weight=w, reduction=reduction, options=options)
    got = linear_cross_entropy(*inputs[:2], y, linear_bias=b, weight=w, reduction=reduction, chunk=chunk)
    near(got, want)
    up, = draw(seed + 1, want.shape)
    for ours, theirs in zip(grads(got, inputs, up), grads(want, inputs, up)):
        near(ours, theirs)


@FORMS
@quick
@given(seed=seeds, N=st.integers(2, 12), chunk=st.integers(1, 12), cut=st.integers(1, 11), reduction=st.sampled_from(["none", "sum"]))
def test_rows_stand_alone(form, seed, N, chunk, cut, reduction):
    """Rows in another order, or in two batches, give the same losses and add up to the same gradient."""
    (h, W, b), y, _ = example(seed, (N,), 7, 4, ignored=range(0, N, 4))
    order, cut = torch.randperm(N, generator=torch.Generator().manual_seed(seed)), min(cut, N - 1)
    whole = form(h, W, y, b, reduction=reduction, chunk=chunk)
    moved = form(h[order], W, y[order], b, reduction=reduction, chunk=chunk)
    parts = [form(h[s], W, y[s], b, reduction=reduction, chunk=chunk) for s in (slice(cut), slice(cut, None))]
    near(moved, whole[order] if reduction == "none" else whole)
    near(torch.cat(parts) if reduction == "none" else sum(parts), whole)
    want = grads(whole.sum(), (h, W, b))
    for losses in ([moved], parts):
        for ours, theirs in zip(grads(sum(x.sum() for x in losses), (h, W, b)), want):
            near(ours, theirs)


@FORMS
def test_any_layout_and_a_tied_matrix(form):
    """Hidden states that are not contiguous; a matrix that is also the embedding gets both gradients."""
    W, y = draw(0, (9, 4))[0].requires_grad_(), torch.arange(6).reshape(2, 3)
    h = W[(y + 1) % 9].mT.contiguous().mT
    assert not h.is_contiguous()
    near(*(grads(f(h, W, y), W, retain_graph=True)[0] for f in (form, plain)))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(form(h, W, y.to(dtype)), form(h, W, y))
    near(form(h[0, 0], W, y[0, 0], reduction="none"), plain(h[0, 0], W, y[0, 0], reduction="none"))


# The gradient from above

@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_way_back_through_a_graph_gives_its_own_gradient(reduction):
    inputs, y, _ = example(0, (5,), 7, 4, ignored=[1])
    loss, want = (f(*inputs[:2], y, inputs[2], reduction=reduction) for f in (linear_cross_entropy, plain))
    for seed in (1, 2, 3):
        up, = draw(seed, loss.shape)
        for ours, theirs in zip(grads(loss, inputs, up, retain_graph=True), grads(want, inputs, up, retain_graph=True)):
            near(ours, theirs)


def test_a_second_way_back_without_retain_graph_is_refused_and_changed_inputs_are_noticed():
    (h, W), y, _ = example(0, (5,), 7, 4, bias=False)
    loss = linear_cross_entropy(h, W, y)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        W += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = linear_cross_entropy(h, W, y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_wanted_gradients_are_made(which, reduction):
    inputs, y, _ = example(0, (8,), 16, 4)
    for x, wanted in zip(inputs, which):
        x.requires_grad_(wanted)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*inputs[:2], y, inputs[2], chunk=4, reduction=reduction)
        if any(which):
            loss.sum().backward()
    again = 1 if reduction == "none" and any(which) else 0
    assert counter.get_total_flops() == (1 + again + which[0] + which[1]) * 2 * 8 * 16 * 4
    assert [x.grad is not None for x in inputs] == list(which)


def test_an_evaluation_makes_logits_only():
    inputs, y, _ = example(0, (8,), 16, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*inputs[:2], y, inputs[2])
    assert counter.get_total_flops() == 2 * 8 * 16 * 4


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_second_derivatives(reduction):
    inputs, y, w = example(0, (2, 2), 5, 3, ignored=[2])
    def f(form): return lambda h, W, b: form(h, W, y, b, w, label_smoothing=0.1, z_loss=0.1, softcap=2.0, reduction=reduction, chunk=2)
    assert torch.autograd.gradcheck(f(linear_cross_entropy), inputs)
    assert torch.autograd.gradgradcheck(f(checkpointed_linear_cross_entropy), inputs)
    with pytest.raises(NotImplementedError, match="first derivative, got create_graph: use checkpointed_linear_cross_entropy"):
        grads(f(linear_cross_entropy)(*inputs), inputs, create_graph=True)


# Dtypes, devices, corners

@FORMS
@DEVICES
@DTYPES
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_errors_are_not_larger_than_plain_s(form, device, dtype, reduction):
    (h, W, b), y, w = example(0, (200,), 500, 32, dtype=dtype, device=device, ignored=range(0, 200, 9))
    with torch.no_grad():
        W *= 0.2
    high = [x.detach().double().requires_grad_() for x in (h, W, b)]
    want = plain(*high[:2], y, high[2], w.double(), label_smoothing=0.1, reduction=reduction)
    up = draw(1, want.shape, device=device)[0].abs() + 0.1
    wanted, off, want = grads(want, high, up), [], want.detach()
    for f, more in ((form, {"chunk": 64}), (plain, {})):
        loss = f(h, W, y, b, w, label_smoothing=0.1, reduction=reduction, **more)
        got = grads(loss, (h, W, b), up.to(loss.dtype))
        assert [g.dtype for g in got] == [dtype] * 3 and (f is plain or loss.dtype == torch.promote_types(dtype, torch.float32))
        off.append([float((a.double() - e).square().mean().sqrt()) for a, e in zip((loss.detach(), *got), (want, *wanted))])
    assert off[0][0] < 12 * torch.finfo(dtype).eps and (dtype != torch.float64 or max(off[0]) < 1e-12)
    if dtype == torch.float64 or dtype.itemsize == 2 and form is checkpointed_linear_cross_entropy:
        return  # autograd adds up the chunks in 16 bits
    limits = [1.25 if device == "cpu" else 2.0] * 3  # a GPU adds up the whole as a tree, and ours chunk by chunk
    assert all(ours <= limit * theirs for ours, theirs, limit in zip(off[0][1:], off[1][1:], limits)), off


@FORMS
@DEVICES
@DTYPES
@pytest.mark.parametrize("row", [[-inf, -inf], [inf, 0.0], [nan, 0.0], [-inf, 0.0], [0.0, -inf], [3e4, -3e4], [-3e4, 3e4], [3e4, 3e4]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_corners_are_torch_s_in_float32_at_least(form, device, dtype, row, smoothing):
    b = torch.tensor(row, dtype=dtype, device=device, requires_grad=True)
    wide = b.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    h, y = torch.zeros(1, 1, dtype=dtype, device=device), torch.zeros(1, dtype=torch.long, device=device)
    got = form(h, h.expand(2, 1), y, b, label_smoothing=smoothing)
    want = F.cross_entropy(wide[None], y, label_smoothing=smoothing)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(grads(got, b)[0], grads(want, wide)[0].to(dtype), equal_nan=True)


@FORMS
@DEVICES
@DTYPES
def test_an_ignored_row_may_hold_anything(form, device, dtype):
    (h, W, b), y, _ = example(0, (4,), 6, 3, dtype=dtype, device=device, ignored=[1, 3])
    clean = grads(form(h, W, y, b, chunk=1), (h, W, b))
    with torch.no_grad():
        h[1], h[3] = nan, inf
    dirty = grads(form(h, W, y, b, chunk=1), (h, W, b))
    for a, c in zip(dirty, clean):
        same(a, c)
    assert not dirty[0][1::2].any()


@FORMS
@DTYPES
def test_no_row_counts(form, dtype):
    (h, W, b), y, w = example(0, (3,), 5, 4, dtype=dtype, ignored=range(3))
    for reduction, told in (("none", [0.0] * 3), ("sum", 0.0), ("mean", nan)):
        loss = form(h, W, y, b, w, reduction=reduction, z_loss=0.1)
        torch.testing.assert_close(loss, torch.full_like(loss, nan) if reduction == "mean" else torch.zeros_like(loss), equal_nan=True)
        assert torch.tensor(told).shape == loss.shape and not any(g.any() for g in grads(loss, (h, W, b)))
    w = torch.zeros_like(w)
    assert form(h, W, y * 0, b, w).isnan() and plain(h.float(), W.float(), y * 0, b.float(), w.float()).isnan()


@FORMS
@DEVICES
def test_a_scaled_loss_in_float16_keeps_small_gradients(form, device):
    """Multiplied before they are rounded, as a loss scaler needs it; a scale beyond the dtype gives infinity, which the scaler sees."""
    (h, W), y, _ = example(0, (64,), 300, 8, bias=False, dtype=torch.float16, device=device)
    with torch.no_grad():
        W *= 1e-3
    small = grads(form(h, W, y), W)[0]
    big = grads(1e4 * form(h, W, y), W)[0]
    wanted = grads(plain(h.detach().double(), wide := W.detach().double().requires_grad_(), y), wide)[0]
    assert (big.double() / 1e4 - wanted).norm() < 2e-3 * wanted.norm() < (small.double() - wanted).norm() + 2e-3 * wanted.norm()
    assert grads(1e9 * form(h, W, y), W)[0].isinf().any()


@FORMS
@DEVICES
def test_under_autocast_as_linear(form, device):
    (h, W, b), y, _ = example(0, (6,), 9, 4, dtype=torch.float32, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss, mixed = form(h, W, y, b), form(h.bfloat16(), W, y, b)
    assert loss.dtype == torch.float32
    same(loss, form(h.bfloat16(), W.bfloat16(), y, b.bfloat16()))
    same(loss, mixed)
    got, want = grads(loss, (h, W, b)), grads(plain(h, W, y, b), (h, W, b))
    assert all(a.dtype == torch.float32 and (a - e).norm() < 0.02 * e.norm() for a, e in zip(got, want))


# Memory

def peak(f):
    os.environ["KINETO_LOG_LEVEL"] = "99"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peak_is_gradients_and_one_chunk(dtype):
    """For 16 bits the sums are in float32, beside a chunk or beside what is returned."""
    N, V, E, n = 512, 20000, 32, 8
    (h, W), y, _ = example(0, (N,), V, E, bias=False, dtype=dtype)
    size = max(4, dtype.itemsize)
    told = size * ((N + V) * E + n * V)
    if dtype.itemsize == 2:
        told = max(told + 2 * n * V + 6 * 2048 * E, 6 * (N + V) * E)
    def backward(): linear_cross_entropy(3 * h, W, y, chunk=n).backward()
    assert 0.9 * told < peak(lambda: grads(linear_cross_entropy(h, W, y, chunk=n), (h, W))) < 1.1 * told
    assert peak(backward) < 1.1 * told + 4 * h.nbytes  # 3 h, and the way back to h; the gradient of W is not copied
    assert peak(lambda: grads(plain(h, W, y), (h, W))) > 3 * N * V * dtype.itemsize


@quick
@given(V=st.integers(1, 10**6), E=st.integers(1, 10**4), budget=st.integers(0, 2**32), capped=st.booleans(),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_chunk_fills_its_budget(V, E, budget, capped, dtype):
    W = torch.empty(V, E, dtype=dtype, device="meta")
    wide = max(4, dtype.itemsize)
    n, row = chunk_rows(W, budget, 1.0 if capped else None), V * (wide + capped * wide + (2 if dtype.itemsize == 2 else 0))
    assert n == 1 or n * row <= budget < (n + 1) * row
    assert chunk_rows(W) == chunk_rows(W, max(2**24, V * E * (wide + (2 if dtype.itemsize == 2 else 0)) // 3))


def test_soft_cap():
    x = torch.tensor([-1e30, -1.0, 0.0, 1e-8, 1e30], dtype=torch.float64)
    assert torch.equal(soft_cap(x, None), x)
    assert torch.equal(soft_cap(x, 30.0)[[0, 2, 4]], torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64))


# Bad input

h, W, b, w = draw(0, (2, 3, 4), (7, 4), (7,), (7,))
y = torch.zeros(2, 3, dtype=torch.long)


@FORMS
@pytest.mark.parametrize("args, options, error, message", [
    ((h, W, y + 7), {}, ValueError, r"targets must be 0 to 6 or -100, targets\[0, 0\] is 7: check V and ignore_index"),
    ((h[0], W, torch.tensor([0, -100, -1])), {}, ValueError, r"targets\[2\] is -1"),
    ((h, W, y - 100), {"ignore_index": 3}, ValueError, r"0 to 6 or 3, targets\[0, 0\] is -100"),
    ((h, W, y[0]), {}, ValueError, r"targets must be \(2, 3\), one for each hidden state, got \(3,\): reshape them"),
    ((h, W, y[..., None]), {}, ValueError, r"got \(2, 3, 1\)"),
    ((h, W, y.double()), {}, TypeError, r"targets must be class numbers, got torch.float64: convert with .long\(\)"),
    ((h, W, y == 0), {}, TypeError, "got torch.bool"),
    ((h, W, torch.rand(2, 3, 7)), {}, TypeError, "probabilities need xent.cross_entropy"),
    ((h, W.float(), y), {}, TypeError, "one floating dtype, got torch.float64, torch.float32: convert"),
    ((h, W, y, b.float()), {}, TypeError, "one floating dtype"),
    ((h.long(), W.long(), y), {}, TypeError, "one floating dtype, got torch.int64"),
    ((h, W.mT, y), {}, ValueError, r"expected hidden \(..., E\) and linear_weight \(V, E\), got \(2, 3, 4\) and \(4, 7\): check E"),
    ((h, W[0], y), {}, ValueError, "check E"),
    ((h[0, 0, 0], W, y[0, 0]), {}, ValueError, "check E"),
    ((h, W[:0], y), {}, ValueError, "check E"),
    ((h[:0], W, y[:0]), {}, ValueError, r"at least one row, got hidden \(0, 3, 4\): leave out empty batches"),
    ((h, W, y, b[:6]), {}, ValueError, r"linear_bias must be \(7,\), one for each class, got \(6,\)"),
    ((h, W, y), {"weight": w[:, None]}, ValueError, r"weight must be \(7,\), one for each class, got \(7, 1\)"),
    ((h, W, y.to("meta")), {}, ValueError, "one device, got cpu, meta: move"),
    ((h, W, y), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be 0 to 1, got 1.5"),
    ((h, W, y), {"reduction": "average"}, ValueError, "reduction must be one of none, sum, mean, got 'average'"),
    ((h, W, y), {"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    ((h, W, y), {"chunk": 0}, ValueError, "chunk must be at least 1, got 0")])
def test_bad_input_is_refused_in_one_line(form, args, options, error, message):
    with pytest.raises(error, match=message) as e:
        form(*args, **options)
    assert "\n" not in str(e.value)
