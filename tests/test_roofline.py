"""FLOPs and bytes on drawn shapes against PyTorch's counter and by hand; roofs, crossovers and the picture; refusals."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from torch.utils import flop_counter

from tunebook.kit.plots import figure
from tunebook.timing import roofline as module
from tunebook.timing.clock import Roof, Simulated, Timing, bench
from tunebook.timing.roofline import (
    Placed,
    Work,
    attainable,
    attention_flops,
    batch_at_ridge,
    bound,
    ceiling,
    counted,
    draw,
    knee,
    layer_work,
    least,
    place,
    ridge,
    share,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
sizes, rates = st.integers(1, 9), st.floats(1e6, 1e15)
aten = torch.ops.aten
KNOWN = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, out_shape=None, **kw: flop_counter.sdpa_flop_count(q, k, v),
         aten._scaled_dot_product_flash_attention_for_cpu_backward:
             lambda g, q, k, v, *a, out_shape=None, **kw: flop_counter.sdpa_backward_flop_count(g, q, k, v)}


def theirs(f, *args):
    with flop_counter.FlopCounterMode(display=False, custom_mapping=KNOWN) as c:
        f(*args)
    return c.get_total_flops()


def both_ways(f, *args):
    out = f(*args)
    return torch.autograd.grad(out.sum(), [a for a in args if a.requires_grad])


def draw_tensor(*shape, grad=True, **how):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**how).requires_grad_(grad) if how else \
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


# FLOPs

@quick
@given(B=sizes, M=sizes, K=sizes, N=sizes, device=st.sampled_from(DEVICES))
def test_products_are_torch_s_forward_and_backward(B, M, K, N, device):
    x, w, v = draw_tensor(B, M, K, device=device), draw_tensor(N, K, device=device), draw_tensor(B, K, N, device=device)
    bias = draw_tensor(N, device=device)
    cases = [(torch.bmm, x, v), (torch.matmul, x, v), (F.linear, x, w), (F.linear, x, w, bias), (torch.addmm, bias, x[0], w.T),
             (torch.baddbmm, bias, x, v), (lambda x, w: torch.einsum("bmk,nk->nmb", x, w), x, w)]
    for f, *args in cases:
        assert counted(f, *args).products == theirs(f, *args)
        assert counted(both_ways, f, *args).products == theirs(both_ways, f, *args)


@quick
@given(B=sizes, H=sizes, T=sizes, S=sizes, D=st.sampled_from([1, 4, 8]), causal=st.booleans(), device=st.sampled_from(DEVICES))
def test_fused_attention_is_torch_s(B, H, T, S, D, causal, device):
    q, k, v = (draw_tensor(B, H, n, D, device=device) for n in (T, S, S))
    attend = partial(F.scaled_dot_product_attention, is_causal=causal)
    assert counted(attend, q, k, v).products == theirs(attend, q, k, v) == 4 * B * H * T * S * D
    assert counted(both_ways, attend, q, k, v).products == theirs(both_ways, attend, q, k, v)
    assert attention_flops(q, k, v, back=True) == (10 * B * H * T * S * D, 6 * B * H * T * S)


@pytest.mark.parametrize("device", DEVICES)
def test_vectors_count_though_torch_s_counter_leaves_them_out(device):
    a, x = torch.ones(3, 4, device=device), torch.ones(4, device=device)
    assert theirs(torch.mv, a, x) == theirs(torch.dot, x, x) == 0
    assert counted(torch.mv, a, x).products == 24 and counted(torch.dot, x, x).products == 8
    assert counted(torch.addmv, a[:, 0], a, x) == Work(24, 3, 4 * (3 + 12 + 4 + 3))


@pytest.mark.parametrize("f, steps", [(torch.exp, 1), (torch.sum, 1), (lambda x: x.softmax(-1), 5), (lambda x: x.log_softmax(-1), 5),
                                      (lambda x: F.layer_norm(x, (8,)), 8), (torch.clone, 0), (lambda x: torch.cat([x, x]), 0),
                                      (torch.zeros_like, 0), (lambda x: x.cumsum(-1), 1), (lambda x: x.new_ones(2), 0), (F.gelu, 1)])
def test_others_by_the_largest_tensor(f, steps):
    assert counted(f, torch.ones(3, 8)).others == 24 * steps


def test_gradients_off_or_inference_count_the_same():
    x, w = draw_tensor(3, 4), draw_tensor(5, 4)
    seen = [counted(F.linear, x, w)]
    with torch.no_grad():
        seen.append(counted(F.linear, x, w))
    with torch.inference_mode():
        seen.append(counted(F.linear, x, w))
    assert set(seen) == {layer_work(3, 4, 5)}


# Bytes

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_bytes_in_every_dtype(dtype, device):
    x, w = torch.ones(3, 4, dtype=dtype, device=device), torch.ones(5, 4, dtype=dtype, device=device)
    size = dtype.itemsize
    assert counted(F.linear, x, w) == least(F.linear, x, w) == layer_work(3, 4, 5, size)
    assert counted(torch.add, x, x).nbytes == 3 * 12 * size and least(torch.add, x, x).nbytes == 2 * 12 * size
    assert counted(torch.softmax, x, -1) == Work(0, 60, 24 * size)


def test_traffic_by_hand():
    x, y = torch.ones(3, 4), torch.ones(3, 4)
    row = torch.ones(4)
    table, at = torch.ones(100, 4), torch.tensor([7, 7, 9])
    cases = {"in place": (lambda: x.add_(y), 144, 144), "overwritten": (lambda: x.copy_(y), 96, 96), "zeroed": (lambda: x.zero_(), 48, 48),
             "into a given tensor": (lambda: torch.exp(x, out=y), 96, 96), "expanded": (lambda: x + row.expand(3, 4), 112, 112),
             "transposed": (lambda: x.T.contiguous(), 96, 96), "views are free": (lambda: x[1:].T.reshape(-1)[:4].exp(), 32 + 64, None),
             "empty, then filled": (lambda: torch.empty(3, 4).copy_(x), 96, 96), "rows of a table": (lambda: table[at], 24 + 96, 24 + 96),
             "embedding": (lambda: F.embedding(at, table), 24 + 96, 24 + 96), "form only": (lambda: torch.zeros_like(x), 48, 48),
             "a list": (lambda: torch.cat([x, y]), 192, 192), "two in a row": (lambda: x.exp().exp(), 192, 96),
             "a part of the input": (lambda: x[:1].exp(), 32, 32), "its parts in turn": (lambda: [r.exp() for r in x], 96, 96),
             "a column": (lambda: x[:, 0].exp(), 24, 24)}
    for name, (f, traffic, fewest) in cases.items():
        assert counted(f).nbytes == traffic, name
        assert fewest is None or least(f).nbytes == fewest, name


@quick
@given(M=sizes, K=sizes, chain=st.lists(st.sampled_from(["exp", "softmax", "matmul", "transpose", "scale", "cut"]), min_size=1, max_size=6))
def test_least_is_never_more_and_flops_are_the_same(M, K, chain):
    steps = {"exp": torch.exp, "softmax": lambda x: x.softmax(-1), "matmul": lambda x: x @ x.mT, "transpose": lambda x: x.mT,
             "scale": lambda x: x * 2, "cut": lambda x: x[:1]}
    def f(x):
        for name in chain:
            x = steps[name](x)
        return x * 1
    x = draw_tensor(M, K, grad=False)
    a, b = counted(f, x), least(f, x)
    assert (a.products, a.others) == (b.products, b.others) and 0 < b.nbytes <= a.nbytes
    assert b.nbytes <= x.nbytes + f(x).nbytes
    assert (a, b) == (counted(f, x.to("meta")), least(f, x.to("meta")))


def test_weights_that_a_function_holds_are_inputs():
    layer = torch.nn.Linear(4, 5, bias=False)
    x = torch.ones(3, 4)
    assert least(layer, x) == least(F.linear, x, layer.weight)


def test_a_step_counts_its_backward_and_returns_gradients():
    x, w = draw_tensor(3, 4), draw_tensor(5, 4)
    a = least(both_ways, F.linear, x, w)
    assert a.products == 3 * 2 * 3 * 4 * 5
    assert a.nbytes == 4 * (2 * 12 + 2 * 20)  # x, w and a gradient of each


# Roofs

@quick
@given(flops=st.integers(1, 10**12), nbytes=st.integers(1, 10**12), P=rates, W=rates)
def test_the_bound_is_the_larger_time(flops, nbytes, P, W):
    top, work = Roof(P, W), Work(flops, 0, nbytes)
    t = attainable(work, top)
    assert t == max(flops / P, nbytes / W)
    assert flops / t <= min(P, work.intensity * W) * (1 + 1e-12)
    if abs(work.intensity / ridge(top) - 1) > 1e-9:
        assert bound(work, top) == ("compute" if flops / P > nbytes / W else "memory")


@quick
@given(E=st.integers(1, 10**5), N=st.integers(1, 10**5), balance=st.floats(0.1, 1e3), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_the_batch_at_the_ridge_solves_the_equation(E, N, balance, itemsize):
    at, top = batch_at_ridge(E, N, balance, itemsize), Roof(balance * 1e9, 1e9)
    if at == math.inf:
        assert bound(layer_work(10**12, E, N, itemsize), top) == "memory"
    elif 1 <= at < 1e6:
        assert 2 * at * E * N / (itemsize * (E * N + at * (E + N))) == pytest.approx(balance, rel=1e-6)
        assert bound(layer_work(math.ceil(at) + 1, E, N, itemsize), top) == "compute"
        assert at <= 1 or bound(layer_work(math.ceil(at) - 1, E, N, itemsize), top) == "memory" or math.ceil(at) < 2


@quick
@given(a=st.floats(1e-6, 1e3), n=st.floats(1.5, 500))
def test_the_knee_is_where_the_asymptotes_meet(a, n):
    at = [2**k for k in range(10)]
    assert knee(at, [a * max(1, m / n) for m in at]) == pytest.approx(n)


@pytest.mark.parametrize("balance", [2.0, 30.0])
def test_a_simulated_machine_has_the_predicted_crossover(balance):
    top, clock, rows = Roof(balance * 1e11, 1e11), Simulated(), [2**k for k in range(11)]
    times = [bench(clock.work(1e9 * attainable(layer_work(n, 8192, 8192), top)), clock=clock, seconds=1e-4).median for n in rows]
    assert knee(rows, times) == pytest.approx(batch_at_ridge(8192, 8192, balance), rel=0.03)


def test_share_and_place():
    clock = Simulated()
    timing = bench(clock.work(2_000_000), clock=clock, seconds=0.01)
    assert share(Work(10**6, 0, 10**6), timing, Roof(1e9, 1e12)) == pytest.approx(0.5, rel=1e-3)
    p = place("exp", torch.exp, torch.ones(1000), seconds=0.001)
    assert p.work == p.least == Work(0, 1000, 8000) and p.timing.name == "exp" and p.timing.kind == "measured here"
    assert p.rate == 1000 / min(p.timing.seconds)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ceiling_is_of_its_dtype(device, dtype, monkeypatch):
    seen = []
    def timed(f, a, b, seconds):
        seen.append((f, a.dtype, a.device.type))
        return Timing("mm", [0.5, 0.25], "simulated")
    monkeypatch.setattr(module, "bench", timed)
    monkeypatch.setattr(module, "roof", lambda device, nbytes: Roof(1.0, nbytes))
    n = 8192 if device == "cuda" else 512
    assert ceiling(dtype, device, nbytes=7.0) == Roof(2 * n**3 / 0.25, 7.0) and seen == [(torch.mm, dtype, device)]


# The picture

@pytest.mark.parametrize("seed", range(4))
def test_labels_do_not_overlap(seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(13, 3, generator=g, dtype=torch.float64).tolist()
    placed = [Placed(Work(int(1e9 * 10 ** (2 * i)), 0, 10**9), Work(int(1e9 * 10 ** (2 * i)), 0, int(1e9 / (1 + 9 * w))),
                     Timing(f"operation {k}", [10 ** (2 * i) / 10 ** r], "simulated")) for k, (i, w, r) in enumerate(values)]
    fig, ax = figure(size=(8.4, 5))
    draw(ax, placed, Roof(2e10, 3e9), Roof(2e10, 9e9))
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in ax.texts if t.get_text().startswith("operation")]  # without the hairline
    boxes = sorted((b.y0, b.y1) for b in boxes)
    assert len(boxes) == 13 and all(low[1] <= high[0] for low, high in zip(boxes, boxes[1:]))
    assert ax.bbox.y0 - 9 < boxes[0][0] and boxes[-1][1] < ax.bbox.y1 + 9
    assert ax.get_ylabel() == "rate (FLOPs a second, simulated)"


# Refusals

def test_an_unknown_operator_is_refused():
    x = torch.ones(1, 1, 5, 5)
    with pytest.raises(ValueError, match=r"whose FLOPs are known, got aten.convolution.default: add it to PRODUCTS or STEPS"):
        counted(F.conv2d, x, torch.ones(1, 1, 3, 3))


def test_nothing_to_count_is_refused():
    for f in (lambda: None, lambda: torch.ones(3).T if False else 3):
        with pytest.raises(ValueError, match="expected a call that runs PyTorch's operators, got none: pass f, args"):
            counted(f)


@pytest.mark.parametrize("at, times", [([1], [1.0]), ([1, 2], [1.0]), ([2, 1], [1.0, 2.0]), ([], [])])
def test_a_knee_needs_rising_sizes(at, times):
    with pytest.raises(ValueError, match="expected two or more rising sizes and a time for each, got .*: sort them"):
        knee(at, times)
