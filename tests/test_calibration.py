"""Calibration on drawn rows and dtypes: equal to PyTorch's and scikit-learn's, true to its identities, and clear about bad input."""

import itertools
import math
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tunebook.entropy.calibration import (
    Total,
    brier,
    consistent,
    edges,
    expected_ece,
    forecasts,
    kl_divergence,
    murphy,
    reliability,
    temperature,
    total_loss,
)
from tunebook.entropy.softmax import entropy, log_softmax, softmax
from tunebook.entropy.xent import cross_entropy
from tunebook.kit.checks import bound, close, gradcheck

quick = settings(deadline=None, max_examples=50, derandomize=True)
seeds, rows, classes = st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 9)
scales = st.sampled_from([0.01, 1.0, 10.0, 300.0])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes, wide = st.sampled_from(DTYPES), st.sampled_from(DTYPES[:2])
bins = st.integers(1, 20)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
inf, nan = math.inf, math.nan


def draw(seed, N, V, scale=1.0, dtype=torch.float64):
    """Logits, and labels that are half of the time the largest of their row."""
    g = torch.Generator().manual_seed(seed)
    z, y = (scale * torch.randn(N, V, generator=g, dtype=torch.float64)).to(dtype), torch.randint(V, (N,), generator=g)
    return z, torch.where(torch.rand(N, generator=g) < 0.5, z.argmax(-1), y)


def events(seed, N, values=None):
    """Probabilities, of few values or of any, and outcomes drawn from them."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(N, generator=g, dtype=torch.float64) if not values else torch.randint(values + 1, (N,), generator=g).double() / values
    return p, torch.rand(N, generator=g, dtype=torch.float64) < p


def size(*zs):
    return sum(1 + 2 * float(z.double().abs().max()) + math.log(z.shape[-1]) for z in zs)


# Reliability

@quick
@given(seed=seeds, N=rows, K=bins, mass=st.booleans(), values=st.sampled_from([None, 1, 4]))
def test_bins_are_those_of_a_loop(seed, N, K, mass, values):
    p, y = events(seed, N, values)
    inner = edges(p, K, mass)
    b, many = reliability(p, y, inner), reliability(p, torch.stack([y, ~y]), inner)
    assert inner.shape == (K - 1,) and b.count.sum() == N and (b.count > 0).all()
    at, gaps = 0, 0.0
    for low, high in itertools.pairwise([-inf, *inner.tolist(), inf]):
        mine = (p > low) & (p <= high)
        if mine.any():
            close(b.forecast[at], p[mine].mean(), terms=2 * N + 2)
            close(b.frequency[at], y[mine].double().mean(), terms=2 * N + 2, scale=1.0)
            gaps += float(mine.sum() * (p[mine].mean() - y[mine].double().mean()).abs())
            at += 1
    assert at == len(b.count) and 0 <= b.ece <= 1
    close(b.ece, torch.tensor(gaps / N, dtype=torch.float64), terms=4 * N + 8, scale=1.0)
    close(many.ece[0], b.ece, terms=4 * N, scale=1.0)
    close(many.frequency[1], 1 - b.frequency, terms=4 * N, scale=1.0)


@quick
@given(seed=seeds, N=st.integers(2, 200), K=bins, mass=st.booleans())
def test_bins_are_scikit_learn_s(seed, N, K, mass):
    from sklearn.calibration import calibration_curve
    assume(not mass or all((N - 1) * j % K for j in range(1, K)))  # else a quantile is an event, and its rounding chooses the side
    p, y = events(seed, N)
    share, mean = calibration_curve(y.numpy(), p.numpy(), n_bins=K, strategy="quantile" if mass else "uniform")
    b = reliability(p, y, edges(p, K, mass))
    close(b.frequency, torch.tensor(share), terms=2 * N + 2, scale=1.0)
    close(b.forecast, torch.tensor(mean), terms=2 * N + 2, scale=1.0)


@quick
@given(seed=seeds, K=bins, N=st.integers(20, 300))
def test_bins_of_equal_mass_hold_as_many(seed, K, N):
    p, y = events(seed, N)
    count = reliability(p, y, edges(p, K, equal_mass=True)).count
    assert len(count) == K and count.max() - count.min() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_ends_of_the_scale(dtype, device):
    p = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5], dtype=dtype, device=device)
    y = torch.tensor([False, False, True, True, True], device=device)
    for mass in (False, True):
        b = reliability(p, y, edges(p, 4, mass))
        assert b.count.sum() == 5 and b.ece.item() == pytest.approx(0.1) and b.count.device == p.device
    assert (consistent(p, 50) == torch.tensor([0, 0, 1, 1, 0], device=device).bool())[:, :4].all()
    assert expected_ece(p, edges(p, 4)).item() == pytest.approx(math.sqrt(2 / math.pi) * 0.5 / 5)
    for constant in (0.0, 0.3, 1.0):
        assert len(reliability(torch.full_like(p, constant), y, edges(p, 7)).count) == 1


def exact_ece(p, inner):
    """The mean ECE of a perfect model, by the distribution of each bin's sum of outcomes."""
    out = 0.0
    bin = torch.bucketize(p, inner)
    for k in bin.unique():
        mass = torch.ones(1, dtype=torch.float64)
        for q in p[bin == k]:
            mass = torch.cat([mass * (1 - q), mass.new_zeros(1)]) + torch.cat([mass.new_zeros(1), mass * q])
        out += float((mass * (torch.arange(len(mass)) - p[bin == k].sum()).abs()).sum())
    return out / len(p)


@quick
@given(seed=seeds, N=rows, K=bins)
def test_the_formula_of_the_bias_is_within_a_count_per_bin(seed, N, K):
    p, y = events(seed, N)
    inner = edges(p, K)
    used = len(reliability(p, y, inner).count)
    assert abs(float(expected_ece(p, inner)) - exact_ece(p, inner)) <= used / N  # Goldstein (2010): |E|S| - s sqrt(2 / pi)| <= 1


def test_perfect_models_are_as_the_exact_bias_says():
    p, _ = events(5, 60)
    shown = reliability(p, consistent(p, 20_000, seed=3), edges(p, 6)).ece
    error = float(shown.std()) / math.sqrt(len(shown))
    assert abs(float(shown.mean()) - exact_ece(p, edges(p, 6))) < 4 * error
    assert torch.equal(consistent(p, 3, seed=1), consistent(p, 3, seed=1)) and not torch.equal(consistent(p, 3, 1), consistent(p, 3, 2))


# Scores

@quick
@given(seed=seeds, N=rows, V=classes, scale=scales, dtype=dtypes)
def test_brier_is_the_squared_distance_to_one_hot(seed, N, V, scale, dtype):
    z, y = draw(seed, N, V, scale, dtype)
    theirs = (z.double().softmax(-1) - F.one_hot(y, V)).square().sum(-1).mean()
    assert 0 <= brier(z, y) <= 2 + 1e-6
    inner = torch.float64 if dtype == torch.float64 else torch.float32  # 16 bits are widened
    assert abs(float(brier(z, y) - theirs)) <= 4 * bound(inner, 4 * (V + 6 + math.ceil(size(z))) + N)


@quick
@given(seed=seeds, V=st.integers(2, 9), scale=st.sampled_from([0.3, 1.0, 3.0]))
def test_log_and_brier_are_proper(seed, V, scale):
    truth, other = draw(seed, 1, V, scale)[0], draw(seed + 1, 1, V, scale)[0]
    pi = softmax(truth)[0]
    every = torch.arange(V)
    for score in (lambda z, c: total_loss(z, c).mean, lambda z, c: float(brier(z, c))):
        at_truth, elsewhere = (sum(float(pi[c]) * score(z, every[c:c + 1]) for c in range(V)) for z in (truth, other))
        assert at_truth < elsewhere


@quick
@given(seed=seeds, N=st.integers(1, 150), K=bins, mass=st.booleans(), values=st.sampled_from([None, 1, 4, 9]))
def test_murphy_s_parts_add_up(seed, N, K, mass, values):
    p, y = events(seed, N, values)
    m = murphy(p, y, edges(p, K, mass))
    close(m.brier, (p - y.double()).square().mean(), terms=8 * N + 30, scale=2.0)
    assert m.reliability >= 0 and m.resolution >= 0 and 0 <= m.uncertainty <= 0.25
    if values and values < K and not mass:  # each bin holds one value
        assert abs(float(m.within)) < bound(torch.float64, 8 * N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_forecasts_follow_the_labels_that_count(dtype, device):
    z = torch.tensor([[[2.0, 1.0, -inf], [nan, 0.0, 0.0]], [[0.0, 5e4, 5e4], [-6e4, -6e4, 0.0]]], dtype=dtype, device=device)
    y = torch.tensor([[0, -100], [2, 2]], device=device)  # the row with NaN does not count
    said, right = forecasts(z, y)
    theirs = F.softmax(z.to(torch.promote_types(dtype, torch.float32))[y != -100], -1)
    torch.testing.assert_close(said, theirs.amax(-1))
    assert right.tolist() == [True, False, True]  # of two equal logits the first is taken
    said, right = forecasts(z, y, of=2)
    torch.testing.assert_close(said, theirs[:, 2])
    assert right.tolist() == [False, True, True] and said.device == z.device
    assert math.isfinite(brier(z, y)) and total_loss(z, y).tokens == 3


# Temperature

def loss_at(z, y, T):
    return float(-log_softmax(z.double(), T).gather(-1, y[:, None]).mean())


@quick
@given(seed=seeds, N=rows, V=classes, scale=scales, dtype=dtypes, excluded=st.booleans())
def test_no_other_temperature_is_better(seed, N, V, scale, dtype, excluded):
    z, y = draw(seed, N, V, scale, dtype)
    if excluded:
        z[:, 1::3] = -inf
        y = torch.where(z.gather(-1, y[:, None])[:, 0] == -inf, torch.zeros_like(y), y)
    T = temperature(z, y)
    best = loss_at(z, y, T)
    around = [T * f for f in (0.5, 0.99, 1.01, 2.0)] if 0 < T < inf else []
    for other in (*around, 1e-3 * scale, scale, 1e3 * scale, inf):
        assert best <= loss_at(z, y, other) * (1 + bound(torch.float64, 8 * (N + V + 6))) + 1e-13
    if 0 < T < inf:
        top = softmax(z.double(), T)
        assert torch.equal(top.gather(-1, z.argmax(-1)[:, None])[:, 0], top.amax(-1))  # the order stays


@quick
@given(seed=seeds, N=rows, V=st.integers(2, 9), power=st.integers(-20, 20), shift=st.sampled_from([0.0, 64.0]))
def test_temperature_scales_with_the_logits_and_knows_no_offset(seed, N, V, power, shift):
    z, y = draw(seed, N, V)
    z = (z * 1024).round() / 1024  # so that the shift is exact
    T = temperature(z, y)
    assert temperature(z * 2.0**power + shift * 2.0**power, y) == T * 2.0**power


def test_temperature_is_scikit_learn_s():
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(400, 6, generator=g, dtype=torch.float64), torch.randint(3, (400,), generator=g)
    X[torch.arange(400), y] += 1.0
    model = LogisticRegression(C=100.0).fit(X[:60], y[:60])
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(X[60:], y[60:]).predict_proba(X)
    z = torch.tensor(model.decision_function(X))
    T = temperature(z[60:], y[60:])
    assert T > 1.2
    torch.testing.assert_close(softmax(z, T), torch.tensor(theirs), rtol=0, atol=1e-6)  # theirs stops at a tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_temperature_at_its_ends(dtype, device):
    z = torch.tensor([[3e4, 0.0, -inf], [0.0, 3e4, 3e4]], dtype=dtype, device=device)
    assert temperature(z, torch.tensor([0, 2], device=device)) == 0.0
    assert temperature(z, torch.tensor([1, 0], device=device)) == inf
    assert temperature(torch.zeros_like(z), torch.tensor([1, 0], device=device)) == 0.0  # all temperatures are alike
    assert temperature(z[:, :1], torch.tensor([0, 0], device=device)) == 0.0
    T = temperature(z.repeat(4, 1), torch.tensor([0, 2, 0, 1, 0, 2, 1, 1], device=device))
    assert 1e4 < T < inf


# KL

@quick
@given(seed=seeds, N=rows, V=classes, scale=scales, dtype=dtypes)
def test_kl_is_torch_s(seed, N, V, scale, dtype):
    p, q = draw(seed, N, V, scale, dtype)[0], draw(seed + 1, N, V, scale, dtype)[0]
    common = torch.promote_types(dtype, torch.float32)
    ours, (a, b) = kl_divergence(p, q), (v.to(common) for v in (p, q))
    assert ours.shape == (N,) and ours.dtype == dtype and (ours >= 0).all()
    terms = 4 * (V + 6) if dtype.itemsize > 2 else 2
    by_F = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1).to(dtype)
    categorical = torch.distributions.Categorical
    by_torch = torch.distributions.kl_divergence(categorical(logits=a), categorical(logits=b)).to(dtype)
    close(ours, by_F, terms=terms, scale=size(p, q))
    fine = by_torch < inf  # torch.distributions takes a probability of q that underflows for an excluded class
    if fine.any():
        close(ours[fine], by_torch[fine], terms=terms, scale=size(p, q))
    both = cross_entropy(b, softmax(a), reduction="none") - entropy(a)  # what coding with q costs above p's own entropy
    close(ours, both.to(dtype), terms=terms + 4 * (V + 6), scale=2 * size(p, q))


@quick
@given(seed=seeds, N=rows, V=classes, scale=st.sampled_from([1.0, 10.0]), dtype=dtypes)
def test_kl_to_itself_is_zero_and_excluded_classes_count_nothing(seed, N, V, scale, dtype):
    p, q = draw(seed, N, V, scale, dtype)[0], draw(seed + 1, N, V, scale, dtype)[0]
    assert (kl_divergence(p, p) == 0).all()
    out = torch.full((N, 2), -inf, dtype=dtype)
    close(kl_divergence(torch.cat([p, out], -1), torch.cat([q, out], -1)), kl_divergence(p, q), terms=4 * (V + 8), scale=size(p, q))
    more = torch.cat([q, q], -1)  # q puts half of its mass where p has none
    close(kl_divergence(torch.cat([p, torch.full_like(p, -inf)], -1), more).double(), kl_divergence(p, q).double() + math.log(2),
          terms=1, scale=size(p, q) * bound(dtype, 8 * (V + 8)) / bound(torch.float64))
    assert (kl_divergence(torch.cat([p, p], -1), torch.cat([q, torch.full_like(q, -inf)], -1)) == inf).all()


@quick
@given(seed=seeds, V=st.integers(2, 40), exponent=st.integers(-6, -1))
def test_kl_of_near_neighbours_keeps_its_digits(seed, V, exponent):
    p = draw(seed, 1, V)[0].float()
    q = p + 10.0**exponent * draw(seed + 1, 1, V)[0].float()
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    truth = (b.exp() - a.exp() - a.exp() * (b - a)).sum() if exponent > -3 else (a.exp() * ((b - a) ** 2 / 2 + (b - a) ** 3 / 6)).sum()
    slack = 4 * (V + 6) * (1 + float(-a.min())) * 2**-24 * float((b - a).abs().max()) + float(((b - a).abs() ** 4).max())
    assert abs(float(kl_divergence(p, q)) - float(truth)) <= slack + 1e-14  # in proportion to the distance, not to the logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("p", "q", "kl"), [
    ([0.0, -inf], [0.0, 0.0], math.log(2)), ([0.0, 0.0], [0.0, -inf], inf), ([0.0, -inf], [5.0, -inf], 0.0),
    ([0.0, -inf], [-inf, 0.0], inf), ([3e4, 0.0], [0.0, 3e4], 3e4), ([3e4, 0.0], [3e4, -inf], inf), ([0.0, -3e4], [0.0, -3e4], 0.0),
    ([0.0, 0.0], [nan, 0.0], nan), ([inf, 0.0], [0.0, 0.0], nan), ([-inf, -inf], [0.0, 0.0], nan)])
def test_kl_corners(p, q, kl, dtype, device):
    ours = kl_divergence(torch.tensor(p, dtype=dtype, device=device), torch.tensor(q, dtype=dtype, device=device))
    torch.testing.assert_close(ours, torch.tensor(kl, dtype=dtype, device=device), equal_nan=True)


def test_kl_gradients():
    p, q = (draw(s, 4, 5, 2.0)[0] for s in (0, 1))
    q[0] = p[0] + 1e-3  # one row on either side of the switch
    gradcheck(kl_divergence, p.requires_grad_(), q.requires_grad_())
    masked = torch.tensor([[0.0, 1.0, -inf]], dtype=torch.float64)
    for a, b in ((masked, q[:1, :3]), (masked, torch.zeros_like(masked).masked_fill(masked == -inf, -inf))):
        a, b = a.clone().requires_grad_(), b.detach().clone().requires_grad_()
        ga, gb = torch.autograd.grad(kl_divergence(a, b).sum(), (a, b))
        assert ga.isfinite().all() and gb.isfinite().all()
        close(gb, softmax(b.detach()) - softmax(a.detach()), terms=60, scale=1.0)


# Perplexity

@quick
@given(seed=seeds, N=rows, V=classes, scale=scales, dtype=dtypes, data=st.data())
def test_any_batches_in_any_order_have_one_perplexity(seed, N, V, scale, dtype, data):
    z, y = draw(seed, N, V, scale, dtype)
    y[1::4] = -100
    cuts = sorted(data.draw(st.sets(st.integers(1, N - 1), max_size=6))) if N > 1 else []
    parts = [total_loss(z[i:j], y[i:j]) for i, j in itertools.pairwise([0, *cuts, N])]
    whole = reduce(lambda a, b: a + b, data.draw(st.permutations(parts)), Total())
    assert whole.tokens == int((y >= 0).sum())
    theirs = F.cross_entropy(z.to(torch.promote_types(dtype, torch.float32)), y)
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    close(torch.tensor(whole.mean, dtype=inner), theirs, terms=2 * (V + 6 + N) if dtype.itemsize > 2 else 2**16, scale=size(z))
    assert whole.perplexity == pytest.approx(math.exp(whole.mean)) if whole.mean < 700 else whole.perplexity == inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_totals_at_their_ends(dtype, device):
    z = torch.tensor([[6e4, 0.0], [0.0, -inf]], dtype=dtype, device=device)
    certain, lost = total_loss(z, torch.tensor([0, 0], device=device)), total_loss(z, torch.tensor([1, 0], device=device))
    assert certain == Total(0.0, 2) and certain.perplexity == 1.0
    assert lost.mean == pytest.approx(3e4, rel=bound(dtype, 2)) and lost.perplexity == inf
    assert total_loss(z, torch.tensor([0, 1], device=device)).perplexity == inf
    none = total_loss(z, torch.full((2,), -100, device=device))
    assert none == Total() and math.isnan(none.mean) and math.isnan(none.perplexity) and none + certain == certain


# Bad input

SCORES = {"forecasts": forecasts, "brier": brier, "temperature": temperature, "total_loss": total_loss}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("device", DEVICES)
def test_bad_rows_are_named(score, device):
    z, y = (t.to(device) for t in draw(0, 6, 3))
    for label in (3, -1, -101):
        with pytest.raises(ValueError, match=rf"^row 4: expected a label 0 to 2 or -100, got {label}: check V"):
            score(z, y.index_fill(0, torch.tensor(4, device=device), label))
    with pytest.raises(ValueError, match=r"^row \(1, 2\): expected a label 0 to 2 or -100, got 7"):
        score(z.view(2, 3, 3), torch.cat([y[:5], y.new_tensor([7])]).view(2, 3))
    for value in (nan, inf):
        bad = z.index_fill(0, torch.tensor([2, 5], device=device), value)
        with pytest.raises(ValueError, match=f"^row 2: expected a finite largest logit, got {value}: look at what the model gave"):
            score(bad, y)
        score(bad, y.index_fill(0, torch.tensor([2, 5], device=device), -100))
    with pytest.raises(ValueError, match="^row 0: expected a finite largest logit, got -inf"):
        score(torch.full_like(z, -inf), y)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_bad_batches(score):
    z, y = draw(0, 6, 3)
    with pytest.raises(ValueError, match="expected a row that counts, got none of 0: skip this batch"):
        score(z[:0], y[:0])
    with pytest.raises(ValueError, match=r"expected targets \(6,\), one a row of logits, got \(6, 1\): reshape them"):
        score(z, y[:, None])
    with pytest.raises(ValueError, match=r"expected targets \(6,\), one a row of logits, got \(5,\)"):
        score(z, y[:5])
    with pytest.raises(ValueError, match=r"V >= 1, got \(6, 0\): give it classes"):
        score(z[:, :0], y)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=rf"expected class numbers, got {dtype}: convert the targets with .long\(\)"):
            score(z, y.to(dtype))
    with pytest.raises(TypeError, match=r"expected logits in float64, .*, got torch.int64: convert them with .float\(\)"):
        score(z.long(), y)
    for dtype in (torch.int32, torch.uint8):
        assert score(z, y.to(dtype)) is not None


@pytest.mark.parametrize("score", [forecasts, brier, temperature])
def test_a_mean_of_no_rows_is_refused(score):
    z, y = draw(0, 6, 3)
    with pytest.raises(ValueError, match="expected a row that counts, got none of 6"):
        score(z, torch.full_like(y, -100))


def test_bad_classes_and_unreachable_labels():
    z, y = draw(0, 6, 3)
    for of in (3, -1):
        with pytest.raises(ValueError, match=f"expected a class 0 to 2, got {of}: or None for the most probable"):
            forecasts(z, y, of)
    z[3] = torch.tensor([-inf, 0.0, 0.0])
    y[3] = 0
    with pytest.raises(ValueError, match="^row 3: expected a finite logit of the label, got -inf: no temperature makes its loss finite"):
        temperature(z, y)


@pytest.mark.parametrize("f", [reliability, murphy, lambda p, y, inner: expected_ece(p, inner), lambda p, y, inner: consistent(p, 2)])
def test_bad_probabilities(f):
    p, y = events(0, 5)
    inner = edges(p)
    for value in (1.5, -0.1, nan):
        bad = p.index_fill(0, torch.tensor(3), value)
        with pytest.raises(ValueError, match=f"^row 3: expected a probability from 0 to 1, got {value:.4g}: logits go through softmax"):
            f(bad, y, inner)
    for bad in (p[:0], p[None], p.long()):
        with pytest.raises(ValueError, match=r"expected probabilities \(N,\), N > 0, got .*: one number a forecast"):
            f(bad, y, inner)


@pytest.mark.parametrize("f", [reliability, murphy])
def test_bad_outcomes(f):
    p, y = events(0, 5)
    with pytest.raises(TypeError, match="expected outcomes as booleans, got torch.int64: compare, as in labels == 1"):
        f(p, y.long(), edges(p))
    with pytest.raises(ValueError, match=r"expected outcomes \(..., 5\), got \(4,\): one for each forecast"):
        f(p, y[:4], edges(p))


def test_bad_bins_and_pairs():
    p, _ = events(0, 5)
    with pytest.raises(ValueError, match="expected 1 bin or more, got 0: 10 to 20 are usual"):
        edges(p, 0)
    for other in (p[:4], p.float(), p[None]):
        with pytest.raises(ValueError, match="expected two tensors alike, got .*: convert one"):
            kl_divergence(p, other)
    with pytest.raises(TypeError, match="got torch.int64: convert them with .float"):
        kl_divergence(p.long(), p.long())
