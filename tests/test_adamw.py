"""Optimizer rules, schedule, clip and groups: equal to torch's and transformers' in drawn settings, and clear about bad input."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunebook.kit.checks import bound, close, same
from tunebook.tuning.adamw import SGD, Adam, AdamW, clip, groups, schedule

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 2**31)
wide = st.sampled_from([torch.float32, torch.float64])
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
PAIRS = {"sgd": (SGD, torch.optim.SGD), "adam": (Adam, torch.optim.Adam), "adamw": (AdamW, torch.optim.AdamW)}
SHAPES = [(), (0,), (1,), (5,), (17,), (3, 4), (2, 3, 11)]
inf, nan = math.inf, math.nan


def draw(seed, shapes, dtype, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def parameters(seed, dtype, device="cpu", shapes=SHAPES):
    return [nn.Parameter(w) for w in draw(seed, shapes, dtype, device)]


def walk(optimizer, params, seed, steps, scale=1.0, skip=None):
    for k in range(steps):
        for i, (p, g) in enumerate(zip(params, draw(seed + k + 1, [p.shape for p in params], params[0].dtype, params[0].device))):
            p.grad = None if skip is not None and (i + k) % skip == 0 else scale * g
        optimizer.step()


def alike(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def states(optimizer, params):
    return [optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p])]


# Equal to torch.optim

rules = st.sampled_from([("sgd", {}), ("sgd", {"momentum": 0.9}), ("sgd", {"momentum": 0.3}), ("adam", {}), ("adamw", {}),
                         ("adam", {"betas": (0.5, 0.99), "eps": 1e-3}), ("adamw", {"betas": (0.0, 0.0)}), ("adamw", {"eps": 0.0})])


@quick
@given(rule=rules, dtype=wide, seed=seeds, decay=st.sampled_from([0.0, 0.01, 0.7]), foreach=st.booleans(),
       scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_every_bit_is_torch_s(rule, dtype, seed, decay, foreach, scale):
    (ours, theirs), options = PAIRS[rule[0]], {"lr": 0.03, "weight_decay": decay, **rule[1]}
    a, b = parameters(seed, dtype), parameters(seed, dtype)
    one, two = ours(a, **options), theirs(b, foreach=foreach, **options)
    walk(one, a, seed, 12, scale, skip=3)
    walk(two, b, seed, 12, scale, skip=3)
    alike(a, b)
    alike(states(one, a), states(two, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_one_by_one(name, device, dtype):
    (ours, theirs), options = PAIRS[name], {"lr": 0.01, "weight_decay": 0.1}
    a, b = parameters(0, dtype, device), parameters(0, dtype, device)
    walk(ours(a, **options), a, 1, 30)
    walk(theirs(b, foreach=False, **options), b, 1, 30)
    alike(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_state_and_weights_to_rounding(name, dtype, device):
    (ours, theirs), options = PAIRS[name], {"lr": 0.01, "weight_decay": 0.1}
    a, b = parameters(3, dtype, device), parameters(3, dtype, device)
    one, two = ours(a, **options), theirs(b, fused=True, **options)
    for k in range(20):
        for p, q, g in zip(a, b, draw(k, SHAPES, dtype, device)):
            p.grad = g.abs() * torch.where(p < 0, -1.0, 1.0).to(g)  # no cancellation in g + decay * p
            q.grad = p.grad.clone()
        one.step(), two.step()
        for p, q in zip(a, b):
            if p.numel():
                close(p, q, terms=40, scale=float(q.detach().abs().max()) + 0.08)
                for key in one.state[p]:
                    close(one.state[p][key].to(p), two.state[q][key].to(q), terms=40, scale=float(q.grad.abs().max()) ** 2 + 3)
        two.load_state_dict(copy.deepcopy(one.state_dict()) | {"param_groups": two.state_dict()["param_groups"]})
        with torch.no_grad():
            for p, q in zip(a, b):
                q.copy_(p)


def test_the_state_travels_both_ways():
    a, b = parameters(0, torch.float32), parameters(0, torch.float32)
    one, two = AdamW(a, lr=0.01), torch.optim.AdamW(b, lr=0.01, foreach=False)
    walk(one, a, 5, 6), walk(two, b, 5, 3)
    mine = parameters(9, torch.float32)
    with torch.no_grad():
        for p, q in zip(mine, b):
            p.copy_(q)
    third = AdamW(mine, lr=0.01)
    third.load_state_dict(two.state_dict())
    walk(third, mine, 8, 3)
    alike(mine, a)


def test_a_checkpoint_resumes_bitwise(tmp_path):
    a, b = parameters(0, torch.float32), parameters(0, torch.float32)
    one, two = AdamW(a), AdamW(b)
    walk(one, a, 5, 6), walk(two, b, 5, 3)
    torch.save((b, two.state_dict()), tmp_path / "half.pt")
    c, state = torch.load(tmp_path / "half.pt", weights_only=True)
    c = [nn.Parameter(p.detach()) for p in c]
    three = AdamW(c)
    three.load_state_dict(state)
    walk(three, c, 8, 3)
    alike(c, a)


def test_groups_have_their_own_settings_and_zero_grad_clears():
    a, b = parameters(0, torch.float64), parameters(0, torch.float64)
    def two(ps): return [{"params": ps[:3], "weight_decay": 0.0}, {"params": ps[3:], "lr": 0.5}]
    one, other = AdamW(two(a), lr=0.1), torch.optim.AdamW(two(b), lr=0.1, foreach=False)
    walk(one, a, 2, 5), walk(other, b, 2, 5)
    alike(a, b)
    one.zero_grad()
    assert all(p.grad is None for p in a)
    one.step()
    alike(a, b)


def test_a_closure_is_evaluated_with_gradients_first():
    p = nn.Parameter(torch.tensor(2.0))
    optimizer = SGD([p], lr=0.25)
    def closure():
        optimizer.zero_grad()
        loss = p**2
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 4.0 and p.item() == 1.0


# What the derivation says

@quick
@given(seed=seeds, power=st.integers(-30, 30), decay=st.sampled_from([0.0, 0.3]))
def test_adamw_does_not_see_the_scale(seed, power, decay):
    ends = []
    for scale in (1.0, 2.0**power):
        a = parameters(seed, torch.float64)
        walk(AdamW(a, lr=0.1, eps=0.0, weight_decay=decay), a, seed, 8, scale)
        ends.append(a)
    alike(*ends)


@quick
@given(gradients=st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-6), min_size=1, max_size=60))
def test_no_step_is_longer_than_the_bound(gradients):
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer, longest = Adam([p], lr=1.0, eps=0.0), 0.0
    for g in gradients:
        before, p.grad = p.item(), torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        longest = max(longest, abs(p.item() - before))
    assert longest <= 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999)) * (1 + 1e-9)


@quick
@given(seed=seeds, decay=st.floats(0, 1), lr=st.floats(1e-4, 0.5), dtype=wide)
def test_decay_is_a_penalty_for_plain_descent_only(seed, decay, lr, dtype):
    w, g = draw(seed, [(9,), (9,)], dtype)
    ends = {}
    for name, rule in (("sgd", SGD), ("adam", Adam)):
        p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone())
        p.grad, q.grad = g.clone(), g + decay * w
        rule([p], lr=lr, weight_decay=decay).step(), rule([q], lr=lr).step()
        close(p, q, terms=12, scale=float(w.abs().max() + g.abs().max()) * 2 + 1)
        ends[name] = p.detach()
    close(ends["sgd"], (1 - lr * decay) * w - lr * g, terms=12, scale=float(w.abs().max() + g.abs().max()) * 2)
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    AdamW([p], lr=lr, weight_decay=decay).step()
    q = nn.Parameter(w.clone())
    q.grad = g.clone()
    Adam([q], lr=lr).step()
    close(p, q - lr * decay * w, terms=24, scale=float(w.abs().max()) * 2 + 1)


# The schedule

@quick
@given(total=st.integers(1, 400), warmup=st.floats(0, 1))
def test_schedule_is_transformers(total, warmup):
    from transformers import get_linear_schedule_with_warmup
    from transformers.training_args import TrainingArguments
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    rise = TrainingArguments.get_warmup_steps(type("Args", (), {"warmup_steps": warmup})(), total) if warmup < 1 else total
    factor = get_linear_schedule_with_warmup(optimizer, rise, total).lr_lambdas[0]
    ours = [schedule(k, total, warmup) for k in range(total + 3)]
    assert ours == [factor(k) for k in range(total + 3)]
    assert 0 <= min(ours) and max(ours) <= 1 and ours[total:] == [0.0] * 3
    assert all(b >= a for a, b in zip(ours[:rise], ours[1:rise])) and all(b <= a for a, b in zip(ours[rise:], ours[rise + 1:]))


@pytest.mark.parametrize("bad", [(-1, 10, 0.1), (0, 0, 0.1), (0, 10, -0.1), (0, 10, 1.5), (0, 10, nan)])
def test_bad_schedule(bad):
    with pytest.raises(ValueError, match="step must be 0 or more, total 1 or more, warmup 0 to 1, got"):
        schedule(*bad)


# The clip

@quick
@given(seed=seeds, limit=st.floats(1e-3, 1e3), scale=st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_clip_is_torch_s(seed, limit, scale, dtype):
    a, b = parameters(seed, dtype), parameters(seed, dtype)
    for ps in (a, b):
        for p, g in zip(ps[1:], draw(seed + 1, SHAPES[1:], dtype)):
            p.grad = scale * g
    one, two = clip(a, limit), nn.utils.clip_grad_norm_(b, limit)
    same(one, two)
    assert a[0].grad is None
    alike([p.grad for p in a[1:]], [p.grad for p in b[1:]])
    after = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in a[1:]))
    assert after <= limit * (1 + bound(dtype, 40))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [inf, -inf, nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_that_is_not_finite_touches_nothing(bad, dtype, device):
    ps = parameters(0, dtype, device)
    for p, g in zip(ps, draw(1, SHAPES, dtype, device)):
        p.grad = g
    ps[3].grad[2] = bad
    before = [p.grad.clone() for p in ps]
    assert not clip(ps, 1e-3).isfinite()
    alike([p.grad for p in ps], before)


def test_clip_measures_takes_one_tensor_and_a_generator():
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.full((2, 2), 2.0)
    assert clip([p], inf).item() == 4.0 and p.grad[0, 0] == 2.0
    assert clip(p, 1.0).item() == 4.0 and abs(p.grad.norm().item() - 1) < 1e-6
    p.grad.fill_(2.0)
    assert clip((q for q in [p]), 1.0).item() == 4.0 and abs(p.grad.norm().item() - 1) < 1e-6
    assert clip([], 1.0).item() == 0.0


@pytest.mark.parametrize("limit", [0.0, -1.0, nan])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match="limit must be positive, got .*: to leave gradients alone, do not clip"):
        clip([], limit)


def test_skipping_keeps_a_run_alive():
    ps, others = parameters(0, torch.float32), parameters(0, torch.float32)
    ends = []
    for params, scale in ((ps, clip), (others, nn.utils.clip_grad_norm_)):
        optimizer = AdamW(params)
        for k in range(4):
            for p, g in zip(params, draw(k, SHAPES, torch.float32)):
                p.grad = g
            if k == 2:
                params[4].grad[0] = nan
            norm = scale(params, 1.0)
            if scale is nn.utils.clip_grad_norm_ or norm.isfinite():
                optimizer.step()
        ends.append(sum(int(p.isnan().sum()) for p in params))
    assert ends == [0, sum(p.numel() for p in ps)]


# Groups

def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                                    vocab_size=101, max_position_embeddings=40, num_labels=2, **options))


@pytest.mark.parametrize("frozen", [(), ("embeddings",), ("encoder", "bias")])
def test_groups_split_what_is_trained(frozen):
    from transformers.trainer import Trainer
    model = bert()
    for n, p in model.named_parameters():
        p.requires_grad_(not any(f in n for f in frozen))
    decay, none = groups(model, 0.03)
    assert decay["weight_decay"] == 0.03 and none["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    wanted = set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
    assert {names[id(p)] for p in decay["params"]} == wanted
    assert sorted(names[id(p)] for g in (decay, none) for p in g["params"]) == sorted(names.values())
    for rule in (AdamW(groups(model, 0.03)), torch.optim.AdamW(groups(model, 0.03), fused=True)):
        model(torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
        rule.step()


def test_groups_with_a_tied_weight_and_nothing_to_train():
    model = nn.ModuleDict({"words": nn.Embedding(7, 3), "out": nn.Linear(3, 7)})
    model["out"].weight = model["words"].weight
    assert [len(g["params"]) for g in groups(model, 0.1)] == [1, 1]
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient: attach a method"):
        groups(model.requires_grad_(False), 0.1)
    only = nn.LayerNorm(3)
    torch.optim.AdamW(groups(only, 0.1), fused=True)
    assert [len(g["params"]) for g in groups(only, 0.1)] == [0, 2]


# Bad settings

@pytest.mark.parametrize("rule, options, word", [
    (SGD, {"lr": -1.0}, "lr must be at least 0, got -1.0"),
    (SGD, {"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
    (AdamW, {"lr": nan}, "lr must be at least 0, got nan"),
    (AdamW, {"eps": -1e-8}, "eps must be at least 0"),
    (Adam, {"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
    (AdamW, {"weight_decay": -0.1}, "weight_decay must be at least 0")])
def test_bad_settings(rule, options, word):
    with pytest.raises(ValueError, match=word):
        rule(parameters(0, torch.float32), **options)


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
