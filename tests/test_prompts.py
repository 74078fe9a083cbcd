"""Virtual tokens on drawn shapes and several models: equal to the words they stand for, to the base when off, clear about bad input."""

import copy
import pickle

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunebook.attention.scores import attention
from tunebook.kit.checks import close, gradcheck, same
from tunebook.tuning.methods import attach, detach, load_adapter, merge, off, pieces, save_adapter, trainable, use
from tunebook.tuning.prompts import Virtual, grown, learnt_positions, mix, share_of_prefix, word_ids

quick = settings(deadline=None, max_examples=40, derandomize=True)
few = settings(deadline=None, max_examples=12, derandomize=True)
seeds, small = st.integers(0, 2**31), st.integers(1, 6)
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
KINDS = {"prompt": ("prompt", {}), "prefix": ("prefix", {}), "prefix, MLP": ("prefix", {"mlp": True, "hidden": 5}),
         "P-tuning, MLP": ("ptuning", {"hidden": 5}), "P-tuning, LSTM": ("ptuning", {"encoder": "lstm", "hidden": 5, "layers": 1})}
EACH = pytest.mark.parametrize("kind", KINDS)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 101,
         "max_position_embeddings": 40, "initializer_range": 0.2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make(cls="BertForSequenceClassification", attn="sdpa", **more):
    """A tiny model with weights from seed 0, in eval mode."""
    torch.manual_seed(0)
    config = {"Bert": tr.BertConfig, "Robe": tr.RobertaConfig, "GPT2": tr.GPT2Config, "Llam": tr.LlamaConfig}[cls[:4]]
    special = SPECIAL if cls[:4] in ("GPT2", "Llam") else {}
    return getattr(tr, cls)._from_config(config(**SHAPE | special | more), attn_implementation=attn).eval()


def put(model, kind, tokens=3, **more):
    method, config = KINDS[kind]
    return attach(model, method, tokens=tokens, **config, **more)


def ids(*shape, seed=0):
    return torch.randint(1, 101, shape, generator=torch.Generator().manual_seed(seed))


def said(model, *args, **batch):
    with torch.no_grad():
        return model(*args, **batch).logits


# The mix

@quick
@given(seed=seeds, B=small, T=small, S=small, P=small, D=small, masked=st.booleans())
def test_attention_with_a_prefix_is_the_mix(seed, B, T, S, P, D, masked):
    g = torch.Generator().manual_seed(seed)
    q, k, v, pk, pv = (torch.randn(B, n, D, generator=g, dtype=torch.float64) for n in (T, S, S, P, P))
    mask = None
    if masked:
        mask = torch.rand(B, 1, S, generator=g) < 0.6
        mask[..., 0] = True
    out, share = mix(q, k, v, pk, pv, mask)
    longer = None if mask is None else torch.cat((torch.ones(B, 1, P, dtype=torch.bool), mask), -1)
    both, weights = attention(q, torch.cat((pk, k), 1), torch.cat((pv, v), 1), longer)
    top = float((q @ torch.cat((pk, k), 1).mT).abs().max()) + 1
    close(out, both, terms=4 * (D + S + P + 8), scale=top * float(torch.cat((pv, v), 1).abs().max()))
    close(share, weights[..., :P].sum(-1), terms=4 * (D + S + P + 8), scale=top)
    assert (share > 0).all() and (share < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mix_does_not_overflow(dtype):
    q, k, v = (torch.full((1, 2), x, dtype=dtype) for x in (1e4, 1e4, 1.0))
    out, share = mix(q, k, v, -k, -v)
    same(out, v)
    assert share.item() == 0
    assert mix(q, -k, v, k, -v)[1].item() == 1


def test_the_mix_has_the_right_gradient():
    g = torch.Generator().manual_seed(0)
    gradcheck(lambda *x: mix(*x)[0], *(torch.randn(2, 3, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(5)))


# Equal to words

@few
@given(seed=seeds, B=st.integers(1, 3), T=small, P=small, attn=st.sampled_from(["sdpa", "eager"]), types=st.booleans())
def test_a_prompt_of_words_is_the_words(seed, B, T, P, attn, types):
    text, words = ids(B, T, seed=seed), ids(P, seed=seed + 1)
    model = attach(make(attn=attn), "prompt", tokens=P, init=words.tolist())
    longer = torch.cat((words.expand(B, -1), text), 1)
    batch, spelt = {"input_ids": text}, {"input_ids": longer}
    if types:
        batch["token_type_ids"] = torch.ones_like(text)
        spelt["token_type_ids"] = torch.cat((torch.zeros_like(words).expand(B, -1), torch.ones_like(text)), 1)
    same(said(model, **batch), said(make(attn=attn), **spelt))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("more", [{"cls": "GPT2LMHeadModel"}, {"cls": "GPT2LMHeadModel", "attn": "eager"},
                                  {"cls": "LlamaForCausalLM", "num_key_value_heads": 2}])
def test_in_a_causal_model_words_are_words(method, more):
    text, words = ids(3, 7), [5, 6, 7, 8]
    spelt = torch.cat((torch.tensor(words).expand(3, 4), text), 1)
    model = attach(make(**more).double(), method, tokens=4, init=words)
    close(said(model, text), said(make(**more).double(), spelt)[:, 4:], terms=4 * (32 + 64 + 32 + 12))
    told = model.generate(text, max_new_tokens=5, do_sample=False)[:, 7:]
    assert torch.equal(told, make(**more).double().generate(spelt, max_new_tokens=5, do_sample=False)[:, 11:])
    assert torch.equal(told, model.generate(text, max_new_tokens=5, do_sample=False, num_beams=1, use_cache=False)[:, 7:])


@EACH
def test_padding_on_the_left_does_not_change_what_is_generated(kind):
    model = put(make("GPT2LMHeadModel").double(), kind)
    text = ids(1, 5)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), text), 1)
    alone = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=6, do_sample=False)[:, 5:]
    assert torch.equal(model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=6, do_sample=False)[:, 8:], alone)


@EACH
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "RobertaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_padding_on_the_right_does_not_change_an_answer(kind, attn, cls):
    pad = 1 if cls.startswith("Robe") else 0
    text = ids(2, 7) % 99 + 2
    text[1, 4:] = pad
    model = put(make(cls, attn).double(), kind)
    close(said(model, text, attention_mask=(text != pad).long())[1:], said(model, text[1:, :4]), terms=4 * (32 + 64 + 32 + 12))


# What comes out

@EACH
@DEVICES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype(kind, device, dtype):
    model = put(make().to(device, dtype), kind)
    out = model(input_ids=ids(2, 5).to(device)).logits
    assert out.dtype == dtype and out.isfinite().all()
    assert pieces(model)[0][1].rows.dtype == torch.promote_types(dtype, torch.float32)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@EACH
def test_autocast(kind):
    model = put(make(), kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids(2, 5)).logits.sum().backward()
    assert pieces(model)[0][1].rows.grad.isfinite().all()


@EACH
@pytest.mark.parametrize("cls", ["BertForTokenClassification", "GPT2LMHeadModel", "BertForMaskedLM", "BertModel"])
def test_one_row_for_each_token_of_the_text(kind, cls):
    model = put(make(cls), kind)
    out = model(input_ids=ids(2, 5))
    assert out[0].shape[:2] == (2, 5)
    assert model(ids(2, 5), return_dict=False)[0].shape[:2] == (2, 5)
    if cls == "BertForTokenClassification":
        assert model(input_ids=ids(2, 5), labels=torch.zeros(2, 5, dtype=torch.long)).loss.isfinite()


@EACH
def test_vectors_and_positions_may_be_given(kind):
    model, text = put(make(), kind), ids(2, 5)
    truth = said(model, text)
    same(said(model, inputs_embeds=model.get_input_embeddings()(text)), truth)
    same(said(model, text, position_ids=torch.arange(5).expand(2, -1)), truth)
    assert (said(model, text, position_ids=torch.arange(5).flip(0).expand(2, -1)) != truth).any()


def test_without_the_shift_the_first_layer_sees_the_same_text():
    text, plain = ids(2, 5), make(attn="eager")
    with torch.no_grad():
        before = plain(input_ids=text, output_attentions=True).attentions[0]
        after = attach(make(attn="eager"), "prefix", tokens=3, shift=False)(input_ids=text, output_attentions=True).attentions[0][..., 3:]
        moved = attach(make(attn="eager"), "prefix", tokens=3)(input_ids=text, output_attentions=True).attentions[0][..., 3:]
    close(after / after.sum(-1, keepdim=True), before, terms=200)
    assert float((moved / moved.sum(-1, keepdim=True) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_share_of_a_prefix(attn):
    model = attach(make(attn=attn), "prefix", tokens=3)
    share = share_of_prefix(model, input_ids=ids(2, 5))
    assert share.shape == (2, 2, 4, 5) and (share > 0).all() and (share < 1).all()
    assert model.config._attn_implementation == attn
    with torch.no_grad():
        pieces(model)[0][1].rows.zero_()
        model.bert.encoder.layer[0].attention.self.key.weight.zero_()
        model.bert.encoder.layer[0].attention.self.key.bias.zero_()
    close(share_of_prefix(model, input_ids=ids(2, 5))[0], torch.full((2, 4, 5), 3 / 8), terms=20)


# On and off

@EACH
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_off_and_detached_it_is_the_base(kind, cls):
    text, truth = ids(2, 5), said(make(cls), ids(2, 5))
    model = put(make(cls), kind)
    assert (said(model, text) != truth).any()
    with off(model):
        same(said(model, text), truth)
    names = set(make(cls).state_dict())
    detach(model)
    same(said(model, text), truth)
    assert set(model.state_dict()) == names and not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
    assert trainable(model)[0] == trainable(make(cls))[0]


@EACH
def test_a_copy_is_its_own(kind):
    model, text = put(make(), kind), ids(2, 5)
    truth = said(model, text)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(said(twin, text), truth)
        with torch.no_grad():
            pieces(twin)[0][1].rows.add_(1)
        assert (said(twin, text) != truth).any()
        detach(twin)
        same(said(model, text), truth)


@EACH
def test_the_state_of_a_model_holds_it(kind):
    model, other = put(make(), kind), put(make(), kind)
    with torch.no_grad():
        pieces(model)[0][1].rows.add_(1)
    other.load_state_dict(model.state_dict())
    same(said(other, ids(2, 5)), said(model, ids(2, 5)))


def test_two_prompts_share_a_model():
    model, text = attach(make(), "prompt", name="a", tokens=3), ids(2, 5)
    a = said(model, text)
    with pytest.raises(ValueError, match="'a' puts virtual tokens.*'b' too"):
        attach(model, "prefix", name="b", tokens=2)
    attach(use(model), "prefix", name="b", tokens=2)
    b = said(model, text)
    same(said(use(model, "a"), text), a)
    same(said(use(model, "b"), text), b)
    with pytest.raises(ValueError, match="choose one"):
        said(use(model, "a", "b"), text)


# Files

@EACH
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_a_file_keeps_the_answers_and_can_be_trained_on(kind, cls, tmp_path):
    model, text = put(make(cls), kind), ids(2, 5)
    again = load_adapter(make(cls), save_adapter(model, tmp_path / "a"))
    same(said(again, text), said(model, text))
    same(said(load_adapter(make(cls), save_adapter(again, tmp_path / "b")), text), said(model, text))
    again(input_ids=text).logits.sum().backward()
    assert pieces(again)[0][1].encoder is None and pieces(again)[0][1].rows.grad.abs().sum() > 0


def test_a_file_of_another_size_is_refused(tmp_path):
    folder = save_adapter(attach(make(num_hidden_layers=3), "prefix", tokens=3), tmp_path)
    model, text = make(), ids(2, 5)
    truth = said(model, text)
    with pytest.raises(ValueError, match="does not fit|other weights"):
        load_adapter(model, folder)
    same(said(model, text), truth)


def test_a_file_without_the_shift_keeps_it_and_peft_refuses_it(tmp_path):
    import peft
    model, text = attach(make(), "prefix", tokens=3, shift=False), ids(2, 5)
    folder = save_adapter(model, tmp_path)
    same(said(load_adapter(make(), folder), text), said(model, text))
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(make(), folder)


# Bad input

@pytest.mark.parametrize(("method", "config", "told"), [
    ("prompt", {"tokens": 0}, "at least 1"), ("prompt", {"tokens": 40}, "40 positions"), ("prefix", {"tokens": 40}, "40 positions"),
    ("prompt", {"init": "word"}, "'normal', 'words' or token ids"), ("prompt", {"init": []}, "at least one"),
    ("prompt", {"init": [101]}, "0 to 100"), ("prefix", {"init": [-1]}, "0 to 100"), ("ptuning", {"encoder": "gru"}, "'mlp' or 'lstm'")])
def test_bad_settings(method, config, told):
    model = make()
    with pytest.raises(ValueError, match=told):
        attach(model, method, **{"tokens": 3} | config)
    assert not pieces(model) and not model.base_model._forward_pre_hooks and trainable(model)[0] == trainable(make())[0]


def test_models_without_a_place_for_them():
    with pytest.raises(ValueError, match="model of transformers"):
        attach(nn.Linear(2, 2), "prompt")
    with pytest.raises(ValueError, match="reads two texts"):
        small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        attach(tr.BartModel(tr.BartConfig(vocab_size=101, encoder_ffn_dim=16, decoder_ffn_dim=16, **small)), "prompt")
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 101, "max_position_embeddings": 40}
    with pytest.raises(ValueError, match="past_key_values.*use 'prompt'"):
        attach(tr.DistilBertModel(tr.DistilBertConfig(**shape)), "prefix")
    with pytest.raises(ValueError, match="needs shift=True"):
        attach(make("RobertaForSequenceClassification"), "prefix", tokens=3, shift=False)


@EACH
def test_texts_that_do_not_fit(kind):
    model = put(make(), kind)
    assert said(model, ids(1, 37)).shape == (1, 2)
    with pytest.raises(ValueError, match="3 virtual tokens and 38 of text need 41 positions, this model has 40: cut the text to 37"):
        model(ids(1, 38))
    for mask in (torch.ones(1, 8), torch.ones(1, 4), torch.ones(1, 1, 5, 5)):
        with pytest.raises(ValueError, match="tokenizer's mask"):
            model(ids(1, 5), attention_mask=mask)


def test_no_limit_without_learnt_positions():
    assert learnt_positions(make("LlamaForCausalLM").base_model) == (None, 0)
    assert learnt_positions(make("RobertaForSequenceClassification").base_model) == (38, 2)
    assert said(put(make("LlamaForCausalLM"), "prefix"), ids(1, 60)).shape == (1, 60, 101)


def test_what_would_drop_a_prefix_is_refused():
    model = attach(make(), "prefix", tokens=3)
    model.base_model.gradient_checkpointing = True
    assert said(model, ids(1, 5)).shape == (1, 2)
    with pytest.raises(ValueError, match="drops the cache"):
        model.train()(ids(1, 5))
    with pytest.raises(ValueError, match="Prefix cannot be merged"):
        merge(model)


def test_helpers():
    assert word_ids([4, 5], 3, 10).tolist() == [4, 5, 4]
    assert word_ids("words", 50, 7).max() < 7
    assert grown(None, (2, 3), 1).tolist() == [[1] * 4] * 2
    assert isinstance(pieces(put(make(), "prompt"))[0][1], Virtual)
