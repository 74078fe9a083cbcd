"""Any method on any model: what is found, what changes, what comes back to the bit, and what is refused."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from tunebook.kit.checks import close, same
from tunebook.tuning import methods
from tunebook.tuning.methods import (
    METHODS,
    Layer,
    Method,
    adapters,
    attach,
    detach,
    digest,
    find,
    fingerprint,
    heads,
    layers,
    load_adapter,
    merge,
    off,
    pieces,
    replace,
    save_adapter,
    trainable,
    unmerge,
    use,
    weight_of,
)

quick = settings(deadline=None, max_examples=25, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
IDS = torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(0))


class Affine(Layer):
    """Scales and shifts each output."""

    suffixes = {"by": "scale", "plus": "shift"}

    def __init__(self, base, name):
        super().__init__(base, name)
        w = weight_of(base)
        self.by, self.plus = nn.Parameter(w.new_ones(len(w))), nn.Parameter(w.new_zeros(len(w)))

    def tuned(self, x):
        return self.base(x) * self.by + self.plus

    def merged(self, weight, bias):
        return weight * self.by[:, None], self.plus if bias is None else bias * self.by + self.plus


class Bent(Affine):
    """Not linear: nothing to merge into."""

    def tuned(self, x):
        return self.base(x) * self.by + self.plus * x.mean().tanh()

    merged = Layer.merged


def affine(model, name, targets=("query", "value")):
    for path, layer in find(model, targets).items():
        replace(model, path, Affine(layer, name))
    return {"targets": list(targets)}


def bent(model, name, targets=("query",)):
    for path, layer in find(model, targets).items():
        replace(model, path, Bent(layer, name))
    return {"targets": list(targets)}


def half_done(model, name):
    affine(model, name)
    raise RuntimeError("in the middle")


def biases(model, name):
    for path, p in model.named_parameters():
        p.requires_grad_(path.endswith("bias"))
    return {}


@pytest.fixture(autouse=True, scope="module")
def known():
    with pytest.MonkeyPatch.context() as m:
        for f in (affine, bent, half_done, biases):
            m.setitem(METHODS, f.__name__, Method(f"{__name__}:{f.__name__}", "for tests", 1e-3))
        yield


def bert(seed=0, cls=BertForSequenceClassification, **more):
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=101,
                        max_position_embeddings=40, num_labels=2, **more)
    return cls(config).eval()


def gpt(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=101, n_positions=40, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def said(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(next(model.parameters()).device)).logits


def moved(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += (torch.randn(p.shape, generator=g) / 5).to(p)
    return model


# Finding layers

def test_every_name_has_to_match_and_the_error_lists_what_exists():
    with pytest.raises(ValueError, match="'v_proj'.*query.*self.query.*value"):
        find(bert(), ["query", "v_proj"])
    with pytest.raises(ValueError, match="no name given"):
        find(bert(), [])
    assert list(find(bert(), "query")) == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_a_name_is_the_end_of_a_path_at_a_dot():
    assert not any(p.endswith("intermediate.dense") for p in find(bert(), ["output.dense"]))
    with pytest.raises(ValueError):
        find(bert(), ["ery"])


def test_all_linear_is_all_but_head_and_output_embedding():
    model = bert()
    linear = {p for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(find(model, "all-linear")) == linear - {"classifier"}
    masked = bert(cls=BertForMaskedLM)
    assert not any("decoder" in p for p in find(masked, "all-linear"))
    assert {p.rsplit(".", 1)[-1] for p in find(gpt(), "all-linear")} == {"c_attn", "c_proj", "c_fc"}


def test_heads():
    assert heads(bert()) == ["classifier"]
    assert heads(gpt()) == [] and heads(bert(cls=BertForMaskedLM)) == []
    assert heads(nn.Linear(2, 2)) == []


def test_a_plain_module_can_be_tuned():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = model(x)
    attach(model, "affine", targets=["0"], head=["2"])
    same(model(x), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.by", "0.plus", "2.weight", "2.bias"}


def test_tied_weights_count_once():
    assert trainable(gpt())[1] == sum(p.numel() for p in gpt().parameters())


# On and off

@quick
@given(names=st.lists(st.sampled_from(["query", "key", "value", "intermediate.dense", "output.dense"]), min_size=1, unique=True),
       seed=st.integers(0, 99))
def test_attach_starts_at_the_base_and_off_returns_to_it(names, seed):
    model = bert(seed)
    head = copy.deepcopy(model.classifier)
    before, state = said(model), {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, "affine", targets=names)
    same(said(model), before)
    moved(model, seed)
    model.classifier = head
    assert not torch.equal(said(model), before)
    with off(model):
        same(said(model), before)
    detach(model)
    same(said(model), before)
    assert model.state_dict().keys() == state.keys()
    for k, v in model.state_dict().items():
        same(v, state[k])
    assert all(p.requires_grad for p in model.parameters()) and adapters(model) == {}


def test_off_ends_when_the_block_fails():
    model = attach(bert(), "affine")
    with pytest.raises(RuntimeError), off(model):
        raise RuntimeError
    assert all(p.active for _, p in pieces(model))


def test_a_method_that_fails_leaves_the_model_as_it_was():
    model = bert()
    keys, before, on = list(model.state_dict()), said(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in the middle"):
        attach(model, "half_done")
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == on and adapters(model) == {}
    same(said(model), before)


def test_several_adapters():
    model = attach(bert(), "affine", name="a")
    moved(model, 1)
    head = copy.deepcopy(model.classifier)
    only_a = said(model)
    moved(attach(model, "affine", name="b", targets=["query", "output.dense"]), 2)
    model.classifier = head
    both = said(model)
    with off(model, "b"):
        same(said(model), only_a)
    use(model, "a")
    same(said(model), only_a)
    use(model, "a", "b")
    same(said(model), both)
    assert [p for p, m in pieces(model, "b")] == list(find(model, ["query", "output.dense"]))
    detach(model, "a")
    use(model, "b")
    assert {m.name for _, m in pieces(model)} == {"b"}
    with pytest.raises(ValueError, match="no adapter is called 'a'.*it has: b"):
        use(model, "a")


def test_deepcopy_keeps_the_adapter():
    model = moved(attach(bert(), "affine"))
    twin = copy.deepcopy(model)
    same(said(twin), said(model))
    with torch.no_grad():
        twin.bert.encoder.layer[0].attention.self.query.by += 1
    assert not torch.equal(said(twin), said(model))
    assert adapters(twin)["default"].method == "affine"


# Merging

@quick
@given(seed=st.integers(0, 99), first=st.booleans(), causal=st.booleans(),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.filterwarnings("ignore:merging into")
def test_merge_equals_apart_and_unmerge_restores_the_bits(seed, first, causal, dtype):
    model = (gpt(seed) if causal else bert(seed)).to(dtype)
    names = [["c_attn", "c_fc"], ["c_fc"]] if causal else [["query", "value"], ["query", "output.dense"]]
    moved(attach(model, "affine", name="a", targets=names[0]), seed)
    moved(attach(model, "affine", name="b", targets=names[1]), seed + 1)
    state, apart = {k: v.clone() for k, v in model.state_dict().items()}, said(model)
    merge(model)
    if dtype == torch.float64:
        close(said(model), apart, terms=10_000)  # two layers of sums over at most 96 terms, and their growth through norms
    if first:
        unmerge(model, "b")
        unmerge(model, "a")
    else:
        unmerge(model)
    for k, v in model.state_dict().items():
        same(v, state[k])
    same(said(model), apart)


def test_merging_outer_alone_needs_the_inner_merged_or_off():
    model = moved(attach(moved(attach(bert(), "affine", name="a")), "affine", name="b"))
    with pytest.raises(ValueError, match="'a' lies below 'b': merge it first"):
        merge(model, "b")
    use(model, "b")
    apart = said(model)
    merge(model, "b")
    close(said(model), apart, terms=10_000)
    with pytest.raises(ValueError, match="unmerge it first"), off(model):
        pass
    with pytest.raises(ValueError, match="is merged"):
        save_adapter(model, "nowhere", "b")


def test_what_cannot_be_merged_says_so():
    model = attach(bert(), "bent")
    with pytest.raises(ValueError, match="Bent cannot be merged"):
        merge(model)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(bert())
    with pytest.raises(ValueError, match="cannot be switched off"), off(attach(bert(), "biases")):
        pass


def test_merging_twice_is_merging_once():
    model = moved(attach(bert(), "affine"))
    merge(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merge(model)
    for k, v in model.state_dict().items():
        same(v, state[k])


def test_merging_into_sixteen_bits_warns_only_when_it_loses():
    model = moved(attach(bert().bfloat16(), "affine", targets=["query"]))
    with torch.no_grad():
        for _, p in pieces(model):
            p.by.fill_(1.01)
    with pytest.warns(UserWarning, match="rounds away .* of the update"):
        merge(model)
    with torch.no_grad():
        whole = attach(bert().bfloat16(), "affine", targets=["query"])
        for _, p in pieces(whole):
            p.by.fill_(2.0)
    merge(whole)  # doubling is exact: a warning would be an error here


# Files

@pytest.mark.parametrize("device", DEVICES)
def test_save_and_load(tmp_path, device):
    model = moved(attach(bert().to(device), "affine"))
    save_adapter(model, tmp_path / "x")
    again = load_adapter(bert().to(device), tmp_path / "x", name="mine")
    same(said(again), said(model))
    assert adapters(again)["mine"].config == {"targets": ["query", "value"]}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_method_without_pieces_travels_too(tmp_path):
    model = moved(attach(bert(), "biases"))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert all(k.endswith("bias") or "classifier" in k for k in f.keys())
    same(said(load_adapter(bert(), tmp_path)), said(model))


def test_the_fingerprint_is_of_the_base_alone():
    model = bert()
    before = fingerprint(model, ["classifier"])
    moved(attach(model, "affine"))
    assert fingerprint(model, ["classifier"]) == before
    assert fingerprint(bert(), ["classifier"]) == before == fingerprint(bert().bfloat16(), ["classifier"])
    assert fingerprint(bert(1), ["classifier"]) != before


@pytest.fixture
def saved(tmp_path):
    return save_adapter(moved(attach(bert(), "affine")), tmp_path / "saved")


def spoil(folder, config=None, tensors=None, sign=True):
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as f:
        held, told = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    if tensors:
        tensors(held)
        save_file(held, path, told | ({"sha256": digest(held)} if sign else {}))
    if config:
        now = json.loads((folder / "adapter_config.json").read_text())
        config(now)
        (folder / "adapter_config.json").write_text(json.dumps(now))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.scale"
SPOILT = {
    "a tensor too few": (lambda f: spoil(f, tensors=lambda t: t.pop(QUERY)), "it lacks .*query.scale"),
    "a tensor too many": (lambda f: spoil(f, tensors=lambda t: t.update(more=torch.ones(1))), "more has no place here"),
    "another shape": (lambda f: spoil(f, tensors=lambda t: t.update({QUERY: torch.ones(2)})),
                      r"query.scale has shape \(2,\), expected \(32,\)"),
    "another value": (lambda f: spoil(f, tensors=lambda t: t[QUERY].add_(1), sign=False), "damaged, its tensors are not those saved"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:99]), "damaged"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "damaged"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "an unknown type": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "XLORA"}'), "asks for 'XLORA'.*LORA"),
    "an unknown method": (lambda f: spoil(f, config=lambda c: c.update(tunebook_method="afine")), "no method is called 'afine'"),
    "an unknown setting": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_bias": true}'), "lora_bias"),
    "another target": (lambda f: spoil(f, config=lambda c: c["settings"].update(targets=["quary"])), "'quary'"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_bad_file_is_one_clear_error_and_changes_nothing(fault, saved):
    change, message = SPOILT[fault]
    change(saved)
    model = bert()
    state, keys = {k: v.clone() for k, v in model.state_dict().items()}, list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert list(model.state_dict()) == keys and adapters(model) == {}
    for k, v in model.state_dict().items():
        same(v, state[k])


def test_another_base_is_refused(saved):
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(bert(1), saved)


def test_a_missing_file_is_named(tmp_path, saved):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_adapter(bert(), saved)


def test_a_file_without_a_head_warns(tmp_path):
    model = attach(bert(), "affine", head=[])
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="holds no classifier"):
        load_adapter(bert(), tmp_path)


def test_layers_do_not_look_inside_pieces():
    model = attach(attach(bert(), "affine", name="a"), "affine", name="b")
    paths = [p for p, _ in layers(model)]
    assert "bert.encoder.layer.0.attention.self.query" in paths and not any(p.endswith(".base") for p in paths)
    assert list(find(model, ["query"])) == list(find(bert(), ["query"]))


def test_bad_calls():
    model = attach(bert(), "affine")
    with pytest.raises(ValueError, match="'default' is on this model"):
        attach(model, "affine")
    with pytest.raises(ValueError, match="no method is called 'lara'; did you mean 'lora'"):
        attach(bert(), "lara")
    with pytest.raises(ValueError, match="no adapter is called 'x'.*it has: none"):
        detach(bert(), "x")
    assert methods.known("lora").peft == "LORA"


def test_a_penalty_is_added_in_training_once_per_label(monkeypatch):
    monkeypatch.setattr(Affine, "penalty", lambda self: self.by.square().sum())
    model = attach(bert(), "affine")
    batch = {"input_ids": IDS, "labels": torch.tensor([0, -100, 1])}

    def loss(model, batch):
        return model(input_ids=batch["input_ids"]).logits.sum(), None
    plain, more = loss(model, batch)[0], methods.penalized(loss)(model, batch)[0]
    close(more - plain, torch.tensor(2.0 * 4 * 32), terms=10)
    use(model)
    same(methods.penalized(loss)(model, batch)[0], plain)  # switched off, it costs nothing
    use(model, "default")
    with torch.no_grad():
        same(methods.penalized(loss)(model, batch)[0], plain)
