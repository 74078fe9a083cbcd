"""Attention in tiles: equal to the dense computation on any shape, mask, dtype and layout, and O(T) in memory."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.masks import packed, sliding
from tunebook.attention.positions import alibi, alibi_slopes
from tunebook.attention.tiled import _Plan, _tiles, alibi_rule, document_rule, tiled_attention, tuned_attention
from tunebook.kit.checks import close, same

FORMS = pytest.mark.parametrize("form", [tiled_attention, tuned_attention], ids=["tiled", "tuned"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
sizes, seeds, tiles = st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([1, 2, 3, 4, 256])
quick = settings(deadline=None, max_examples=50, derandomize=True)


def draw(seed, *shapes, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def dense(q, k, v, seen, bias=0.0, scale=None):
    """Output and log-sum-exp from the whole matrix."""
    s = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    return (s - lse.clamp(min=torch.finfo(s.dtype).min)[..., None]).exp() @ v, lse


def visible(T, S, causal, window, device="cpu"):
    age = torch.arange(T, device=device)[:, None] + S - T - torch.arange(S, device=device)
    near = age < (window or S + T)
    return (age >= 0) & near if causal or window else torch.ones_like(near)


@FORMS
@quick
@given(seed=seeds, B=st.integers(1, 3), H=st.integers(1, 5), T=sizes, S=sizes, D=sizes, Dv=sizes, tile=tiles, causal=st.booleans(),
       window=st.sampled_from([None, 1, 3]), mask=st.sampled_from([None, "tensor", "rule", "row"]),
       bias=st.sampled_from([None, "tensor", "rule", "row"]), scale=st.sampled_from([None, 0.3]))
def test_values_and_gradients_are_those_of_the_matrix(form, seed, B, H, T, S, D, Dv, tile, causal, window, mask, bias, scale):
    q, k, v, up, d_lse, m, b = draw(seed, (B, H, T, D), (B, H, S, D), (B, H, S, Dv), (B, H, T, Dv), (B, H, T), (B, 1, T, S), (H, T, S))
    masks = {None: None, "tensor": m > 0, "row": m[:, :, :1] > 0, "rule": lambda i, j: (3 * i + j) % 4 > 0}
    biases = {None: None, "tensor": b, "row": b[:1, 0], "rule": lambda i, j: -0.2 * (i - j).abs()}
    given_mask, given_bias = masks[mask], biases[bias]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if isinstance(given_bias, torch.Tensor):
        inputs.append(given_bias := given_bias.clone().requires_grad_())
    i, j = torch.arange(T)[:, None], torch.arange(S)[None]
    seen = visible(T, S, causal, window) & (torch.tensor(True) if mask is None else given_mask(i, j) if mask == "rule" else given_mask)
    added = 0.0 if bias is None else given_bias(i, j) if bias == "rule" else given_bias
    more = {"heads": 1 + seed % 3} if form is tuned_attention else {}
    out, lse = form(q, k, v, given_mask, given_bias, causal, scale, tile, window, **more)
    want, want_lse = dense(q, k, v, seen, added, scale)
    finite = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite) and not out[~finite].any()
    grads = []
    for y, z in ((out, lse), (want, want_lse)):
        assert torch.allclose(y, want, rtol=0, atol=1e-11) and torch.allclose(z[finite], want_lse[finite], rtol=0, atol=1e-11)
        grads.append(torch.autograd.grad((y * up).sum() + (z[finite] * d_lse[finite]).sum(), inputs))
    for ours, theirs in zip(*grads):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs.nan_to_num(), rtol=0, atol=1e-10)


@FORMS
@quick
@given(seed=seeds, T=st.integers(2, 12), at=st.integers(1, 11), tile=tiles)
def test_a_change_of_the_future_leaves_the_past_bitwise_equal(form, seed, T, at, tile):
    at = min(at, T - 1)
    q, k, v, other = draw(seed, (2, T, 4), (2, T, 4), (2, T, 3), (2, T, 7))
    before = form(q, k, v, causal=True, tile=tile)
    k[:, at:], v[:, at:] = other[:, at:, :4], other[:, at:, 4:]
    after = form(q, k, v, causal=True, tile=tile)
    for x, y in zip(before, after):
        same(x[:, :at], y[:, :at])


@FORMS
@quick
@given(seed=seeds, T=sizes, S=st.integers(3, 9), tile=tiles)
def test_a_hidden_key_gets_no_gradient(form, seed, T, S, tile):
    q, k, v, up = draw(seed, (2, T, 4), (2, S, 4), (2, S, 3), (2, T, 3))
    mask = torch.arange(S) != seed % S
    k.requires_grad_()
    v.requires_grad_()
    for g in torch.autograd.grad(form(q, k, v, mask=mask, tile=tile)[0], (k, v), up):
        assert not g[:, seed % S].any() and g[:, mask].any()


@FORMS
@quick
@given(seed=seeds, T=sizes, S=st.integers(2, 9), at=st.integers(1, 8), tile=tiles)
def test_two_parts_of_the_keys_are_put_together_by_the_log_sum_exp(form, seed, T, S, at, tile):
    at = min(at, S - 1)
    q, k, v = draw(seed, (2, T, 4), (2, S, 4), (2, S, 3))
    (a, x), (b, y) = form(q, k[:, :at], v[:, :at], tile=tile), form(q, k[:, at:], v[:, at:], tile=tile)
    z = torch.logaddexp(x, y)
    out, lse = form(q, k, v, tile=tile)
    assert torch.allclose((x - z).exp()[..., None] * a + (y - z).exp()[..., None] * b, out, rtol=0, atol=1e-12)
    assert torch.allclose(z, lse, rtol=0, atol=1e-12)


@quick
@given(seed=seeds, lead=st.lists(st.integers(1, 3), max_size=4), T=sizes, tile=tiles, heads=st.integers(1, 4))
def test_any_leading_dimensions(seed, lead, T, tile, heads):
    q, k, v = draw(seed, (*lead, T, 4), (*lead, T, 4), (*lead, T, 3))
    want = dense(q, k, v, visible(T, T, True, None))
    for out, lse in (tiled_attention(q, k, v, causal=True, tile=tile), tuned_attention(q, k, v, causal=True, tile=tile, heads=heads)):
        assert out.shape == want[0].shape and lse.shape == want[1].shape
        assert torch.allclose(out, want[0], rtol=0, atol=1e-12) and torch.allclose(lse, want[1], rtol=0, atol=1e-12)


@FORMS
@quick
@given(seed=seeds, groups=st.integers(1, 3), times=st.integers(1, 3), T=sizes)
def test_shared_keys_and_heads_stored_beside_each_other(form, seed, groups, times, T):
    """Grouped heads by broadcasting; (B, T, H, D) in memory, as a projection gives it."""
    q, k, v, up = draw(seed, (2, T, groups, times, 4), (2, T, groups, 1, 4), (2, T, groups, 1, 3), (2, groups, times, T, 3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    heads = [x.movedim(1, -2) for x in leaves]
    full = [x.expand(2, groups, times, T, -1) for x in heads]
    grads = [torch.autograd.grad(f(*x), leaves, up) for f, x in (
        (lambda *x: form(*x, tile=3)[0], heads), (lambda *x: dense(*x, visible(T, T, False, None))[0], full))]
    for ours, theirs in zip(*grads):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


@FORMS
@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_not_larger_than_the_library_s(form, device, dtype, causal):
    *low, up = draw(0, *[(1, 2, 300, 32)] * 4, dtype=dtype, device=device)
    errors = []
    for f in (lambda *x: form(*x, causal=causal, tile=128)[0], lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal)):
        sides = []
        for wide in (False, True):
            inputs = [(x.double() if wide else x.clone()).requires_grad_() for x in low]
            out = f(*inputs)
            assert out.dtype == (torch.float64 if wide else dtype)
            sides.append([out.detach(), *torch.autograd.grad(out, inputs, up.to(out.dtype))])
        errors.append([float((a.double() - b).square().mean().sqrt()) for a, b in zip(*sides)])
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(*errors)), errors


@FORMS
@DEVICES
def test_the_log_sum_exp_of_half_precision_is_float32_and_autocast_changes_nothing(form, device):
    q, k, v = (x.requires_grad_() for x in draw(0, *[(1, 2, 20, 8)] * 3, dtype=torch.float32, device=device))
    assert form(*(x.bfloat16() for x in (q, k, v)))[1].dtype == torch.float32
    want = torch.autograd.grad(form(q, k, v)[0].sum(), (q, k, v))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = torch.autograd.grad(form(q, k, v)[0].sum(), (q, k, v))
    for x, y in zip(got, want):
        same(x, y)


@FORMS
def test_masks_and_positions_of_the_other_chapters(form):
    q, k, v = draw(0, (2, 4, 50, 8), (2, 4, 50, 8), (2, 4, 50, 8))
    documents = torch.stack([torch.arange(50) // 20, torch.arange(50) // 13])
    for rule, seen, bias in (({"window": 7}, sliding(50, 7), 0.0), ({"mask": document_rule(documents)}, packed(documents), 0.0),
                             ({"bias": alibi_rule(alibi_slopes(4).double(), 50), "causal": True}, visible(50, 50, True, None),
                              alibi(4, 50).double())):
        got = form(q, k, v, **rule, tile=16)
        for x, y in zip(got, dense(q, k, v, seen, bias)):
            close(x, y, terms=2000)


@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (40, 40), (40, 64), (64, 40)])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 100])
def test_only_tiles_with_something_to_see_are_visited(T, S, window):
    plan = _Plan(T, S, 16, True, window, None, None, 1.0, torch.float32)
    seen, visited = visible(T, S, True, window), torch.zeros(T, S, dtype=torch.bool)
    for rows in plan.rows():
        for cols, extra in _tiles(plan, rows, "cpu"):
            part = seen[rows, cols]
            assert part.any() and not visited[rows, cols].any()
            assert torch.equal(torch.as_tensor(extra).expand_as(part) == 0, part)
            assert isinstance(extra, torch.Tensor) == (not part.all())
            visited[rows, cols] = True
    assert not seen[~visited].any()


@FORMS
def test_peak_memory_grows_with_the_length_only(form):
    os.environ["KINETO_LOG_LEVEL"] = "99"
    from torch.profiler import ProfilerActivity, profile

    def peak(T):
        inputs = [x.requires_grad_() for x in draw(0, *[(1, 2, T, 16)] * 3, dtype=torch.float32)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            torch.autograd.grad(form(*inputs, causal=True, tile=64)[0].sum(), inputs)
        events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
        return max(itertools.accumulate(size for _, size in events))

    assert peak(1024) <= 2.2 * peak(512)
    assert peak(1024) < 4 * 2 * 1024**2 / 4  # a quarter of one (H, T, T) matrix


@FORMS
def test_nothing_to_see_and_nothing_to_ask(form):
    q, k, v = (x.requires_grad_() for x in draw(0, (2, 3, 4), (2, 0, 4), (2, 0, 5)))
    out, lse = form(q, k, v)
    assert out.shape == (2, 3, 5) and not out.any() and bool((lse == -math.inf).all())
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    assert form(q[:, :0], k, v)[0].shape == (2, 0, 5)


@FORMS
def test_a_mask_overwritten_before_the_way_back_is_noticed(form):
    q, k, v = (x.requires_grad_() for x in draw(0, *[(3, 4)] * 3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    out, _ = form(q, k, v, mask=mask)
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


q, k, v = draw(0, (2, 5, 4), (2, 6, 4), (2, 6, 3))


@FORMS
@pytest.mark.parametrize("args, options, error, message", [
    ((q, k[..., :3], v), {}, ValueError, r"expected q \(..., T, D\), k \(..., S, D\) and v .* transpose or project"),
    ((q, k, v[:, :5]), {}, ValueError, "transpose or project"),
    ((q[0, 0], k, v), {}, ValueError, "transpose or project"),
    ((q, k.float(), v), {}, TypeError, "one floating dtype, got torch.float64, torch.float32"),
    ((q.long(), k.long(), v.long()), {}, TypeError, "one floating dtype"),
    ((q, k.expand(3, 2, 6, 4), v.expand(4, 2, 6, 3)), {}, ValueError, "leading dimensions that broadcast"),
    ((q, k, v), {"mask": torch.ones(5, 6)}, TypeError, "boolean mask .* got torch.float32"),
    ((q, k, v), {"mask": torch.ones(6, 5) > 0}, ValueError, r"mask that broadcasts to \(..., T, S\) = \(2, 5, 6\), got \(6, 5\)"),
    ((q, k, v), {"mask": torch.ones(3, 2, 5, 6) > 0}, ValueError, "mask that broadcasts"),
    ((q, k, v), {"mask": [True] * 6}, TypeError, "tensor or a function, got list"),
    ((q, k, v), {"mask": lambda i, j: i - j}, TypeError, "boolean mask .* got torch.int64"),
    ((q, k, v), {"mask": lambda i, j: (i > j).expand(3, 1, 1)}, ValueError, "mask that broadcasts"),
    ((q, k, v), {"bias": torch.ones(5, 6) > 0}, TypeError, "floating bias, got torch.bool"),
    ((q, k, v), {"bias": lambda i, j: torch.ones((), requires_grad=True) * (i - j)}, TypeError, "pass the bias as a tensor"),
    ((q, k, v), {"tile": 0}, ValueError, "tile of at least 1, got 0"),
    ((q, k, v), {"window": 0}, ValueError, "window of at least 1, got 0"),
    ((q * math.nan, k, v), {}, ValueError, "expected finite .* got NaN"),
    ((q, k * math.inf, v), {}, ValueError, "expected finite .* got NaN")])
def test_bad_input_is_refused_in_one_line(form, args, options, error, message):
    with pytest.raises(error, match=message) as e:
        form(*args, **options)
    assert "\n" not in str(e.value)


@FORMS
def test_a_second_derivative_is_refused(form):
    x = q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="first derivative"):
        torch.autograd.grad(form(x, k, v)[0].sum(), x, create_graph=True)
