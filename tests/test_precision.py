"""Formats, rounding, lost updates, sums and loss scaling on drawn numbers: PyTorch's bits, its neighbours, its scaler, and clear errors."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunebook.kit.checks import same
from tunebook.timing.precision import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    FP32,
    FP64,
    TF32,
    Format,
    Scaler,
    add_kahan,
    add_master,
    dot_bound,
    fields,
    rounded,
    running,
    spacing,
    stochastic,
    stops,
    unscale,
)

quick = settings(deadline=None, max_examples=100, derandomize=True)
few = settings(quick, max_examples=30)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
OF = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
SHORT = list(OF)[1:]
FORMATS = [FP32, TF32, BF16, FP16, E4M3, E5M2, Format(4, 3), Format(3, 2, finite=True), Format(2, 1)]
seeds, formats = st.integers(0, 2**31), st.sampled_from(FORMATS)
singles = st.floats(width=32) | st.floats(-3, 3, width=32) | st.floats(width=16) | st.sampled_from([-0.0, math.inf, -math.inf, math.nan])
inf, nan = math.inf, math.nan


def patterns(dtype, device="cpu"):
    whole, n = (torch.int16, 2**16) if dtype.itemsize == 2 else (torch.uint8, 2**8)
    return torch.arange(n, device=device).to(whole).view(dtype)


def bits(seed, n):
    return torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed)).int().view(torch.float32)


def torchs(x, dtype):
    """PyTorch's rounding. Beyond the largest of E4M3 older versions made NaN; newer ones saturate."""
    y = x.to(dtype).float()
    return torch.where(y.isnan() & ~x.isnan(), torch.finfo(dtype).max * x.sign().float(), y)


def alike(a, b):
    """The same bits, and NaN at the same places."""
    assert torch.equal(a.isnan(), b.isnan())
    same(a.nan_to_num(nan=1.0, posinf=inf, neginf=-inf), b.nan_to_num(nan=1.0, posinf=inf, neginf=-inf))


def numbers(f):
    """All finite numbers of a small format, ascending, by the formula."""
    size = [(m + 2**f.mantissa * (e > 0)) * 2.0 ** (max(e, 1) - f.bias - f.mantissa)
            for e in range(f.bias + f.top + 1) for m in range(2**f.mantissa)]
    size = size[:-1] if f.finite else size
    return torch.tensor(sorted({s * v for v in size for s in (1.0, -1.0)}), dtype=torch.float64)


# Formats

@pytest.mark.parametrize("dtype", OF)
def test_limits_are_torch_s(dtype):
    f, theirs = OF[dtype], torch.finfo(dtype)
    assert (f.largest, f.normal, f.eps, 1 + f.exponent + f.mantissa) == (theirs.max, theirs.tiny, theirs.eps, theirs.bits)
    one = torch.tensor([1], dtype={1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]).view(dtype)
    assert f.subnormal == one.double().item() and f.unit == f.eps / 2


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("device", DEVICES)
def test_fields_and_spacing_of_every_pattern(dtype, device):
    f, x = OF[dtype], patterns(dtype, device)
    sign, exponent, mantissa = fields(x)
    whole = (sign << (f.exponent + f.mantissa)) | (exponent << f.mantissa) | mantissa
    assert torch.equal(whole, torch.arange(len(x), device=device))
    real, positive = x.float().isfinite(), sign == 0
    sign, exponent, mantissa = sign.cpu(), exponent.cpu(), mantissa.cpu()  # on a GPU 2.0 ** n is not exact
    value = (mantissa + 2.0**f.mantissa * (exponent > 0)) * 2.0 ** (exponent.clamp(min=1).double() - f.bias - f.mantissa)
    same(((1 - 2 * sign) * value)[real.cpu()], x.double().cpu()[real.cpu()])
    whole = whole[real & positive]
    steps = (whole[1:].to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).double()).diff()
    assert torch.equal(spacing(x[real & positive].float(), f)[1:-1], steps)


def test_fields_of_what_is_not_contiguous():
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4).mT
    for a, b in zip(fields(x), fields(x.contiguous())):
        assert torch.equal(a, b)
    assert [v.item() for v in fields(torch.tensor(-1.5, dtype=torch.float64))] == [1, 1023, 2**51]


# Rounding

@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("device", DEVICES)
def test_every_16_bit_pattern_and_every_tie_is_rounded_as_torch_does(dtype, device):
    f = OF[dtype]
    v = torch.cat([patterns(torch.bfloat16, device).float(), patterns(torch.float16, device).float()])
    ends = patterns(dtype, device).float()
    tie = (ends.double() + spacing(ends, f) / 2).float()
    near = [torch.nextafter(tie, torch.full_like(tie, end)) for end in (inf, -inf)]
    for x in (v, tie, *near, -tie):
        alike(rounded(x, f), torchs(x, dtype))


@quick
@given(seed=seeds, dtype=st.sampled_from(SHORT))
def test_random_bits_are_rounded_as_torch_does(seed, dtype):
    x = bits(seed, 2000)
    alike(rounded(x, OF[dtype]), torchs(x, dtype))
    alike(rounded(x, FP32), x)


@quick
@given(x=singles, f=formats)
def test_nearest_even_among_all_neighbours(x, f):
    y = rounded(torch.tensor(x), f).item()
    if math.isnan(x):
        assert math.isnan(y)
    elif abs(x) > f.largest + spacing(torch.tensor(f.largest), f).item() / 2 or math.isinf(x):
        assert y == math.copysign(f.largest if f.finite else inf, x)
    elif math.isinf(y):
        assert abs(x) >= f.largest
    else:
        step, true = Fraction(spacing(torch.tensor(x), f).item()), Fraction(x)
        assert Fraction(y) % Fraction(f.subnormal) == 0 and abs(y) <= f.largest
        assert 2 * abs(Fraction(y) - true) <= step or abs(y) == f.largest and f.finite
        if 2 * abs(Fraction(y) - true) == step and abs(y) < f.largest:
            assert Fraction(y) / step % 2 == 0
        assert math.copysign(1, y) == math.copysign(1, x)


@pytest.mark.parametrize("f", [E4M3, E5M2, Format(4, 3), Format(3, 2, finite=True), Format(2, 1)])
def test_small_formats_against_a_search(f):
    every = numbers(f)
    same(rounded(every, f), every)
    x = torch.cat([every, (every[1:] + every[:-1]) / 2, every * 1.0001, every * 0.9999]).clamp(-f.largest, f.largest)
    gaps = (x[:, None] - every).abs()
    y = rounded(x, f)
    assert torch.equal((x - y).abs(), gaps.min(1).values)
    tied = (gaps == gaps.min(1, keepdim=True).values).sum(1) > 1
    assert tied.any() and ((y / spacing(y, f) % 2 == 0) | (y == 0) | ~tied).all()


@quick
@given(seed=seeds, f=formats)
def test_rounding_is_idempotent_odd_and_never_turns_round(seed, f):
    x = bits(seed, 500)
    y = rounded(x, f)
    alike(rounded(y, f), y)
    alike(rounded(-x, f), -y)
    order = rounded(x[~x.isnan()].sort().values, f)
    assert (order[1:] >= order[:-1]).all()
    alike(rounded(x.double(), f).float(), y)


def test_dtypes_shapes_and_float64():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        x, wide = torch.ones(2, 0, 3).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
        assert rounded(x, BF16).dtype == stochastic(x, BF16).dtype == wide and rounded(x, BF16).shape == (2, 0, 3)
    tiny = torch.tensor([5e-324, -1e-310, 1e308, -0.0], dtype=torch.float64)
    same(rounded(tiny, FP32), torch.tensor([0.0, -0.0, inf, -0.0], dtype=torch.float64))
    assert rounded(torch.tensor(65504.0, dtype=torch.float16), BF16).item() == 65536.0
    above = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)  # torch rounds twice
    assert rounded(above, BF16).item() == 1 + 2**-7 and above.to(torch.bfloat16).item() == 1.0


# Stochastic rounding

@quick
@given(seed=seeds, f=formats)
def test_only_the_two_neighbours(seed, f):
    x, g = bits(seed, 1000), torch.Generator().manual_seed(seed)
    y = stochastic(x, f, g)
    assert torch.equal(y.isnan(), x.isnan())
    x, y = x[~x.isnan()].double(), y[~x.isnan()].double()
    inside = x.abs() <= f.largest
    assert ((y - x).abs() < spacing(x, f))[inside].all()
    alike(rounded(y.float(), f).double(), y)
    assert torch.equal(y[~inside].abs() >= f.largest, torch.ones(int((~inside).sum()), dtype=torch.bool))
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", SHORT)
def test_what_is_a_number_of_the_format_stays(dtype):
    x = patterns(dtype).float()
    alike(stochastic(x, OF[dtype], torch.Generator().manual_seed(0)), x)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("f", [BF16, FP16, E4M3])
@pytest.mark.parametrize("device", DEVICES)
def test_up_as_often_as_the_distance_says(share, f, device):
    n = 40_000
    x = torch.full((n,), 3.0 + share * 2 * f.eps, dtype=torch.float64, device=device)
    up = (stochastic(x, f, torch.Generator(device).manual_seed(1)) > 3.0).double().mean().item()
    assert abs(up - share) < 5 * math.sqrt(share * (1 - share) / n)
    y = stochastic(-x, f, torch.Generator(device).manual_seed(2)).mean().item()
    assert abs(y + x[0].item()) < 5 * 2 * f.eps * math.sqrt(share * (1 - share) / n)


def test_a_seed_repeats():
    x = bits(3, 100).nan_to_num(0.0)
    same(*(stochastic(x, BF16, torch.Generator().manual_seed(5)) for _ in range(2)))


# Updates

@quick
@given(seed=seeds, f=st.sampled_from([BF16, FP16, TF32, E4M3, E5M2]), sign=st.sampled_from([1, -1]))
def test_an_update_stops_exactly_when_trial_says_so(seed, f, sign):
    g = torch.Generator().manual_seed(seed)
    w = rounded(bits(seed, 500), f).double()
    w = w[w.isfinite()]
    powers = w.sign() * 2.0 ** w.abs().clamp(min=f.normal).log2().floor()
    w = torch.cat([w, powers, torch.tensor([0.0, -0.0, f.largest, f.subnormal, f.normal])])
    step = spacing(w, f)
    for share in (0.25, 0.5, 1.0, 0.5 + 2.0**-9, 0.25 - 2.0**-9, torch.rand(len(w), generator=g).bfloat16()):
        u = share * step
        assert torch.equal(stops(w, sign * u, f), rounded(w + sign * u, f) == w)


def test_stops_broadcasts():
    w = torch.tensor([0.01, 0.1, 1.0]).bfloat16()
    assert stops(w, torch.tensor(1e-4), BF16).tolist() == [False, True, True]
    assert stops(w[:, None], torch.tensor([1e-5, 1e-2]), BF16).shape == (3, 2)
    assert stops(w, torch.tensor(nan), BF16).any().item() is False


@few
@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_kahan_keeps_what_is_lost(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    w = (1 + torch.rand(50, generator=g)).to(dtype)
    lost, total = torch.zeros_like(w), w.double()
    for _ in range(100):
        u = (1e-3 * torch.randn(50, generator=g)).to(dtype)
        before = w.double() + lost.double()
        rest = (u + lost).double() - (u.double() + lost.double())  # the one rounding that is not kept
        add_kahan(w, u, lost)
        assert torch.equal(w.double() + lost.double(), before + u.double() + rest)
        total = total + u.double()
    assert (w.double() - total).abs().max() < 2 * torch.finfo(dtype).eps


def test_master_is_float32_s_sum_rounded():
    w, master = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    for _ in range(100):
        add_master(w, torch.full((4,), 1e-3), master)
    total = torch.ones(4)
    for _ in range(100):
        total = total + 1e-3
    same(master, total)
    same(w, total.bfloat16())


def test_parameters_may_be_changed_in_place():
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    add_kahan(w, torch.full((3,), 0.5), torch.zeros(3, dtype=torch.bfloat16))
    add_master(w, torch.full((3,), 0.5), torch.ones(3))
    assert w.tolist() == [1.5] * 3 and w.requires_grad


# Sums

@few
@given(seed=seeds, n=st.integers(1, 60), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_running_sums_are_torch_s(seed, n, dtype):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours, total = running(x, OF[dtype]), torch.zeros(3, dtype=dtype)
    for k in range(n):
        total = total + x[:, k]
        same(ours[:, k], total.double())


@few
@given(seed=seeds, n=st.integers(1, 120), inputs=st.sampled_from(FORMATS[:6]), sums=st.sampled_from([FP32, TF32, FP16, BF16]))
def test_dot_products_are_within_the_bound(seed, n, inputs, sums):
    g = torch.Generator().manual_seed(seed)
    x, y = (0.6 + 0.4 * torch.rand(4, n, generator=g, dtype=torch.float64) for _ in range(2))  # no underflow in any format
    x, y = x * (torch.rand(4, n, generator=g) - 0.5).sign(), y
    products = rounded(rounded(x, inputs) * rounded(y, inputs), sums)
    error = (running(products, sums)[:, -1] - (x * y).sum(-1)).abs()
    assert (error <= dot_bound(n, inputs, sums) * (x * y).abs().sum(-1) + 1e-12).all()


def test_the_bound_ends():
    assert dot_bound(256, BF16, BF16) == dot_bound(2**24, FP32, FP32) == inf
    assert dot_bound(1, FP32, FP32) == pytest.approx(3 * 2.0**-24, rel=1e-6)


# Loss scaling

@few
@given(finite=st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=30), start=st.floats(0, 126).map(lambda k: 2.0**k),
       growth=st.floats(1.01, 8), backoff=st.floats(0.1, 0.9), interval=st.integers(1, 5), bad=st.sampled_from([inf, -inf, nan]))
def test_scale_weights_and_skips_are_gradscaler_s(finite, start, growth, backoff, interval, bad):
    ours, theirs = Scaler(start, growth, backoff, interval), torch.amp.GradScaler("cpu", start, growth, backoff, interval)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    sgd = [torch.optim.SGD([w], lr=0.1) for w in weights]
    for k, fine in enumerate(finite):
        same(ours.scaled(torch.tensor(0.3)), theirs.scale(torch.tensor(0.3)))
        assert (ours.scale, ours.calm) == (theirs.get_scale(), theirs._get_growth_tracker())
        for w in weights:
            w.grad = torch.tensor([float(k + 1), 2.0 if fine else bad]) * 1e-3
        stepped = ours.step(sgd[0])
        theirs.step(sgd[1])
        theirs.update()
        assert stepped == fine
        alike(*(w.detach() for w in weights))


@pytest.mark.parametrize("device", DEVICES)
def test_scaler_in_a_real_backward_pass(device):
    w = nn.Parameter(torch.full((3,), 2.0, device=device))
    scaler, sgd = Scaler(scale=2.0**10), torch.optim.SGD([w], lr=0.5)
    scaler.scaled((w * w).sum() / 2).backward()
    assert w.grad.tolist() == [2048.0] * 3
    assert scaler.step(sgd) and w.tolist() == [1.0] * 3 and scaler.scale == 2.0**10
    assert scaler.scaled(torch.ones((), dtype=torch.float16, device=device)).dtype == torch.float32


def test_the_scale_does_not_leave_float32():
    s = Scaler(scale=2.0**127, interval=1)
    s.update(True)
    assert s.scale == 2.0**127 and s.calm == 0
    s = Scaler(scale=2.0**-149)
    with pytest.raises(FloatingPointError, match="the loss scale fell to 0: gradients are infinite at any scale, look in the model"):
        s.update(False)


def test_unscale_leaves_out_what_has_no_gradient():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    a.grad = torch.tensor([8.0])
    assert unscale(iter([a, b]), 4.0) and a.grad.item() == 2.0 and b.grad is None
    assert unscale([b], 4.0)
    c = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    c.grad = torch.tensor([8.0], dtype=torch.bfloat16)
    assert unscale([c], 4.0) and c.grad.item() == 2.0 and c.grad.dtype == torch.bfloat16


# Bad input

def test_bad_dtypes_and_formats():
    with pytest.raises(TypeError, match=r"expected one of float64, .*, got torch.int64: convert it first"):
        fields(torch.arange(3))
    for f in (rounded, spacing, stochastic):
        with pytest.raises(ValueError, match="float64 cannot be imitated in float64: use a format of at most float32's"):
            f(torch.ones(1), FP64)


@pytest.mark.parametrize("w", [0.1, inf, nan])
def test_weights_that_are_not_of_the_format(w):
    with pytest.raises(ValueError, match=r"expected finite weights of Format\(.*\): round them first"):
        stops(torch.tensor(w), torch.tensor(0.1), BF16)


def test_gradients_in_float16():
    w = nn.Parameter(torch.ones(1, dtype=torch.float16))
    w.grad = torch.ones_like(w)
    with pytest.raises(TypeError, match="expected gradients in float32, got float16: keep the weights in float32 and use autocast"):
        unscale([w], 2.0)
    assert w.grad.item() == 1.0


@pytest.mark.parametrize("bad", [{"scale": 0.0}, {"scale": nan}, {"growth": 1.0}, {"backoff": 1.0}, {"backoff": 0.0}, {"interval": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="expected a positive scale, growth > 1 > backoff > 0 and an interval of 1 or more, got "):
        Scaler(**bad)
