"""The comparison's statistics against scipy and against simulation; the protocol's file; what is refused."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from tunebook.tuning import compare
from tunebook.tuning.compare import (
    BASELINES,
    Difference,
    Study,
    answers,
    as_table,
    chosen,
    compare_methods,
    difference,
    holm,
    job,
    rates,
    run_study,
    summary,
    verdict,
)

quick = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 2**31)


def table(seed, s=5, n=40, p=0.8):
    return (torch.rand(s, n, generator=torch.Generator().manual_seed(seed)) < p).double()


# Differences

@quick
@given(seed=seeds, s=st.integers(3, 9))
def test_for_other_seeds_it_is_the_paired_t_test(seed, s):
    a, b = table(seed, s), table(seed + 1, s)
    ours, theirs = difference(a, b, items=False), ttest_rel(a.mean(1), b.mean(1))
    if math.isnan(theirs.pvalue):
        return
    low, high = theirs.confidence_interval()
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9) and (ours.low, ours.high) == pytest.approx((low, high), rel=1e-9)


@quick
@given(seed=seeds, s=st.integers(3, 6), n=st.integers(2, 50))
def test_turned_over_and_repeated(seed, s, n):
    a, b = table(seed, s, n), table(seed + 1, s, n)
    one, two = difference(a, b), difference(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-two.mean, -two.high, -two.low)) and one.p == pytest.approx(two.p)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    again = difference(a[:, order], b[:, order])
    assert (again.mean, again.low, again.p) == pytest.approx((one.mean, one.low, one.p))
    assert one.high - one.low >= 0 and one.low <= one.mean <= one.high and 0 <= one.p <= 1


@quick
@given(seed=seeds)
def test_it_is_never_surer_than_its_parts(seed):
    a, b = table(seed), table(seed + 1)
    d = a - b
    both = compare._error(d, True)[0]
    per_seed, per_item = float(d.mean(1).std() / math.sqrt(len(d))), float(d.mean(0).std() / math.sqrt(d.shape[1]))
    assert both >= max(per_seed, per_item) - 1e-12


def test_items_that_come_in_pairs_count_once():
    a, b = table(0, n=30), table(1, n=30)
    twice = difference(a.repeat_interleave(2, 1), b.repeat_interleave(2, 1), group=[i // 2 for i in range(60)])
    once = difference(a, b)
    assert (twice.mean, twice.low, twice.p) == pytest.approx((once.mean, once.low, once.p))
    assert difference(a.repeat_interleave(2, 1), b.repeat_interleave(2, 1)).p < once.p  # the mistake: every row counts


def test_equal_answers_are_no_difference():
    a = table(0)
    d = difference(a, a)
    assert d == Difference(0.0, 0.0, 0.0, 1.0) and verdict(d, d.p) == "indistinguishable"
    assert difference(torch.ones(3, 4), torch.zeros(3, 4)).p == 0


@pytest.mark.parametrize("a, b", [((5, 40), (4, 40)), ((5, 40), (5, 39)), ((2, 40), (2, 40)), ((40,), (40,))])
def test_shapes_that_cannot_be_paired(a, b):
    with pytest.raises(ValueError, match="the same seeds"):
        difference(torch.zeros(a), torch.zeros(b))


def test_groups_have_one_size():
    with pytest.raises(ValueError, match="all of one size"):
        difference(table(0, n=3), table(1, n=3), group=[0, 0, 1])


def test_coverage_for_other_seeds_and_items():
    """Planted components: a seed's effect, an item's effect, noise. The 95 % interval holds the truth in 95 of 100, within its error."""
    g, held, trials = torch.Generator().manual_seed(0), 0, 1500
    for _ in range(trials):
        d = 0.3 + 0.3 * torch.randn(5, 1, generator=g) + 1.5 * torch.randn(1, 60, generator=g) + torch.randn(5, 60, generator=g)
        out = difference(d.double(), torch.zeros(5, 60))
        held += out.low <= 0.3 <= out.high
    assert 0.93 <= held / trials <= 0.985


# Holm

@quick
@given(p=st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm(p):
    out = holm(p)
    order = sorted(p, key=lambda k: p[k])
    assert out.keys() == p.keys() and all(p[k] <= out[k] <= 1 for k in p)
    assert [out[k] for k in order] == sorted(out.values())
    for alpha in (0.01, 0.05, 0.3):  # the step-down procedure itself
        rejected = set()
        for i, k in enumerate(order):
            if p[k] * (len(p) - i) >= alpha:
                break
            rejected.add(k)
        assert {k for k in p if out[k] < alpha} == rejected


# The protocol

def fake(what):
    """A trial that never trains: better with a smaller rate, worse with a larger one."""
    quality = 0.6 if what["method"] in BASELINES else 0.9 - abs(math.log10(what["rate"] / 1e-3)) / 10
    out = {"job": dict(what), "validation": {"accuracy": quality, "loss": 1 - quality}, "trainable": len(what["method"]), "total": 100}
    if what["test"]:
        out["right"] = "".join("1" if x else "0" for x in table(what["seed"] * 7 + len(what["method"]), 1, 40, quality)[0].tolist())
    return out


@pytest.fixture
def faked(monkeypatch):
    calls = []
    monkeypatch.setattr(compare, "run_job", lambda what: calls.append(what) or fake(what))
    return calls


def test_the_protocol(faked, tmp_path):
    search, final = compare_methods(tmp_path / "x.json", ["full", "lora"], seeds=range(3), data="reviews")
    assert len(search) == 8 and len(final) == 6 + 6 and len(faked) == 20
    assert not any(w["test"] for w in faked[:8]) and all(w["test"] for w in faked[8:])
    assert {w["seed"] for w in faked[:8]}.isdisjoint({w["seed"] for w in faked[8:]})
    rate = chosen(search)
    assert {(w["method"], w["rate"]) for w in faked[8:]} == set((rate | dict.fromkeys(BASELINES, 1.0)).items())
    rows = summary(final)
    assert {r["method"] for r in rows} == {"full", "lora", *BASELINES} and rows[0]["accuracy"].mean >= rows[1]["accuracy"].mean
    assert as_table(rows).count("\n") == 5 and "reference" in as_table(rows)
    by = {r["method"]: r for r in rows}
    assert all(by[m]["p"] is None and by[m]["verdict"] == "baseline" for m in BASELINES)  # Holm's correction is for the methods
    assert by["lora"]["p"] == by["lora"]["difference"].p


def test_baselines_get_the_rows_of_their_seed(tmp_path):
    """All texts that hold "good" are positive: TF-IDF knows it, the majority does not; of other rows, other answers."""
    def rows(n, flip=0):
        return [{"text": f"{'good' if (i + flip) % 2 else 'poor'} {i}", "label": "yes" if (i + flip) % 2 else "no"} for i in range(n)]
    for split, n in (("train", 40), ("validation", 4), ("test", 9)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(n)))
    what = {"test": True, "data": str(tmp_path), "rows": 15, "model": "any", "epochs": 3}
    words, most = (compare.run_job(job(m, 1.0, 3, **what)) for m in ("tf-idf", "majority"))
    assert words["right"] == "1" * 9 and words["trainable"] > 2
    from tunebook.tuning import sample, splits_of
    train = splits_of(str(tmp_path))[0]["train"]
    taken = [r["label"] for r in sample(train, 15, 3)]
    top = max(set(taken), key=taken.count)
    assert [int(c) for c in most["right"]] == [int(i % 2 == top) for i in range(9)] and most["trainable"] == 0


def test_a_seed_that_chose_the_rate_is_not_tested(tmp_path):
    with pytest.raises(ValueError, match="seed 1000 chooses the rates"):
        compare_methods(tmp_path / "x.json", ["full"], seeds=[0, 1, 1000])


def test_what_is_kept_is_not_run_again_and_an_interruption_loses_one_trial(faked, tmp_path, monkeypatch):
    jobs = [job("lora", 1e-3, s) for s in range(5)]
    fails = {3}

    def sometimes(what):
        if what["seed"] in fails:
            raise KeyboardInterrupt
        return faked.append(what) or fake(what)
    monkeypatch.setattr(compare, "run_job", sometimes)
    with pytest.raises(KeyboardInterrupt):
        run_study(Study(tmp_path / "x.json"), jobs)
    assert len(json.loads((tmp_path / "x.json").read_text())["trials"]) == 3
    fails.clear()
    found = run_study(Study(tmp_path / "x.json"), jobs)
    assert [t["job"]["seed"] for t in found] == list(range(5)) and len(faked) == 5


def test_rates_are_half_a_decade_apart():
    for method in ("full", "lora", "head"):
        r = rates(method)
        assert len(r) == 4 and all(b / a == pytest.approx(10**0.5) for a, b in zip(r, r[1:]))
        assert math.sqrt(r[1] * r[2]) == pytest.approx(compare_rate(method))


def compare_rate(method):
    from tunebook.tuning import METHODS
    return METHODS[method].rate


REAL = Path(os.environ.get("TUNEBOOK_DATA") or "/nonexistent").expanduser() / "rt_polarity"


@pytest.mark.skipif(not REAL.is_dir(), reason="TUNEBOOK_DATA names no folder that holds rt_polarity/")
def test_what_readme_says_of_a_bag_of_words_with_all_rows():
    found = compare.run_job(job("tf-idf", 1.0, 0, test=True, data="rt_polarity"))["right"]
    said = re.search(r"reaches ([\d.]+) % when it gets all 8530", (Path(__file__).parent.parent / "README.md").read_text())
    assert f"{100 * found.count('1') / len(found):.1f}" == said[1]


def test_missing_trials_are_noticed():
    trials = [fake(job(m, 1e-3, s, test=True)) for m in ("full", "lora") for s in range(3)][:-1]
    with pytest.raises(ValueError, match="differ in seeds"):
        answers(trials)
