"""Traces: own times that add up, PyTorch's own tables, kernels and backward passes at their modules, verdicts, loaders, clear errors."""

import gzip
import json
import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tunebook.timing.clock import Roof
from tunebook.timing.profile import (
    SHADES,
    Call,
    Graphs,
    Slow,
    Trace,
    break_even,
    busy,
    by_name,
    chrome,
    deliver,
    draw,
    during,
    hottest,
    idle,
    limited_by,
    named,
    nest,
    pace,
    parse,
    read,
    record,
    spend,
    waiting,
)
from tunebook.timing.roofline import Work
from tunebook.timing.simulate import GPU, Costs

quick = settings(deadline=None, max_examples=30, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


@st.composite
def trees(draw, low=0, high=2000, depth=2):
    """Calls of one row that nest, in no order, with names that repeat."""
    calls, at = [], low
    for _ in range(draw(st.integers(1, 3))):
        if high - at < 4:
            break
        start = draw(st.integers(at, high - 2))
        end = draw(st.integers(start + 1, high))
        calls.append(Call(draw(st.sampled_from("abcd")), draw(st.sampled_from(["operator", "range"])), "host", start, end))
        if depth:
            calls += draw(trees(start, end, depth - 1))
        at = end
    return draw(st.permutations(calls))


# Trees

@quick
@given(trees())
def test_own_times_add_up_and_children_lie_within(calls):
    assume(calls)
    trace = Trace(calls, "simulated")
    roots = [c for c in trace.calls() if not c.parent]
    assert sum(c.own for c in trace.calls()) == sum(c.total for c in roots) == busy(roots)
    assert all(c.own >= 0 and all(c.start <= k.start and k.end <= c.end and k.parent is c for k in c.children) for c in trace.calls())
    for by in (lambda c: c.name, trace.owner, trace.operator):
        assert sum(spend(trace, by).values()) == busy(roots)


@quick
@given(trees())
def test_rows_by_name_equal_a_count_by_hand(calls):
    assume(calls)
    trace = Trace(calls, "simulated")
    rows = by_name(trace)
    assert {n: r.calls for n, r in rows.items()} == Counter(c.name for c in trace.calls())
    for name, r in rows.items():
        assert r.total == busy(c for c in trace.calls() if c.name == name) >= r.own
    assert [r.own for r in rows.values()] == sorted((r.own for r in rows.values()), reverse=True)


@quick
@given(trees(), st.integers(1, 10**13))
def test_a_trace_survives_chromes_format(calls, first):
    assume(calls)
    cats = {"operator": "cpu_op", "range": "user_annotation"}
    text = ",".join(f'{{"ph": "X", "cat": "{cats[c.kind]}", "name": "{c.name}", "pid": 1, "tid": 2, '
                    f'"ts": {Decimal(first + c.start) / 1000:f}, "dur": {Decimal(c.total) / 1000:f}}}' for c in calls)
    back = parse(json.loads(f'{{"traceEvents": [{text}]}}', parse_float=Decimal))
    start = min(c.start for c in calls)
    here = Trace(calls, "simulated").calls()
    assert Counter((c.name, c.start - start, c.end - start) for c in here) == Counter((c.name, c.start, c.end) for c in back.calls())


def test_calls_that_overlap_are_neighbours_and_rows_are_apart():
    a, b, c = Call("a", "operator", "host", 0, 10), Call("b", "operator", "host", 5, 15), Call("c", "operator", "host 2", 2, 4)
    assert nest([a, b, c]) == [a, c, b] and busy([a, b, c]) == 15
    edge = Call("edge", "operator", "host", 10, 12)
    assert nest([a, edge]) == [a, edge] and edge.parent is None


# PyTorch's own numbers

def step_of(device):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))).to(device)
    x = torch.randn(4, 8, device=device)

    def step():
        with record_function("forward"):
            loss = model(x).square().mean()
        with record_function("backward"):
            loss.backward()
        return loss.item()
    return model, step


@pytest.mark.parametrize("device", DEVICES)
def test_counts_and_own_times_are_pytorchs(device):
    _, step = step_of(device)
    record(step)
    for _ in range(3):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as p:
            step()
        host = by_name(Trace(read(p).calls("range", "operator", "runtime"), "measured here"))
        theirs = {r.key: r for r in p.key_averages() if r.key in host and r.device_type.name == "CPU"}
        assert {n: r.calls for n, r in host.items()} == {n: r.count for n, r in theirs.items()} and len(host) > 20
        gaps = {n: r.own - round(1000 * theirs[n].self_cpu_time_total) for n, r in host.items()}
        asked = [round(1000 * r.self_cpu_time_total) for r in p.key_averages() if r.key == "Activity Buffer Request"]
        assert [gap for gap in gaps.values() if gap] == asked, "only the profiler's own request for room is not told apart"


@pytest.mark.parametrize("device", DEVICES)
def test_modules_own_their_forward_and_backward_passes(device):
    model, step = step_of(device)
    with named(model):
        trace = record(step)
    names = {n or "Sequential" for n, _ in model.named_modules()}
    assert names <= {c.name for c in trace.calls("range")}
    nodes = {trace.owner(c) for c in trace.calls("operator") if c.name in ("AddmmBackward0", "GeluBackward0", "NativeLayerNormBackward0")}
    assert nodes == {"0", "1", "2.0", "2.1"}
    assert trace.kind == "measured here" and not any(c.name in names for c in record(step).calls())  # the hooks are gone


def test_hooks_go_when_the_model_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), named(model):
        model(torch.ones(3, 3))
    assert not model._forward_hooks and not model[0]._forward_pre_hooks


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_have_launchers_where_there_are_kernels(device):
    _, step = step_of(device)
    trace = record(step)
    kernels = trace.calls("kernel")
    assert bool(kernels) == (device == "cuda")
    assert all(c.key in trace.launchers and trace.operator(c) != c.name for c in kernels)


def test_files_plain_and_packed(tmp_path):
    _, step = step_of("cpu")
    record(step)
    with profile(activities=[ProfilerActivity.CPU]) as p:
        step()
    p.export_chrome_trace(str(tmp_path / "a.json"))
    (tmp_path / "b.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    a, b = read(tmp_path / "a.json"), read(str(tmp_path / "b.gz"), "recorded on a laptop")
    assert by_name(a) == by_name(b) and len(a.calls()) > 50
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "an unnamed CPU"
    assert (a.kind, b.kind) == (f"recorded on {name}", "recorded on a laptop")


@pytest.mark.parametrize("source, words", [([], "expected a trace with traceEvents, got list: write one with export_chrome_trace"),
                                           ({}, "expected a trace with traceEvents, got dict"),
                                           ({"traceEvents": [{"ph": "M", "name": "x"}]}, "found none: run the work inside profile")])
def test_what_is_no_trace_is_refused(source, words):
    with pytest.raises(ValueError, match=words):
        parse(source)


# A recorded GPU's format and the simulated one's

def event(cat, name, pid, tid, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


GPU_EVENTS = [
    event("user_annotation", "step", 5, 5, 0, 60), event("cpu_op", "aten::mm", 5, 5, 1, 20, **{"External id": 4, "Sequence number": 1}),
    event("cuda_runtime", "cudaLaunchKernel", 5, 5, 3, 9, correlation=4),
    event("kernel", "gemm", 1, 7, 14, 70, correlation=4, stream=7, device=1),
    event("gpu_memcpy", "Memcpy", 0, 7, 90, 5, correlation=99, stream=7), event("gpu_user_annotation", "step", 0, 7, 14, 70),
    event("cpu_op", "aten::add", 5, 6, 30, 2)]


def test_a_trace_of_two_devices():
    trace = read({"traceEvents": GPU_EVENTS, "deviceProperties": [{"id": 0, "name": "NVIDIA A"}]})
    assert trace.kind == "recorded on NVIDIA A"
    assert {c.row for c in trace.calls()} == {"host", "host 2", "stream 7 of device 1", "stream 7"}
    gemm, memcpy = trace.calls("kernel")
    assert (trace.owner(gemm), trace.operator(gemm)) == ("step", "aten::mm")
    assert (trace.owner(memcpy), trace.operator(memcpy)) == ("no range", "Memcpy")  # launched before the profiler began
    assert hottest(trace).where == "device" and spend(trace, trace.operator, device=True) == {"aten::mm": 70_000, "Memcpy": 5000}


@quick
@given(st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.sampled_from("pq")), min_size=1, max_size=12), st.integers(1, 9))
def test_every_simulated_kernel_finds_its_launch(work, launch):
    gpu = GPU(Costs(launch=float(launch)))
    other, names = gpu.Stream(), []
    for k, (us, aside, place) in enumerate(work):
        with during(gpu, place), during(gpu, f"op::{k}"), gpu.stream(other if aside else gpu.streams[0]):
            gpu.kernel(us, name=f"kernel {k}")()
        names.append((f"kernel {k}", place, f"op::{k}"))
    gpu.Event().record()
    gpu.synchronize()
    trace = read(gpu)
    kernels = [c for c in trace.calls("kernel") if c.name != "event"]
    assert sorted((c.name, trace.owner(c), trace.operator(c)) for c in kernels) == sorted(names)
    assert all(trace.launchers[c.key].end <= c.start for c in kernels)
    assert sum(c.total for c in kernels) == 1000 * sum(us for us, _, _ in work)
    assert chrome(gpu) == chrome(gpu)


def test_a_graph_is_one_launch_of_many_kernels():
    gpu = GPU()
    f, graph = gpu.kernel(3), gpu.CUDAGraph()
    with gpu.graph(graph):
        for _ in range(4):
            f()
    gpu.synchronize()
    with during(gpu, "replayed"):
        graph.replay()
    gpu.synchronize()
    kernels = read(gpu).calls("kernel")
    assert len({c.key for c in kernels}) == 1 and len(kernels) == 4 and {read(gpu).owner(c) for c in kernels} == {"replayed"}


@quick
@given(st.integers(1, 40), st.integers(1, 60))
def test_idle_share_is_the_formula(n, us):
    gpu = GPU()
    for _ in range(n):
        gpu.kernel(us)()
    gpu.synchronize()
    period = max(5, us + 1)
    assert idle(read(gpu), "kernel") == pytest.approx(1 - n * us / ((n - 1) * period + us), abs=1e-12)
    assert idle(read(gpu), "range") == 1.0


# Verdicts

TOP = Roof(1e12, 1e11)  # ridge 10


@pytest.mark.parametrize("grown, intensity, verdict", [
    (1.0, 1, "launches"), (3.9, 100, "launches"), (4.1, 1, "undecided"), (15.9, 100, "undecided"), (16.1, 1, "memory"), (64, 1, "memory"),
    (64, 3.3, "memory"), (64, 3.4, "undecided"), (64, 29, "undecided"), (64, 31, "compute"), (200, 100, "compute"), (0.5, 1, "launches")])
def test_thirds(grown, intensity, verdict):
    works = [Work(0, int(intensity * 10**6) * k, 10**6 * k) for k in (1, 64)]
    assert limited_by(works, [1e-5, 1e-5 * grown], TOP) == verdict


def test_sizes_that_are_too_near_are_refused():
    with pytest.raises(ValueError, match="expected a least time that grows by 27 or more, it grows by 26: choose sizes further apart"):
        limited_by([Work(0, 1, 10**6), Work(0, 1, 26 * 10**6)], [1, 26], TOP)


@quick
@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**5), st.integers(0, 3))
def test_break_even_is_the_first_call_that_pays(compiling, before, after, digits):
    scale = Fraction(1, 10**digits)
    n = break_even(*(float(v * scale) for v in (compiling, before, after)))
    if after >= before:
        assert n == math.inf
    else:
        assert compiling + n * after <= n * before and (n == 0 or compiling + (n - 1) * after > (n - 1) * before)


def test_graphs_are_counted_and_run():
    def f(x):
        y = x.sin() * 2
        if y.sum() > 0:
            y = y + 1
        return y - 3
    torch._dynamo.reset()
    graphs = Graphs()
    x = torch.ones(5)
    assert torch.equal(torch.compile(f, backend=graphs)(x), f(x)) and len(graphs) == 2 and len(graphs.sizes) == 2
    torch._dynamo.reset()


# Loading

@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 40), st.integers(0, 4), st.integers(1, 4))
def test_a_loader_keeps_its_rules(loads, step, workers, prefetch):
    times = deliver(loads, step, workers, prefetch)
    assert all(has >= asks for asks, has in times)
    assert all(b[0] == a[1] + step for a, b in zip(times, times[1:]))
    alone = deliver(loads, step, 0)
    assert alone[-1][1] == sum(loads) + step * (len(loads) - 1)
    if workers:
        assert times[-1][1] <= alone[-1][1] and times[-1][1] >= max(sum(loads[i::workers]) for i in [(len(loads) - 1) % workers])
        more = deliver(loads, step, workers, prefetch + 1)
        assert more[-1][1] <= times[-1][1]


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.integers(1, 3))
def test_the_pace_of_constant_times(load, step, workers, prefetch):
    times, w = deliver([load] * 80, step, workers, prefetch), max(workers, 1)
    assert times[-1][1] - times[-1 - w][1] == pytest.approx(w * pace(load, step, workers), rel=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_real_loader_hands_out_in_order_and_names_its_ranges(workers):
    def loop():
        return [int(b) for b in torch.utils.data.DataLoader(Slow(5, 0.001), batch_size=1, num_workers=workers)]
    assert loop() == list(range(5))
    trace = record(loop, warm=0)
    assert 0 < waiting(trace) <= 1 and waiting(trace, "another name") == 0
    assert sum(c.name.startswith("enumerate(DataLoader)") for c in trace.calls()) == 6  # and the one that ends it


# Pictures

def test_a_picture_has_a_bar_for_each_call():
    from matplotlib.figure import Figure
    ax, trace = Figure().subplots(), read({"traceEvents": GPU_EVENTS})
    draw(ax, trace)
    assert sum(len(b.get_paths()) for b in ax.collections) == len(trace.calls()) == 6
    assert [t.get_text() for t in ax.get_yticklabels()] == ["host", "host 2", "stream 7", "stream 7 of device 1"]
    assert set(SHADES) == {"range", "operator", "runtime", "kernel"}
