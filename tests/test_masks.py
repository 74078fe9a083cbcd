"""Masks over drawn sizes, dtypes and rules; the two instruments against wrong masks; bad input, one clear error each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.heads import MultiHead
from tunebook.attention.masks import SHAPES, causal, check_mask, packed, padding, positions_within, prefix, sees, sliding
from tunebook.attention.scores import attention, attention_backward, scores
from tunebook.kit.checks import close, same

sizes, seeds = st.integers(1, 9), st.integers(0, 2**31)
half = [torch.float16, torch.bfloat16]
dtypes = st.sampled_from([torch.float32, torch.float64, *half])
quick = settings(deadline=None, max_examples=50, derandomize=True)

devices = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])


def draw(seed, *shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def kept(seed, B, S):
    """An attention_mask of runs of 0 and 1, one token at least in a row."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.randint(2, (B, S), generator=g)
    keep[torch.arange(B), torch.randint(S, (B,), generator=g)] = 1
    return keep


def numbered(seed, B, S):
    """Document numbers, ascending, of runs of random length."""
    return torch.randint(3, (B, S), generator=torch.Generator().manual_seed(seed)).eq(0).cumsum(-1)


def any_mask(seed, T, S, window, length):
    """One of the rules, or two of them together, that broadcasts to (2, 1, T, S)."""
    rules = [causal(T, S), sliding(T, window, S), prefix(T, min(length, S), S), padding(kept(seed, 2, S)),
             padding(kept(seed, 2, S)) & causal(T, S), prefix(T, min(length, S), S) & sliding(T, window, S)]
    if T <= S:
        rules.append((packed(numbered(seed, 2, S)) & causal(S))[..., S - T:, :])
    return rules[seed % len(rules)]


def chain(E, D, S):
    """Roundings on the longest path through a MultiHead, both sides, as in its chapter."""
    return 2 * (E + D + S + E + 8)


def magnitude(layer, x):
    """Largest sum of absolute values behind an output of a MultiHead."""
    big = copy.deepcopy(layer).requires_grad_(False)
    for p in big.parameters():
        p.abs_()
    return float(big.out(big.value(x.abs()).amax(-2)).max())


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def ours(q, k, v, mask):
    return attention(q, k, v, mask)[0]


@quick
@given(T=sizes, S=sizes, window=sizes, length=st.integers(0, 9))
def test_masks_are_their_rules_read_aloud(T, S, window, length):
    length = min(length, S)
    for mask, rule in ((causal(T, S), lambda t, s: s <= t), (sliding(T, window, S), lambda t, s: t - window < s <= t),
                       (prefix(T, length, S), lambda t, s: s <= t or s < length)):
        assert mask.shape == (T, S)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[rule(S - T + i, s) for s in range(S)] for i in range(T)]
    assert causal(T, S)[-1].all(), "the last query sees all keys"


@quick
@given(seed=seeds, B=st.integers(1, 3), S=sizes)
def test_masks_from_data_are_their_rules_read_aloud(seed, B, S):
    keep, documents = kept(seed, B, S), torch.randint(4, (B, S), generator=torch.Generator().manual_seed(seed))
    assert padding(keep).shape == (B, 1, 1, S)
    assert padding(keep)[:, 0, 0].tolist() == [[bool(x) for x in row] for row in keep.tolist()]
    same(padding(keep.bool()), padding(keep))
    assert packed(documents)[:, 0].tolist() == [[[a == b for b in row] for a in row] for row in documents.tolist()]
    assert positions_within(documents).tolist() == [[row[:i].count(d) for i, d in enumerate(row)] for row in documents.tolist()]
    left = keep.sort(-1).values
    real = left == 1
    assert positions_within(left)[real].tolist() == (left.cumsum(-1) - 1)[real].tolist()  # as tokenizers' models count


@quick
@given(seed=seeds, T=sizes, S=sizes, window=sizes, length=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_attention_sees_what_the_mask_says(seed, T, S, window, length, dtype):
    mask = any_mask(seed, T, S, window, length)
    q, kv = draw(seed, (2, 1, T, 4), (2, 1, S, 4), dtype=dtype)
    rows = mask.expand(2, 1, T, S)
    for b in range(2):
        for attend in (ours, sdpa):
            same(sees(lambda x, f=attend, b=b: f(q[b], x, x, rows[b]), kv[b]), rows[b, 0])


@quick
@given(seed=seeds, T=sizes, S=sizes, D=sizes, window=sizes, length=st.integers(0, 9), dtype=dtypes)
def test_attention_under_a_mask_is_the_library_s(seed, T, S, D, window, length, dtype):
    mask = any_mask(seed, T, S, window, length)
    q, k, v = draw(seed, (2, 1, T, D), (2, 1, S, D), (2, 1, S, 3), dtype=dtype)
    reach = float((q.double().abs() @ k.double().abs().mT).max()) * D**-0.5
    if dtype in half:  # stored scores, weights and outputs round, each a few times; sums run in float32
        terms = 2 * (int(4 * reach) + 8)
    else:
        terms = int(2 * (2 * (D + 4) * reach + 2 * S + 8)) + 1
    out = ours(q, k, v, mask)
    close(out, sdpa(q, k, v, mask), terms=terms, scale=float(v.abs().max()))
    blind = ~mask.any(-1).expand(2, 1, T)
    assert not out[blind].any()
    assert out.isfinite().all()


@quick
@given(seed=seeds, T=st.integers(2, 9), at=st.integers(1, 8), dtype=dtypes, size=st.sampled_from([1.0, 30.0, 1000.0]))
def test_an_edit_of_the_future_leaves_the_past_alone(seed, T, at, dtype, size):
    at = min(at, T - 1)
    q, k, v, a, b = draw(seed, *[(2, T, 4)] * 5, dtype=dtype)
    k2, v2 = (torch.cat([x[:, :at], (size * y)[:, at:]], dim=1) for x, y in ((k, a), (v, b)))
    for attend in (ours, sdpa):
        before, after = attend(q, k, v, causal(T)), attend(q, k2, v2, causal(T))
        same(before[:, :at], after[:, :at])
        assert (before[:, at:] != after[:, at:]).any()


@quick
@given(seed=seeds, T=sizes, S=sizes, window=sizes, length=st.integers(0, 9))
def test_the_gradient_to_a_hidden_key_is_zero_and_a_blind_row_sends_none(seed, T, S, window, length):
    mask = any_mask(seed, T, S, window, length).expand(2, 1, T, S)
    q, k, v, up = draw(seed, (2, 1, T, 3), (2, 1, S, 3), (2, 1, S, 2), (2, 1, T, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    hidden, blind = ~mask.any(-2), ~mask.any(-1)
    for grads in (attention_backward(up, *inputs, mask), torch.autograd.grad(ours(*inputs, mask), inputs, up),
                  torch.autograd.grad(sdpa(*inputs, mask), inputs, up)):
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][blind].any()
        assert not grads[1][hidden].any()
        assert not grads[2][hidden].any()
        assert grads[2][~hidden].all()


@quick
@given(seed=seeds, lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), heads=st.integers(1, 3))
def test_packed_documents_are_documents_alone(seed, lengths, heads):
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    S, width = documents.shape[1], 4 * heads
    torch.manual_seed(seed)
    layer = MultiHead(width, heads).double()
    (x,) = draw(seed, (1, S, width))
    together = layer(x, mask=packed(documents) & causal(S))[0]
    apart = torch.cat([layer(part, mask=causal(part.shape[1]))[0] for part in x.split(lengths, dim=1)], dim=1)
    close(together, apart, terms=chain(width, 4, S), scale=magnitude(layer, x))
    assert positions_within(documents)[0].tolist() == [i for n in lengths for i in range(n)]


@quick
@given(seed=seeds, n=sizes, extra=st.integers(0, 5), left=st.booleans())
def test_a_padded_example_is_the_example_alone(seed, n, extra, left):
    torch.manual_seed(seed)
    layer = MultiHead(8, 2).double()
    x, noise = draw(seed, (1, n, 8), (1, extra, 8))
    keep = torch.tensor([[0] * extra + [1] * n if left else [1] * n + [0] * extra])
    whole = torch.cat([noise, x] if left else [x, noise], dim=1)
    padded = layer(whole, mask=padding(keep) & causal(n + extra))[0][keep == 1][None]
    close(padded, layer(x, mask=causal(n))[0], terms=chain(8, 4, n + extra), scale=magnitude(layer, whole))


@quick
@given(seed=seeds, T=sizes, extra=st.integers(0, 6), window=sizes)
def test_masks_are_transformers(seed, T, extra, window):
    from transformers import masking_utils as theirs
    S, keep, d = T + extra, kept(seed, 2, T + extra), numbered(seed, 2, T + extra)
    slide = theirs.sliding_window_causal_mask_function(window)
    def made(T, rule, keep=None):
        return theirs.sdpa_mask(2, T, S, q_offset=S - T, mask_function=rule, attention_mask=keep, allow_is_causal_skip=False)
    same(padding(keep) & causal(T, S), made(T, theirs.causal_mask_function, keep.bool()))
    same(sliding(T, window, S).expand(2, 1, T, S), made(T, slide))
    same(packed(d) & sliding(S, window), made(S, theirs.packed_sequence_compatibility_function(slide, positions_within(d), d)))


@devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *half])
def test_masks_live_on_their_device_and_serve_every_dtype(device, dtype):
    keep, documents = kept(0, 2, 7).to(device), numbered(0, 2, 7).to(device)
    q, k, v = (x.to(device) for x in draw(0, *[(2, 2, 7, 8)] * 3, dtype=dtype))
    for mask in (causal(7, device=device), prefix(7, 2, device=device), sliding(7, 3, device=device), padding(keep),
                 packed(documents) & causal(7, device=device), padding(keep) & causal(7, device=device)):
        assert mask.device.type == device
        out = ours(q, k, v, mask)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert not out[~mask.any(-1).expand(2, 2, 7)].any()
    assert positions_within(documents).device.type == device
    check_mask(lambda q, k, v: ours(q, k, v, causal(q.shape[-2], k.shape[-2], device=q.device)), device=device)


BAD = [  # call, error, words of its message
    (lambda: causal(0), ValueError, "expected queries to be a number of tokens from 1 on, got 0"),
    (lambda: causal(3, 0), ValueError, "expected keys to be a number of tokens from 1 on, got 0"),
    (lambda: sliding(2.0, 1), ValueError, "expected queries to be a number of tokens from 1 on, got 2.0"),
    (lambda: sliding(2, 0), ValueError, "expected a window of at least 1 key, got 0"),
    (lambda: prefix(2, 3), ValueError, "expected a prefix of 0 to 2 keys, got 3"),
    (lambda: prefix(2, -1), ValueError, "expected a prefix of 0 to 2 keys, got -1"),
    (lambda: padding(torch.ones(3, dtype=torch.long)), ValueError, r"expected keep \(B, S\), got \(3,\)"),
    (lambda: padding(torch.ones(2, 3)), TypeError, "expected integers or booleans, got torch.float32"),
    (lambda: padding(torch.tensor([[101, 7, 0]])), ValueError, "expected 0 and 1, got 0 to 101: pass attention_mask, not the tokens"),
    (lambda: packed(torch.zeros(3, dtype=torch.long)), ValueError, r"expected documents \(B, S\), got \(3,\)"),
    (lambda: packed(torch.ones(1, 3, dtype=torch.bool)), TypeError, "expected integers, got torch.bool: number the documents"),
    (lambda: positions_within(torch.zeros(1, 3)), TypeError, "expected integers, got torch.float32"),
    (lambda: sees(torch.sum, torch.ones(2, 2)), ValueError, r"expected outputs \(..., T, any\), got \(\)"),
    (lambda: sees(torch.tril, torch.ones(2, 2), edit=lambda x: x), ValueError, "the edit left token 0 as it was"),
    (lambda: attention(*draw(0, (3, 4), (3, 4), (3, 4)), mask=causal(4)), ValueError, "expected a mask that broadcasts"),
    (lambda: attention(*draw(0, (3, 4), (3, 4), (3, 4)), mask=causal(3).long()), TypeError, "expected a boolean mask"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input_is_refused_in_one_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value), "says what to do"


def test_sees_leaves_its_input_alone_and_reads_tokens_by_number():
    (x,) = draw(0, (4, 3))
    kept_x = x.clone()
    x.requires_grad_()
    seen = sees(lambda y: y.cumsum(-2), x)
    same(seen, causal(4))
    same(x.detach(), kept_x)
    assert not seen.requires_grad
    table = draw(1, (10, 5))[0]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    same(sees(lambda i: table[i].flip(-2), ids, edit=lambda i: (i + 1) % 10, dim=-1), torch.eye(3, dtype=torch.bool).flip(0))
    assert not sees(lambda y: torch.full((2, 3), torch.nan), x).any(), "NaN before and after is no change"


def over_scores(hidden, fill=-torch.inf, dim=-1):
    """Attention of a student who fills the scores where `hidden(scores)`."""
    return lambda q, k, v: scores(q, k).masked_fill(hidden(scores(q, k)), fill).softmax(dim) @ v


def upper(s, diagonal=1):
    return torch.ones(s.shape[-2:]).triu(diagonal).bool()


def future(s):
    return ~causal(*s.shape[-2:])


def under(rule):
    return lambda q, k, v: ours(q, k, v, rule(q.shape[-2], k.shape[-2]))


RIGHT = {
    "ours": under(causal),
    "SDPA": lambda q, k, v: sdpa(q, k, v, causal(q.shape[-2], k.shape[-2])),
    "filled with -inf": over_scores(future),
    "filled with the least number": over_scores(future, torch.finfo(torch.float32).min),
}
def unwritten(q, k, v):
    raise NotImplementedError


WRONG = {  # name: (attention, what the message names)
    "no mask": (lambda q, k, v: ours(q, k, v, None), "query 0 sees key 1"),
    "from the scores": (over_scores(lambda s: s.triu(1).bool()), "zero scores: query 0 sees key 1"),
    "where the lower part is 0": (over_scores(lambda s: s.tril() == 0), "zero scores: NaN"),
    "5 by 5": (over_scores(lambda s: torch.ones(5, 5).triu(1).bool()), "RuntimeError"),
    "upper-left": (over_scores(upper), "T = 1, S = 3, ordinary scores: query 0 ignores key 1"),
    "is_causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "T = 1, S = 3"),
    "hides itself": (over_scores(lambda s: upper(s, 0)), "T = 1, S = 1, ordinary scores: NaN"),
    "one step too far": (over_scores(lambda s: upper(s, 2)), "T = 2, S = 2, ordinary scores: query 0 sees key 1"),
    "filled with -1e9": (over_scores(future, -1e9), "huge scores: query 0 sees key 1"),
    "filled with 0": (over_scores(future, 0.0), "query 0 sees key 1"),
    "after the softmax": (lambda q, k, v: scores(q, k).softmax(-1) * ~future(scores(q, k)) @ v, "query 0 sees key 1"),
    "over the queries": (over_scores(future, dim=-2), "T = 2, S = 2, ordinary scores: query 0 depends on query 1"),
    "window of 2": (under(lambda T, S: sliding(T, 2, S)), "query 2 ignores key 0"),
    "not written yet": (unwritten, "NotImplementedError"),
    "returns nothing": (lambda q, k, v: None, "AttributeError"),
    "of another shape": (lambda q, k, v: under(causal)(q, k, v)[..., :2], "expected shape"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_check_mask_accepts_what_is_right(name):
    check_mask(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_check_mask_rejects_what_is_wrong(name):
    attend, words = WRONG[name]
    with pytest.raises(AssertionError, match=words) as caught:
        check_mask(attend)
    assert str(caught.value).startswith("T = ")


@quick
@given(window=st.integers(1, 4), length=st.integers(0, 2))
def test_check_mask_tells_rules_apart(window, length):
    def slide(T, S): return sliding(T, window, S)
    def given_first(T, S): return prefix(T, min(length, S), S)
    check_mask(under(slide), slide)
    check_mask(under(given_first), given_first)
    if any(not torch.equal(slide(*shape), given_first(*shape)) for shape in SHAPES):
        with pytest.raises(AssertionError, match="query"):
            check_mask(under(slide), given_first)


def test_masks_survive_export_with_a_free_length():
    class Both(torch.nn.Module):
        def forward(self, x):
            return causal(x.shape[-2], device=x.device) & sliding(x.shape[-2], 3, device=x.device)

    program = torch.export.export(Both(), (torch.randn(2, 5, 4),), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    same(program.module()(torch.randn(2, 9, 4)), sliding(9, 3))
