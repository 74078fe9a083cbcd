"""Gates, cut heads, masks, sparse rows, int8, distillation and export on drawn models: PyTorch's bits, derived bounds, clear errors."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tunebook.kit.checks import close, same
from tunebook.tasks.compress import (
    Int8Linear,
    agreement,
    agrees,
    blocks,
    csr_bytes,
    distillation_loss,
    drop_layers,
    file_bytes,
    gated,
    grid,
    head_importance,
    int8,
    largest,
    least,
    linears,
    masked,
    onnx_gap,
    onnx_int8,
    onnx_model,
    prune_heads,
    sparse_state,
    to_csr,
    to_onnx,
    two_of_four,
    weight_scale,
)
from tunebook.tuning.pretrain import Pooled, tiny_bert

quick = settings(deadline=None, max_examples=60, derandomize=True)
few = settings(quick, max_examples=12)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
ENGINE = torch.backends.quantized.engine in ("x86", "fbgemm")  # of which the grid is ours; qnnpack ignores the seventh bit
seeds, sides = st.integers(0, 2**31), st.integers(1, 9)


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(seed=0, layers=3, dtype=torch.float64):
    return Pooled(tiny_bert(50, seed, layers, 16).bert, 3, seed).to(dtype).eval()


def texts(seed, B=4, T=7):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (B, T), generator=g)
    ids[0, T // 2 + 1:] = 0
    return ids, torch.randint(3, (B,), generator=g)


# Heads and layers


@few
@given(seeds, st.lists(st.sampled_from([[], [0], [3], [1, 2], [0, 1, 3]]), min_size=3, max_size=3))
@pytest.mark.parametrize("device", DEVICES)
def test_cut_heads_are_closed_gates(device, seed, gone):
    m, ids = model(seed).to(device), texts(seed)[0].to(device)
    small = prune_heads(m, dict(enumerate(gone)))
    gates = torch.tensor([[float(h not in layer) for h in range(4)] for layer in gone], dtype=torch.float64, device=device)
    with torch.no_grad(), gated(m, gates):
        close(small(ids), m(ids), terms=3000, scale=10.0)
    removed = sum(map(len, gone)) * (4 * 16 * 4 + 3 * 4)
    assert sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in small.parameters()) == removed
    again = prune_heads(small, {0: [0]}) if len(gone[0]) < 3 else small
    assert again(ids).isfinite().all()


def test_hooks_are_gone_even_after_an_error():
    m, ids = model(), texts(0)[0]
    before = m(ids)
    with pytest.raises(RuntimeError), gated(m, torch.zeros(3, 4)):
        raise RuntimeError
    same(m(ids), before)


def test_gates_that_do_not_fit_are_refused():
    m, ids = model(), texts(0)[0]
    for layers, where in ((2, m), (3, prune_heads(m, {1: [0, 1]})), (3, prune_heads(m, {1: [0, 1, 2]}))):
        with pytest.raises((ValueError, RuntimeError)), gated(where, torch.ones(layers, 4, dtype=torch.float64)):
            where(ids)


@few
@given(seeds)
def test_importance_is_the_slope_of_each_text(seed):
    m, (ids, y) = model(seed), texts(seed)
    found = head_importance(m, [(ids[:2], y[:2]), (ids[2:], y[2:])])
    h, slow = 1e-5, torch.zeros(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(3):
            for head in range(4):
                ends = []
                for step in (h, -h):
                    gates = torch.ones(3, 4, dtype=torch.float64)
                    gates[layer, head] += step
                    with gated(m, gates):
                        ends.append(F.cross_entropy(m(ids), y, reduction="none"))
                slow[layer, head] = ((ends[0] - ends[1]) / (2 * h)).abs().mean()
    assert (found - slow).abs().max() < 1e-8


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_least_leave_one_head(seed, L, H, data):
    count, value = data.draw(st.integers(0, L * (H - 1))), drawn(seed, L, H)
    gone = least(value, count)
    assert sum(map(len, gone.values())) == count and all(len(set(g)) == len(g) < H for g in gone.values())
    kept = [value[i, h] for i in range(L) for h in range(H) if h not in gone.get(i, []) and len(gone.get(i, [])) < H - 1]
    if kept and count:
        assert max(value[i, h] for i, g in gone.items() for h in g) <= min(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropped_layers_are_the_states(dtype):
    m, ids = model(dtype=dtype), texts(1)[0]
    states = m.encoder(ids, output_hidden_states=True).hidden_states
    for k in (1, 2, 3):
        short = drop_layers(m, range(k))
        same(short.encoder(ids).last_hidden_state, states[k])
        assert short.encoder.config.num_hidden_layers == k == len(blocks(short))
    assert len(blocks(m)) == m.encoder.config.num_hidden_layers == 3


def test_the_model_itself_stays():
    m, ids = model(dtype=torch.float32), texts(2)[0]
    before = copy.deepcopy(m.state_dict())
    prune_heads(m, {0: [1]}), drop_layers(m, [1]), int8(m), masked(m, largest({n: x.weight for n, x in linears(m).items()}, 0.9))
    for k, v in m.state_dict().items():
        same(v, before[k])
    assert m(ids).shape == (4, 3)


# Zeros


@quick
@given(seeds, sides, sides, st.floats(0, 1), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_masks_are_those_of_torch(seed, O, I, share, dtype):
    torch.manual_seed(seed)
    a, b = nn.Linear(I, O).to(dtype), nn.Linear(O, O).to(dtype)
    for i, m in enumerate((a, b)):
        m.weight.data = drawn(seed + i, *m.weight.shape).to(dtype)
    masks = largest({"a": a.weight, "b": b.weight}, share)
    assert sum(int((~k).sum()) for k in masks.values()) == round(share * (a.weight.numel() + b.weight.numel()))
    if 0 < share < 1:
        prune.global_unstructured([(a, "weight"), (b, "weight")], prune.L1Unstructured, amount=share)
        same(masks["a"], a.weight_mask.bool())
        same(masks["b"], b.weight_mask.bool())


@quick
@given(seeds, sides, sides, st.floats(0, 1), st.sampled_from([torch.float16, torch.float32, torch.float64]))
@pytest.mark.parametrize("device", DEVICES)
def test_sparse_rows_are_those_of_torch(device, seed, O, I, share, dtype):
    w = (drawn(seed, O, I) * (drawn(seed + 1, O, I) > share)).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = w.to_sparse_csr()
    for index in (torch.int32, torch.int64):
        parts = to_csr(w, index)
        for mine, other in zip(parts, (theirs.crow_indices(), theirs.col_indices(), theirs.values())):
            assert mine.shape == other.shape and torch.equal(mine, other.to(mine.dtype))
        assert sum(p.nbytes for p in parts) == csr_bytes(int(w.count_nonzero()), O, dtype.itemsize, index.itemsize)


@quick
@given(seeds, sides, sides)
def test_two_of_four(seed, O, groups):
    w = drawn(seed, O, 4 * groups)
    kept = two_of_four(w)
    rows, mask = w.abs().unflatten(-1, (-1, 4)), kept.unflatten(-1, (-1, 4))
    assert (mask.sum(-1) == 2).all() and (rows[mask].view(-1, 2).amin(1) >= rows[~mask].view(-1, 2).amax(1)).all()


def test_sparse_tensors_are_never_larger():
    m = model(dtype=torch.float32)
    w = {n: x.weight for n, x in linears(m).items()}
    states = [sparse_state(masked(m, largest(w, s))) for s in (0.0, 0.6, 0.9)]
    sizes = [sum(t.nbytes for t in state.values()) for state in states]
    assert sizes[0] == sum(t.nbytes for t in m.state_dict().values()) > sizes[1] > sizes[2]
    assert file_bytes(m.state_dict()) > sizes[0]  # and a header


# Int8


def quantized(layer, per_channel):
    kind = torch.ao.quantization.per_channel_dynamic_qconfig if per_channel else torch.ao.quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear: kind})[0]


@quick
@given(seeds, sides, sides, sides, st.sampled_from([1e-3, 1.0, 30.0]), st.booleans(), st.booleans())
def test_the_layer_is_that_of_torch(seed, B, I, O, size, bias, per_channel):
    torch.manual_seed(seed)
    layer, x = nn.Linear(I, O, bias=bias), drawn(seed, B, I) * size
    layer.weight.data = drawn(seed + 1, O, I)
    ours, theirs = Int8Linear(layer, per_channel), quantized(layer, per_channel)
    same(ours.weight, theirs.weight().int_repr())
    if ENGINE:
        close(ours(x), theirs(x), terms=4, scale=float(ours(x).abs().max() + 1))


@quick
@given(seeds, sides, st.integers(1, 200), st.booleans())
@pytest.mark.parametrize("device", DEVICES)
def test_an_output_is_within_half_steps(device, seed, B, I, per_channel):
    torch.manual_seed(seed)
    layer, x = nn.Linear(I, 5).to(device), drawn(seed, B, I).to(device)
    eight = Int8Linear(layer, per_channel)
    w = eight.weight * (eight.scale[:, None] if per_channel else eight.scale)
    assert ((w - layer.weight).abs() <= weight_scale(layer.weight, per_channel) * (0.5 + 2 * 127 * 2**-23)).all()
    limit = eight.scale / 2 * x.abs().sum(1, keepdim=True) + grid(x)[0] / 2 * w.abs().sum(1)
    assert ((eight(x) - layer(x)).abs() <= limit * 1.0001 + 1e-5).all()


@quick
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9), st.sampled_from([127, 255]))
def test_zero_is_on_the_grid_and_so_is_the_range(values, levels):
    x = torch.tensor(values)
    step, zero = grid(x, levels)
    assert zero == zero.round() and 0 <= zero <= levels and step > 0
    back = (((x / step).round() + zero).clamp(0, levels) - zero) * step
    assert ((back - x).abs() <= step * 0.5001).all() and (back[x == 0] == 0).all()


def test_all_zero_activations_and_weights():
    layer = nn.Linear(4, 3)
    same(Int8Linear(layer)(torch.zeros(2, 4)), layer.bias.detach().expand(2, 3).contiguous())
    layer.weight.data.zero_()
    same(Int8Linear(layer)(torch.ones(1, 4)), layer.bias.detach()[None])


# Distillation, export, agreement


@quick
@given(seeds, sides, st.integers(2, 6), st.floats(0.5, 20), st.sampled_from([torch.float32, torch.float64]))
@pytest.mark.parametrize("device", DEVICES)
def test_distillation(device, seed, B, C, T, dtype):
    z, v = (drawn(seed + i, B, C, dtype=dtype).to(device) for i in range(2))
    z.requires_grad_()
    theirs = T**2 * F.kl_div(F.log_softmax(z / T, -1), F.log_softmax(v / T, -1), log_target=True, reduction="batchmean")
    close(distillation_loss(z, v, T), theirs.detach(), terms=8 * (C + B + 6), scale=T**2 * 12)
    slope, = torch.autograd.grad(distillation_loss(z, v, T), z)
    close(slope, T * ((z / T).softmax(-1) - (v / T).softmax(-1)).detach() / B, terms=8 * (C + 6), scale=T**2)
    assert abs(float(distillation_loss(v, v, T))) <= T**2 * 1e-5


def test_export_runs_on_other_shapes_and_shrinks():
    m = Pooled(tiny_bert(200).bert, 3).eval()  # of a small one, the scales are more than what they save
    file = to_onnx(m, texts(0)[0])
    assert max(onnx_gap(m, onnx_model(file), 50).values()) < 1e-5
    small, ids = onnx_int8(file), texts(3, 64)[0]
    assert len(small) < len(file) / 1.5
    run = onnx_model(small)
    with torch.no_grad():
        assert agreement(run(ids), m(ids)) > 0.9


def test_agreement():
    a, b = torch.eye(2)[[0, 1, 1, 1]], torch.eye(2)[[0, 0, 1, 1]]
    assert agreement(a, b) == 0.75 and agrees(0.75)(a, b) is None
    with pytest.raises(AssertionError, match="75.0% of 4"):
        agrees(0.76)(a, b)


@pytest.mark.parametrize("call, words", [
    (lambda: blocks(nn.Linear(2, 2)), "expected an encoder whose layers have .attention"),
    (lambda: prune_heads(model(), {0: [4]}), "has heads 0 to 3 and keeps one"),
    (lambda: prune_heads(model(), {0: [0, 1, 2, 3]}), "keeps one"),
    (lambda: drop_layers(model(), []), "expected layers from 0 to 2"),
    (lambda: drop_layers(model(), [3]), "expected layers from 0 to 2"),
    (lambda: least(torch.zeros(2, 4), 7), "at most 6 can go"),
    (lambda: largest({"a": torch.ones(2)}, 1.5), "0 to 1, got 1.5"),
    (lambda: two_of_four(torch.zeros(1, 6)), "a multiple of 4 columns, got 6"),
    (lambda: head_importance(model(), []), "expected batches of texts"),
    (lambda: distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0), "above 0"),
    (lambda: agreement(torch.zeros(2, 2), torch.zeros(3, 2)), "logits of the same texts"),
])
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
