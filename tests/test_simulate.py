"""The simulated GPU on drawn programs: no time runs backwards, nothing overlaps that may not; every exercise finds its wrong answers."""

import ast
import inspect
import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.timing import simulate
from tunebook.timing.simulate import (
    EXERCISES,
    GPU,
    METHODS,
    PROMPTS,
    Cache,
    Costs,
    Frequency,
    Kernel,
    closed_form,
    event_times,
    events_each,
    events_loop,
    grade,
    graphed,
    naive,
    readings,
    sync_each,
    sync_end,
    timeline,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)


def quarters(low, high):
    """Multiples of a quarter: sums of them are exact."""
    return st.integers(4 * low, 4 * high).map(lambda i: i / 4)


costs = st.builds(Costs, launch=quarters(0, 12), record=quarters(0, 6), sync=quarters(0, 30), graph=quarters(0, 12), gap=quarters(0, 3),
                  node=quarters(0, 2), depth=st.integers(1, 6), l2=st.sampled_from([0.0, 8.0, 40.0]), dram=st.sampled_from([0.5, 2.0]))
kernels = st.builds(Kernel, quarters(0, 40), mb=st.sampled_from([0.0, 4.0, 16.0]), first=st.sampled_from([0.0, 50.0]),
                    out=st.sampled_from([0.0, 2.0]), share=st.sampled_from([0.25, 0.5, 1.0]), name=st.sampled_from("abc"))
streams = st.integers(0, 2)
calls = st.one_of(st.tuples(st.just("launch"), kernels, streams), st.tuples(st.just("work"), quarters(0, 50)),
                  st.tuples(st.sampled_from(["record", "wait", "replay", "synchronize"]), streams), st.tuples(st.just("synchronize")))
programs = st.lists(calls, min_size=1, max_size=30)


def run(costs, program):
    """The device after a program on three streams, with the commands that wait and what they wait for."""
    gpu, waits = GPU(costs), []
    streams, event, graph = [gpu.current, gpu.Stream(), gpu.Stream()], gpu.Event(enable_timing=True), gpu.CUDAGraph()
    with gpu.graph(graph):
        for us in (3, 5):
            gpu.kernel(us, name="captured")()
    for call, *args in program:
        if call == "launch":
            with gpu.stream(streams[args[1]]):
                gpu.launch(args[0])
        elif call == "work":
            gpu.work(*args)
        elif call == "record":
            event.record(streams[args[0]])
        elif call == "wait":
            streams[args[0]].wait_event(event)
            if event.command:
                waits.append((streams[args[0]].commands[-1], event.command))
        elif call == "replay":
            with gpu.stream(streams[args[0]]):
                graph.replay()
        elif args:
            streams[args[0]].synchronize()
        else:
            gpu.synchronize()
        for s in streams:  # what has not ended by the host's clock is in the queue
            assert sum(c.end > gpu.now for c in s.commands) <= costs.depth
    gpu.synchronize()
    return gpu, waits


@quick
@given(costs, programs)
def test_time_never_runs_backwards(costs, program):
    gpu, _ = run(costs, program)
    host = [s for s in gpu.trace if s.row == "host"]
    assert host[0].start == 0 and all(s.start <= s.end for s in gpu.trace)
    assert all(a.end == b.start for a, b in zip(host, host[1:])) and host[-1].end == gpu.now


@quick
@given(costs, programs)
def test_a_stream_runs_in_order_without_overlap_and_not_before_the_launch(costs, program):
    gpu, waits = run(costs, program)
    for s in gpu.streams:
        spans = [x for x in gpu.trace if x.row == s.name]
        assert all(a.end + min(costs.gap, costs.node) <= b.start for a, b in zip(spans, spans[1:]))
        for before, c in zip([None, *s.commands], s.commands):
            assert c.end >= c.arrive + sum(k.us for k in c.kernels) and (not before or c.end >= before.end + costs.gap)
    assert all(after.end >= event.end for after, event in waits)


@quick
@given(costs, programs)
def test_what_runs_at_once_fits_the_device(costs, program):
    gpu, _ = run(costs, program)
    spans = []
    for s in gpu.streams:
        commands = [c for c in s.commands for _ in c.kernels or [None]]  # one span for each kernel, one for an event
        mine = [x for x in gpu.trace if x.row == s.name]
        assert len(mine) == len(commands)
        spans += [(x, c.share()) for x, c in zip(mine, commands)]
    for x, _ in spans:
        assert sum(share for y, share in spans if y.start <= x.start < y.end) <= 1


@quick
@given(costs, programs)
def test_the_sum_of_the_kernels_is_a_lower_bound(costs, program):
    gpu, _ = run(costs, program)
    for s in gpu.streams:
        assert gpu.now >= sum(k.us for c in s.commands for k in c.kernels)
    assert gpu.now >= sum(k.us * k.share for s in gpu.streams for c in s.commands if len(c.kernels) == 1 for k in c.kernels)


@quick
@given(costs, programs, streams)
def test_synchronize_waits_exactly_for_the_streams(costs, program, which):
    for one in (True, False):
        gpu, _ = run(costs, program)
        for i, s in enumerate(gpu.streams):
            with gpu.stream(s):
                gpu.kernel(10 * i + 5)()
        called, awaited = gpu.now, [gpu.streams[which]] if one else gpu.streams
        awaited[0].synchronize() if one else gpu.synchronize()
        assert gpu.now == max(called, *(s.commands[-1].end for s in awaited)) + costs.sync


@quick
@given(costs, st.lists(kernels, max_size=8), programs)
def test_a_pair_of_events_encloses_what_was_launched_between(costs, between, program):
    gpu, _ = run(costs, program)
    start, stop = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
    start.record()
    for k in between:
        gpu.launch(k)
    stop.record()
    gpu.synchronize()
    commands = gpu.current.commands[-len(between) - 1: -1]
    assert all(start.command.end + costs.gap <= c.end <= stop.command.end - costs.gap for c in commands)
    assert start.elapsed_time(stop) * 1000 >= sum(k.us for k in between) + costs.gap - 1e-9


@quick
@given(costs, st.lists(kernels, min_size=1, max_size=8))
def test_a_replay_is_its_launch_and_the_sum_of_its_kernels(costs, captured):
    captured = [replace(k, mb=0.0) for k in captured]
    gpu, graph = GPU(costs), None
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        for k in captured:
            gpu.launch(k)
    assert not gpu.current.commands and not [s for s in gpu.trace if s.row != "host"]
    gpu.synchronize()
    start = gpu.now
    graph.replay()
    assert gpu.now == start + costs.graph
    gpu.synchronize()
    assert gpu.now == start + costs.graph + sum(k.us for k in captured) + costs.node * (len(captured) - 1) + costs.sync
    assert [s.name for s in gpu.trace if s.row != "host"] == [k.name for k in captured]


@quick
@given(costs, st.lists(st.tuples(quarters(0, 40), quarters(0, 20)), min_size=1, max_size=40))
def test_one_stream_is_a_recursion(costs, loop):
    """Launch i leaves the host when kernel i - depth has ended; kernel i begins when it has arrived and a gap has passed."""
    gpu, host, ends = GPU(costs), 0.0, []
    for i, (us, work) in enumerate(loop):
        gpu.kernel(us, name=f"k{i}")()
        host = max(host, ends[i - costs.depth] if i >= costs.depth else 0.0) + costs.launch
        ends.append((max(host, ends[-1] + costs.gap) if ends else host) + us)
        assert gpu.now == host
        gpu.work(work)
        host += work
    gpu.synchronize()
    assert [c.end for c in gpu.current.commands] == ends and gpu.now == max(host, ends[-1]) + costs.sync


@st.composite
def inside(draw):
    """Costs for which the closed forms hold: the gap is at most record, launch and synchronize."""
    g = draw(st.integers(2, 10))
    return Costs(launch=draw(quarters(g, 20)), record=draw(quarters(g, 12)), sync=draw(quarters(g, 60)), graph=draw(quarters(0, 30)),
                 gap=g / 2, node=draw(quarters(0, 2)), depth=draw(st.sampled_from([8, 20, 1024])))


@quick
@given(inside(), quarters(0, 60), st.integers(3, 60))
def test_readings_are_the_closed_forms(costs, us, n):
    kernel = Kernel(us + 0.25, mb=8.0, name="timed")
    mine, theirs, gpu = readings(costs, kernel, n), closed_form(costs, kernel, n), GPU(costs)
    flush = gpu.kernel(costs.launch + 2 * costs.record, mb=40, name="flush")  # long enough for any costs
    mine["events and flush"] = events_each(gpu, lambda: gpu.launch(kernel), n, gpu.clock, flush)
    for name in METHODS:
        assert mine[name] == pytest.approx(theirs[name], rel=1e-14), name


# The parts

@quick
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1.0, 3.0, 6.0, 11.0])), max_size=30))
def test_the_cache_is_a_list_of_the_last_used(touched):
    cache, order = Cache(10), []  # most recent last
    for name, mb in touched:
        kernel = Kernel(1, mb=mb, name=name)
        held = next((m for n, m in order if n == name), 0)
        assert cache.miss(kernel) == (0 if held >= mb else mb)
        order = [(n, m) for n, m in order if n != name] + [(name, mb)]
        while sum(m for _, m in order) > 10:
            order.pop(0)
        assert list(cache.held.items()) == order


def test_a_graph_s_kernels_use_the_cache_and_the_clock():
    gpu, graph = GPU(Costs(ramp=15, idle=0.5, dram=2)), None
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        gpu.kernel(10, mb=8)()
        gpu.kernel(10, mb=8)()
    graph.replay()
    gpu.synchronize()
    assert [s.end - s.start for s in gpu.trace if s.row != "host"] == [10 / 0.5 + 8 / 2, 10]


def test_a_rest_cools_the_clock():
    costs = Costs(ramp=100, hot=1000, rest=500)
    clock = Frequency(costs)
    for start, end, speed in ((0, 100, 0.5), (100, 1100, 1.0), (1100, 1200, 0.8), (1699, 1700, 0.8), (2200, 2300, 0.5)):
        assert clock.at(start) == speed
        clock.ran(start, end)


def test_the_first_call_pays_once_and_again_after_empty_cache():
    gpu = GPU()
    f, paid = gpu.kernel(1, first=70, out=4), []
    for _ in range(3):
        before = gpu.now
        f()
        paid.append(gpu.now - before)
    gpu.empty_cache()
    f()
    assert paid == [175, 5, 5] and gpu.trace[-1].end - gpu.trace[-1].start == 105


def test_the_simulator_has_at_most_150_lines():
    source = inspect.getsource(simulate)
    names = set("Costs Kernel Cache Frequency Span Command Stream Event CUDAGraph Device Host GPU".split())
    nodes = {getattr(n, "name", None) or ast.unparse(n.targets[0]): n for n in ast.parse(source).body
             if isinstance(n, (ast.ClassDef, ast.Assign))}
    lines = 0
    for n in (nodes[name] for name in names):
        docs = {i for m in ast.walk(n) if isinstance(m, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(m)
                for i in range(m.body[0].lineno, m.body[0].end_lineno + 1)}
        first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])
        lines += sum(bool(t.strip()) and i not in docs for i, t in enumerate(source.splitlines()[first - 1: n.end_lineno], first))
    assert lines <= 150


# The interface

def test_the_interface_is_torch_cuda_s():
    gpu = GPU()
    for name in ("Event", "Stream", "CUDAGraph", "stream", "graph", "synchronize", "current_stream", "empty_cache"):
        assert hasattr(gpu, name) and hasattr(torch.cuda, name)
    pairs = [(gpu.Event(), torch.cuda.Event, ("record", "query", "elapsed_time")), (gpu.CUDAGraph(), torch.cuda.CUDAGraph, ("replay",)),
             (gpu.Stream(), torch.cuda.Stream, ("synchronize", "wait_event"))]
    for mine, theirs, methods in pairs:
        for m in methods:
            ours, other = (list(inspect.signature(getattr(x, m)).parameters) for x in (mine, theirs))
            assert callable(getattr(theirs, m)) and len(ours) <= len([p for p in other if p != "self"])


def devices():
    """A simulated GPU, and the real one where there is one: (device, call, clock)."""
    gpu = GPU()
    yield gpu, gpu.kernel(20), gpu.clock
    if torch.cuda.is_available():
        x = torch.ones(2**20, device="cuda")
        yield torch.cuda, lambda: x.add_(1), simulate.host_clock


@pytest.mark.parametrize("device, f, clock", list(devices()), ids=lambda x: getattr(x, "__name__", type(x).__name__))
@pytest.mark.parametrize("name", METHODS)
def test_the_same_harness_runs_on_every_device(device, f, clock, name):
    more = {"before": f} if "flush" in name else {}
    assert 0 < METHODS[name](device, f, 5, clock, **more) < math.inf


def test_errors_say_what_to_do():
    gpu = GPU()
    start, stop = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
    for a, b in ((start, stop), (gpu.Event(), stop)):
        stop.record()
        with pytest.raises(ValueError, match="recorded and made with enable_timing=True: make and record them so"):
            a.elapsed_time(b)
    start.record()
    gpu.kernel(20)()
    stop.record()
    assert start.query() and not stop.query() and gpu.Event().query()
    with pytest.raises(RuntimeError, match="has not reached both events: synchronize first"):
        start.elapsed_time(stop)
    graph = gpu.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"graph is empty: capture kernels with device.graph\(g\) first"):
        graph.replay()
    for call in (gpu.synchronize, gpu.current_stream().synchronize, start.record):
        with gpu.graph(graph), pytest.raises(RuntimeError, match="while a graph is captured: move it out of the block"):
            call()
    for bad in ({"us": -1}, {"us": 1, "mb": -1}, {"us": 1, "share": 0}, {"us": 1, "share": 1.5}):
        with pytest.raises(ValueError, match=r"us and mb must be >= 0, share in \(0, 1\]"):
            Kernel(**bad)


def test_what_is_printed_says_simulated():
    assert "simulated" in repr(GPU())
    assert all("simulated" in grade(name, lambda *args: "no number")[0] for name in EXERCISES)


def test_a_time_line_draws_every_span():
    from matplotlib.figure import Figure
    ax, gpu = Figure().subplots(), GPU()
    event_times(gpu, gpu.kernel(8), 3)
    timeline(ax, gpu)
    assert len(ax.patches) + len(ax.lines) == len(gpu.trace) and [t.get_text() for t in ax.get_yticklabels()] == ["host", "stream 0"]


# The exercises: solutions, other right ways, and wrong ones with a word of what is said about them

def by_hand(device, f, clock):
    """Launch, kernel and synchronize, less a launch and an idle synchronize."""
    def spent(*parts):
        start = clock()
        for part in parts:
            part()
        return clock() - start
    f()
    device.synchronize()
    idle, launch = spent(device.synchronize), spent(f)
    device.synchronize()
    return spent(f, device.synchronize) - launch - idle


def loop(n, wait_each=False, wait_end=False, warm=True):
    def answer(device, f, *args):
        clock = args[-1]
        if warm:
            f()
            device.synchronize()
        start = clock()
        for _ in range(n):
            f()
            if wait_each:
                device.synchronize()
        if wait_end:
            device.synchronize()
        return (clock() - start) / n
    return answer


def odd_one(invert=False, truth=False, choose=None):
    def answer(harnesses, device, f, clock):
        read = {name: h(device, f, 60, clock) for name, h in harnesses.items()}
        true = by_hand(device, f, clock) if truth else statistics.median(read.values())
        name = choose(read, key=read.get) if choose else max(read, key=lambda x: abs(math.log(read[x] / true)))
        return name, (true / read[name] if invert else read[name] / true)
    return answer


def simulate_queue(costs, us):
    gpu = GPU(costs)
    f = gpu.kernel(us)
    for i in range(3 * costs.depth):
        before = gpu.clock()
        f()
        if gpu.clock() - before > costs.launch:
            return i
    return None


def queue_by_formula(costs, us):
    p = us + costs.gap
    x = (costs.depth * p - costs.launch - us) / (p - costs.launch)
    return None if p <= costs.launch else max(costs.depth, math.floor(x) + 1)


def streams_apart(n, split=True, between=False, wait=True):
    def answer(device, fa, fb, clock):
        def both(first, second):
            def run():
                with device.stream(first):
                    fa()
                if between:
                    device.synchronize()
                with device.stream(second):
                    fb()
            return loop(n, wait_each=wait)(device, run, clock)
        one, two = device.Stream(), device.Stream()
        return both(one, one) - both(one, two if split else one)
    return answer


def graph_against(n, wait=True, inside=False):
    def answer(device, step, clock):
        step()
        graph = device.CUDAGraph()
        def capture():
            with device.graph(graph):
                step()
        def again():
            if inside:
                capture()
            graph.replay()
        capture()
        return loop(n, wait_each=wait)(device, step, clock) / loop(n, wait_each=wait)(device, again, clock)
    return answer


def marks(device, f, n):
    """One event between two calls, not a pair."""
    events = [device.Event(enable_timing=True) for _ in range(n + 1)]
    device.synchronize()
    events[0].record()
    for e in events[1:]:
        f()
        e.record()
    device.synchronize()
    return sorted(a.elapsed_time(b) * 1000 for a, b in zip(events, events[1:]))


def middle_and(times, q):
    return statistics.median(times), sorted(times)[math.ceil(q * len(times)) - 1]


def slower(times):
    return sum(t > 1.05 * min(times) for t in times)


def on(stream_of, factor=1000.0):
    def answer(device, f, stream, clock):
        start, stop = device.Event(enable_timing=True), device.Event(enable_timing=True)
        f()
        device.synchronize()
        start.record(stream_of(device, stream))
        f()
        stop.record(stream_of(device, stream))
        device.synchronize()
        return start.elapsed_time(stop) * factor
    return answer


def within_stream(device, f, stream, clock):
    with device.stream(stream):
        return events_each(device, f, 9, clock)


def first_less_second(n=1, wait=True):
    def answer(device, f, clock):
        first = loop(n, wait_end=wait, warm=False)(device, f, clock)
        device.synchronize()
        return first - loop(n, wait_end=wait, warm=False)(device, f, clock)
    return answer


def period(costs, us):
    """us between the starts of the last two kernels of a long loop."""
    gpu = GPU(costs)
    f = gpu.kernel(us)
    for _ in range(300):
        f()
    gpu.synchronize()
    starts = [s.start for s in gpu.trace if s.row != "host"]
    return starts[-1] - starts[-2]


def steady(device, f, clock):
    times = event_times(device, f, 120)
    return next(i for i, t in enumerate(times) if t < 1.1 * times[-1])


def full_speed(device, f, clock):
    for _ in range(120):
        f()
    return math.ceil(device.costs.ramp / by_hand(device, f, clock))


def streams_between(device, fa, fb, clock):
    one, two = device.Stream(), device.Stream()
    def run(second, wait):
        def both():
            with device.stream(one):
                fa()
            if wait:
                device.synchronize()
            with device.stream(second):
                fb()
        return loop(1, wait_each=True)(device, both, clock)
    return run(one, False) - run(two, True)


RIGHT = {
    "device time": [lambda d, f, clock: graphed(d, f, 300, clock), by_hand],
    "launch cost": [loop(20), loop(1)],
    "wrong harness": [odd_one(), odd_one(truth=True)],
    "queue full": [queue_by_formula, simulate_queue],
    "flush": [lambda d, f, flush, clock: events_each(d, f, 20, clock, flush) - events_each(d, f, 20, clock),
              lambda d, f, flush, clock: statistics.mean(event_times(d, f, 9, flush)[1:]) - statistics.mean(event_times(d, f, 9)[2:])],
    "two streams": [streams_apart(1), streams_apart(10)],
    "graph gain": [graph_against(1), graph_against(7)],
    "first call": [first_less_second(), first_less_second(wait=False)],
    "percentiles": [lambda d, f, n: middle_and(event_times(d, f, n), 0.95), lambda d, f, n: middle_and(marks(d, f, n), 0.95)],
    "warm-up": [steady, lambda d, f, clock: slower(marks(d, f, 99))],
    "other stream": [on(lambda d, s: s), within_stream],
    "hidden work": [lambda c, us: max(0.0, us + c.gap - c.launch), lambda c, us: period(c, us) - c.launch],
    "launch-bound": [lambda c, us: (us + c.gap < c.launch, max(c.launch, us + c.gap)),
                     lambda c, us: (period(c, us) == c.launch, period(c, us))],
    "roof": [lambda c, mb, us: (mb / us * 1000, mb > us * c.dram), lambda c, mb, us: (mb * 1e6 / (us * 1e-6) / 1e9, mb / c.dram > us)],
}
WRONG = {
    "device time": {"reads the launches": loop(50), "waits at each call": loop(50, wait_each=True), "in ms": lambda *a: by_hand(*a) / 1000,
                    "first call": loop(10, wait_end=True, warm=False), "launch-bound": lambda d, f, clock: events_loop(d, f, 100, clock),
                    "the launch is between them": lambda d, f, clock: events_each(d, f, 30, clock), "": lambda *a: 20},
    "launch cost": {"queue was full": loop(2000), "waits at each call": loop(10, wait_each=True),
                    "waits at the end": loop(100, wait_end=True), "first call": loop(1, warm=False), "": lambda *a: 5},
    "wrong harness": {"upside down": odd_one(invert=True), "takes the largest": odd_one(choose=max),
                      "takes the smallest": odd_one(choose=min), "": lambda *a: ("A", 1.0)},
    "queue full": {"number of places": lambda c, us: c.depth,
                   "gap between kernels": lambda c, us: queue_by_formula(replace(c, gap=0.0), us),
                   "counted from 1": lambda c, us: queue_by_formula(c, us) and queue_by_formula(c, us) + 1, "": lambda c, us: None},
    "flush": {"flush itself": lambda d, f, flush, clock: (loop(100, wait_end=True)(d, lambda: (flush(), f()), clock)
                                                          - loop(100, wait_end=True)(d, f, clock)),
              "not the difference": lambda d, f, flush, clock: events_each(d, f, 30, clock, flush),
              "nothing was flushed": lambda d, f, flush, clock: (flush(), events_each(d, f, 30) - events_each(d, f, 30))[1]},
    "two streams": {"ran on one stream": streams_apart(1, split=False), "nothing waits": streams_apart(1, wait=False),
                    "do not overlap": lambda d, fa, fb, clock: min(by_hand(d, f, clock) for f in (fa, fb)),
                    "waits between": streams_between},
    "graph gain": {"launches are compared": graph_against(1, wait=False), "capture is timed": graph_against(1, inside=True),
                   "upside down": lambda *a: 1 / graph_against(1)(*a)},
    "first call": {"warm already": lambda d, f, clock: (f(), d.synchronize(), first_less_second()(d, f, clock))[2],
                   "first call itself": loop(1, wait_end=True, warm=False),
                   "ten calls": first_less_second(10)},
    "percentiles": {"the mean": lambda d, f, n: (statistics.mean(t := marks(d, f, n)), middle_and(t, 0.95)[1]),
                    "never got hot": lambda d, f, n: middle_and(event_times(d, f, 10), 0.95),
                    "fifth": lambda d, f, n: middle_and(event_times(d, f, n), 0.05), "": lambda d, f, n: (min(event_times(d, f, n)),) * 2},
    "warm-up": {"a fixed number": lambda *a: 1, "longer": full_speed, "one too many": lambda *a: steady(*a) + 1, "": lambda *a: 25},
    "other stream": {"current stream": on(lambda d, s: None), "nothing waits": loop(1), "in ms": on(lambda d, s: s, 1.0)},
    "hidden work": {"launch is host work": lambda c, us: us + c.gap, "gap between": lambda c, us: max(0.0, us - c.launch),
                    "negative": lambda c, us: us + c.gap - c.launch, "": lambda c, us: us},
    "launch-bound": {"do not add": lambda c, us: (us + c.gap < c.launch, us + c.gap + c.launch),
                     "gap is forgotten": lambda c, us: (us < c.launch, max(us, c.launch)),
                     "wrong way round": lambda c, us: (us + c.gap > c.launch, max(c.launch, us + c.gap))},
    "roof": {"MB per us": lambda c, mb, us: (mb / us, mb / us > c.dram),
             "upside down": lambda c, mb, us: (us / mb * 1000, us / mb > c.dram),
             "another unit": lambda c, mb, us: (mb / us * 1000, mb / us * 1000 > c.dram), "": lambda c, mb, us: mb / us * 1000},
}


def test_every_exercise_is_tested():
    assert set(EXERCISES) == set(PROMPTS) == set(RIGHT) == set(WRONG) and len(EXERCISES) >= 12
    assert all(len(RIGHT[name]) >= 2 and len(WRONG[name]) >= 3 and len(EXERCISES[name].cases) >= 3 for name in EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_pass(name):
    for answer in RIGHT[name]:
        assert grade(name, answer) == []


@pytest.mark.parametrize("name, words", [(name, words) for name in EXERCISES for words in WRONG[name]])
def test_wrong_answers_are_found_and_named(name, words):
    problems = grade(name, WRONG[name][words])
    assert problems and (not words or any(words in p for p in problems[1:])), problems


@pytest.mark.parametrize("name", EXERCISES)
def test_known_mistakes_are_wrong_and_name_themselves(name):
    for words, answer in EXERCISES[name].mistakes.items():
        assert words in grade(name, answer)[1:]


@pytest.mark.parametrize("name", EXERCISES)
def test_truth_does_not_depend_on_luck_and_no_constant_passes(name):
    e = EXERCISES[name]
    truths = [e.truth(*c) for c in e.cases]
    assert truths == [e.truth(*c) for c in e.cases] and len(set(truths)) > 1
    for t in truths:
        assert grade(name, lambda *args, t=t: t)


def test_an_answer_that_fails_is_a_problem_in_words():
    def broken(*args):
        raise ZeroDivisionError("by hand")
    assert "ZeroDivisionError: by hand" in grade("roof", broken)[0]
    assert grade("roof", lambda *args: None) and grade("queue full", lambda costs, us: float(queue_by_formula(costs, us) or 0))
    with pytest.raises(ValueError, match="no exercise 'x': choose from device time, launch cost"):
        grade("x", broken)


def test_naive_and_the_others_leave_the_current_stream_alone():
    gpu = GPU()
    for method in (naive, sync_end, sync_each, graphed):
        method(gpu, gpu.kernel(3), 4, gpu.clock)
    assert gpu.current_stream() is gpu.streams[0] and gpu.capturing is None
