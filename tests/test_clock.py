"""Timing on simulated clocks: known times found, intervals that keep their promise under any load, and refusals that refuse."""

import gc
import itertools
import json
import math
import random
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.cli import main
from tunebook.timing import clock as module
from tunebook.timing.clock import (
    Comparison,
    Refused,
    Roof,
    Simulated,
    Timing,
    bench,
    block,
    calibrate,
    calls_for,
    clock_of,
    compare,
    demand_equal,
    duration,
    event_clock,
    evictor,
    graphed,
    interleave,
    judged,
    load,
    provenance,
    resolution,
    sampler,
    save,
    signed_rank,
    table,
    time_set,
    versus,
    warm_up,
    within,
)

quick = settings(deadline=None, max_examples=50, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
positive = st.floats(1e-9, 1e4)


def world(seed, steps=5000):
    """A load that wanders, with bursts, and jitter with a heavy tail."""
    rng, x, load = random.Random(f"world {seed}"), 0.0, []
    for _ in range(steps):
        x = 0.97 * x + 0.05 * rng.gauss(0, 1)
        load.append(math.exp(x) * (2.0 if rng.random() < 0.02 else 1.0))
    return Simulated(load=load, jitter=[1 + 0.01 * rng.paretovariate(1.5) for _ in range(997)])


def turns(f, g, kind="simulated"):
    return Comparison(*(Timing(n, list(t), kind, {"turns": "f and g"}) for n, t in (("f", f), ("g", g))))


# Clocks and blocks

@quick
@given(ticks=st.integers(1, 300), cost=st.integers(1, 10**4))
def test_resolution_is_the_smallest_step_shown(ticks, cost):
    tick = max(1, ticks * cost // 7)
    step = resolution(Simulated(tick=tick, cost=cost))
    assert step % tick == 0 and cost - tick < step < cost + tick + (step == tick) * cost


@pytest.mark.parametrize("clock", [lambda: 7, itertools.count(10**9, -1).__next__])
def test_a_clock_that_stands_still_or_runs_back(clock):
    with pytest.raises(ValueError, match="expected a clock that goes on, got one that stands still: use another"):
        resolution(clock)


@quick
@given(ns=st.integers(200, 10**7), cost=st.integers(1, 90), length=st.integers(1, 10**7))
def test_calls_that_fill_a_block(ns, cost, length):
    clock = Simulated(cost=cost)
    n = calls_for(clock.work(ns), clock, length)
    assert n & (n - 1) == 0 and n * ns + cost >= length and (n == 1 or n // 2 * ns + cost < length)


@quick
@given(ns=st.integers(300, 10**7), cost=st.integers(1, 100))
def test_a_known_time_is_found_exactly(ns, cost):
    clock = Simulated(cost=cost)
    t = bench(clock.work(ns), clock=clock, seconds=1e-3, name="known")
    assert t.median == pytest.approx(ns * 1e-9, rel=1e-12) and t.kind == "simulated" and len(t.seconds) <= 1000


@quick
@given(ns=st.integers(50_000, 10**6), tick=st.sampled_from([10, 1000, 100_000]))
def test_a_coarse_clock_costs_one_percent_at_most(ns, tick):
    clock = Simulated(tick=tick)
    for s in bench(clock.work(ns), clock=clock, seconds=0.01).seconds:
        assert abs(s * 1e9 / ns - 1) < 0.011


@pytest.mark.parametrize("falling", [0, 3, 20, 40])
def test_warm_up_outlasts_what_falls(falling):
    clock = Simulated(jitter=[40.0] + [3 - 2 * k / falling for k in range(falling)] + [1.0] * 100_000)
    assert warm_up(clock.work(1e6), clock, 10**8) >= falling
    clock = Simulated(jitter=[2.0**-k for k in range(40)])
    assert warm_up(clock.work(1e9), clock, 1) == 1  # the limit holds, steady or not


def test_what_costs_less_than_a_call_is_refused():
    with pytest.raises(Refused, match="takes longer than an empty one, this does not: time a loop of it"):
        sampler(gc.isenabled, (), time.perf_counter_ns, 0, 1e5)


def test_before_runs_ahead_of_each_sample_and_is_not_timed():
    clock, count = Simulated(), []
    t = bench(clock.work(1e5), clock=clock, seconds=0.01, before=lambda: count.append(clock.work(1e6)()))
    assert t.median == pytest.approx(1e-4) and len(count) == len(t.seconds) + 1 and t.where["calls a sample"] == "1"


def test_arguments_arrive_and_garbage_collection_returns():
    seen = []
    clock = Simulated()
    bench(lambda a, b: seen.append((a, b, gc.isenabled())) or clock.work(1e5)(), 1, 2, clock=clock, seconds=0.001)
    assert set(seen) == {(1, 2, False)} and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        bench(lambda: 1 / 0, clock=clock)
    assert gc.isenabled()


# Devices

@pytest.mark.parametrize("device", DEVICES)
def test_bench_and_compare_on_a_device(device):
    x = torch.rand(64, 64, device=device)
    t = bench(torch.mm, x, x, seconds=0.02)
    name = {"cpu": "perf_counter_ns", "cuda": "CUDA events"}[device]
    assert t.kind == "measured here" and t.where["clock"] == name and t.name == "mm"
    assert {"device", "threads", "torch", "date", "clock", "calls a sample"} <= set(t.where)
    c = compare(torch.mul, lambda a, b: a * b, x, x, seconds=0.02, names=("f", "g"))
    assert c.f.where["turns"] == "f and g" and c.low <= c.ratio <= c.high
    y = graphed(torch.mm, x, x)()
    assert torch.allclose(y, x @ x) and evictor(device, 2**12)().numel() == 2**12


def test_only_a_real_clock_measures():
    assert bench(lambda: sum(range(100)), clock=time.process_time_ns, seconds=0.005).kind == "measured here"
    assert bench(lambda: sum(range(100)), clock=lambda: time.perf_counter_ns(), seconds=0.005).kind == "simulated"
    with pytest.raises(ValueError, match="cpu or cuda, got 'abacus': pass clock="):
        clock_of("abacus")


def test_the_event_clock_adds_up_what_passed_between_events(monkeypatch):
    stamps = iter([0.0, 1.5, 1.5005, 9.25])
    waited = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = next(stamps)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    read = event_clock("cuda:1")
    assert [read(), read(), read()] == [1_500_000, 1_500_500, 9_250_000] and waited == [1.5, 1.5005, 9.25]


def test_provenance_is_plain_text():
    where = provenance()
    assert all(isinstance(v, str) and v for v in where.values()) and where["torch"] == torch.__version__


# Samples

@quick
@given(times=st.lists(positive, min_size=1, max_size=50), q=st.floats(0, 100))
def test_percentiles_are_samples(times, q):
    t = Timing("x", times, "simulated")
    at = t.percentile(q)
    assert at in times and sum(s <= at for s in times) >= q / 100 * len(times) - 1e-9
    assert t.percentile(0) == min(times) and t.percentile(100) == max(times) and t.percentile(50) <= t.median


@pytest.mark.parametrize("kind", ["", "fast", "measured", "recorded"])
def test_a_time_from_nowhere(kind):
    with pytest.raises(ValueError, match="a time says where it comes from"):
        Timing("x", [1.0], kind)


@pytest.mark.parametrize("times", [[], [0.0], [-1.0], [math.nan], [math.inf], [1.0, 0.0]])
def test_no_times(times):
    with pytest.raises(ValueError, match="expected positive times"):
        Timing("x", times, "simulated")


def test_durations_and_table():
    assert [duration(t) for t in (100.0, 1.0, 0.999, 1e-3, 1e-6, 9.99e-7)] == ["100 s", "1 s", "999 ms", "1 ms", "1 us", "999 ns"]
    lines = table([Timing("a", [1.0] * 20, "simulated"), Timing("long name", [2e-3], "recorded on x")]).splitlines()
    assert len(lines) == 3 and lines[1].endswith("simulated") and lines[2].endswith("recorded on x") and "2 ms" in lines[2]
    assert repr(Timing("a", [1.0], "simulated")) == "a: 1 s (1 s to 1 s, 1 samples), simulated"


# The interval

@pytest.mark.parametrize("n", range(6, 13))
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_coverage_over_all_signs(n, level):
    sizes = torch.tensor([1.5**k for k in range(n)], dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)
    _, low, high = signed_rank(signs * sizes, level)
    covered = float(((low <= 0) & (0 <= high)).double().mean())
    k = module._cut(n, level)
    sums = [sum(r for r, s in zip(range(1, n + 1), pick) if s) for pick in itertools.product((0, 1), repeat=n)]
    assert covered == 1 - 2 * sum(w < k for w in sums) / 2**n >= level
    assert 1 - 2 * sum(w < k + 1 for w in sums) / 2**n < level  # and one average further in would not do


@quick
@given(logs=st.lists(st.floats(-3, 3), min_size=6, max_size=40), shift=st.floats(-2, 2), seed=st.integers(0, 100))
def test_the_interval_moves_with_the_data(logs, shift, seed):
    x = torch.tensor(logs, dtype=torch.float64)
    middle, low, high = signed_rank(x)
    assert low <= middle <= high
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack(signed_rank(x + shift)), torch.stack((middle, low, high)) + shift, **close)
    torch.testing.assert_close(torch.stack(signed_rank(-x)), -torch.stack((middle, high, low)), **close)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(torch.stack(signed_rank(x[order])), torch.stack((middle, low, high)), **close)
    torch.testing.assert_close(torch.stack(signed_rank(torch.stack([x, -x])))[:, 0], torch.stack((middle, low, high)), **close)


def test_the_estimate_is_scipy_s_median_of_averages():
    from scipy.stats import wilcoxon
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, low, high = signed_rank(x)
    for edge, side in ((low, -1), (high, 1)):
        inside, outside = (wilcoxon((x - edge + side * step).numpy(), method="exact").pvalue for step in (1e-9, -1e-9))
        assert outside <= 0.05 < inside


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_rounds(n):
    with pytest.raises(ValueError, match=f"{n} rounds are too few for an interval of 95%: sample longer"):
        signed_rank(torch.zeros(n))


# Verdicts

@quick
@given(a=st.floats(0.5, 2), b=st.floats(0.5, 2), floor=st.floats(0, 0.2), effect=st.floats(0.001, 0.1))
def test_verdicts(a, b, floor, effect):
    low, high = sorted((a, b))
    said = judged(low, high, floor, effect)
    if low <= 1 <= high:
        assert said in ("undecided", "no difference detected")
    if said == "no difference detected":
        assert high / low <= (1 + effect) ** 2 * (1 + 1e-12)
    if judged(low, high, 0.0, effect) in ("undecided", "no difference detected"):
        assert said == judged(low, high, 0.0, effect)  # a higher floor never makes a verdict
    mirror = {"faster": "slower", "slower": "faster"}
    back = judged(1 / high, 1 / low, floor, effect)
    assert back == mirror.get(said, said) or min(abs(math.log(v) - s * math.log1p(m)) for v in (low, high) for s in (-1, 1)
                                                 for m in (floor, effect)) < 1e-12


@quick
@given(logs=st.lists(st.floats(-0.5, 0.5), min_size=32, max_size=32))
def test_a_comparison_turned_round_is_its_inverse(logs):
    f, g = [math.exp(v) for v in logs[:16]], [math.exp(v) for v in logs[16:]]
    a, b = turns(f, g), turns(g, f)
    assert a.ratio == pytest.approx(1 / b.ratio) and a.low == pytest.approx(1 / b.high) and a.high == pytest.approx(1 / b.low)


def test_what_did_not_take_turns_is_no_comparison():
    a = Timing("a", [1.0] * 20, "simulated")
    for b in (a, Timing("b", [1.0] * 20, "simulated", {"turns": "a and b"})):
        with pytest.raises(Refused, match="a and .* did not take turns, so the load is in their ratio: use compare"):
            Comparison(a, b)
    with pytest.raises(Refused, match="did not take turns"):
        turns([1.0] * 20, [1.0] * 18)


def test_rounds_follow_the_coin():
    order = []
    interleave(lambda: order.append("f") or 1.0, lambda: order.append("g") or 1.0, lambda rounds: rounds < 400, seed=1)
    rounds = ["".join(order[k:k + 4]) for k in range(0, 1600, 4)]
    assert set(rounds) == {"fggf", "gffg"} and 150 < rounds.count("fggf") < 250
    assert sum(a == b for a, b in zip(rounds, rounds[1:])) in range(150, 250)


def test_compare_leaves_the_generators_alone():
    clock = Simulated()
    before = random.getstate(), torch.get_rng_state()
    compare(clock.work(1e6), clock.work(1e6), clock=clock, seconds=0.05)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# Under load

@pytest.mark.parametrize("slower", [1.0, 1.05])
def test_intervals_keep_their_promise(slower):
    clock = world(slower)
    f, g = clock.work(1.2e6 * slower), clock.work(1.2e6)
    found = [compare(f, g, clock=clock, seconds=0.1, most=25, seed=f"test {t}") for t in range(300)]
    held = sum(c.low <= slower <= c.high for c in found) / 300
    assert 0.91 <= held <= 0.99
    verdicts = {c.verdict for c in found}
    assert "faster" not in verdicts and (slower > 1 or sum(c.verdict == "slower" for c in found) <= 15)
    if slower > 1:
        assert "no difference detected" not in verdicts


def test_a_quiet_five_percent_is_found():
    rng = random.Random(0)
    clock = Simulated(jitter=[math.exp(0.01 * rng.gauss(0, 1)) for _ in range(997)])
    found = [compare(clock.work(1.26e6), clock.work(1.2e6), clock=clock, seconds=0.1, most=25, seed=f"quiet {t}") for t in range(50)]
    assert sum(c.verdict == "slower" for c in found) >= 45


def test_a_drift_that_fools_medians_does_not_fool_turns():
    clock = Simulated(load=[1 + k / 500 for k in range(10_000)])
    f, g = clock.work(1e6), clock.work(1e6)
    early, late = (statistics.median(block(h, 1, clock) for _ in range(50)) for h in (f, g))
    assert late / early > 1.05
    assert compare(f, g, clock=clock, seconds=0.5, seed=0).verdict == "no difference detected"


def test_calibration_counts():
    clock = world(2)
    seen = calibrate(clock.work(1.2e6), clock=clock, trials=10, seconds=0.1)
    assert len(seen.turns) == len(seen.alone) == 10 and all(c.f.kind == "simulated" for c in seen.turns)
    assert "10 comparisons of a function with itself, simulated" in repr(seen) and "0 false verdicts" in repr(seen)


# Refusals

x = torch.arange(1.0, 5.0)


@pytest.mark.parametrize("f, g, why", [
    (torch.sin, torch.cos, "not close"),
    (torch.sin, lambda t: torch.sin(t) * (1 + 1e-4), "not close"),
    (torch.sin, lambda t: torch.sin(t).double(), "dtype differs"),
    (torch.sin, lambda t: torch.sin(t)[None], "shape differs"),
    (lambda t: (t, t), lambda t: t, "2 values against 1"),
    (lambda t: (), lambda t: (), "0 values against 0"),
    (lambda t: {"a": t, "b": 2 * t}, lambda t: {"a": t, "b": t}, "not close"),
    (lambda t: t / 0 * 0, lambda t: t / 0 * 0, "NaN"),
    (torch.rand_like, torch.rand_like, "differs from itself too"),
    (lambda t: None, lambda t: None, "differs from itself too: .* pass check="),
    (lambda t: t.add_(1), lambda t: t.mul_(2), "not close"),
    (lambda t: t.add_(1), lambda t: t.add_(1), "differs from itself too"),
    (lambda t: "text", lambda t: "text", "differs from itself too")])
def test_unequal_outputs(f, g, why):
    with pytest.raises(Refused, match=f"(?s)do not return the same, so their times cannot be compared: .*{why}"):
        compare(f, g, x.clone(), seconds=0.01)


def test_equal_outputs_and_explicit_checks():
    demand_equal(lambda t: (t + t, [1.0, 2]), lambda t: [2 * t, (1.0, 2)], [x])
    demand_equal(torch.rand_like, torch.rand_like, [x], check=lambda a, b: a.shape == b.shape)
    demand_equal(lambda t: None, lambda t: None, [x], check=lambda a, b: None)
    with pytest.raises(Refused, match="check returned False"):
        demand_equal(torch.sin, torch.cos, [x], check=torch.equal)


def test_rates_above_the_roof(monkeypatch):
    t, top = Timing("f", [1e-3] * 3, "simulated"), Roof(1e12, 1e11)
    within(t, flops=1e9, nbytes=1e8, limit=top)
    with pytest.raises(Refused, match="f, simulated: 2,000 GFLOP/s where the roof is 1,000. Was the call waited for"):
        within(t, flops=2e9, limit=top)
    with pytest.raises(Refused, match="1,000 GB/s where the roof is 100"):
        within(t, nbytes=1e9, limit=top)
    clock = Simulated()
    for call in (lambda **w: bench(clock.work(1e6), clock=clock, seconds=0.01, **w),
                 lambda **w: compare(clock.work(1e6), clock.work(1e6), clock=clock, seconds=0.05, **w)):
        call(flops=1e9, limit=top)
        with pytest.raises(Refused, match="10,000 GFLOP/s"):
            call(flops=1e10, limit=top)
    asked = []
    rising = lambda device, nbytes, again: asked.append(again) or Roof((1 + again) * 1e12, 1e11)  # noqa: E731
    monkeypatch.setattr(module, "roof", rising)
    within(t, flops=2e9)  # the roof was measured beside a busy neighbour, and is higher the second time
    assert asked == [0, 1]
    with pytest.raises(Refused, match="5,000 GFLOP/s where the roof is 2,000"):
        within(t, flops=5e9)


def test_a_roof_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "bench", lambda f, *a, **k: calls.append(f) or SimpleNamespace(seconds=[2e-3, 1e-3 / len(calls)]))
    module._peaks.cache_clear()
    try:
        first = module.roof(nbytes=2**20)
        n = len(calls)
        assert module.roof(nbytes=2**20 + 5) == first and len(calls) == n  # the same size
        assert module.roof(nbytes=2**20, again=1).flops > first.flops and len(calls) == 2 * n
    finally:
        module._peaks.cache_clear()


# Files

@quick
@given(times=st.lists(positive, min_size=1, max_size=20), data=st.data())
def test_files_keep_every_bit_and_notice_a_change(tmp_path_factory, times, data):
    path = tmp_path_factory.mktemp("times") / "t.json"
    save(path, [Timing("ä", times, "measured here", {"device": "abc"}), Timing("b", times, "simulated")])
    a, b = load(path)
    assert a.seconds == b.seconds == times and a.kind == "recorded on abc" and b.kind == "simulated" and a.name == "ä"
    record = json.loads(path.read_text())
    i = data.draw(st.integers(0, len(times) - 1))
    record[0]["seconds"][i] = math.nextafter(times[i], math.inf)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was changed after it was measured: measure it again"):
        load(path)


@pytest.mark.parametrize("edit", [lambda r: r.pop("sha256"), lambda r: r["where"].update(device="faster"), lambda r: r.update(name="x")])
def test_any_edit_is_noticed(tmp_path, edit):
    save(tmp_path / "t.json", [Timing("f", [1.0], "measured here", {"device": "slow"})])
    record = json.loads((tmp_path / "t.json").read_text())
    edit(record[0])
    (tmp_path / "t.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was changed"):
        load(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "3", "[1]", "{", '{"a": 1}'])
def test_other_files(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match="t.json is not a file of timings: write one with save"):
        load(tmp_path / "t.json")


def test_a_comparison_comes_back_from_a_file(tmp_path):
    clock = world(3)
    c = compare(clock.work(2e6), clock.work(1e6), clock=clock, seconds=0.1, seed=0)
    save(tmp_path / "c.json", [c.f, c.g])
    again = Comparison(*load(tmp_path / "c.json"))
    assert (again.ratio, again.low, again.high, again.floor, again.verdict) == (c.ratio, c.low, c.high, c.floor, "slower")


# The command

def test_time_writes_and_compares(tmp_path, capsys):
    out = tmp_path / "mine"
    assert main(["time", "softmax", "--seconds", "0.02", "--out", str(out)]) == 0
    assert "measured here" in capsys.readouterr().out and (tmp_path / "mine.png").stat().st_size < 60_000
    t, = load(tmp_path / "mine.json")
    other = t.where | {"device": "other", "threads": "64"}
    save(tmp_path / "other.json", [Timing("softmax", [s / 2 for s in t.seconds], "measured here", other)])
    assert main(["time", "--compare", str(tmp_path / "mine.json"), str(tmp_path / "other.json")]) == 0
    said = capsys.readouterr().out
    assert "softmax: 0.50 times as long" in said and "differs: device: " in said and "-> other" in said and "-> 64" in said
    save(tmp_path / "other.json", [Timing("softmax", t.seconds, "measured here", t.where | {"shape": "(1, 1)"})])
    assert main(["time", "--compare", str(tmp_path / "mine.json"), str(tmp_path / "other.json")]) == 2
    assert "expected the same work" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["shape", "dtype", "source"])
def test_different_work_is_not_compared(key):
    work = {"shape": "(4,)", "dtype": "torch.float32", "source": "ab"}
    a = Timing("copy", [1.0], "simulated", work)
    for other in (work | {key: "else"}, {k: v for k, v in work.items() if k != key}):
        with pytest.raises(Refused, match="expected the same work"):
            versus([a], [Timing("copy", [1.0], "simulated", other)])
    with pytest.raises(Refused, match="expected the same calls"):
        versus([a], [])
    with pytest.raises(Refused, match="expected the same work"):
        versus([Timing("copy", [1.0], "simulated")], [Timing("copy", [1.0], "simulated")])


@pytest.mark.parametrize("line, word", [(["nonsense"], "no call is named 'nonsense'; known: matmul, softmax, copy"),
                                        (["--compare", "a.json", "b.json"], "a.json"), (["--device", "abacus"], "abacus")])
def test_one_clear_line_for_each_mistake(tmp_path, monkeypatch, capsys, line, word):
    monkeypatch.chdir(tmp_path)
    assert main(["time", *line]) == 2
    said = capsys.readouterr().err
    assert word in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_calibrate_prints_its_three_lines(monkeypatch, capsys):
    monkeypatch.setattr(module, "calibrate", lambda f, *a, seconds, **k: calibrate(f, *a, trials=2, seconds=0.02))
    assert main(["time", "--calibrate"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 comparisons of a function with itself, measured here") and len(said.splitlines()) == 3


def test_named_work_says_what_it_was():
    t, = time_set(["copy"], seconds=0.005)
    assert (t.where["shape"], t.where["dtype"], len(t.where["source"])) == ("(4000000,)", "torch.float32", 16)
