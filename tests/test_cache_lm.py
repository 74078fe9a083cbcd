"""Generation with a cache equals reading everything again, and transformers' generate, over drawn models, paddings and pieces."""

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunebook.attention.block import Config, Transformer
from tunebook.attention.cache import KVCache, Recompute, choose, feed, filtered, generate, keep_top_k, keep_top_p, left_pad
from tunebook.attention.heads import cache_bytes
from tunebook.kit.checks import close, same

seeds = st.integers(0, 2**31)
quick = settings(deadline=None, max_examples=100, derandomize=True)
V = 23
configs = st.builds(Config, vocab=st.just(V), width=st.just(16), layers=st.integers(1, 2), heads=st.just(4), length=st.just(32),
                    hidden=st.just(24), kv_heads=st.sampled_from([None, 1, 2]), window=st.sampled_from([None, 1, 2, 5]),
                    norm=st.sampled_from(["layer", "rms"]), gated=st.booleans(), rotary=st.sampled_from([None, 1e4]), pre=st.booleans())


def build(config, seed=0, dtype=torch.float64, device="cpu"):
    """A random model whose parts all matter."""
    torch.manual_seed(seed % 2**31)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model.to(device, dtype).eval()


def prompts(seed, lengths, device="cpu"):
    """Left-padded random prompts of these lengths, and their mask."""
    g = torch.Generator().manual_seed(seed)
    return left_pad([torch.randint(V, (n,), generator=g).tolist() for n in lengths], pad=seed % V, device=device)


@torch.no_grad()
def terms(model, tokens, mask):
    """Roundings on the way to a logit: those of a block, times the blocks, times the growth of a nudge; with the head's."""
    c, base, gain = model.config, model(tokens, mask), 1.0
    for block in model.blocks:
        hook = block.register_forward_pre_hook(lambda _, x: (x[0] * (1 + 1e-6 * torch.randn_like(x[0]).sign()), *x[1:]))
        gain = max(gain, float((model(tokens, mask).logits - base.logits).abs().max() / base.logits.abs().max()) * 1e6)
        hook.remove()
    chain = 2 * (7 * c.width + c.width // c.heads + 2 * tokens.shape[1] + c.inner + 40)
    head = float((base.hidden.abs() @ model.head.out.weight.abs().mT).max() / base.logits.abs().max())
    return math.ceil(gain * c.layers * chain + 2 * (3 * c.width + 8) * head)


@torch.no_grad()
def read(model, tokens, mask, ends, cache=None):
    """Logits (B, T, V) of a text that is fed in pieces with these ends."""
    cache = KVCache(model.config.window) if cache is None else cache
    return torch.cat([feed(model, tokens[:, :n], cache, mask[:, :n]) for n in ends], 1)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@quick
@given(config=configs, seed=seeds, lengths=lengths, data=st.data())
def test_any_pieces_give_the_logits_of_the_whole(config, seed, lengths, data):
    model, (tokens, mask) = build(config, seed), prompts(seed, lengths)
    T = tokens.shape[1]
    ends = sorted({*data.draw(st.lists(st.integers(1, T), max_size=6)), T})
    spare = data.draw(st.integers(0, 3))
    real, n = mask.bool(), terms(model, tokens, mask)
    whole = read(model, tokens, mask, [T], Recompute())[real]
    size = float(whole.abs().max())
    close(read(model, tokens, mask, ends)[real], whole, terms=n, scale=size)
    close(read(model, tokens, mask, ends, KVCache(config.window, spare))[real], whole, terms=n, scale=size)
    close(read(model, tokens, mask, range(1, T + 1), KVCache())[real], whole, terms=n, scale=size)


@quick
@given(config=configs, seed=seeds, rows=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       moves=st.lists(st.one_of(st.integers(1, 3), st.integers(-3, -1)), min_size=1, max_size=8))
def test_what_was_rolled_back_leaves_no_trace(config, seed, rows, dtype, moves):
    """A positive move reads so many tokens, a negative one drops so many of the pieces read last."""
    model, g = build(config, seed, dtype), torch.Generator().manual_seed(seed)
    cache, text, pieces = KVCache(config.window, spare=24), torch.empty(rows, 0, dtype=torch.long), [2]
    def more(n):
        return torch.cat((text, torch.randint(V, (rows, n), generator=g)), 1)
    text = more(2)
    with torch.no_grad():
        feed(model, text, cache)
        for move in moves:
            if move > 0:
                text = more(move)
                feed(model, text, cache)
                pieces.append(move)
            elif len(pieces) > -move:
                drop = sum(pieces[move:])
                cache.crop(drop)
                text, pieces = text[:, :text.shape[1] - drop], pieces[:move]
        text = more(2)
        fresh = KVCache(config.window)
        for n in itertools.accumulate(pieces):
            feed(model, text[:, :n], fresh)
        assert cache.length() == fresh.length()
        same(feed(model, text, cache), feed(model, text, fresh))


@quick
@given(config=configs, seed=seeds, lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), data=st.data())
def test_chosen_rows_go_on_as_their_texts(config, seed, lengths, data):
    model, (tokens, mask) = build(config, seed), prompts(seed, lengths)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5)))
    cache, new = KVCache(config.window), torch.randint(V, (len(rows), 1), generator=torch.Generator().manual_seed(seed))
    longer, seen = torch.cat((tokens[rows], new), 1), torch.cat((mask[rows], torch.ones_like(new)), 1)
    with torch.no_grad():
        feed(model, tokens, cache, mask)
        cache.select(rows)
        ours, whole = feed(model, longer, cache, seen)[:, -1], feed(model, longer, Recompute(), seen)[:, -1]
    close(ours, whole, terms=terms(model, longer, seen))


@quick
@given(config=configs, B=st.integers(1, 3), S=st.integers(1, 9), spare=st.integers(0, 3), drop=st.integers(0, 3),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_bytes_held_are_those_of_the_formula(config, B, S, spare, drop, dtype):
    model, cache = build(config, dtype=dtype), KVCache(config.window, spare)
    with torch.no_grad():
        for n in sorted({(S + 1) // 2, S}):
            feed(model, torch.zeros(B, n, dtype=torch.long), cache)
    held = S if config.window is None else min(S, config.window - 1 + spare)
    def formula(tokens):
        return cache_bytes(16, 4, config.kv_heads, B * tokens, config.layers, dtype)
    assert cache.nbytes() == formula(held) and cache.length() == S
    if drop <= (held if held == S else spare):
        cache.crop(drop)
        assert cache.nbytes() == formula(held - drop) and cache.length() == S - drop
    else:
        with pytest.raises(ValueError, match="expected to drop 0 to"):
            cache.crop(drop)
    cache.reset()
    assert cache.nbytes() == cache.length() == 0


hows = st.sampled_from([{}, {"beams": 2}, {"beams": 3, "length_penalty": 0.0}, {"beams": 2, "early": True}, {"temperature": 0.8}])


@quick
@given(config=configs, seed=seeds, lengths=lengths, steps=st.integers(1, 7), chunk=st.sampled_from([None, 1, 2, 5]),
       end=st.integers(0, V - 1), how=hows)
def test_texts_are_those_without_a_cache(config, seed, lengths, steps, chunk, end, how):
    model, (tokens, mask) = build(config, seed), prompts(seed, lengths)
    def write(**more):
        dice = {"generator": torch.Generator().manual_seed(seed)} if "temperature" in how else {}
        return generate(model, tokens, steps, mask, end, **how, **dice, **more)
    out = write(chunk=chunk)
    same(out, write(cache=Recompute()))
    same(out, write(cache=KVCache()))
    new = out[:, tokens.shape[1]:]
    assert torch.equal(out[:, :tokens.shape[1]], tokens) and 1 <= new.shape[1] <= steps
    for row in new.tolist():
        assert row[row.index(end):] == [end] * (len(row) - row.index(end)) if end in row else len(row) == steps


@quick
@given(config=configs, seed=seeds, shared=st.integers(1, 5), own=st.integers(1, 4), steps=st.integers(1, 5))
def test_a_cached_beginning_serves_many_prompts(config, seed, shared, own, steps):
    model, (start, _) = build(config, seed), prompts(seed, [shared])
    ends, _ = prompts(seed + 1, [own] * 3)
    tokens, cache = torch.cat((start.expand(3, -1), ends), 1), KVCache(config.window)
    with torch.no_grad():
        feed(model, start, cache)
    cache.select(torch.zeros(3, dtype=torch.long))
    same(generate(model, tokens, steps, cache=cache), generate(model, tokens, steps))


def pair(kind, seed):
    """A tiny random model of transformers, and ours."""
    torch.manual_seed(seed)
    common = dict(vocab_size=V, initializer_range=0.25, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, **common))
    else:
        common |= dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
        build, config = {"llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**common)), "mistral": (
            transformers.MistralForCausalLM, transformers.MistralConfig(sliding_window=3, head_dim=None, **common))}[kind]
        theirs = build(config)
    return theirs.eval(), Transformer.from_pretrained(theirs)


PAIRS = {(kind, seed): pair(kind, seed) for kind in ("gpt2", "llama", "mistral") for seed in range(2)}


@settings(quick, max_examples=250)
@given(which=st.sampled_from(sorted(PAIRS)), seed=seeds, lengths=lengths, steps=st.integers(1, 8),
       end=st.one_of(st.none(), st.integers(0, V - 1)), beams=st.integers(1, 5),
       penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), early=st.booleans(), pad=st.integers(1, V - 1))
def test_texts_are_those_of_transformers(which, seed, lengths, steps, end, beams, penalty, early, pad):
    """Padding 0 is left out: transformers' beam search then fills with the end token."""
    theirs, ours = PAIRS[which]
    tokens, mask = prompts(seed, lengths)
    other = theirs.generate(tokens, attention_mask=mask, max_new_tokens=steps, eos_token_id=end, pad_token_id=pad, num_beams=beams,
                            do_sample=False, **({"length_penalty": penalty, "early_stopping": early} if beams > 1 else {}))
    assert generate(ours, tokens, steps, mask, end, pad, beams=beams, length_penalty=penalty, early=early).tolist() == other.tolist()


@quick
@given(which=st.sampled_from(sorted(PAIRS)), seed=seeds, lengths=lengths, steps=st.integers(1, 6),
       temperature=st.sampled_from([0.3, 1.0, 2.0]), k=st.sampled_from([None, 1, 4, 50]), p=st.sampled_from([None, 0.2, 0.9]))
def test_draws_are_those_of_transformers(which, seed, lengths, steps, temperature, k, p):
    theirs, ours = PAIRS[which]
    tokens, mask = prompts(seed, lengths)
    torch.manual_seed(seed)
    other = theirs.generate(tokens, attention_mask=mask, max_new_tokens=steps, do_sample=True, pad_token_id=0,
                            temperature=temperature, top_k=k or 0, top_p=p or 1.0)
    torch.manual_seed(seed)
    assert generate(ours, tokens, steps, mask, temperature=temperature, top_k=k, top_p=p).tolist() == other.tolist()


def test_the_cache_of_transformers_serves_our_model():
    class Theirs(transformers.DynamicCache):
        def length(self):
            return self.get_seq_length()

        def select(self, rows):
            self.reorder_cache(rows)

    for (kind, _), (theirs, ours) in PAIRS.items():
        tokens, mask = prompts(3, [5, 2, 7])
        for beams in (1, 3):
            same(generate(ours, tokens, 8, mask, beams=beams, cache=Theirs()), generate(ours, tokens, 8, mask, beams=beams))
        if kind != "mistral":
            cache = KVCache()
            with torch.no_grad():
                feed(ours, tokens, cache)
                other = theirs(tokens, use_cache=True).past_key_values.layers
            for layer, (k, v) in cache.kept.items():
                close(k, other[layer].keys, terms=4000)
                close(v, other[layer].values, terms=4000)


logit_rows = st.tuples(seeds, st.integers(1, 30), st.sampled_from([0.1, 1.0, 8.0, 60.0]), st.booleans(), st.booleans())


def logits_of(seed, size, spread, ties, hidden):
    z = spread * torch.randn(4, size, generator=torch.Generator().manual_seed(seed))
    z = z.round() if ties else z
    return z.masked_fill((z < 0) & (z < z.amax(-1, keepdim=True)), -torch.inf) if hidden else z


@settings(quick, max_examples=150)
@given(row=logit_rows, k=st.integers(1, 40), p=st.floats(1e-9, 1.0), t=st.floats(1e-3, 100))
def test_filters_are_those_of_transformers(row, k, p, t):
    z = logits_of(*row)
    same(keep_top_k(z, k), TopKLogitsWarper(k)(None, z))
    same(keep_top_p(z, p), TopPLogitsWarper(p)(None, z))
    same(filtered(z, t), TemperatureLogitsWarper(t)(None, z))
    same(filtered(z, t, k, p), TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(t)(None, z))))
    same(keep_top_p(z[0], p), keep_top_p(z, p)[0])
    for kept in (keep_top_k(z, k), keep_top_p(z, p)):
        assert kept.isfinite().any(-1).all() and torch.equal(kept[kept.isfinite()], z[kept.isfinite()])
    assert (keep_top_k(z, k).isfinite().sum(-1) >= z.isfinite().sum(-1).clamp(max=k)).all()
    assert (z.softmax(-1).where(keep_top_p(z, p).isfinite(), 0).sum(-1) >= p - 1e-5).all()


@quick
@given(row=logit_rows, k=st.integers(1, 9), p=st.floats(0.05, 1.0), t=st.floats(0.1, 10))
def test_only_what_was_kept_is_drawn(row, k, p, t):
    z, how = logits_of(*row), dict(temperature=t, top_k=k, top_p=p)
    drawn = [choose(z.repeat(50, 1), **how, generator=torch.Generator().manual_seed(row[0])) for _ in range(2)]
    same(*drawn)
    assert filtered(z, **how).repeat(50, 1).gather(1, drawn[0]).isfinite().all()
    same(choose(z), z.argmax(-1, keepdim=True))


@quick
@given(config=configs, seed=seeds, penalty=st.sampled_from([0.0, 1.0]))
def test_enough_beams_find_the_best_text(config, seed, penalty):
    model = build(Config(**{**vars(config), "vocab": 4}), seed, torch.float32)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    tokens = torch.cat((torch.tensor([[seed % 4]]).expand(len(every), -1), every), 1)
    with torch.no_grad():
        logs = feed(model, tokens, Recompute())[:, :-1].double().log_softmax(-1).gather(-1, every[..., None]).sum((-1, -2))
    first, second = logs.topk(2).values.tolist()
    assume(first - second > 1e-5)
    assert generate(model, tokens[:1, :1], 3, beams=16, length_penalty=penalty)[0, 1:].tolist() == every[logs.argmax()].tolist()


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 3])
def test_half_precision_and_devices(device, dtype, window):
    config = Config(V, 32, 2, 4, 64, kv_heads=2, window=window, norm="rms", gated=True, rotary=1e4)
    model, reference = build(config, 1, dtype, device), build(config, 1, torch.float64, device)
    reference.load_state_dict(model.state_dict())
    tokens, mask = prompts(5, [9, 4, 1], device)
    cache, real = KVCache(window), mask.bool()
    cached, whole, right = (read(m, tokens, mask, ends, c)[real].double() for m, ends, c in (
        (model, range(1, 10), cache), (model, [9], Recompute()), (reference, [9], Recompute())))
    size, unit = float(right.abs().max()), torch.finfo(dtype).eps
    assert float((cached - right).abs().max()) <= 3 * float((whole - right).abs().max()) + 2 * unit * size
    assert all(t.dtype == dtype and t.device.type == device for held in cache.kept.values() for t in held)
    assert cache.nbytes() == cache_bytes(32, 4, 2, 3 * (9 if window is None else window - 1), 2, dtype)
    dice = torch.Generator(device).manual_seed(0)
    for how in ({}, {"beams": 3}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "generator": dice}):
        out = generate(model, tokens, 6, mask, **how)
        assert out.device.type == device and out.dtype == torch.int64 and out.shape == (3, 15)


def learned(**more):
    return build(Config(**(dict(vocab=V, width=16, layers=1, heads=4, length=12) | more)))


one, three = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3], [4, 5, 6]])
BAD = {
    "expected prompts (B, T)": dict(tokens=one[0]),
    "one token at least": dict(tokens=one[:, :0]),
    "expected a mask (B, T) = (2, 3)": dict(tokens=three, mask=torch.ones(2, 4, dtype=torch.long)),
    "expected a mask (B, T) = (2, 3), got (2, 1, 1, 3)": dict(tokens=three, mask=torch.ones(2, 1, 1, 3, dtype=torch.bool)),
    "expected 0 and 1": dict(mask=torch.tensor([[0, 1, 2]])),
    "padding on the left": dict(mask=torch.tensor([[1, 1, 0]])),
    "expected steps of at least 1, got 0": dict(steps=0),
    "expected beams of at least 1, got 0": dict(beams=0),
    "expected chunks of at least 1 token, got 0": dict(chunk=0),
    "expected an end token from 0 to 22, got 23": dict(end=23),
    "expected a temperature above 0, got 0": dict(temperature=0.0),
    "expected a temperature above 0, got -1": dict(temperature=-1.0),
    "expected a temperature above 0, got nan": dict(temperature=math.nan),
    "expected top_k of at least 1, got 0": dict(top_k=0),
    "expected top_p above 0 and at most 1, got 0": dict(top_p=0.0),
    "expected top_p above 0 and at most 1, got 1.1": dict(top_p=1.1),
    "expected beams or drawing, got both": dict(beams=2, top_k=3),
    "expected 12 positions at most, got a prompt of 3 tokens and 11 steps": dict(steps=11),
    "expected 12 positions at most, got a prompt of 13 tokens": dict(tokens=torch.ones(1, 13, dtype=torch.long), steps=1),
    "expected a cache for the model's window, None, got 5": dict(cache=KVCache(5)),
    "expected a decoder with a head": dict(model=learned(head="none")),
    "expected a decoder with a head: this": dict(model=learned(causal=False)),
    "integers as tokens": dict(tokens=one.float()),
    "tokens from 0 to 22": dict(tokens=one + 20),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(message):
    given = dict(model=learned(), tokens=one, steps=4, mask=None) | BAD[message]
    for block in given["model"].blocks:
        block.register_forward_pre_hook(lambda *_: pytest.fail("a block was run"))
    error = TypeError if "integers" in message else ValueError
    with pytest.raises(error) as caught:
        generate(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_caches_refuse_what_does_not_fit():
    model, cache = learned(), KVCache()
    with torch.no_grad():
        feed(model, one, cache)
        with pytest.raises(ValueError, match="longer than the 3 cached tokens, got 3"):
            feed(model, one, cache)
        with pytest.raises(ValueError, match="call reset"):
            feed(model, three.repeat(1, 2), cache)
    for drop in (-1, 4):
        with pytest.raises(ValueError, match="expected to drop 0 to"):
            KVCache().crop(drop)
    for wrong in (dict(window=0), dict(window=-2), dict(window=3, spare=-1)):
        with pytest.raises(ValueError, match="expected window >= 1"):
            KVCache(**wrong)
    for texts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            left_pad(texts)


def test_padding_takes_no_position():
    """The longest text fills the table; the padding beside it does not count, and one step more is refused."""
    model = learned()
    tokens, mask = prompts(0, [9, 2])
    wide, more = torch.nn.functional.pad(tokens, (4, 0)), torch.nn.functional.pad(mask, (4, 0))
    same(generate(model, wide, 4, more)[:, 4:], generate(model, tokens, 4, mask))
    with pytest.raises(ValueError, match="12 positions"):
        generate(model, wide, 5, more)
    long = build(Config(V, 16, 1, 4, 12, rotary=1e4))
    assert generate(long, tokens, 9, mask).shape == (2, 18)
