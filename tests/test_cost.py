"""The cost of a step: counted against PyTorch on random models, closed forms, guards, and a property or two."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import flop_counter
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from tunebook.tuning import cost
from tunebook.tuning.cost import PARAMETERS, PLANS, Sizes, Tape, below_limit, count, enough, free, least, parameters, sizes, walk
from tunebook.tuning.methods import METHODS, attach

aten = torch.ops.aten
KNOWN = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, out_shape=None, **kw: flop_counter.sdpa_flop_count(q, k, v),
         aten._scaled_dot_product_flash_attention_for_cpu_backward:
             lambda g, q, k, v, *a, out_shape=None, **kw: flop_counter.sdpa_backward_flop_count(g, q, k, v),
         aten.addmm_: lambda y, a, b, *rest, out_shape=None, **kw: flop_counter.mm_flop(a, b)}
ALL = [(name, {}) for name in PLANS] + [
    ("lora", {"targets": "all-linear", "r": 3}), ("lora", {"targets": ["intermediate.dense"], "dropout": 0.2}), ("lora", {"fused": False}),
    ("dora", {"targets": "all-linear"}), ("dora", {"dropout": 0.1}), ("adalora", {"targets": ["output.dense"]}),
    ("houlsby", {"norms": True, "width": 5}), ("pfeiffer", {"activation": "tanh"}),
    ("ia3", {"targets": ["query", "intermediate.dense"], "feedforward": ["intermediate.dense"]}),
    ("bitfit", {"targets": ["query"]}), ("prompt", {"tokens": 3}), ("prefix", {"tokens": 2, "mlp": True, "hidden": 7}),
    ("ptuning", {"hidden": 9}), ("top", {"k": 1})]
MINILM = Sizes(L=6, d=384, f=1536, H=12, V=30522)


@st.composite
def shapes(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    return Sizes(L=draw(st.integers(1, 3)), d=heads * 4 * draw(st.integers(1, 4)), f=8 * draw(st.integers(3, 12)) + 4 * 16 * heads, H=heads,
                 V=draw(st.integers(30, 90)), P=64, types=draw(st.integers(1, 3)), C=draw(st.integers(2, 5)),
                 drop=draw(st.sampled_from([0.0, 0.1])), attention_drop=draw(st.sampled_from([0.0, 0.1])))


def model_of(s):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        hidden_size=s.d, num_hidden_layers=s.L, num_attention_heads=s.H, intermediate_size=s.f, vocab_size=s.V, max_position_embeddings=s.P,
        type_vocab_size=s.types, num_labels=s.C, hidden_dropout_prob=s.drop, attention_probs_dropout_prob=s.attention_drop))


def kept(model, batch, y):
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found.setdefault(t.untyped_storage().data_ptr(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(model(**batch).logits, y)
    return sum(t.untyped_storage().nbytes() for t in found.values())


def batch_of(s, B, T, mask):
    ids = torch.randint(1, s.V, (B, T))
    pad = (torch.arange(B)[:, None] > 0) | (torch.arange(T) < T // 2)
    return {"input_ids": ids} | ({"attention_mask": pad.long(), "token_type_ids": torch.zeros_like(ids)} if mask else {})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(s=shapes(), case=st.sampled_from(ALL), B=st.integers(1, 5), T=st.integers(2, 20), mask=st.booleans())
def test_parameters_bytes_and_flops_are_those_of_the_model(s, case, B, T, mask):
    name, config = case
    if name == "top" and not config:
        config = {"k": min(2, s.L)}
    if name == "pissa":  # no more directions than the width has
        config = config | {"r": min(config.get("r", 8), s.d)}
    model = attach(model_of(s), name, **config).train()
    b, batch, y = count(s, name, B, T, mask, **config), batch_of(s, B, T, mask), torch.zeros(B, dtype=torch.long)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert b.trainable == real == parameters(s, name, **config) == parameters(model, name, **config)
    assert b.saved == kept(model, batch, y)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=KNOWN) as counter:
        F.cross_entropy(model(**batch).logits, y).backward()
    assert sum(b.flops.values()) - b.flops["optimizer"] == counter.get_total_flops()


def test_every_method_is_counted():
    assert set(METHODS) == set(PLANS) == set(PARAMETERS)


def test_an_lstm_before_the_text():
    s = replace(MINILM, V=100)
    model = attach(model_of(s), "ptuning", encoder="lstm").train()
    real, b = sum(p.numel() for p in model.parameters() if p.requires_grad), count(s, "ptuning", 16, 128, encoder="lstm")
    assert b.trainable == real == parameters(s, "ptuning", encoder="lstm")
    batch, y = batch_of(s, 16, 128, False), torch.zeros(16, dtype=torch.long)
    assert abs(b.saved / kept(model, batch, y) - 1) < 0.02


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_attached_is_what_is_counted(name):
    s = Sizes(L=2, d=16, f=40, H=2, V=50, P=64)
    model = attach(model_of(s), name)
    assert count(model, B=2, T=5) == count(s, name, 2, 5) == count(model, name, 2, 5)


def test_the_walk_gives_everything_back():
    m = cost.Step(MINILM, PLANS["lora"](MINILM), 2, 8, True)
    result = cost.loss(m)
    assert m.t.meter.now > m.t.saved() / 2
    cost.backward(m.t)
    del result
    gc.collect()
    assert m.t.meter.now == sum(g.size for g in m.t.gradients.values()) == 4 * parameters(MINILM, "lora")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(s=shapes(), name=st.sampled_from(list(PLANS)), B=st.integers(1, 4), T=st.integers(2, 20))
def test_more_costs_more_and_full_costs_most(s, name, B, T):
    b, larger, longer = count(s, name, B, T), count(s, name, B + 1, T), count(s, name, B, T + 1)
    for more in (larger, longer):
        assert more.saved >= b.saved and more.above >= b.above and sum(more.flops.values()) > sum(b.flops.values())
        assert more.trainable == b.trainable
    assert b.above >= 4 * b.trainable and b.above >= b.saved - 16 * B * T - 8 * B and b.peak == b.weights + b.moments + b.above
    assert count(s, "head", B, T).saved <= b.saved


@settings(max_examples=20, deadline=None, derandomize=True)
@given(s=shapes(), B=st.integers(1, 4), T=st.integers(2, 20))
def test_frozen_matrices_cost_two_thirds(s, B, T):
    s = replace(s, drop=0.0, attention_drop=0.0)
    full, one = count(s, "full", B, T).flops, walk(s, cost.Plan(trains=lambda path: path == "bert.embeddings.LayerNorm.weight"), B, T).flops
    assert one["forward"] == full["forward"] and one["input gradients"] == full["input gradients"]
    assert one["weight gradients"] == 2 * B * s.d * s.C < full["weight gradients"]


def test_numbers_that_are_no_costs_are_refused():
    for B, T in ((0, 1), (1, 0), (-1, 5)):
        with pytest.raises(ValueError, match="at least one text of one token"):
            count(MINILM, "full", B, T)
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        parameters(MINILM, "loar")
    with pytest.raises(ValueError, match="no layer is called 'q_proj'"):
        count(MINILM, "lora", targets=["q_proj"])
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        sizes(gpt())
    with pytest.raises(ValueError, match="name a method"):
        count(model_of(replace(MINILM, L=1, d=16, f=40, H=2, V=50)))


def gpt():
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50, n_positions=32))


def test_memory_is_refused_only_when_it_certainly_lacks():
    s = Sizes(L=2, d=16, f=40, H=2, V=50, P=64)
    model = attach(model_of(s), "lora")
    need = least(model, 8, 16)
    assert need == count(model, B=8, T=16).moments + count(model, B=8, T=16).above == enough(model, 8, 16, available=need)
    with pytest.raises(MemoryError, match=r"8 texts of 16 tokens .* a batch of 4 fits"):
        enough(model, 8, 16, available=need - 1)
    with pytest.raises(MemoryError, match="choose a method that trains less"):
        enough(model, 8, 16, available=0)
    assert enough(model, 8, 16) == need and least(model, 8, 16, "bf16") < need
    model.bert.encoder.layer[0].gradient_checkpointing = True
    assert least(model, 8, 16) == 12 * count(model, B=1, T=1).trainable


def test_a_model_that_cannot_be_counted_asks_for_gradients_and_moments():
    model = gpt()
    assert enough(model, 10**6, 32) == 12 * sum(p.numel() for p in model.parameters())
    with pytest.raises(MemoryError):
        enough(model, 1, 32, available=10)


def test_no_false_alarm_for_the_largest_run_of_the_chapters():
    assert count(MINILM, "full", 32, 128).peak < 2e9, "an ordinary laptop has more"


def test_free_memory_is_known_on_linux_and_on_a_gpu():
    assert free() > 10**7 and free("meta") is None
    if torch.cuda.is_available():
        before = free("cuda")
        held = torch.ones(2**26, device="cuda")
        assert before - free("cuda") >= 2**28 * 0.9
        del held


def test_a_store_counts_while_it_is_held():
    meter = cost.Meter()
    stores = [cost.Store(n, meter) for n in (3, 5)]
    assert (meter.now, meter.top) == (8, 8)
    stores.pop()
    assert (meter.now, meter.top) == (3, 8)
    t = Tape(lambda path: False)
    x = t.weight("w", 4, new=True)
    assert t.weight("w", 4) is x and t.op([x], (4,), keep=[x]).size == 16 and t.saved() == 0


GROUPS = {  # files of a control group: bytes that are left
    "version 2": ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": "1000", "sys/fs/cgroup/job/memory.current": "700",
                   "sys/fs/cgroup/job/memory.stat": "anon 3\ninactive_file 50\n"}, 350),
    "no limit": ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": "max\n", "sys/fs/cgroup/job/memory.current": "700",
                  "sys/fs/cgroup/job/memory.stat": ""}, float("inf")),
    "a parent is tighter": ({"proc/self/cgroup": "0::/a/b", **{
        f"sys/fs/cgroup/{at}/{name}": text for at, top in (("a", "900"), ("a/b", "2000"))
        for name, text in (("memory.max", top), ("memory.current", "600"), ("memory.stat", ""))}}, 300),
    "version 1, seen from inside": ({"proc/self/cgroup": "3:cpu:/x\n4:memory:/outside/x", **{
        f"sys/fs/cgroup/memory/memory.{name}": text for name, text in (
            ("limit_in_bytes", "500"), ("usage_in_bytes", "100"), ("stat", "total_inactive_file 20\n"))}}, 420),
    "nothing there": ({}, float("inf")),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_container_has_less(tmp_path, name):
    files, left = GROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert below_limit(tmp_path) == left
