"""Positions on drawn shapes, dtypes and places: equal to the libraries, blind to a shift, and clear about bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.heads import MultiHead, split_heads
from tunebook.attention.positions import (
    Learned,
    alibi,
    alibi_slopes,
    frequencies,
    half_order,
    rotary,
    rotate,
    sinusoid,
    to_half,
    to_interleaved,
)
from tunebook.attention.scores import attention, scores, softmax
from tunebook.kit.checks import close, same

quick = settings(deadline=None, max_examples=50, derandomize=True)
sizes, seeds, pairs = st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 20)
layouts = st.sampled_from(["half", "interleaved"])
wide = st.sampled_from([torch.float32, torch.float64])
narrow = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
bases = st.sampled_from([100.0, 10000.0, 500000.0])


def draw(seed, *shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def llama(width, base):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    rope = {"rope_type": "default", "rope_theta": base}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=2 * width, num_attention_heads=2, rope_parameters=rope))


# None

@quick
@given(seed=seeds, B=st.integers(1, 3), T=sizes, H=st.integers(1, 3), D=st.integers(1, 4))
def test_attention_without_positions_commutes_with_any_order(seed, B, T, H, D):
    torch.manual_seed(seed)
    layer, (x,) = MultiHead(H * D, H).double(), draw(seed, (B, T, H * D))
    P = torch.randperm(T)
    out, weights = layer(x)
    moved, moved_weights = layer(x[:, P])
    terms = 8 * (2 * H * D + D + T + 8)
    close(moved, out[:, P], terms=terms, scale=1.0 + float(x.abs().sum(-1).max()))
    close(moved_weights, weights[:, :, P][..., P], terms=terms, scale=1.0 + float(x.abs().sum(-1).max()) ** 2)


@quick
@given(seed=seeds, T=st.integers(2, 9), pairs=st.integers(1, 4))
def test_turned_tokens_no_longer_commute(seed, T, pairs):
    (x,) = draw(seed, (1, T, 2 * pairs))
    P = torch.roll(torch.arange(T), 1)
    table = rotary(torch.arange(T), 2 * pairs, dtype=x.dtype)
    def weights(y): return softmax(scores(*[rotate(y, *table)] * 2))
    assert (weights(x[:, P]) - weights(x)[:, P][..., P]).abs().max() > 1e-6


# Sinusoids and learned tables

@quick
@given(T=st.integers(1, 300), pairs=pairs, dtype=narrow)
def test_sinusoids_are_distilbert_s(T, pairs, dtype):
    from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
    theirs, ours = create_sinusoidal_embeddings(T, 2 * pairs, torch.empty(T, 2 * pairs)), sinusoid(T, 2 * pairs, dtype=dtype)
    common = torch.float32 if dtype == torch.float64 else dtype  # theirs is rounded to float32
    close(ours.to(common), theirs.to(common), terms=3, scale=1.0)


@quick
@given(T=st.integers(2, 200), pairs=pairs, base=bases, data=st.data())
def test_dot_products_of_sinusoids_depend_on_the_distance(T, pairs, base, data):
    p = sinusoid(T, 2 * pairs, base, dtype=torch.float64)
    k = data.draw(st.integers(0, T - 1))
    distance = torch.full((T - k,), float(k), dtype=torch.float64)
    cosines = (distance[:, None] * frequencies(2 * pairs, base, torch.float64)).cos().sum(-1)
    close((p[k:] * p[:T - k]).sum(-1), cosines, terms=2 * (2 * T + 2 * pairs + 4), scale=float(pairs))


@quick
@given(length=sizes, width=sizes, data=st.data())
def test_learned_places_are_rows_and_end_with_the_table(length, width, data):
    table = Learned(length, width)
    at = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), max_size=6)), dtype=torch.long)
    assert table(at).shape == (len(at), width)
    if len(at):
        same(table(at), table.weight[at])
    for bad in (length, -1):
        with pytest.raises(ValueError, match=f"places from 0 to {length - 1}, got .*: shorten the text"):
            table(torch.cat((at, torch.tensor([bad]))))


# Rotary

@quick
@given(seed=seeds, B=st.integers(1, 3), H=sizes, T=sizes, pairs=pairs, base=bases, first=st.integers(0, 100_000), dtype=narrow)
def test_rotary_is_llama_s(seed, B, H, T, pairs, base, first, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k = draw(seed, (B, H, T, 2 * pairs), (B, 1, T, 2 * pairs), dtype=dtype)
    at = first + torch.arange(T) + torch.arange(B)[:, None]
    ours, theirs = rotary(at, 2 * pairs, base, dtype), llama(2 * pairs, base)(q, at)
    for a, b in zip(ours, theirs):
        same(a, b)
    for x, other in zip((q, k), apply_rotary_pos_emb(q, k, *theirs)):
        close(rotate(x, *ours), other, terms=6, scale=2 * float(x.abs().max()))


@quick
@given(seed=seeds, B=st.integers(1, 3), H=sizes, T=sizes, pairs=pairs, dtype=narrow)
def test_interleaved_is_gptj_s(seed, B, H, T, pairs, dtype):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions
    (x,) = draw(seed, (B, H, T, 2 * pairs), dtype=dtype)
    sin, cos = create_sinusoidal_positions(T, 2 * pairs).to(dtype).expand(B, -1, -1).chunk(2, -1)
    theirs = apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    ours = rotate(x, *rotary(torch.arange(T), 2 * pairs, dtype=dtype), layout="interleaved")
    close(ours, theirs, terms=6, scale=2 * float(x.abs().max()))


@quick
@given(seed=seeds, H=sizes, T=sizes, pairs=pairs)
def test_interleaved_is_a_complex_product(seed, H, T, pairs):
    (x,) = draw(seed, (H, T, 2 * pairs))
    cos, sin = rotary(torch.arange(T), 2 * pairs, dtype=x.dtype, angles=x.dtype)
    clock = torch.polar(torch.ones(()).double(), torch.arange(T)[:, None] * frequencies(2 * pairs, dtype=torch.float64))
    theirs = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * clock).flatten(-2)
    close(rotate(x, cos, sin, "interleaved"), theirs, terms=12, scale=2 * float(x.abs().max()))


@quick
@given(seed=seeds, H=st.integers(1, 3), T=sizes, S=sizes, pairs=pairs, shift=st.integers(0, 5000), layout=layouts, dtype=wide)
def test_scores_depend_on_the_distance_and_norms_stay(seed, H, T, S, pairs, shift, layout, dtype):
    q, k = draw(seed, (H, T, 2 * pairs), (H, S, 2 * pairs), dtype=dtype)
    def turned(x, first): return rotate(x, *rotary(first + torch.arange(x.shape[1]), x.shape[2], dtype=dtype, angles=dtype), layout)
    size = float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    moved, still = (scores(turned(q, f), turned(k, f), 1.0) for f in (shift, 0))
    close(moved, still, terms=2 * (2 * pairs + 8 + 2 * (shift + 9)), scale=size)
    close(turned(q, shift).norm(dim=-1), q.norm(dim=-1), terms=4 * pairs + 20, scale=float(q.norm(dim=-1).max()))


@quick
@given(seed=seeds, H=st.integers(1, 3), T=sizes, pairs=pairs, layout=layouts)
def test_the_gradient_is_the_turn_back(seed, H, T, pairs, layout):
    x, up = draw(seed, (H, T, 2 * pairs), (H, T, 2 * pairs))
    cos, sin = rotary(torch.arange(T), 2 * pairs, dtype=x.dtype, angles=x.dtype)
    y = rotate(x.requires_grad_(), cos, sin, layout)
    close(torch.autograd.grad(y, x, up)[0], rotate(up, cos, -sin, layout), terms=6, scale=2 * float(up.abs().max()))
    close(rotate(y, cos, -sin, layout), x, terms=16, scale=2 * float(x.detach().abs().max()))


@quick
@given(seed=seeds, H=st.integers(1, 4), T=sizes, pairs=st.integers(1, 5), E=sizes)
def test_layouts_convert_into_one_another(seed, H, T, pairs, E):
    D = 2 * pairs
    x, w, bias = draw(seed, (2, T, E), (H * D, E), (H * D,))
    for weight in (w, bias):
        same(to_interleaved(to_half(weight, H), H), weight)
        same(to_half(to_interleaved(weight, H), H), weight)
    table = rotary(torch.arange(T), D, dtype=x.dtype)
    inter = rotate(split_heads(x @ w.mT + bias, H), *table, "interleaved")
    half = rotate(split_heads(x @ to_half(w, H).mT + to_half(bias, H), H), *table)
    size = 2 * float((x.abs() @ w.abs().mT).max() + bias.abs().max())
    close(half, inter[..., half_order(D)], terms=2 * (E + 5), scale=size)
    same(rotate(inter[..., half_order(D)], *table), rotate(inter, *table, "interleaved")[..., half_order(D)])


def test_meta_s_permutation_is_ours():
    w = torch.arange(3 * 8 * 5.0).reshape(24, 5)  # the reshape by which Meta's Llama weights became transformers'
    same(to_half(w, 3), w.view(3, 4, 2, 5).transpose(1, 2).reshape(24, 5))


def test_places_of_each_sequence_may_differ():
    (x,) = draw(0, (2, 3, 4, 6))
    at = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    together = rotate(x, *rotary(at, 6, dtype=x.dtype))
    for b in range(2):
        same(together[b], rotate(x[b], *rotary(at[b], 6, dtype=x.dtype)))


def test_stretched_places_stand_between_whole_ones():
    whole, stretched = (rotary(torch.arange(4) / n, 8, angles=torch.float64, dtype=torch.float64) for n in (1, 2))
    for a, b in zip(whole, stretched):
        same(a[:2], b[::2])


# ALiBi

@quick
@given(H=st.integers(1, 70), S=st.integers(1, 60))
def test_alibi_is_bloom_s_and_mpt_s(H, S):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
    bloom = build_alibi_tensor(torch.ones(1, S, dtype=torch.long), H, torch.float32)
    scale = max(1.0, float(bloom.abs().max()))
    close(alibi(H, S).tril(), (bloom - bloom.mT).tril(), terms=H + 6, scale=scale)
    close(alibi(H, 1, S), build_mpt_alibi_tensor(H, S), terms=6, scale=scale)


@quick
@given(seed=seeds, H=st.integers(1, 12), T=sizes, more=st.integers(0, 5))
def test_alibi_looks_at_distance_from_the_end_of_the_keys(seed, H, T, more):
    S, bias = T + more, alibi(H, T, T + more)
    same(bias, alibi(H, S)[:, more:])
    assert bias.shape == (H, T, S) and (bias <= 0).all()
    assert not bias.diagonal(more, 1, 2).any()
    for t in range(T):
        for s in range(S):
            assert torch.equal(bias[:, t, s], -alibi_slopes(H) * abs(t + more - s))


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 64])
def test_slopes_of_a_power_of_two_are_geometric(heads):
    slopes = alibi_slopes(heads)
    close(slopes, torch.tensor([2 ** (-8 * h / heads) for h in range(1, heads + 1)]), terms=2)
    assert float(slopes[-1]) == 2**-8


# Devices, dtypes and bad input

@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_stay_on_their_device_in_their_dtype(device, dtype):
    x = torch.randn(2, 3, 5, 8, device=device, dtype=dtype)
    cos, sin = rotary(torch.arange(5, device=device), 8, dtype=dtype)
    for layout in ("half", "interleaved"):
        y = rotate(x, cos, sin, layout)
        assert y.dtype == dtype and y.device == x.device and y.shape == x.shape
        exact = rotate(x.double(), *rotary(torch.arange(5, device=device), 8, dtype=torch.float64), layout).to(dtype)
        close(y, exact, terms=8, scale=2 * float(x.abs().max()))
    for made in (sinusoid(5, 8, dtype=dtype, device=device), alibi(3, 5, dtype=dtype, device=device)):
        assert made.dtype == dtype and made.device == x.device
    assert Learned(5, 8).to(device, dtype)(torch.arange(5, device=device)).dtype == dtype
    assert to_half(x[0, 0, 0, :, None], 2).device == x.device


def test_angles_far_out_need_float32():
    """A narrow table is the float32 one, rounded once: places and angles are never kept in half precision."""
    at = torch.arange(100_000, 100_020)
    for dtype in (torch.bfloat16, torch.float16):
        for a, b in zip(rotary(at, 16, dtype=dtype), rotary(at, 16)):
            same(a, b.to(dtype))


def test_turned_attention_is_wired_as_in_llama():
    """Causal attention over turned queries and keys equals the library's kernel on the library's rotary."""
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k, v = draw(3, (2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    at = torch.arange(7).expand(2, -1)
    theirs = F.scaled_dot_product_attention(*apply_rotary_pos_emb(q, k, *llama(8, 10000.0)(q, at)), v, is_causal=True)
    table = rotary(at, 8, dtype=q.dtype)
    ours = attention(rotate(q, *table), rotate(k, *table), v, torch.ones(7, 7, dtype=torch.bool).tril())[0]
    reach = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * 8**-0.5  # bounds the magnitudes in a score, turned or not
    close(ours, theirs, terms=math.ceil(2 * ((8 + 6 + 4) * (1 + reach) + 2 * 7 + 8)), scale=float(v.abs().max()))


X, (COS, SIN) = torch.zeros(2, 3, 5, 8), rotary(torch.arange(5), 8)
BAD = {
    "odd width": (lambda: rotary(torch.arange(3), 7), ValueError, "even width, got 7"),
    "no width": (lambda: frequencies(0), ValueError, "even width, got 0"),
    "odd sinusoid": (lambda: sinusoid(4, 5), ValueError, "even width, got 5"),
    "empty sinusoid": (lambda: sinusoid(0, 4), ValueError, "at least one place"),
    "places in bfloat16": (lambda: rotary(torch.arange(3).bfloat16(), 8), TypeError, "bfloat16 cannot even hold 257"),
    "places as booleans": (lambda: rotary(torch.ones(3, dtype=torch.bool), 8), TypeError, "got torch.bool"),
    "angles in float16": (lambda: rotary(torch.arange(3), 8, angles=torch.float16), TypeError, "and torch.float16"),
    "unknown layout": (lambda: rotate(X, COS, SIN, "neox"), ValueError, "half or interleaved, got 'neox'"),
    "another dtype": (lambda: rotate(X.bfloat16(), COS, SIN), TypeError, r"rotary\(..., dtype=x.dtype\)"),
    "table too short": (lambda: rotate(X, COS[:1], SIN[:1]), ValueError, "make the tables for these places"),
    "table too long": (lambda: rotate(X[..., :4, :], COS, SIN), ValueError, "make the tables for these places"),
    "another width": (lambda: rotate(X[..., :4], COS, SIN), ValueError, "make the tables for these places"),
    "another batch": (lambda: rotate(X, COS.expand(3, 5, 8), SIN.expand(3, 5, 8)), ValueError, r"\(3, 5, 8\)"),
    "cos without sin": (lambda: rotate(X, COS, SIN[None]), ValueError, r"\(1, 5, 8\)"),
    "no heads": (lambda: rotate(X[0, 0], COS, SIN), ValueError, r"\(..., H, T, D\)"),
    "heads that do not divide": (lambda: to_half(torch.zeros(12, 4), 4), ValueError, "4 heads of even width, got 12"),
    "no rows": (lambda: to_interleaved(torch.zeros(0, 4), 1), ValueError, "got 0"),
    "zero heads": (lambda: to_half(torch.zeros(8, 4), 0), ValueError, "0 heads"),
    "no slopes": (lambda: alibi_slopes(0), ValueError, "at least one head"),
    "more queries than keys": (lambda: alibi(2, 4, 3), ValueError, "T 4, S 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_clear_line(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)
