"""Memory: closed forms over random nets, timelines against the allocator, checkpoints that change no bit, and clear refusals."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunebook.kit.checks import same
from tunebook.timing.memory import (
    Watch,
    at_peak,
    budget,
    checkpointed,
    in_segments,
    longest,
    mark,
    peak,
    rehearse,
    saved,
    size,
    table,
    total,
    worst,
)

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
quick = settings(deadline=None, max_examples=30, derandomize=True)
seeds = st.integers(0, 2**31)
KEEPS = {"gelu": (nn.GELU, "input"), "silu": (nn.SiLU, "input"), "tanh": (nn.Tanh, "result"), "relu": (nn.ReLU, "result")}


def mlp(widths, act, dtype=torch.float32, device="cpu", p=0.0):
    def block(i, o):
        return nn.Linear(i, o, dtype=dtype, device=device), KEEPS[act][0](), *[nn.Dropout(p)] * (p > 0)
    return nn.Sequential(*(m for i, o in zip(widths, widths[1:]) for m in block(i, o)))


def grads(f, *inputs, parameters=(), seed=0):
    torch.manual_seed(seed)
    out = f(*inputs)
    wanted = [x for x in (*inputs, *parameters) if isinstance(x, torch.Tensor) and x.requires_grad]
    return [out, *torch.autograd.grad(out.double().square().sum(), wanted, allow_unused=True)]


def equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        if x is not None:
            same(x, y)


@quick
@given(seed=seeds, N=st.integers(1, 9), widths=st.lists(st.integers(1, 9), min_size=2, max_size=6), act=st.sampled_from(list(KEEPS)),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), frozen=st.booleans())
def test_kept_bytes_of_a_net_in_closed_form(seed, N, widths, act, dtype, frozen):
    net, x = mlp(widths, act, dtype), torch.ones(N, widths[0], dtype=dtype)
    for layer in list(net)[2::2] * frozen:  # only the first trains: the others keep no input, the activations keep theirs
        layer.requires_grad_(False)
    late = KEEPS[act][1] == "result"
    inputs = widths[:1] if frozen else widths[:-1]  # of linear layers that train
    acts = widths[1:] if not late else ([] if not frozen else widths[1:-1]) + widths[-1:]  # a kept result is the next layer's input
    want = x.element_size() * N * (sum(inputs) + sum(acts))
    pieces = saved(lambda: net(x), net)
    assert total(pieces) == want == sum(p.bytes for p in pieces)
    assert {p.dtype for p in pieces} == {dtype} and total(saved(lambda: net(x), net, x)) == want - size(x)


def test_names_shapes_and_order_of_what_is_kept():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = torch.ones(2, 3, requires_grad=True)
    pieces = saved(lambda: Twice.apply(x.sin()).sum() + torch.softmax(x, -1).sum())
    assert [(p.op, p.shape) for p in pieces] == [("sin", (2, 3)), ("a custom function", (2, 3)), ("softmax", (2, 3))]
    assert [line.split()[0] for line in table(pieces * 3, rows=1).splitlines()] == ["72", "144", "216"]
    assert saved(lambda: x.detach().sin()) == []


def test_a_hook_leaves_no_knot():
    x = torch.ones(1000, requires_grad=True)
    gc.disable()
    try:
        for _ in range(2):  # the first time torch imports what it needs, and that leaves garbage
            with Watch() as w:
                assert total(saved(lambda: (x * 1).tanh())) == 4000
    finally:
        gc.enable()
    assert max(w.bytes) == 8000 and w.bytes[-1] == 0


@DEVICES
def test_budget_by_part_and_type(device):
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).to(torch.float64)).to(device)
    assert budget(net) == {"parameters": {"float32": 4 * 30, "float64": 8 * 12}, "buffers": {"float32": 40, "int64": 8},
                           "gradients": {}, "states": {}}
    for make, states in ((torch.optim.SGD, 0), (partial(torch.optim.SGD, momentum=0.9), 4), (torch.optim.Adagrad, 4)):
        optimizer = make(net[0].parameters(), lr=0.1)
        net[0](torch.ones(4, 3, device=device)).sum().backward()
        optimizer.step()
        found = budget(net, optimizer)
        counters = 8 * (make is torch.optim.Adagrad)  # one step number a tensor
        assert found["gradients"] == {"float32": 80} and sum(found["states"].values()) == 20 * states + counters
    net[0].zero_grad()
    assert budget(net)["gradients"] == {}


def test_memory_is_counted_once():
    x = torch.zeros(10, 10)
    assert size() == 0 and size(x, x.T, x[0], x.view(-1)) == 400 and size(x, x.clone()) == 800 and size(x[:1].clone()) == 40


@quick
@given(seed=seeds, N=st.integers(1, 40), widths=st.lists(st.integers(1, 40), min_size=2, max_size=5), act=st.sampled_from(["gelu", "tanh"]))
def test_the_timeline_is_the_allocators(seed, N, widths, act):
    net, x = mlp(widths, act), torch.ones(N, widths[0])

    def step():
        out = net(x)
        out.backward(torch.ones_like(out))

    with Watch() as w:
        step()
    net.zero_grad()
    told = peak(step)
    assert max(w.bytes) == told and w.bytes[0] == 0 and w.bytes[-1] == size(*net.parameters())
    assert total(list(at_peak(w).values())) == max(w.bytes) and len(w.bytes) == len(w.log) + 1

    def build():
        torch.manual_seed(0)
        ghost, y = mlp(widths, act), torch.ones(N, widths[0])

        def step():
            out = ghost(y)
            out.backward(torch.ones_like(out))
        return step

    assert rehearse(build).bytes == w.bytes


def test_a_watch_forgets_what_comes_after_it():
    with Watch() as w:
        mark("begin")
        x = torch.zeros(100)
        mark("end")
    before = list(w.bytes)
    del x
    mark("late")
    assert w.bytes == before == [0, 400] and w.marks == {"begin": 0, "end": 1} and w.alive == {}
    with Watch() as outer, Watch() as inner:
        torch.zeros(5)
    assert max(outer.bytes) == max(inner.bytes) == 20 and not Watch.opened
    with pytest.raises(ZeroDivisionError), Watch():
        1 / 0  # noqa: B018
    assert not Watch.opened


def test_in_place_and_views_are_no_births():
    x = torch.zeros(10, 10)
    with Watch() as w:
        _ = x.add_(1).view(20, 5)[3:].T
        torch.add(x, 1, out=x)
    assert w.bytes == [0]
    assert at_peak(w) == {}


def test_the_longest_of_a_rule():
    for limit in range(1, 60):
        assert longest(lambda n: 3 * n, 3 * limit + 2) == limit
        assert longest(lambda n: 3 * n, 10**9, most=limit) == limit
    calls = []
    assert longest(lambda n: calls.append(n) or n * n, 10**8) == 10**4 and len(calls) < 32
    with pytest.raises(MemoryError, match="needs 7 bytes and the budget is 6"):
        longest(lambda n: 7 * n, 6)


def test_a_ghost_asked_for_its_number():
    def build():
        w = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.AdamW([w])

        def step():
            w.sum().backward()
            optimizer.step()
        return step

    with pytest.raises(RuntimeError, match="number=1"):
        rehearse(build)
    assert max(rehearse(build, number=1).bytes) >= 4 * (3 + 6)
    assert torch.zeros(1).item() == 0 and not Watch.opened


@quick
@given(seed=seeds, N=st.integers(1, 6), widths=st.lists(st.integers(1, 6), min_size=2, max_size=6), act=st.sampled_from(list(KEEPS)),
       p=st.sampled_from([0.0, 0.4]), k=st.integers(1, 5), needs=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_checkpoints_change_no_bit(seed, N, widths, act, p, k, needs, dtype):
    net = list(mlp(widths, act, dtype, p=p))
    x = torch.randn(N, widths[0], generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(needs)
    weights = [w for m in net for w in m.parameters()]
    k = min(k, len(net))
    plain = grads(nn.Sequential(*net), x, parameters=weights, seed=seed)
    equal(grads(in_segments(net, k), x, parameters=weights, seed=seed), plain)
    equal(grads(partial(checkpoint, nn.Sequential(*net), use_reentrant=False), x, parameters=weights, seed=seed), plain)
    nested = partial(checkpointed, in_segments(net, k))
    equal(grads(partial(checkpointed, nested), x, parameters=weights, seed=seed), plain)


@DEVICES
def test_any_arguments_and_results(device):
    a, b, w = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(3))
    table = {"b": b, "list": [a, 2.0, None, "text"]}

    def f(x, scale, *, more, flag=False):
        y = x * scale + more["list"][0].tanh() * more["list"][1]
        if flag:
            y = F.dropout(y, 0.5)
        y = y.clone()
        y.mul_(more["b"])  # in place, on a tensor of its own
        return {"sum": (y @ w.T).sum(), "y": (y, 7)}

    def loss(how, use_reentrant=None):
        more = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
        torch.manual_seed(5)
        out = how(f, a, 3.0, more=table, flag=True, **more)
        assert out["y"][1] == 7
        return torch.autograd.grad(out["sum"] + out["y"][0].square().sum(), [a, b, w])  # w is an argument of nobody

    plain = loss(lambda f, *a, **k: f(*a, **k))
    equal(loss(checkpointed), plain)
    equal(loss(checkpoint, False), plain)


def test_second_derivatives_and_two_backward_passes():
    net, x = mlp([3, 5, 4], "tanh", torch.float64), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def second(f):
        g, = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, net[0].weight])

    equal(second(partial(checkpointed, net)), second(net))
    y = checkpointed(net, x).sum()
    once, twice = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    same(once, twice)


def test_autocast_is_the_same_again():
    net, x = mlp([8, 8, 8], "gelu"), torch.randn(4, 8)

    def run(f):
        with torch.autocast("cpu", torch.bfloat16):
            out = f(x)
        assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out.float().square().sum(), list(net.parameters()))

    equal(run(partial(checkpointed, net)), run(net))


def test_chance_goes_on_as_without_a_checkpoint():
    x = torch.ones(5, requires_grad=True)

    def after(how):
        torch.manual_seed(1)
        how(F.dropout, x).sum().backward()
        return torch.rand(3)

    same(after(checkpointed), after(lambda f, x: f(x)))


def test_without_gradients_it_is_a_plain_call():
    net, x = mlp([3, 3], "gelu"), torch.ones(2, 3)
    with torch.no_grad():
        y = checkpointed(net, x)
        assert not y.requires_grad and saved(lambda: checkpointed(net, x), net) == []
    same(y, net(x))
    assert checkpointed(lambda: 3) == 3


def test_only_the_arguments_are_kept():
    net, x, g = mlp([4, 4, 4, 4], "gelu"), torch.ones(7, 4), torch.ones(7, 4)
    pieces = saved(lambda: checkpointed(lambda x, g, n: net(x) * g, x, g, 3), net)
    assert [(p.shape, p.bytes) for p in pieces] == [((7, 4), 112)] * 2
    inside = saved(lambda: checkpointed(in_segments(net, 3), x), net)
    assert total(inside) == 112, "an inner checkpoint's arguments are dropped by the outer one"


def test_memory_goes_when_the_backward_pass_is_through():
    net, x = mlp([50] * 5, "gelu"), torch.ones(30, 50)
    with Watch() as w:
        in_segments(net, 2)(x).sum().backward()
    gc.disable()
    try:
        assert w.bytes[-1] == size(*net.parameters()) and peak(lambda: None) == 0
        with Watch() as w:
            out = in_segments(net, 2)(x)
            del out  # never undone
        assert w.bytes[-1] == 0
    finally:
        gc.enable()


@quick
@given(L=st.integers(1, 12), k=st.integers(1, 12), N=st.integers(8, 40))
def test_segments_keep_their_inputs_and_the_peak_is_near_the_formula(L, k, N):
    k, d = min(k, L), 4
    net, x = [nn.Sequential(nn.Linear(d, d), nn.GELU()) for _ in range(L)], torch.ones(N, d)
    e = 4 * N * d
    assert total(saved(lambda: in_segments(net, k)(x), *net)) == k * e
    with Watch() as w:
        out = in_segments(net, k)(x)
        out.backward(torch.ones_like(out))
    above = max(w.bytes) - worst(L, k, 2 * e, e)
    assert e <= above <= 3 * e + 4 * L * (d * d + d) + e


def test_what_cannot_be_made_again_is_refused():
    net, x = mlp([3, 4], "tanh"), torch.ones(2, 3, requires_grad=True)
    calls = []

    def moody(x):
        calls.append(1)
        return x.sin() if len(calls) > 1 else x.sin().cos()

    with pytest.raises(RuntimeError, match="did something else"):
        checkpointed(moody, x).sum().backward()
    calls.clear()

    def growing(x):
        calls.append(1)
        return x.repeat(len(calls), 1).sin()

    with pytest.raises(RuntimeError, match="did something else"):
        checkpointed(growing, x).sum().backward()

    def spoilt(x):
        y = x * 2
        z = y.sin()
        y.add_(1)
        return z.cos()

    with pytest.raises(RuntimeError, match="changed in place"):
        checkpointed(spoilt, x).sum().backward()
    moved = x * 1
    out = checkpointed(net, moved).sum()
    moved.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.backward()
    for k in (0, -1, 3):
        with pytest.raises(ValueError, match="1 to 2 segments"):
            in_segments(list(net), k)


@DEVICES
def test_the_allocator_has_the_last_word(device):
    net, x = mlp([64] * 4, "gelu", device=device), torch.ones(100, 64, device=device)

    def step():
        net(x).square().mean().backward()

    step()
    net.zero_grad()
    with Watch() as w:
        step()
    net.zero_grad()
    assert abs(peak(step, device) / max(w.bytes) - 1) < 0.05
