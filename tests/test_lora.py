"""LoRA and its kin: equal to the algebra and to peft on drawn shapes, files that come back, and clear about bad input."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from tunebook.kit.checks import bound, close, gradcheck, same
from tunebook.tuning.lora import (
    Allocator,
    Dora,
    FastLora,
    Lora,
    LowRank,
    Pissa,
    Quantized,
    Ranked,
    Svd,
    budget,
    by_row,
    decode,
    dequantize,
    encode,
    nf4,
    quantize,
    size,
    to_lora,
)
from tunebook.tuning.methods import (
    adapters,
    after_update,
    attach,
    detach,
    find,
    load_adapter,
    merge,
    off,
    pieces,
    save_adapter,
    trainable,
    unmerge,
    use,
    weight_of,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds, widths, ranks = st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4)
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
METHODS = pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "adalora"])
IDS = torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(0))


def tiny(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=101,
                        max_position_embeddings=40, num_labels=2)
    model = BertForSequenceClassification(config)
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model.to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(next(model.parameters()).device)).logits


def disturb(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += (torch.randn(p.shape, generator=g) / 10).to(p)
    return model


def plain(kind, n_in, n_out, bias=True, dtype=torch.float64):
    layer = nn.Linear(n_in, n_out, bias=bias) if kind == "linear" else Conv1D(n_out, n_in)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.to(dtype)


def moved(layer, seed):
    g = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    return layer


def ready(layer):
    """An AdaLoRA layer that stands alone."""
    layer.allocator = Allocator({"orth_reg_weight": 0.5}, {"x": layer})
    return layer


# The algebra

@quick
@given(seed=seeds, n_in=widths, n_out=widths, r=ranks, kind=st.sampled_from(["linear", "conv"]),
       shape=st.sampled_from([(1,), (9,), (2, 3), (2, 1, 3)]),
       make=st.sampled_from([Lora, FastLora, Dora, Svd, Ranked]))
def test_a_layer_is_its_merged_weight(seed, n_in, n_out, r, kind, shape, make):
    torch.manual_seed(seed)
    layer = moved(make(plain(kind, n_in, n_out), "a", r, 0.7), seed)
    ready(layer) if make is Ranked else None
    x = torch.randn(*shape, n_in, dtype=torch.float64)
    weight, bias = layer.merged(weight_of(layer), layer.base.bias)
    want = F.linear(x, weight, bias)
    scale = float((x.abs() @ (weight_of(layer).abs() + layer.update().abs()).mT).max() * 4 + 10)
    close(layer(x).detach(), want.detach(), terms=4 * (n_in + r + 8), scale=scale * (1 + float(weight.abs().max())))


@quick
@given(seed=seeds, n_in=widths, n_out=widths, r=ranks, kind=st.sampled_from(["linear", "conv"]), bias=st.booleans(),
       needs=st.booleans(), rows=st.sampled_from([1, 4]))
def test_the_fast_form_has_the_gradients_of_the_readable(seed, n_in, n_out, r, kind, bias, needs, rows):
    torch.manual_seed(seed)
    fast = moved(FastLora(plain(kind, n_in, n_out, bias), "a", r, 1.3), seed)
    slow = Lora(copy.deepcopy(fast.base), "a", r, 1.3)
    slow.load_state_dict(fast.state_dict())
    got = []
    for layer in (fast, slow):
        torch.manual_seed(seed)
        x = torch.randn(rows, 2, n_in, dtype=torch.float64).requires_grad_(needs)
        (layer(x) * torch.randn(rows, 2, n_out, dtype=torch.float64)).sum().backward()
        got.append([layer.A.grad, layer.B.grad, *([x.grad] if needs else [])])
        assert layer.base.weight.grad is None
    for a, b in zip(*got):
        close(a, b, terms=200, scale=float(b.abs().max()) + 100)


def test_gradcheck_of_every_layer():
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (5, 2)))
    gradcheck(lambda x, A, B: LowRank.apply(x, torch.ones(5, 3, dtype=torch.float64), None, A, B, 0.3), x, A, B)
    for make in (Lora, Ranked):
        layer = moved(make(plain("linear", 3, 5), "a", 2, 0.7), 1)
        ready(layer) if make is Ranked else None
        gradcheck(layer, x)


def test_dora_takes_the_norm_as_a_constant():
    torch.manual_seed(0)
    layer = moved(Dora(plain("linear", 3, 4), "a", 2, 1.0), 1)
    x, up = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    (layer(x) * up).sum().backward()
    norm = (weight_of(layer) + layer.update()).norm(dim=1)
    want = (layer.m.detach() / norm)[:, None] * (up.mT @ x) @ layer.A.detach().mT
    close(layer.B.grad, want, terms=200)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_method_in_every_dtype(method, dtype):
    model = tiny(dtype=dtype)
    before = logits(model)
    attach(model, method, targets="all-linear", head=[])
    after = logits(model)
    assert after.dtype == dtype
    if method in ("lora", "rslora", "adalora"):
        same(after, before)
    else:
        assert (after - before).abs().max() < (0.05 if dtype.itemsize == 2 else 1e-4)
    with off(model):
        same(logits(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.promote_types(dtype, torch.float32)}
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apart = logits(model)
        merge(model)
        unmerge(model)
    same(logits(model), apart)
    detach(model)
    same(logits(model), before)


@METHODS
def test_trained_numbers(method):
    model = tiny()
    shapes = [tuple(weight_of(m).shape) for m in find(model, "all-linear").values()]
    attach(model, method, targets="all-linear", head=[], **({"init_r": 5, "target_r": 2} if method == "adalora" else {"r": 5}))
    assert trainable(model)[0] == sum(size(s, 5, method) for s in shapes)


@DEVICES
def test_on_each_device(device):
    for method in ("lora", "dora", "adalora"):
        model = disturb(attach(tiny().to(device), method))
        assert logits(model).isfinite().all()
        loss = F.cross_entropy(model(input_ids=IDS.to(device)).logits, torch.tensor([0, 1, 1], device=device))
        loss.backward()
        assert all(p.grad is not None and p.grad.device.type == device for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_under_autocast(method):
    model = disturb(attach(tiny(), method)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_dropout_acts_on_the_adapter_only_and_in_training_only():
    torch.manual_seed(0)
    layer = moved(FastLora(plain("linear", 50, 3), "a", 2, 1.0, dropout=0.5), 1)
    x = torch.randn(1, 50, dtype=torch.float64)
    many = torch.stack([layer.train()(x) for _ in range(20)])
    assert many.std(0).max() > 0
    same(layer.eval()(x), layer(x))
    layer.B.data.zero_()
    same(layer.train()(x), layer.base(x))


def test_a_copy_is_whole():
    model = disturb(attach(tiny(), "adalora"))
    twin = copy.deepcopy(model)
    same(logits(twin), logits(model))
    assert pieces(twin)[0][1].allocator.first is pieces(twin)[0][1]


# PiSSA

@quick
@given(seed=seeds, n_in=st.integers(2, 9), n_out=st.integers(2, 9), kind=st.sampled_from(["linear", "conv"]))
def test_pissa_takes_the_largest_directions(seed, n_in, n_out, kind):
    torch.manual_seed(seed)
    base = plain(kind, n_in, n_out)
    nn.init.normal_(base.weight)
    old, r = weight_of(base).detach().clone(), min(n_in, n_out) // 2
    layer = Pissa(base, "a", r, 0.5)
    all_of, top = torch.linalg.svdvals(old), torch.linalg.svdvals(layer.update())[:r]
    close(top, all_of[:r], terms=400)
    close((weight_of(base) + layer.update()).detach(), old, terms=20, scale=2 * float(all_of[0]))
    assert torch.linalg.svdvals(weight_of(base).detach())[0] <= all_of[r] * (1 + 1e-9)


def test_conversion_of_pissa(tmp_path):
    model = disturb(attach(tiny(), "pissa", r=3, targets="all-linear"))
    before = logits(model)
    to_lora(model)
    close(logits(model), before, terms=2000)
    assert adapters(model)["default"].method == "lora"
    base = tiny()
    for path, p in pieces(model):
        same(weight_of(p).detach(), weight_of(base.get_submodule(path)).detach())
    close(logits(load_adapter(tiny(), save_adapter(model, tmp_path))), logits(model), terms=1)
    with pytest.raises(ValueError, match="no PiSSA adapter"):
        to_lora(model)


# AdaLoRA

@quick
@given(total=st.integers(5, 60), tinit=st.integers(0, 3), tfinal=st.integers(0, 1), start=st.integers(8, 60), end=st.integers(1, 8),
       every=st.integers(1, 4))
def test_the_budget_falls_from_start_to_end(total, tinit, tfinal, start, end, every):
    plan = [budget(step, total, start, end, tinit, tfinal, every) for step in range(total + 1)]
    alive = [b for b, _ in plan]
    assert alive == sorted(alive, reverse=True) and alive[0] == start and alive[-1] == end
    assert plan[total - tfinal] == (end, True) and not any(now for _, now in plan[: tinit + 1])


def steps(model, n, call=True, total=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(n):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        if call:
            after_update(model, step, total or n)


def test_pruned_triplets_stay_zero_and_the_file_leaves_them_out(tmp_path):
    model = attach(tiny(), "adalora", init_r=4, target_r=1, targets="all-linear").train()
    steps(model, 12)
    model.eval()
    found = [p for _, p in pieces(model)]
    assert sum(int(p.pattern.sum()) for p in found) == len(found)
    assert all((p.E[:, 0] != 0).eq(p.pattern).all() for p in found)
    again = load_adapter(tiny(), save_adapter(model, tmp_path))
    same(logits(again), logits(model))
    assert [p.pattern.tolist() for _, p in pieces(again)] == [p.pattern.tolist() for p in found]
    same(logits(load_adapter(tiny(), save_adapter(again, tmp_path / "2"))), logits(model))


def test_the_importance_travels_in_a_checkpoint():
    one, two = (attach(tiny(), "adalora", init_r=4, target_r=1).train() for _ in range(2))
    for m in (one, two):
        for d in m.modules():
            d.p = 0.0 if isinstance(d, nn.Dropout) else getattr(d, "p", None)
    two.load_state_dict(one.state_dict())
    steps(one, 5, total=12)
    two.load_state_dict(one.state_dict())
    same(pieces(two)[0][1].mean_A, pieces(one)[0][1].mean_A)
    assert pieces(two)[0][1].mean_A.abs().max() > 0


def test_a_run_of_another_length_warns_once():
    model = attach(tiny(), "adalora", total_step=30, tinit=2, tfinal=2).train()
    with pytest.warns(UserWarning, match="total_step=30") as told:
        steps(model, 6)
    assert len(told) == 1


def test_an_allocator_that_is_never_called_warns_once():
    model = attach(tiny(), "adalora").train()
    with pytest.warns(UserWarning, match="never called") as told:
        steps(model, 12, call=False)
    assert len(told) == 1
    model = attach(tiny(), "adalora").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, 12)


# Several adapters

def test_stacked_adapters_add_up_and_rows_choose():
    model = disturb(attach(attach(tiny(), "lora", name="a"), "dora", name="b"))
    names = ["b", "a", None]
    with by_row(model, names):
        mixed = logits(model)
    for i, n in enumerate(names):
        close(mixed[i], logits(use(model, *([n] if n else [])))[i], terms=2000)
    use(model, "a", "b")
    with pytest.raises(ValueError, match="has 3"), by_row(model, ["a"]):
        logits(model)
    with pytest.raises(ValueError, match="'c'"), by_row(model, ["c"]):
        pass
    assert all(p.rows is None for _, p in pieces(model))


# Four and eight bits

@quick
@given(seed=seeds, n=st.integers(1, 400), bits=st.sampled_from([4, 8]), block=st.sampled_from([2, 16, 64]),
       scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_no_number_moves_more_than_half_a_gap(seed, n, bits, block, scale):
    w = scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    codes, top = encode(w, bits, block)
    back = decode(codes, top, (n,))
    worst = float((nf4()[1:] - nf4()[:-1]).max()) / 2 if bits == 4 else 0.5 / 127
    assert ((back - w).abs() <= top.repeat_interleave(block)[:n] * (worst + bound(torch.float32, 8))).all()
    again, top2 = encode(back, bits, block)
    close(decode(again, top2, (n,)), back, terms=4)
    assert codes.numel() * codes.itemsize == len(top) * block * bits // 8


def test_zero_blocks_and_levels():
    codes, top = encode(torch.zeros(70))
    same(decode(codes, top, (70,)), torch.zeros(70))
    levels = nf4()
    assert len(levels) == 16 and levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1 and levels.diff().min() > 0
    same(decode(*encode(levels, block=16), (16,)), levels)


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_over_a_quantized_base(bits):
    model = disturb(attach(quantize(tiny(), bits=bits), "lora", targets="all-linear"))
    small, kept = [m for m in model.modules() if isinstance(m, Quantized)], logits(model)
    assert len(small) == 13 and not any("weight" in m._parameters for m in small)
    with pytest.raises(ValueError, match="dequantize"):
        merge(model)
    F.cross_entropy(model(input_ids=IDS).logits, torch.tensor([0, 1, 1])).backward()
    assert all(p.grad.isfinite().all() for _, piece in pieces(model) for p in (piece.A, piece.B))
    dequantize(model)
    close(logits(model), kept, terms=2000)
    close(logits(merge(model)), kept, terms=2000)


# Bad input

@pytest.mark.parametrize(("method", "settings_", "words"), [
    ("lora", {"r": 0}, "rank must be"), ("lora", {"r": 2.0}, "rank must be"), ("lora", {"alpha": 0}, "alpha must be"),
    ("lora", {"dropout": 1.0}, "dropout is"), ("lora", {"targets": ["q_proj"]}, "no layer is called 'q_proj'"),
    ("pissa", {"r": 33}, "no 33 singular"),
    ("adalora", {"target_r": 13}, "target_r must be"), ("adalora", {"beta1": 1.0}, "beta1 and beta2"), ("adalora", {"deltaT": 0}, "deltaT"),
    ("adalora", {"orth_reg_weight": -1}, "orth_reg_weight")])
def test_bad_settings_are_refused_and_the_model_stays(method, settings_, words):
    model = tiny()
    before = logits(model)
    with pytest.raises(ValueError, match=words):
        attach(model, method, **settings_)
    assert not pieces(model) and not adapters(model)
    same(logits(model), before)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="plain weight"):
        attach(attach(tiny(), "lora"), "pissa", name="b")
    with pytest.raises(ValueError, match="plain weight"):
        attach(quantize(tiny()), "pissa")
    with pytest.raises(ValueError, match="quantize once"):
        quantize(attach(tiny(), "lora"))
    with pytest.raises(ValueError, match="quantize once"):
        quantize(quantize(tiny()))
    with pytest.raises(ValueError, match="bits must be"):
        quantize(tiny(), bits=3)
    with pytest.raises(ValueError, match="no update of 10"):
        steps(attach(tiny(), "adalora", tinit=9, tfinal=1).train(), 1, total=10)


def test_scales():
    assert attach(tiny(), "rslora", r=4, alpha=6).bert.encoder.layer[0].attention.self.query.scale == 6 / math.sqrt(4)
    assert attach(tiny(), "lora", r=4, alpha=6).bert.encoder.layer[0].attention.self.query.scale == 6 / 4
