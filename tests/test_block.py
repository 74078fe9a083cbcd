"""Properties of the blocks and of the Transformer over drawn shapes, dtypes and masks; loading, saving and bad input."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tunebook.attention.block import (
    ACTIVATIONS,
    MLP,
    NAMES,
    NORMS,
    Attention,
    Block,
    Config,
    Transformer,
    block_from_torch,
    count_flops,
    count_parameters,
    residual,
    understand,
)
from tunebook.attention.masks import causal, packed, padding, sees, sliding
from tunebook.kit.checks import close, same

sizes, seeds, dtypes = st.integers(1, 7), st.integers(0, 2**31 - 1), st.sampled_from([torch.float32, torch.float64])
quick, slow = (settings(deadline=None, max_examples=n, derandomize=True) for n in (40, 12))
TINY = Config(vocab=23, width=12, layers=2, heads=6, length=16)
VARIANTS = {  # what the three families are made of, and a decoder that asks an encoder
    "bert": Config(23, 12, 2, 6, 16, causal=False, pre=False, activation="gelu", segments=2, eps=1e-12, head="mlm"),
    "gpt2": TINY, "llama": Config(23, 12, 2, 6, 16, 20, 2, norm="rms", activation="silu", gated=True, bias=False, rotary=1e4, tied=False),
    "window": Config(23, 12, 2, 6, 16, kv_heads=3, window=3, rotary=1e4, norm="rms"), "cross": Config(23, 12, 2, 6, 16, cross=True)}
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(seed, B, T, vocab=23):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def random_model(config, seed=0, dtype=torch.float64, device="cpu"):
    """Every part matters: weights that are not tiny, norms and biases that are not 1 and 0."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for p in model.parameters():
        nn.init.normal_(p, mean=p.detach().mean().item() if p.ndim == 1 else 0.0, std=0.3)
    return model.to(device, dtype).eval()


def memory_of(config, B=2, S=4, dtype=torch.float64, device="cpu"):
    return {"memory": draw(9, B, S, config.width).to(device, dtype)} if config.cross else {}


def terms(c, S):
    return 4 * c.layers * ((1 + c.cross) * (4 * c.width + c.width // c.heads + 2 * S + 16) + 3 * c.width + c.inner + 16) + 4 * c.width


# equality with PyTorch


@quick
@given(seed=seeds, B=sizes, T=sizes, E=st.integers(1, 33), dtype=dtypes, name=st.sampled_from(["layer", "rms"]),
       eps=st.sampled_from([1e-5, 1e-12]), shift=st.sampled_from([0.0, 5.0]))
def test_norms_are_the_library_s(seed, B, T, E, dtype, name, eps, shift):
    ours, theirs = NORMS[name](E, eps).to(dtype), {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[name](E, eps, dtype=dtype)
    for p in ours.parameters():
        p.data = draw(seed + p.ndim, E, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = (draw(seed, B, T, E, dtype=dtype) + shift).requires_grad_()
    spread = x.std(-1, unbiased=False) if name == "layer" else x.square().mean(-1).sqrt()
    reach = 1 + x.abs().amax(-1) / (spread.square() + eps).sqrt()
    reach, spread = reach.detach(), spread.detach()
    size = float(reach.max()) * max(float(p.detach().abs().max()) for p in ours.parameters())
    close(ours(x), theirs(x), terms=2 * (2 * E + 8), scale=size)
    up = draw(seed + 1, B, T, E, dtype=dtype)
    steep = E * float(up.abs().max()) * size * float(reach.max()) * float((spread.square() + eps).rsqrt().max())
    close(torch.autograd.grad(ours(x), x, up)[0], torch.autograd.grad(theirs(x), x, up)[0], terms=8 * (2 * E + 8), scale=steep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms_in_half_precision_round_once(name, dtype):
    ours, x = NORMS[name](48, 1e-5).to(dtype), draw(0, 5, 48, dtype=dtype) * 30
    exact = copy.deepcopy(ours).double()(x.double())
    assert ours(x).dtype == dtype
    close(ours(x), exact.to(dtype), terms=2)


@quick
@given(seed=seeds, dtype=dtypes, spread=st.sampled_from([0.1, 1.0, 20.0, 1e4]))
def test_bends_are_the_library_s_and_never_nan(seed, dtype, spread):
    x = draw(seed, 64, dtype=dtype) * spread
    theirs = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu, "relu": F.relu}
    for name, f in theirs.items():
        close(ACTIVATIONS[name](x), f(x), terms=24, scale=float(x.abs().max()))
        assert ACTIVATIONS[name](x.half()).dtype == torch.float16 and not ACTIVATIONS[name](x.half()).isnan().any()


@quick
@given(seed=seeds, B=st.integers(1, 3), T=sizes, S=sizes, H=st.integers(1, 4), D=st.integers(1, 4), M=st.integers(1, 17),
       cross=st.booleans(), first=st.booleans(), bend=st.sampled_from(["relu", "gelu"]), masked=st.booleans())
def test_a_block_is_torch_s_layer(seed, B, T, S, H, D, M, cross, first, bend, masked):
    torch.manual_seed(seed)
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = kind(H * D, H, M, dropout=0.0, activation=bend, norm_first=first, batch_first=True, dtype=torch.float64)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours, x, memory = block_from_torch(theirs), draw(seed, B, T, H * D), draw(seed + 1, B, S, H * D)
    keep = (draw(seed + 2, B, S) > 0) | (torch.arange(S) == 0)
    mask = causal(T) if masked else None
    if cross:
        a = ours(x, mask, memory=memory, memory_mask=padding(keep))[0]
        b = theirs(x, memory, tgt_mask=None if mask is None else ~mask, memory_key_padding_mask=~keep)
    else:
        a, b = ours(x, mask)[0], theirs(x, src_mask=None if mask is None else ~mask)
    reach = 1.0 if first else 1e4  # a last norm over few numbers of nearly one size enlarges errors
    c = Config(1, H * D, 1, H, 1, M, cross=cross)
    close(a, b, terms=terms(c, max(T, S)), scale=reach * float(x.abs().max() + b.detach().abs().max() + H * D + M))


def test_residual_and_mlp_by_hand():
    x, norm = draw(0, 2, 3, 4), NORMS["layer"](4).double()
    same(residual(x, torch.tanh, norm), x + torch.tanh(norm(x)))
    same(residual(x, torch.tanh, norm, pre=False), norm(x + torch.tanh(x)))
    gated = MLP(4, 8, "silu", gated=True).double()
    close(gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x)), terms=64, scale=10.0)


# equality with transformers


def build(family, layers=2, **more):
    """A tiny random model of transformers, in float64, without its float32 norms and softmax."""
    common = {"vocab_size": 23, "initializer_range": 0.3, "attn_implementation": "sdpa"}
    usual = {"hidden_size": 12, "num_hidden_layers": layers, "num_attention_heads": 6, "intermediate_size": 20}
    own = {"gpt2": {"n_embd": 12, "n_layer": layers, "n_head": 6, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
           "bert": usual | {"max_position_embeddings": 16}, "llama": usual | {"num_key_value_heads": 2},
           "mistral": usual | {"num_key_value_heads": 2, "head_dim": None, "sliding_window": 3}}[family]
    name = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[family]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**(common | own | more))).double().eval()
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.2)
    for parent in list(model.modules()):
        for part, child in list(parent.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):
                made = nn.RMSNorm(len(child.weight), child.variance_epsilon)
                made.weight = child.weight
                setattr(parent, part, made)
    return model


choices = {"gpt2": {"tie_word_embeddings": [True, False], "n_inner": [None, 7], "activation_function": ["gelu_new", "gelu", "relu"]},
           "llama": {"tie_word_embeddings": [True, False], "num_key_value_heads": [1, 2, 3, 6], "attention_bias": [True, False],
                     "hidden_act": ["silu", "gelu"], "rms_norm_eps": [1e-6, 1e-2]},
           "mistral": {"num_key_value_heads": [1, 6], "sliding_window": [None, 1, 2, 5]},
           "bert": {"tie_word_embeddings": [True, False], "hidden_act": ["gelu", "gelu_new", "relu"], "type_vocab_size": [1, 2, 3]}}


@pytest.mark.parametrize("family", choices)
@slow
@given(seed=seeds, B=st.integers(1, 3), T=st.integers(1, 9), layers=st.integers(1, 3), data=st.data())
@torch.no_grad()
def test_a_transformer_is_transformers_model(family, seed, B, T, layers, data):
    torch.manual_seed(seed)
    more = {k: data.draw(st.sampled_from(v)) for k, v in choices[family].items()}
    if family == "llama":
        more["mlp_bias"] = more["attention_bias"]
    theirs = build(family, layers, **more)
    ours, tokens = Transformer.from_pretrained(theirs), ids(seed, B, T)
    keep = torch.arange(T) < torch.tensor([T, *(data.draw(st.integers(1, T)) for _ in range(B - 1))])[:, None]
    a, b = ours(tokens, keep, keep=True), theirs(tokens, attention_mask=keep.long(), output_hidden_states=True)
    size = max(float(s.abs().max()) for s in b.hidden_states)
    for x, y in zip(a.states, b.hidden_states, strict=True):
        close(x[keep], y[keep], terms=terms(ours.config, T), scale=300 * size)
    rows = float(ours.head.out.weight.abs().sum(-1).max())
    close(a.logits[keep], b.logits[keep], terms=terms(ours.config, T), scale=300 * size * rows)
    assert sum(count_parameters(ours.config).values()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("positions, segments", [(None, None), (torch.tensor([3, 1, 0, 2]), torch.tensor([[0, 1, 1, 0]] * 2))])
@torch.no_grad()
def test_positions_and_segments_reach_the_tables(positions, segments):
    theirs, tokens = build("bert"), ids(0, 2, 4)
    a = Transformer.from_pretrained(theirs)(tokens, positions=positions, segments=segments).logits
    b = theirs(tokens, position_ids=None if positions is None else positions[None], token_type_ids=segments).logits
    close(a, b, terms=terms(VARIANTS["bert"], 4), scale=100 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", choices)
@torch.no_grad()
def test_half_precision_is_as_near_as_transformers(family, dtype):
    torch.manual_seed(0)
    theirs, tokens = build(family).to(dtype), ids(0, 8, 12)
    ours = Transformer.from_pretrained(theirs)
    truth = Transformer.from_pretrained(theirs, dtype=torch.float64)(tokens).logits
    a, b = ours(tokens), theirs(tokens).logits
    assert a.logits.dtype == a.hidden.dtype == dtype
    far = [float((x.double() - truth).square().mean().sqrt()) for x in (a.logits, b)]
    assert far[0] < 1.5 * far[1]


# masks, positions, caches


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_who_sees_whom(name):
    config = VARIANTS[name]
    model, more = random_model(config), memory_of(config, B=1)
    seen = sees(lambda t: model(t, **more).hidden, ids(1, 1, 8), edit=lambda t: (t + 1) % 23, dim=-1)
    rule = torch.ones(8, 8, dtype=torch.bool) if not config.causal else sliding(8, 5) if config.window else causal(8)
    assert torch.equal(seen, rule)  # two layers of window 3 reach 5 tokens


@pytest.mark.parametrize("name", VARIANTS)
@quick
@given(seed=seeds, T=st.integers(2, 8), real=st.integers(1, 7))
@torch.no_grad()
def test_padded_tokens_change_no_bit_of_the_others(name, seed, T, real):
    real, config = min(real, T - 1), VARIANTS[name]
    model, tokens, more = random_model(config), ids(seed, 2, T), memory_of(config)
    keep = (torch.arange(T) < real).expand(2, T)
    other = torch.where(keep, tokens, (tokens + 1) % 23)
    a, b = (model(t, m, **more).hidden[:, :real] for t, m in ((tokens, keep), (other, keep.long())))
    same(a, b)
    close(a, model(tokens, padding(keep), **more).hidden[:, :real])
    close(a, model(tokens[:, :real], **more).hidden, terms=terms(config, T), scale=300 * float(a.abs().max()))


@torch.no_grad()
def test_packed_documents_are_separate_texts():
    model, tokens = random_model(VARIANTS["gpt2"]), ids(0, 1, 8)
    documents, places = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    together = model(tokens, packed(documents), positions=places).logits
    apart = torch.cat([model(tokens[:, :3]).logits, model(tokens[:, 3:]).logits], 1)
    close(together, apart, terms=terms(TINY, 8), scale=300 * float(apart.abs().max()))


class Kept:
    """A cache with the signature of transformers' Cache; `limit` forgets the oldest keys."""
    def __init__(self, limit=None):
        self.kept, self.limit, self.count = {}, limit, 0

    def length(self):
        return self.count

    def update(self, k, v, layer):
        if layer in self.kept:
            k, v = (torch.cat(pair, -2) for pair in zip(self.kept[layer], (k, v)))
        self.count += k.shape[-2] - (self.kept[layer][0].shape[-2] if layer in self.kept else 0) if layer == 0 else 0
        self.kept[layer] = [t[..., -self.limit:, :] if self.limit else t for t in (k, v)]
        return k, v


class Theirs:
    """transformers' own cache behind our two methods."""
    def __init__(self):
        self.cache = transformers.DynamicCache()

    def length(self):
        return self.cache.get_seq_length()

    def update(self, k, v, layer):
        return self.cache.update(k, v, layer)


@pytest.mark.parametrize("name", ["gpt2", "llama", "window", "cross"])
@slow
@given(seed=seeds, cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), padded=st.booleans())
@torch.no_grad()
def test_any_chunks_through_a_cache_give_the_whole(name, seed, cuts, padded):
    config, T = VARIANTS[name], sum(cuts)
    model, tokens, more = random_model(config), ids(seed, 2, T), memory_of(config)
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[1, : T // 2] = not padded  # padding on the left
    whole = model(tokens, keep, **more)
    for cache in (Kept(), Theirs(), *([Kept(limit=2)] if name == "window" else [])):
        parts, at = [], 0
        for n in cuts:
            parts.append(model(tokens[:, at:at + n], keep[:, : at + n], cache=cache, **more).logits)
            at += n
        assert cache.length() == T
        close(torch.cat(parts, 1), whole.logits, terms=terms(config, T), scale=300 * float(whole.logits.abs().max()))


@torch.no_grad()
def test_a_hook_on_out_switches_a_head_off():
    model, tokens = random_model(VARIANTS["llama"]), ids(0, 1, 5)
    full, attention = model(tokens).hidden, model.blocks[1].attention
    off = copy.deepcopy(model)
    off.blocks[1].attention.out.weight.data[:, 2:4] = 0  # head 1 of width 2
    hook = attention.out.register_forward_pre_hook(lambda m, args: args[0] * (torch.arange(12) // 2 != 1))
    close(model(tokens).hidden, off(tokens).hidden, terms=terms(TINY, 5), scale=100.0)
    hook.remove()
    same(model(tokens).hidden, full)
    assert not torch.equal(off(tokens).hidden, full)


# counting, training, saving


@quick
@given(B=st.integers(1, 2), T=st.integers(1, 6), past=st.integers(0, 5), name=st.sampled_from(list(VARIANTS)), S=st.integers(1, 5))
@torch.no_grad()
def test_counts_are_what_is_there(B, T, past, name, S):
    config = VARIANTS[name]
    model, more, cache = random_model(config), memory_of(config, B, S), Kept()
    if past and config.causal:
        model(ids(0, B, past), cache=cache, **more)
    with FlopCounterMode(display=False) as counter:
        model(ids(0, B, T), cache=cache if config.causal else None, **more)
    keys = T + past * config.causal
    assert counter.get_total_flops() == sum(count_flops(config, B, T, keys, S if config.cross else 0).values())
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(config).values())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns(name):
    config = VARIANTS[name]
    model = Transformer(config)
    out = model(ids(0, 2, 6), **memory_of(config, dtype=torch.float32))
    F.cross_entropy(out.logits.flatten(0, 1), ids(1, 2, 6).flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() and "key.bias" not in n] == []
    assert (model.head.out.weight is model.embed.tokens.weight) == config.tied


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_saving_keeps_every_bit(name, dtype, tmp_path):
    model = random_model(VARIANTS[name], dtype=dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Transformer.from_pretrained(str(tmp_path / "new" / "folder"))
    assert again.config == model.config and not again.training
    for (a, p), (b, q) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a == b
        same(p, q)
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_matrix_is_written_once_and_loading_draws_nothing(tmp_path):
    from safetensors import safe_open
    random_model(TINY).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert "head.out.weight" not in f.keys() and "embed.tokens.weight" in f.keys()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = Transformer.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state()) and all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("family", choices)
def test_a_folder_of_transformers_is_its_model(family, tmp_path):
    theirs = build(family)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")  # several files
    a, b = Transformer.from_pretrained(tmp_path), Transformer.from_pretrained(theirs)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and a.config == b.config
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        same(p, q)
    a.embed.tokens.weight.data += 1
    assert not torch.equal(a.embed.tokens.weight, b.embed.tokens.weight)  # copies, also of the model object


def test_names_of_old_files():
    bert, gpt2 = build("bert"), build("gpt2")
    new = understand(bert.config.to_dict(), bert.state_dict())[1]
    old = {k: p for k, p in bert.state_dict().items() if not k.startswith("cls.predictions.decoder")}
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p for k, p in old.items()}
    old["bert.pooler.dense.weight"] = torch.ones(1)
    assert understand(bert.config.to_dict(), old)[1].keys() == new.keys() - {"head.out.weight"}
    bare = {k.removeprefix("transformer."): p for k, p in gpt2.state_dict().items() if k != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1)
    assert understand(gpt2.config.to_dict(), bare)[0].head == "none"
    assert understand(gpt2.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}, bare)[0].head == "linear"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_one_code_for_all_devices_and_dtypes(name, dtype, device, tmp_path):
    config = VARIANTS[name]
    random_model(config, dtype=dtype).save_pretrained(tmp_path)
    model, keep = Transformer.from_pretrained(tmp_path, device=device), torch.tensor([[1] * 5, [1] * 3 + [0] * 2], device=device)
    out = model(ids(0, 2, 5).to(device), keep, keep=True, **memory_of(config, dtype=dtype, device=device))
    truth = random_model(config).to(device)
    for p, q in zip(truth.parameters(), model.parameters()):
        p.copy_(q)
    exact = truth(ids(0, 2, 5).to(device), keep, **memory_of(config, device=device)).logits
    assert out.logits.dtype == out.weights[0].dtype == dtype and out.logits.device.type == device
    error = (out.logits.double() - exact)[keep.bool()].square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 50 * torch.finfo(dtype).eps


# bad input: one clear error each


def call(config=TINY, **more):
    return lambda: random_model(config)(**({"tokens": ids(0, 2, 5)} | more))


def read(family, weights=None, **changed):
    return lambda: understand(build(family).config.to_dict() | changed, weights or {})


STRETCHED = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}  # as older files write it
ALONE = {"classifier.weight": torch.ones(1)}
BAD = {
    "a text longer than the table": (call(tokens=ids(0, 1, 17)), ValueError, "from 0 to 15.*table"),
    "positions beyond the table": (call(positions=torch.arange(12, 17)), ValueError, "from 0 to 15, got 12 to 16"),
    "tokens beyond the vocabulary": (call(tokens=ids(0, 2, 5) + 20), ValueError, "tokens from 0 to 22, got .* tokenizer"),
    "negative tokens": (call(tokens=ids(0, 2, 5) - 23), ValueError, "tokens from 0 to 22, got -"),
    "tokens without a batch": (call(tokens=torch.tensor([1, 2])), ValueError, r"\(B, T\), got \(2,\): add the batch"),
    "no tokens": (call(tokens=ids(0, 2, 0)), ValueError, "at least one token"),
    "floating tokens": (call(tokens=torch.ones(2, 5)), TypeError, "integers as tokens, got torch.float32"),
    "segments beyond the table": (call(VARIANTS["bert"], segments=ids(0, 2, 5)), ValueError, "segments from 0 to 1"),
    "padding of another length": (call(mask=torch.ones(2, 4, dtype=torch.long)), ValueError, r"\(B, S\) = \(2, 5\).*got \(2, 4\)"),
    "a mask of two dimensions": (call(mask=torch.ones(5, 5, dtype=torch.bool)), ValueError, r"mask\[None, None\]"),
    "a mask of three dimensions": (call(mask=torch.ones(2, 5, 5, dtype=torch.bool)), ValueError, r"\(B, H, T, S\) = \(2, 6, 5, 5\)"),
    "a mask that enlarges": (call(mask=torch.ones(4, 1, 5, 5, dtype=torch.bool)), ValueError, r"got \(4, 1, 5, 5\)"),
    "a floating padding mask": (call(mask=torch.ones(2, 5)), TypeError, "integers or booleans"),
    "a floating mask": (call(mask=torch.zeros(1, 1, 5, 5)), TypeError, "boolean mask"),
    "memory for a model without cross-attention": (call(memory=torch.ones(2, 3, 12).double()), ValueError, "cross=True"),
    "cross-attention without memory": (call(VARIANTS["cross"]), ValueError, "cross=True"),
    "a memory mask of another length": (call(VARIANTS["cross"], memory=torch.ones(2, 3, 12).double(), memory_mask=torch.ones(2, 5).bool()),
                                        ValueError, r"\(B, S\) = \(2, 3\)"),
    "NaN in the memory": (call(VARIANTS["cross"], memory=torch.full((2, 3, 12), torch.nan).double()), ValueError, "NaN or inf.*memory"),
    "heads that do not divide": (lambda: Transformer(Config(23, 12, 1, 5, 16)), ValueError, "divide the width 12, got 5"),
    "key-value heads that do not divide": (lambda: Transformer(Config(23, 12, 1, 6, 16, kv_heads=4)), ValueError, "divide the 6 heads"),
    "an odd head width under rotary positions": (call(Config(23, 9, 1, 3, 16, rotary=1e4)), ValueError, "even width, got 3"),
    "an unknown norm": (lambda: Config(23, 12, 1, 6, 16, norm="batch"), ValueError, "norm among layer, rms, got 'batch'"),
    "an unknown bend": (lambda: Config(23, 12, 1, 6, 16, activation="gelu_new"), ValueError, "among gelu, gelu_tanh, silu, relu"),
    "an unknown head": (lambda: Config(23, 12, 1, 6, 16, head="lm"), ValueError, "among linear, mlm, none"),
    "a window in an encoder": (lambda: Config(23, 12, 1, 6, 16, causal=False, window=3), ValueError, "window"),
    "a layer with another bend": (lambda: block_from_torch(nn.TransformerEncoderLayer(8, 2, activation=torch.tanh)), ValueError, "gelu"),
    "no transformers model": (lambda: Transformer.from_pretrained(nn.Linear(2, 2)), TypeError, "transformers model, got Linear"),
    "a misspelt name": (lambda: Transformer.from_pretrained("minilmm"), ValueError, "did you mean 'minilm'"),
    "no folder": (lambda: Transformer.from_pretrained("./no/such/folder"), FileNotFoundError, "neither a folder nor a hub id"),
    "an unknown family": (read("gpt2", model_type="mamba"), ValueError, "'mamba'.*known: bert, gpt2, llama, mistral, tunebook"),
    "a variant of GPT-2": (read("gpt2", scale_attn_by_inverse_layer_idx=True), ValueError, "not built here"),
    "a BERT that decodes": (read("bert", is_decoder=True), ValueError, "is_decoder = False"),
    "stretched positions": (read("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "yarn"}), ValueError, "'default'.*'yarn'"),
    "stretched rotary positions, old": (read("llama", **STRETCHED), ValueError, "'default'.*'linear'"),
    "heads of another width": (read("llama", head_dim=4), ValueError, "head_dim = 2"),
    "an unknown activation": (read("gpt2", activation_function="mish"), ValueError, "'mish'"),
    "a task head": (read("bert", ALONE), ValueError, "without a place in a bert: classifier.weight"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_in_one_line(what):
    f, error, message = BAD[what]
    with pytest.raises(error, match=message) as caught:
        f()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_nan_in_any_weight_is_noticed_and_named(name):
    config = VARIANTS[name]
    for weight in [n for n, _ in random_model(config).named_parameters() if not n.startswith("head.")]:
        model = random_model(config)
        model.get_parameter(weight).view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=f"weight {weight.replace('.', '[.]')}, load"):
            model(torch.zeros(2, 3, dtype=torch.long), **memory_of(config))  # row 0 of the table is read


def test_overflow_in_half_precision_is_told():
    model = random_model(TINY, dtype=torch.float16)
    model.blocks[0].mlp.down.weight.data *= 60000
    with pytest.raises(ValueError, match="torch.float16 was too narrow"), torch.no_grad():
        model(ids(0, 1, 5))


def test_files_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    with pytest.raises(FileNotFoundError, match="config.json and model.safetensors"):
        Transformer.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="pickles, are not read"):
        Transformer.from_pretrained(tmp_path)
    random_model(VARIANTS["llama"]).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    save_file({k: p for k, p in whole.items() if k != "norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights lack norm.weight"):
        Transformer.from_pretrained(tmp_path)
    save_file(whole | {"norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected norm.weight \(12,\), got \(3,\)"):
        Transformer.from_pretrained(tmp_path)
    save_file(whole, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tied": True}))
    with pytest.raises(ValueError, match="tie_word_embeddings.*differ"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    with pytest.raises(ValueError, match="no architecture is called 'other'"):
        Transformer.from_pretrained(tmp_path)


def test_a_hub_id_fails_at_once_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="(?s)owner/name.*Tried.*folder: .*hub: .*hf download owner/name"):
        Transformer.from_pretrained("owner/name")
    assert os.listdir(tmp_path) == []


def test_attention_reads_a_context_and_refuses_nothing_that_fits():
    attention = Attention(12, 6, 3).double()
    out, weights = attention(draw(0, 2, 4, 12), draw(1, 2, 7, 12))
    assert out.shape == (2, 4, 12) and weights.shape == (2, 6, 4, 7)
    close(weights.sum(-1), torch.ones(2, 6, 4, dtype=torch.float64), terms=2 * 7 + 2)


def test_each_family_names_each_weight_once():
    for family, names in NAMES.items():
        assert len(set(names.values())) == len(names), family
    for kind, name in (("bert", "bert"), ("gpt2", "gpt2"), ("llama", "llama")):
        wanted = {k.rsplit(".", 1)[0] for k in Transformer(VARIANTS[name]).state_dict()}
        assert wanted == {n.replace("*", str(i)) for n in NAMES[kind] for i in range(2)}


def test_block_stands_alone():
    x = draw(0, 1, 4, 12)
    out, weights = Block(VARIANTS["gpt2"]).double()(x, causal(4))
    assert out.shape == x.shape and not weights[..., ~causal(4)].any()
