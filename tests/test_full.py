"""Full, top and head: what trains on drawn models, rates by depth, files, and clear errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from tunebook.kit.checks import same
from tunebook.tuning.full import agreement, depths, layer_rates, retrieval, vectors
from tunebook.tuning.methods import adapters, attach, detach, load_adapter, off, pieces, save_adapter, trainable

quick = settings(deadline=None, max_examples=30, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
IDS = torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(0))


def bert(layers=2, width=32, **options):
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * width, "vocab_size": 101}
    return BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=40, num_labels=2, **options)).eval()


def gpt(layers=2):
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": layers, "n_head": 2, "vocab_size": 101, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def train(model, groups, steps=3):
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS.to(model.device)).logits.square().sum().backward()
        optimizer.step()


@quick
@given(layers=st.integers(1, 12), make=st.sampled_from([bert, gpt]))
def test_depths_count_from_the_head(layers, make):
    model = bert(layers, 4) if make is bert else gpt(layers)
    found = depths(model)
    assert list(found) == [n for n, _ in model.named_parameters()]
    for path, depth in found.items():
        parts = path.split(".")
        number = next((int(p) for p in parts if p.isdigit()), None)
        if number is not None:
            assert depth == layers - number
        else:
            assert depth == (layers + 1 if "embeddings" in path or parts[-2] in ("wte", "wpe") else 0)


@quick
@given(layers=st.integers(1, 5), data=st.data())
def test_top_trains_a_block_more_for_each_k(layers, data):
    k = data.draw(st.integers(1, layers))
    model = attach(bert(layers, 8), "top", k=k)
    one = sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    rest = sum(p.numel() for m in (model.bert.pooler, model.classifier) for p in m.parameters())
    assert trainable(model)[0] == k * one + rest
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())


@quick
@given(layers=st.integers(1, 5), decay=st.floats(0.1, 1.0), rate=st.floats(1e-6, 1.0), wd=st.floats(0, 0.5))
def test_groups_hold_all_that_trains_once(layers, decay, rate, wd):
    model = attach(bert(layers, 8), "full")
    groups, found = layer_rates(model, rate, decay, wd), depths(model)
    of = {id(p): n for n, p in model.named_parameters()}
    inside = [of[id(p)] for g in groups for p in g["params"]]
    assert sorted(inside) == sorted(found)
    for g in groups:
        assert g["lr"] == rate * decay ** g["depth"]
        for p in g["params"]:
            assert found[of[id(p)]] == g["depth"] and g["weight_decay"] == (wd if p.ndim > 1 else 0)
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("method, config", [("full", {}), ("top", {"k": 1}), ("head", {})])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_frozen_stays_and_a_file_brings_back_the_rest(method, config, device, tmp_path):
    model = attach(bert(hidden_dropout_prob=0.0).to(device), method, **config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, layer_rates(model, 1e-2, 0.5))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            same(p, before[name])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    again = load_adapter(bert(hidden_dropout_prob=0.0).to(device), save_adapter(model, tmp_path))
    for a, b in zip(model.parameters(), again.parameters()):
        same(a, b)
    assert adapters(again)["default"].config == config


def test_a_language_model_may_train_its_top():
    model = attach(gpt(), "top", k=1)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".h.1." in n or ".ln_f." in n for n in trains)


def test_rates_of_an_adapter_s_pieces():
    model = attach(bert(3), "houlsby", width=2)
    groups = layer_rates(model, 1.0, 0.5)
    assert sorted({g["depth"] for g in groups}) == [0, 1, 2, 3]
    assert sum(p.numel() for g in groups for p in g["params"]) == trainable(model)[0]
    assert len(pieces(detach(model))) == 0


def test_trained_weights_cannot_be_switched_off():
    with pytest.raises(ValueError, match="keep a copy of the model from before"), off(attach(bert(), "full")):
        pass


@pytest.mark.parametrize("k", [0, 3, -1, 1.5, "1"])
def test_bad_k(k):
    with pytest.raises(ValueError, match="k must be 1 to 2, the blocks of this BertForSequenceClassification; got"):
        attach(bert(), "top", k=k)


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1, got .*: it is a factor for each layer"):
        layer_rates(bert(), 1e-3, decay)


def test_no_layers_and_no_head():
    for call in (depths, lambda m: layer_rates(m, 1e-3), lambda m: attach(m, "top")):
        with pytest.raises(ValueError, match="this Linear has no numbered layers: there are no upper and lower ones"):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this GPT2LMHeadModel has no head on top of its base: nothing would train"):
        attach(gpt(), "head")


# What the encoder still knows

class Reader:
    """A tokenizer for words that are numbers, padded on the right."""

    def __call__(self, texts, **_):
        from transformers import BatchEncoding
        ids = [[int(w) for w in t.split()] for t in texts]
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return BatchEncoding({"input_ids": rows, "attention_mask": (rows > 0).long()})


TEXTS = [" ".join(str(1 + (7 * i + 3 * j * j + i * j) % 100) for j in range(3 + i % 5)) for i in range(12)]


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
def test_vectors_do_not_depend_on_the_batch(method):
    model = attach(bert(), method)
    model.train()
    together, alone = vectors(model, Reader(), TEXTS), torch.cat([vectors(model, Reader(), [t]) for t in TEXTS])
    assert model.training and not together.requires_grad and together.shape == (12, 32)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(12))


@quick
@given(seed=st.integers(0, 2**31))
def test_agreement_is_of_ranks(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (nn.functional.normalize(torch.randn(9, 5, generator=g), dim=1) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g)).Q  # turns the space, and no similarity
    assert agreement(a, a) == pytest.approx(1) and agreement(a, b) == pytest.approx(agreement(b, a))
    assert agreement(a, a @ turn) == pytest.approx(1, abs=0.02) and -1 <= agreement(a, b) <= 1
    assert agreement(a, a[:1].expand(9, 5)) == 0  # every text has become the same


def test_retrieval_finds_texts_by_their_rest():
    table = nn.functional.one_hot(torch.arange(101), 101).float()

    class Words(nn.Module):
        """States that are the words themselves: a text is found by the words that are left."""

        def __init__(self):
            super().__init__()
            self.weight, self.base_model = nn.Parameter(table), lambda input_ids, attention_mask: self.states(input_ids)

        def states(self, ids):
            return type("Out", (), {"last_hidden_state": self.weight[ids]})

    assert retrieval(Words(), Reader(), ["1 2 3", "4 5 6", "7 8 9"]) == 1.0
    assert retrieval(Words(), Reader(), ["1 2 3", "1 2 4", "7 8 9"]) == pytest.approx(2 / 3)  # without the third word the first two are one
