"""Several tasks, one encoder: roles right in every drawn sentence, gradients that add up, heads apart, weight 0, seeds, clear errors."""

import itertools
import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit.checks import close, same
from tunebook.tuning import together as T
from tunebook.tuning.batches import IGNORED, pad
from tunebook.tuning.pretrain import tiny_bert

quick = settings(deadline=None, max_examples=40, derandomize=True)
slow = settings(deadline=None, max_examples=8, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
seeds = st.integers(0, 2**31)


def bert(seed=0, layers=2):
    return tiny_bert(len(T.TOKENS), seed, layers, width=16).bert


def main(count=20, **more):
    return T.Task("main", [T.did_it(s, "dog") for s in T.sentences(count, 0, "dog")], 2, **more)


def roles(count=20, **more):
    return T.Task("roles", [T.role_tags(s) for s in T.sentences(count, 1)], 4, **more)


def words(count=20):
    def hide(ids, g):
        hidden = (torch.rand(ids.shape, generator=g) < 0.5) & (ids > 4)
        return ids.masked_fill(hidden, 4), ids.masked_fill(~hidden, IGNORED)
    return T.Task("words", [{"input_ids": e["input_ids"]} for e in roles(count).rows], len(T.TOKENS), corrupt=hide)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def firsts(*tasks, size=8, seed=0):
    return {t.name: next(T.stream(t, size, seed)) for t in tasks}


def fit(*tasks, steps=4, seed=0, **more):
    models = T.share(bert(seed), tasks, seed)
    losses = [*T.learn_together(models, tasks, steps, 0.01, size=8, seed=seed, **more)]
    return models, losses


# Sentences

def read(words_):
    """Roles by reading from left to right: takes the phrases of place and instrument off the ends, then looks at what is left."""
    rest, found = list(words_), {}

    def phrase(at):
        found["INSTRUMENT" if rest[at] == "with" else "PLACE"] = rest[at + 1]
        del rest[at:at + 2]

    if rest[0] in ("with", "near", "by"):
        phrase(0)
    passive = "was" in rest and rest[0] != "it"
    if rest[-2] in ("with", "near") or rest[-2] == "by" and not (passive and rest.count("by") == 1):
        phrase(len(rest) - 2)
    nouns = [w for w in rest if w in T.NOUNS]
    turned = passive or rest[0] == "it" and rest[4] in T.NOUNS
    return found | dict(zip(("PATIENT", "AGENT") if turned else ("AGENT", "PATIENT"), nouns))


@quick
@given(seed=seeds, asked=st.sampled_from([None, *T.NOUNS]))
def test_a_reader_of_words_finds_the_same_roles(seed, asked):
    for s in T.sentences(25, seed, asked):
        told = {r: w for w, r in zip(s.words, s.roles) if r}
        assert read(s.words) == told, " ".join(s.words)
        assert len(set(told.values())) == len(told) and {"AGENT", "PATIENT"} <= set(told)
        assert all((w in T.NOUNS) == (r is not None) for w, r in zip(s.words, s.roles))
        assert set(s.words) <= set(T.TOKENS[5:])
        if asked:
            assert asked in (told["AGENT"], told["PATIENT"])


@quick
@given(seed=seeds)
def test_sentences_are_distinct_seeded_and_unlike_others(seed):
    made = T.sentences(30, seed, "dog")
    assert len(set(made)) == 30 and made == T.sentences(30, seed, "dog") != T.sentences(30, seed + 1, "dog")
    assert not set(made[:10]) & set(T.sentences(30, seed, "dog", unlike=made[:10]))


@quick
@given(seed=seeds)
def test_examples_are_aligned(seed):
    for s in T.sentences(10, seed, "owl"):
        tags, asked = T.role_tags(s), T.did_it(s, "owl")
        assert tags["input_ids"] == asked["input_ids"] == [2, *map(T.TOKENS.index, s.words), 3]
        told = [None if k == IGNORED else T.ROLES[k] for k in tags["labels"]]
        assert told == [None, *s.roles, None]
        assert asked["labels"] == [int(s.roles[s.words.index("owl")] == "AGENT"), *[IGNORED] * (len(s.words) + 1)]


@quick
@given(seed=seeds)
def test_shuffling_keeps_places_and_tags_of_each_sentence(seed):
    rows = roles(15).rows
    kept = deepcopy(rows)
    mixed = T.shuffled(rows, seed)
    assert rows == kept and mixed == T.shuffled(rows, seed)
    for a, b in zip(rows, mixed):
        assert a["input_ids"] == b["input_ids"] and sorted(a["labels"]) == sorted(b["labels"])
        assert [k == IGNORED for k in a["labels"]] == [k == IGNORED for k in b["labels"]]


def test_every_deal_of_two_tags_is_as_frequent():
    row = {"input_ids": [2, 9, 8, 3], "labels": [IGNORED, 0, 1, IGNORED]}
    kept = sum(T.shuffled([row], seed)[0] == row for seed in range(400))
    assert abs(kept - 200) < 4 * math.sqrt(100)


# Sharing

@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_a_cut_encoder_is_the_same_one(layers, device):
    whole = bert(layers=3).to(device).eval()
    batch = {k: v.to(device) for k, v in pad(roles(5).rows).items() if k != "labels"}
    states = whole(**batch, output_hidden_states=True).hidden_states
    before = torch.random.get_rng_state()
    part = T.below(whole, layers)
    same(torch.random.get_rng_state(), before)
    same(part(**batch).last_hidden_state, states[layers])
    assert {id(p) for p in part.parameters()} <= {id(p) for p in whole.parameters()}
    assert len(whole.encoder.layer) == 3 and whole.config.num_hidden_layers == 3


def test_a_head_depends_on_seed_and_name_only():
    together, alone = T.share(bert(), [roles(), main(), words()], 3), T.share(bert(), [main()], 3)
    same(together["main"].head.weight, alone["main"].head.weight)
    assert not torch.equal(alone["main"].head.weight, T.share(bert(), [main()], 4)["main"].head.weight)
    assert sum(p.numel() for p in together.parameters()) == sum(p.numel() for p in bert().parameters()) + 17 * (2 + 4 + len(T.TOKENS))


# The loss and its gradient

@slow
@given(seed=seeds, weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
def test_the_joint_loss_by_hand(seed, weights):
    tasks = [main(), roles(layers=1), words()]
    models, batches = T.share(bert(), tasks, seed).double(), firsts(*tasks, seed=seed)
    w = dict(zip(batches, weights))
    total = count = size = 0.0
    for name, b in batches.items():
        z = models[name](b["input_ids"], b["attention_mask"]).logits
        for i, t in (b["labels"] != IGNORED).nonzero().tolist():
            one = F.cross_entropy(z[i, t], b["labels"][i, t]).item()
            total, count, size = total + w[name] * one, count + w[name], size + abs(w[name] * one)
    labels = sum(int((b["labels"] != IGNORED).sum()) for b in batches.values())
    if count:
        ours, theirs = T.joint(models, batches, w).double(), torch.tensor(total / count, dtype=torch.float64)
        close(ours, theirs, 2 * (labels + len(T.TOKENS) + 60), size / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_shared_gradients_add_up_and_heads_stay_apart(dtype, device):
    tasks = [main(), roles()]
    models, batches = T.share(bert(), tasks).to(device, dtype), firsts(*tasks)
    count = {n: int((b["labels"] != IGNORED).sum()) for n, b in batches.items()}
    shared = list(models["main"].encoder.parameters())

    def grads(loss, names):
        models.zero_grad()
        loss.backward()
        assert {n for n, m in models.items() if m.head.weight.grad is not None} == set(names)
        return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in shared)

    both = grads(T.joint(models, batches, dict.fromkeys(batches, 1.0)), batches)
    alone = [T.classify(models[n], {k: v.to(device) for k, v in b.items()})[0] / sum(count.values()) for n, b in batches.items()]
    parts = [grads(loss, [n]) for loss, n in zip(alone, batches)]
    if device == "cpu":
        same(both, sum(parts))  # one addition, in either order
    close(both, sum(parts), 2 * (len(parts) + len(T.TOKENS) * 16), sum(p.abs() for p in parts).max().item())


def test_no_label_no_loss():
    models, batches = T.share(bert(), [main()]), firsts(main())
    batches["main"]["labels"][:] = IGNORED
    loss = T.joint(models, batches, {"main": 1.0})
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in models.parameters())


# Training

def test_weight_zero_changes_no_bit():
    (alone, losses), (beside, same_losses) = fit(main()), fit(main(), roles(weight=0.0, layers=1))
    assert losses == same_losses
    same(flat(beside["main"].parameters()), flat(alone["main"].parameters()))
    same(flat(beside["roles"].head.parameters()), flat(T.share(bert(), [roles()])["roles"].head.parameters()))


def test_the_main_task_sees_the_same_batches_whoever_is_beside_it():
    for a, b in zip(itertools.islice(T.stream(main(), 8, 5), 7), itertools.islice(T.stream(main(weight=2.0), 8, 5), 7)):
        same(a["input_ids"], b["input_ids"])
    orders = [[next(q)["input_ids"].tolist() for q in [T.stream(t, 8, s)] for _ in range(3)] for t, s in
              ((main(), 5), (main(), 6), (replace(main(), name="other"), 5))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_an_epoch_holds_each_example_once():
    task = main(21)
    seen = [row for b in itertools.islice(T.stream(task, 8, 0), 3) for row in zip(b["input_ids"].tolist(), b["labels"].tolist())]
    short = sorted(([i for i in ids if i], labels[0]) for ids, labels in seen)
    assert short == sorted((r["input_ids"], r["labels"][0]) for r in task.rows)


@pytest.mark.parametrize("in_turn", [False, True])
def test_runs_repeat_and_the_list_s_order_does_not_matter(in_turn):
    (a, losses), (b, again) = fit(main(), words(), in_turn=in_turn), fit(words(), main(), in_turn=in_turn)
    assert losses == again
    same(flat(a.parameters()), flat(b.parameters()))
    assert fit(main(), words(), seed=1, in_turn=in_turn)[1] != losses


@quick
@given(seed=seeds, weight=st.floats(0.2, 5))
def test_turns_follow_the_weights(seed, weight):
    drawn = [*itertools.islice(T.turns({"a": 1.0, "b": weight}, seed), 500)]
    share = weight / (1 + weight)
    assert drawn == [*itertools.islice(T.turns({"b": weight, "a": 1.0}, seed), 500)]
    assert abs(drawn.count("b") - 500 * share) < 5 * math.sqrt(500 * share * (1 - share))


@pytest.mark.parametrize("device", DEVICES)
def test_a_few_updates_learn_the_roles_of_a_few_sentences(device):
    task = roles(8)
    models = T.share(tiny_bert(len(T.TOKENS), width=32).bert, [task]).to(device)
    losses = [*T.learn_together(models, [task], 60, 0.01, size=8)]
    assert losses[-1] < 0.5 * losses[0]


# Bad input

@pytest.mark.parametrize("call, error, words_", [
    (lambda: T.sentences(3, 0, "lion"), ValueError, "no noun 'lion'"),
    (lambda: T.did_it(T.sentences(1, 0, "dog")[0], "it"), ValueError, "neither AGENT nor PATIENT"),
    (lambda: main(weight=-0.5), ValueError, "0 or more, got -0.5"),
    (lambda: main(weight=math.nan), ValueError, "0 or more, got nan"),
    (lambda: T.Task("empty", [], 2), ValueError, "empty: expected examples"),
    (lambda: T.Task("blank", [{"input_ids": [2, 3], "labels": [IGNORED] * 2}], 2), ValueError, "blank: no label counts"),
    (lambda: T.below(bert(), 0), ValueError, "take 1 to 2"),
    (lambda: [*T.learn_together(T.share(bert(), [main()]), [main(weight=0.0)], 3, 0.01)], ValueError, "every task has weight 0"),
    (lambda: fit(T.Task("wide", roles().rows, 3)), ValueError, "labels must be 0 to 2"),
])
def test_one_clear_error(call, error, words_):
    with pytest.raises(error, match=re.escape(words_)):
        call()
