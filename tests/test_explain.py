"""Explain: the axioms over drawn games, references, readings of real models, one clear error for each bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.checks import close, same
from tunebook.kit.models import load
from tunebook.tasks.explain import (
    METHODS,
    agreement,
    area,
    coalitions,
    curve,
    explain,
    gradient,
    gradient_x_input,
    integrated_gradients,
    kernel_draws,
    kernel_shap,
    kernel_weight,
    lime,
    lime_draws,
    lime_fit,
    log_odds,
    looked_at,
    occlusion,
    plant,
    quadrature,
    ranks,
    read,
    rolled_out,
    shapley,
    shapley_sampled,
    tabled,
)
from tunebook.tuning.pretrain import wordpiece

quick = settings(deadline=None, max_examples=25, derandomize=True)
devices = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
games = st.tuples(st.integers(1, 6), st.integers(0, 2**31))
TEXTS = ["The fish was fresh and the staff kind .", "I found the acting flat .", "Nobody would call the script good ."]


def drawn(n, seed, device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2**n, generator=g, dtype=torch.float64).to(device, dtype)


@pytest.fixture(scope="module")
def tiny():
    """A BERT with random weights, large enough for its answers to differ."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = wordpiece(TEXTS)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=32, initializer_range=0.3, num_labels=3, attn_implementation="eager")
    return BertForSequenceClassification(config).double().eval(), tokenizer


@quick
@given(games, st.permutations(range(6)))
def test_shapley_values_are_the_mean_over_all_orders(game, order):
    n, seed = game
    values = drawn(n, seed)
    def gains(order):
        before = [sum(2**j for j in order[:k]) for k in range(n + 1)]
        return {i: float(values[before[k + 1]] - values[before[k]]) for k, i in enumerate(order)}
    if n <= 4:
        every = [gains(p) for p in itertools.permutations(range(n))]
        mean = torch.tensor([sum(e[i] for e in every) / len(every) for i in range(n)], dtype=torch.float64)
        close(shapley(tabled(values), n), mean, terms=8 * math.factorial(n) + 2**n, scale=float(8 * values.abs().max()))
    names = [i for i in order if i < n]  # the players under other names
    there = coalitions(n)
    renamed = tabled(values)(there[:, names])
    close(shapley(tabled(renamed), n)[names], shapley(tabled(values), n), terms=2**n * 8, scale=float(4 * values.abs().max()))


@quick
@given(games)
def test_every_way_to_shapley_values_is_efficient_and_the_regression_equals_the_formula(game):
    n, seed = game
    values = drawn(n, seed)
    whole, scale = values[-1] - values[0], float(values.abs().sum())
    exact = shapley(tabled(values), n)
    close(exact.sum(), whole, terms=2**n * 4 * n, scale=2 * scale)
    sampled, error = shapley_sampled(tabled(values), n, 5, torch.Generator().manual_seed(seed))
    close(sampled.sum(), whole, terms=20 * n, scale=2 * scale)
    assert (error >= 0).all()
    close(kernel_shap(tabled(values), n, 64), exact, terms=2**n * 200, scale=scale)
    if n > 4:
        part = kernel_shap(tabled(values), n, 2 * n + 4, torch.Generator().manual_seed(seed))
        close(part.sum(), whole, terms=8 * n, scale=float(part.abs().sum()) + scale)


@quick
@given(games)
def test_a_linear_game_is_explained_by_its_coefficients(game):
    n, seed = game
    weights = drawn(n, seed)[:n]
    linear = tabled(coalitions(n).double() @ weights)
    scale = float(weights.abs().sum())
    for found in (occlusion(linear, n), shapley(linear, n), shapley_sampled(linear, n, 2)[0]):
        close(found, weights, terms=2**n * 8, scale=4 * scale)
    there = coalitions(n)
    close(lime_fit(there, linear(there), ridge=0.0), weights, terms=100 * (2**n + 12), scale=scale)
    scores = torch.stack([weights, *(torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4))])
    fell, rose = area(curve(linear, scores)), area(curve(linear, scores, insert=True))
    assert (fell[0] <= fell + 1e-12 * scale).all() and (rose[0] >= rose - 1e-12 * scale).all()


def test_kernel_weights_and_draws():
    for n in (2, 5, 8):
        there, weights = kernel_draws(n, 2**n)
        assert len(there) == 2**n - 2
        assert weights.tolist() == [kernel_weight(int(s), n) for s in there.sum(-1)]
    there, weights = kernel_draws(12, 100, torch.Generator().manual_seed(0))
    assert there.shape == (100, 12) and (weights == 1).all()
    assert (there[:50] ^ there[50:]).all() and 0 < there.sum(-1).min() and there.sum(-1).max() < 12
    sizes = kernel_draws(18, 40_000, torch.Generator().manual_seed(1))[0].sum(-1).bincount(minlength=18)[1:].double() / 40_000
    total = torch.tensor([1 / (s * (18 - s)) for s in range(1, 18)], dtype=torch.float64)
    assert (sizes - total / total.sum()).abs().max() < 0.01  # six standard errors


def test_many_players_by_regression():
    weights = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = kernel_shap(lambda there: there.double() @ weights, 20, 400, torch.Generator().manual_seed(0))
    close(found, weights, terms=400 * 50, scale=float(weights.abs().sum()))


@quick
@given(st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 10.0]))
def test_lime_is_sklearns_ridge(n, seed, ridge):
    from sklearn.linear_model import Ridge

    there = lime_draws(n, 60, torch.Generator().manual_seed(seed))
    assert there[0].all() and not there[1:].all(-1).any()
    values = tabled(drawn(n, seed))(there)
    distance = 100 * (1 - np.sqrt(there.double().mean(-1).numpy()))
    weights = np.exp(-(distance**2) / (2 * 25.0**2))
    theirs = Ridge(alpha=ridge).fit(there.double().numpy(), values.numpy(), sample_weight=weights).coef_
    close(lime_fit(there, values, ridge=ridge), torch.from_numpy(theirs), terms=60 * 8 * (60 + 12), scale=float(values.abs().max()))


@pytest.mark.parametrize("rule", ["left", "middle", "trapezoid", "gauss"])
@pytest.mark.parametrize("steps", [2, 3, 16])
def test_quadrature(rule, steps):
    at, weights = quadrature(steps, rule)
    assert len(at) == len(weights) == steps and 0 <= at.min() and at.max() <= 1
    close(weights.sum(), torch.tensor(1.0, dtype=torch.float64), terms=64 * steps)
    top = {"left": 0, "middle": 1, "trapezoid": 1, "gauss": 2 * steps - 1}[rule]
    for power in range(top + 1):
        close((weights * at**power).sum(), torch.tensor(1 / (power + 1), dtype=torch.float64), terms=200 * steps)
    wrong = float((weights * at ** (top + 1)).sum() - 1 / (top + 2))
    assert abs(wrong) > 1e-12 or steps == 16


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_integrated_gradients_of_a_quadratic_are_complete(T, E, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x, absent = torch.randn(2, T, E, generator=g, dtype=dtype)
    matrix = torch.randn(T * E, T * E, generator=g, dtype=dtype)
    def value(x): return torch.einsum("ni,ij,nj->n", x.flatten(1), matrix, x.flatten(1))
    gain = value(x[None]) - value(absent[None])
    scale = float(matrix.abs().sum() * 4 * (x.abs().max() + absent.abs().max()) ** 2)
    for rule in ("middle", "trapezoid", "gauss"):
        found = integrated_gradients(value, x, absent, 5, rule)
        assert found.dtype == dtype and found.shape == (T, E)
        close(found.sum()[None], gain, terms=40 * (T * E) ** 2, scale=scale)
    close(gradient(value, x[None])[0].flatten(), (matrix + matrix.T) @ x.flatten(), terms=8 * T * E, scale=scale)
    same(gradient_x_input(value, x, x), torch.zeros(T, E, dtype=dtype).copysign(gradient_x_input(value, x, x)))


@quick
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9), st.integers(0, 2**31))
def test_ranks_and_agreement_are_scipys(row, seed):
    from scipy.stats import rankdata, spearmanr

    a = torch.tensor(row, dtype=torch.float64)
    same(ranks(a), torch.from_numpy(rankdata(-a.numpy())))
    b = torch.randn(len(row), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if len(set(row)) > 1:
        theirs = torch.tensor(spearmanr(a, b).statistic, dtype=torch.float64)
        close(agreement(torch.stack([a, b]))[0, 1], theirs, terms=40 * len(row), scale=1.0)


def test_a_curve_visits_the_order():
    asked = []
    def game(there):
        asked.append(there)
        return there.sum(-1).float()
    out = curve(game, torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    assert out.tolist() == [[3, 2, 1, 0], [3, 2, 1, 0]] and len(asked) == 1
    rows = asked[0].view(2, 4, 3).int().tolist()
    assert rows[0] == [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert rows[1] == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]  # equal scores: from left to right


@devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_games_in_every_dtype(device, dtype):
    values = drawn(4, 0, device, dtype)
    exact = shapley(tabled(values.double()), 4)
    for found in (shapley(tabled(values), 4), kernel_shap(tabled(values), 4)):
        assert found.dtype == torch.float64 and found.device.type == device
        close(found, exact, terms=4000, scale=float(values.abs().max()))
    assert occlusion(tabled(values), 4).dtype == dtype
    assert lime(tabled(values), 4).dtype == shapley_sampled(tabled(values), 4, 3)[0].dtype == torch.float64


@devices
def test_a_reading_of_a_tiny_model(tiny, device):
    model, tokenizer = tiny
    model.to(device)
    try:
        r = read(model, tokenizer, TEXTS[0], maps=True)
        n = len(r.tokens)
        assert r.tokens == "the fish was fresh and the staff kind .".split() and r.places.tolist() == list(range(1, n + 1))
        ids = torch.tensor([tokenizer(TEXTS[0]).input_ids], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            short = model(input_ids=ids, attention_mask=(torch.arange(n + 2, device=device) != 3).long()[None]).logits
            gone = model(input_ids=ids.masked_fill(torch.arange(n + 2, device=device) == 3, tokenizer.mask_token_id)).logits
        assert r.label == int(logits.argmax()) and read(model, tokenizer, TEXTS[0], 2).label == 2
        there = torch.ones(2, n, dtype=torch.bool)
        there[1, 2] = False
        scale = float(8 * logits.abs().max())
        close(r.game(there), log_odds(torch.cat([logits, gone]), r.label), terms=400, scale=scale)
        close(r.drop(there), log_odds(torch.cat([logits, short]), r.label), terms=400, scale=scale)
        told = explain(r, seed=1)
        assert told.shape == (len(METHODS), n) and told.dtype == torch.float64 and not told.isnan().any()
        same(told, explain(r, seed=1))
        assert not torch.equal(told[2], explain(r, ["LIME"], seed=2)[0])
        close(told[1].sum()[None], r.game(there[:1]).cpu() - r.game(~there[:1]).cpu(), terms=400, scale=4 * scale)
        assert looked_at(r).shape == rolled_out(r).shape == (n,) and looked_at(r).sum() < 1
        vector = model.get_input_embeddings().weight[tokenizer.mask_token_id].detach()
        same(read(model, tokenizer, TEXTS[0], absent=vector).absent, r.absent)
    finally:
        model.to("cpu")


def test_a_reading_of_minilm():
    model, tokenizer = load("minilm", auto="AutoModelForSequenceClassification", num_labels=2, attn_implementation="eager")
    r = read(model, tokenizer, "The unputdownable novel", maps=True)
    assert [t[:2] == "##" for t in r.tokens].count(True) >= 1 and len(r.maps) == 6
    assert explain(r, ["occlusion", "integrated gradients", "attention rollout"]).shape == (3, len(r.tokens))
    with pytest.raises(ValueError, match="eager"):
        model.config._attn_implementation = "sdpa"
        read(model, tokenizer, "x", maps=True)


def test_log_odds_of_three_classes():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for label in range(3):
        close(log_odds(logits, label).sigmoid(), logits.softmax(-1)[:, label], terms=100)


def test_planting():
    assert plant("", "x") == "x"
    found = {plant("a b", "x", torch.Generator().manual_seed(s)) for s in range(20)}
    assert found == {"x a b", "a x b"}


@pytest.mark.parametrize("call, error, words", [
    (lambda m, t: coalitions(0), ValueError, "got 0"),
    (lambda m, t: shapley(lambda z: z.sum(-1), 17), ValueError, "kernel_shap"),
    (lambda m, t: tabled(torch.zeros(6)), ValueError, r"expected 2\^n values"),
    (lambda m, t: shapley_sampled(tabled(torch.zeros(4)), 2, 1), ValueError, "at least 2 orders"),
    (lambda m, t: kernel_draws(6, 11), ValueError, "at least 12 draws"),
    (lambda m, t: lime_fit(torch.ones(3, 2, dtype=torch.bool), torch.zeros(3), ridge=0.0), ValueError, "draw more"),
    (lambda m, t: quadrature(0), ValueError, "at least 1 steps"),
    (lambda m, t: quadrature(4, "right"), ValueError, "must be left"),
    (lambda m, t: log_odds(torch.zeros(1, 3), 3), ValueError, "0 to 2"),
    (lambda m, t: read(m, t, TEXTS[0], label=3), ValueError, "0 to 2"),
    (lambda m, t: read(m, t, "  "), ValueError, "no token"),
    (lambda m, t: read(m, t, TEXTS[0], absent="[HOLE]"), ValueError, "HOLE"),
    (lambda m, t: looked_at(read(m, t, TEXTS[0])), ValueError, "maps=True"),
    (lambda m, t: rolled_out(read(m, t, TEXTS[0])), ValueError, "maps=True"),
    (lambda m, t: explain(read(m, t, TEXTS[0]), ["shap"]), ValueError, "expected occlusion"),
])
def test_bad_input_is_named(tiny, call, error, words):
    with pytest.raises(error, match=words):
        call(*tiny)


def test_a_model_in_training_mode_is_refused(tiny):
    model, tokenizer = tiny
    model.train()
    try:
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            read(model, tokenizer, TEXTS[0])
    finally:
        model.eval()


def test_import_stays_light():
    import subprocess
    import sys

    heavy = "transformers", "captum", "lime", "shap", "sklearn", "scipy"
    code = f"import sys, tunebook.tasks.explain; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
