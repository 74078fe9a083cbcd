"""Bottlenecks, IA3, BitFit, LayerNorm-tuning: identity, counts and gradients on drawn shapes, peft's files, and clear errors."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tunebook.kit.checks import close, gradcheck, same
from tunebook.tuning.adapters import ACTIVATIONS, Bottleneck, Norm, Scale, blocks, ia3, is_norm, layernorm, projections
from tunebook.tuning.methods import adapters, attach, detach, load_adapter, merge, off, pieces, save_adapter, trainable, unmerge

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds, sizes = st.integers(0, 2**31), st.integers(1, 9)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
METHODS = ["houlsby", "pfeiffer", "ia3", "bitfit", "layernorm"]
IDS = torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(0))


def bert(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 101}
    return BertForSequenceClassification(BertConfig(**shape | {"max_position_embeddings": 40, "num_labels": 2} | options)).eval()


def gpt(seed=0):
    torch.manual_seed(seed)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 101, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits


def moved(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += (torch.randn(p.shape, generator=g) / 10).to(p)
    return model


def linear(rows, cols, kind, seed, dtype=torch.float64, bias=True):
    torch.manual_seed(seed)
    if kind == "Linear":
        return nn.Linear(cols, rows, bias=bias, dtype=dtype)
    layer = Conv1D(rows, cols).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


kinds = st.sampled_from(["Linear", "Conv1D"])


# The pieces

@quick
@given(seed=seeds, rows=sizes, cols=sizes, width=sizes, kind=kinds, activation=st.sampled_from(list(ACTIVATIONS)))
def test_a_bottleneck_is_its_formula(seed, rows, cols, width, kind, activation):
    piece = Bottleneck(linear(rows, cols, kind, seed), "a", width, activation)
    x = torch.randn(2, 3, cols, dtype=torch.float64)
    same(piece(x), piece.base(x))
    assert sum(p.numel() for p in piece.parameters() if p.requires_grad) == 2 * rows * width + width + rows
    assert not any(p.requires_grad for p in piece.base.parameters())
    nn.init.normal_(piece.up.weight)
    nn.init.normal_(piece.up.bias)
    h = piece.base(x)
    g = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation]
    formula = h + g(h @ piece.down.weight.T + piece.down.bias) @ piece.up.weight.T + piece.up.bias
    close(piece(x), formula, terms=4 * (rows + width + 10), scale=float(1 + h.abs().max()) * (rows + 1) * (width + 1) * 30)


@quick
@given(seed=seeds, rows=sizes, cols=sizes, kind=kinds, inputs=st.booleans())
def test_a_scale_merges_into_any_layer(seed, rows, cols, kind, inputs):
    layer = linear(rows, cols, kind, seed)
    model = nn.Sequential(nn.ModuleDict({"value": layer}))
    x = torch.randn(4, cols, dtype=torch.float64)
    before = layer(x)
    attach(model, "ia3", targets=["value"], feedforward=["value"] if inputs else [], head=[])
    piece, = (p for _, p in pieces(model))
    same(piece(x), before)
    nn.init.normal_(piece.by)
    apart = piece(x)
    expected = layer(x * piece.by) if inputs else before * piece.by
    same(apart, expected)
    merge(model)
    weight = layer.weight if kind == "Linear" else layer.weight.T
    close(piece(x), apart, terms=2 * (cols + 2), scale=float((x.abs() @ weight.abs().T + layer.bias.abs()).max()))
    unmerge(model)
    same(piece(x), apart)
    detach(model)
    same(layer(x), before)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("inputs", [False, True])
def test_gradients_of_a_scale(kind, inputs):
    piece = Scale(linear(3, 5, kind, 0), "a", inputs)
    x, by = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn_like(piece.by).requires_grad_()
    gradcheck(lambda x, by: torch.func.functional_call(piece, {"by": by}, x), x, by)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_a_bottleneck(activation):
    piece = Bottleneck(linear(4, 6, "Linear", 0), "a", 3, activation)
    values = [torch.randn_like(piece.get_parameter(n)).requires_grad_() for n in Bottleneck.suffixes]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda x, *v: torch.func.functional_call(piece, dict(zip(Bottleneck.suffixes, v)), x), x, *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_kept_in_float32_at_least(dtype, device):
    base, x = nn.Linear(6, 4, dtype=dtype, device=device), torch.randn(3, 6, device=device).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for piece in (Bottleneck(base, "a", 2, "gelu"), Scale(base, "a", False), Scale(base, "a", True)):
        trains = [p for p in piece.parameters() if p.requires_grad]
        assert {p.dtype for p in trains} == {wide} and {p.device for p in trains} == {base.weight.device}
        same(piece(x), base(x))
        assert piece(x).dtype == dtype
        piece(x).float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trains)
    assert Norm(nn.LayerNorm(4, dtype=dtype), "a").own.weight.dtype == dtype


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows):
    base = nn.Linear(6, 4)
    for piece in (Bottleneck(base, "a", 1, "relu"), Scale(base, "a", False), Scale(base, "a", True)):
        assert piece(torch.randn(rows, 6)).shape == (rows, 4)


def test_autocast_runs_every_method():
    for method in METHODS:
        model = attach(bert(), method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=IDS).logits.float().sum().backward()
        trained = [p for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)


# On models

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("device", DEVICES)
def test_a_method_starts_as_the_identity_trains_only_its_own_and_comes_off(method, make, device):
    model = make().to(device)
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, method, head=[])
    same(logits(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS.to(device)).logits.square().sum().backward()
        optimizer.step()
    assert (logits(model) != before).any()
    if method != "bitfit":
        with off(model):
            same(logits(model), before)
    detach(model)
    for key, value in model.state_dict().items():
        if method == "bitfit" and key.endswith("bias"):
            continue
        same(value, weights[key])


@quick
@given(layers=st.integers(1, 3), heads=st.integers(1, 3), per_head=st.integers(1, 5), wide=st.integers(1, 20), width=st.integers(1, 7))
def test_counts_are_the_formulas(layers, heads, per_head, wide, width):
    E = heads * per_head
    wide += E
    model = bert(hidden_size=E, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=wide)
    one = 2 * E * width + width + E
    norms = (2 * layers + 1) * 2 * E
    formula = {"houlsby": 2 * layers * one, "pfeiffer": layers * one, "ia3": layers * (2 * E + wide),
               "bitfit": layers * (7 * E + wide) + 2 * E, "layernorm": norms}
    for method, count in formula.items():
        attach(model, method, head=[], **{"width": width} if method in ("houlsby", "pfeiffer") else {})
        assert trainable(model)[0] == count, method
        detach(model)
    attach(model, "houlsby", head=[], width=width, norms=True)
    assert trainable(model)[0] == 2 * layers * one + norms


CONFIGS = {
    "bert": ({}, "attention.output.dense", "output.dense"), "roberta": ({}, "attention.output.dense", "output.dense"),
    "electra": ({"embedding_size": 8}, "attention.output.dense", "output.dense"),
    "llama": ({"num_key_value_heads": 1}, "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ({"num_key_value_heads": 1}, "self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ({}, "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ({"ffn_dim": 16, "word_embed_proj_dim": 8}, "self_attn.out_proj", "fc2"),
    "distilbert": ({"dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}, "attention.out_lin", "ffn.lin2"),
    "gpt2": ({"n_embd": 8, "n_layer": 1, "n_head": 2}, "attn.c_proj", "mlp.c_proj"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_projections_keys_and_norms_are_found(name):
    options, attention, feedforward = CONFIGS[name]
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    config = AutoConfig.for_model(name, **(options if name in ("gpt2", "distilbert") else small | options))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    (first,), (second,) = projections(model)
    assert first.endswith(f"0.{attention}") and second.endswith(f"0.{feedforward}")
    filled = ia3(model, "a")
    assert filled["feedforward"] == [second] and len(filled["targets"]) == (2 if name in ("gpt2", "gpt_neox") else 3)
    norms = [m for m in model.modules() if is_norm(m)]
    layernorm(model, "norms")
    assert len(pieces(model, "norms")) == len(norms) > 1


def test_blocks_of_a_bare_stack():
    stack = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])
    assert list(blocks(stack)) == ["0", "1"]
    assert projections(stack) == (["0.0", "1.0"], ["0.2", "1.2"])


def test_a_head_is_no_target():
    class Model(nn.Module):
        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.top = nn.ModuleList([nn.LayerNorm(4)]), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

        def get_output_embeddings(self):
            return None

    model = attach(Model(), "layernorm", targets=["0"])
    assert [path for path, _ in pieces(model)] == ["body.0"]
    model = attach(Model(), "bitfit", head=[])
    assert trainable(model)[0] == 4


def test_bitfit_with_targets():
    model = attach(bert(), "bitfit", targets=["query", "intermediate.dense"])
    trains = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("classifier")}
    assert len(trains) == 4 and all(n.endswith(("query.bias", "intermediate.dense.bias")) for n in trains)


# Files

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [bert, gpt])
def test_saved_and_loaded(method, make, tmp_path):
    model = moved(attach(make(), method))
    save_adapter(model, tmp_path)
    again = load_adapter(make(), tmp_path)
    same(logits(again), logits(model))
    assert adapters(again)["default"].config == adapters(model)["default"].config


@pytest.mark.parametrize("method", ["ia3", "layernorm"])
@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_and_writes_the_same_file(method, make, tmp_path):
    peft = pytest.importorskip("peft")
    ours = moved(attach(make(), method))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    same(logits(ours), logits(theirs))
    trains = [[p for p in m.parameters() if p.requires_grad] for m in (ours, theirs)]
    grads = [torch.autograd.grad(m(input_ids=IDS).logits.square().sum(), ps) for m, ps in zip((ours, theirs), trains)]
    assert len(grads[0]) == len(grads[1]) > 0
    for a, b in zip(*grads):
        same(a.flatten(), b.flatten())
    moved(theirs, 1).save_pretrained(tmp_path / "theirs")
    same(logits(load_adapter(make(), tmp_path / "theirs")), logits(theirs))


@pytest.mark.filterwarnings("ignore")
def test_many_steps_are_peft_s(tmp_path):
    peft = pytest.importorskip("peft")
    labels, losses = torch.tensor([0, 1, 1]), []
    for model in (attach(bert(), "ia3"), peft.get_peft_model(bert(), peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "value", "0.output.dense", "1.output.dense"],
            feedforward_modules=["0.output.dense", "1.output.dense"]))):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(input_ids=IDS).logits, labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] / 2


def test_peft_is_told_of_conv1d_without_a_warning(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(attach(gpt(), "ia3"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(gpt(), tmp_path)
    assert not [w for w in seen if "fan_in_fan_out" in str(w.message)]


@pytest.mark.parametrize("method, targets", [("houlsby", "output.dense"), ("pfeiffer", "all-linear"), ("ia3", "all-linear"), ("ia3", "key"),
                                             ("bitfit", "query"), ("layernorm", "LayerNorm")])
def test_one_name_is_a_string(method, targets, tmp_path):
    model = moved(attach(bert(), method, targets=targets))
    assert adapters(model)["default"].config["targets"] == targets
    same(logits(load_adapter(bert(), save_adapter(model, tmp_path))), logits(model))


# Several, and merging

def test_two_adapters_multiply_and_switch():
    model = bert()
    before = logits(model)
    moved(attach(model, "ia3", name="a", head=[]))
    one = logits(model)
    moved(attach(model, "houlsby", name="b", head=[], width=3))
    assert (logits(model) != one).any()
    with off(model, "b"):
        same(logits(model), one)
    with off(model):
        same(logits(model), before)
    same(logits(detach(model, "b")), one)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_bottlenecks_do_not_merge(method):
    model = moved(attach(bert(), method, width=3))
    before = logits(model)
    with pytest.raises(ValueError, match="Bottleneck cannot be merged: no weight"):
        merge(model)
    same(logits(model), before)


def test_merged_16_bit_scales_say_what_is_lost():
    model = moved(attach(bert().to(torch.bfloat16), "ia3", head=[]))
    with pytest.warns(UserWarning, match="rounds away"):
        merge(model)


# Bad input

@pytest.mark.parametrize("method, config, words", [
    ("houlsby", {"activation": "swish"}, "activation must be one of gelu, relu, silu, tanh, got 'swish'"),
    ("houlsby", {"width": 0}, "width must be a whole number from 1 on, got 0"),
    ("pfeiffer", {"width": 2.5}, "width must be a whole number from 1 on, got 2.5"),
    ("pfeiffer", {"targets": ["fc2"]}, "no layer is called 'fc2'; this BertForSequenceClassification has: .*output.dense"),
    ("pfeiffer", {"targets": []}, "no layer is called '.no name given.'"),
    ("ia3", {"targets": ["key"], "feedforward": ["value"]}, "feedforward must be among the targets, which lack bert.*value"),
    ("ia3", {"targets": ["k_proj"]}, "no layer is called 'k_proj'"),
    ("bitfit", {"targets": ["dropout"]}, "no layer is called 'dropout'"),
    ("layernorm", {"targets": ["query"]}, "no layer is called 'query'; .* has: .*LayerNorm"),
])
def test_bad_settings_leave_the_model_alone(method, config, words):
    model = bert()
    before = logits(model)
    with pytest.raises(ValueError, match=words):
        attach(model, method, **config)
    assert not pieces(model) and not adapters(model) and all(p.requires_grad for p in model.parameters())
    same(logits(model), before)


@pytest.mark.parametrize("model, method, words", [
    (nn.Sequential(nn.ReLU()), "houlsby", r"numbered blocks .* Sequential cannot be told: name them with targets=\[...\]; .* none"),
    (nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))]), "pfeiffer", "the output projections of this ModuleList .*: 0, 1"),
    (nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))]), "ia3", "keys and values of this ModuleList"),
    (nn.Sequential(nn.Linear(4, 4, bias=False)), "bitfit", "no biases: BitFit has nothing to train, choose another method"),
    (nn.Sequential(nn.Linear(4, 4)), "layernorm", "no LayerNorm or RMSNorm to train: choose another method"),
    (nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)), "layernorm", "no LayerNorm or RMSNorm to train"),
])
def test_a_model_without_the_place(model, method, words):
    with pytest.raises(ValueError, match=words):
        attach(model, method)
