"""The lint of silent mistakes: no alarm in drawn right runs, the right finding in wrong ones, nothing changed, nothing raised."""

import random
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tunebook import pitfalls
from tunebook.pitfalls import (
    DETECTORS,
    IGNORED,
    MISTAKES,
    Blind,
    Finding,
    Findings,
    Look,
    audit_evaluation,
    audit_metric,
    audit_predict,
    audit_run,
    later_pieces,
    lint,
    real_tokens,
    split_batch,
    squashed,
    unchanged,
    watch,
)

quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**20)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
V = 50  # words 5 to 49; 0 pads, 1 is unknown, 2 and 3 begin and end a text


class Letters:
    """As much of a tokenizer as the lint asks of one; odd words go on with the word before."""

    pad_token_id, unk_token_id, eos_token_id, sep_token_id, all_special_ids = 0, 1, None, 3, [0, 1, 2, 3, 4]

    def convert_ids_to_tokens(self, ids):
        return [f"##{i}" if i > 4 and i % 2 else str(i) for i in ids]


class Net(nn.Module):
    """An embedding, dropout and a head, for rows or for tokens."""

    def __init__(self, outputs, tokens=False, p=0.1, top=None):
        super().__init__()
        self.words, self.drop, self.out, self.top, self.tokens = nn.Embedding(V, 8), nn.Dropout(p), nn.Linear(8, outputs), top, tokens

    def forward(self, input_ids, attention_mask=None):
        h = self.drop(self.words(input_ids))
        z = self.out(h if self.tokens else h.mean(1))
        return z if self.top is None else self.top(z)


def tokens_loss(z, y): return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORED)
def causal_loss(z, y): return tokens_loss(z[:, :-1], y[:, 1:])


def texts(dice, n, low=4, high=9):
    return [[2, *(dice.randrange(5, V) for _ in range(dice.randrange(low, high))), 3] for _ in range(n)]


def filled(rows, fill=0, width=None, left=False):
    width = width or max(map(len, rows))
    return torch.tensor([[fill] * (width - len(r)) * left + r + [fill] * (width - len(r)) * (not left) for r in rows])


def right(kind, seed, device="cpu", tuples=False, masked=True, p=0.1, size=8):
    """A right run: the arguments of lint."""
    dice, g = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches, C = [], dice.randrange(2, 6)
    for i in range(4):
        rows = texts(dice, size)
        ids = filled(rows)
        mask = (ids != 0).long()
        if kind == "classes": y = (torch.arange(size) + i) % C
        elif kind == "numbers": y = torch.randn(size, 1, generator=g)
        elif kind == "several": y = (torch.rand(size, 3, generator=g) < 0.5).float()
        elif kind == "tags":
            tags = [[dice.randrange(3) if i == 1 or r[i] % 2 == 0 else IGNORED for i in range(1, len(r) - 1)] for r in rows]
            y = filled([[IGNORED, *t, IGNORED] for t in tags], IGNORED)
        else: y = ids.masked_fill(mask == 0, IGNORED)  # words, shifted by the loss
        if kind == "ahead": y = F.pad(y[:, 1:], (0, 1), value=IGNORED)
        given = {"input_ids": ids, "labels": y} | ({"attention_mask": mask} if masked else {})
        batches.append(tuple(given[k] for k in ("input_ids", "attention_mask", "labels") if k in given) if tuples else given)
    outputs = {"classes": C, "numbers": 1, "several": 3, "tags": 3}.get(kind, V)
    loss = {"classes": nn.CrossEntropyLoss(label_smoothing=dice.choice((0.0, 0.1))), "numbers": F.mse_loss, "tags": tokens_loss,
            "several": F.binary_cross_entropy_with_logits, "words": causal_loss, "ahead": tokens_loss}[kind]
    model = Net(outputs, kind in ("tags", "words", "ahead"), p).to(device)
    return {"model": model, "loader": batches, "loss": loss, "tokenizer": Letters(), "optimizer": torch.optim.AdamW(model.parameters())}


KINDS = ("classes", "numbers", "several", "tags", "words", "ahead")


def numbers(found): return sorted({f.mistake for f in found})


@quick
@given(st.sampled_from(KINDS), seeds, st.booleans(), st.booleans(), st.sampled_from((0.0, 0.1)), st.integers(4, 16))
def test_right_runs_raise_no_alarm(kind, seed, tuples, masked, p, size):
    found = lint(**right(kind, seed, tuples=tuples, masked=masked, p=p, size=size))
    assert not found, found
    told = {"overlap": "no such loader", "baseline": "no score", "tags of pieces": "B-PER", "constant labels": "too few"}
    assert all(told.get(name, "?") in why for name, why in found.skipped.items()), found.skipped


def change(name, f):
    return lambda run: run | {"loader": [b | {name: f(b)} for b in run["loader"]]}


def labelled_padding(b): return b["labels"].masked_fill(b["attention_mask"] == 0, 0)
def with_top(top): return lambda run: run | {"model": Net(run["model"].out.out_features, top=top), "optimizer": None}
def wide(b): return {k: F.pad(v, (0, 60), value=IGNORED * (k == "labels")) if v.ndim == 2 else v for k, v in b.items()}


WRONG = {
    "another optimizer": (1, "classes", lambda run: run | {"optimizer": torch.optim.SGD(Net(run["model"].out.out_features).parameters())}),
    "an old head": (1, "several", lambda run: run | {
        "optimizer": torch.optim.SGD([*run["model"].words.parameters(), *Net(3).out.parameters()])}),
    "eval mode": (2, "classes", lambda run: run | {"model": run["model"].eval()}),
    "dropout in evaluation": (2, "tags", lambda run: run | {"training": False}),
    "a column": (3, "classes", lambda run: change("labels", lambda b: b["labels"][:, None])(run) | {
        "loss": lambda z, y: F.cross_entropy(z, y.flatten())}),
    "numbers in a row": (3, "numbers", change("labels", lambda b: b["labels"][:, 0])),
    "two shifts": (4, "ahead", lambda run: run | {"loss": causal_loss}),
    "no shift": (4, "words", lambda run: run | {"loss": tokens_loss}),
    "padding among the words": (5, "words", change("labels", lambda b: b["input_ids"])),
    "padding among the tags": (6, "tags", change("labels", labelled_padding)),
    "tags of special tokens": (6, "tags", change("labels", lambda b: b["labels"].masked_fill(b["input_ids"] == 2, 1))),
    "one label": (9, "classes", change("labels", lambda b: torch.ones_like(b["labels"]))),
    "rows twice": (9, "classes", lambda run: run | {
        "loader": [{k: v if k == "labels" else v.repeat(2, 1) for k, v in b.items()} for b in run["loader"]]}),
    "below the majority": (10, "classes", lambda run: run | {"score": 0.05}),
    "wide": (11, "tags", lambda run: run | {"loader": [wide(b) for b in run["loader"]]}),
    "unknown": (11, "several", change("input_ids", lambda b: b["input_ids"].where(b["input_ids"] % 3 > 0, b["input_ids"].clamp(max=1)))),
    "one-hot": (13, "several", change("labels", lambda b: F.one_hot(torch.arange(len(b["labels"])) % 3, 3).float())),
    "rows that train": (14, "numbers", lambda run: run | {"eval_loader": run["loader"][1:2]}),
    "softmax": (15, "classes", with_top(nn.Softmax(-1))),
    "sigmoid": (15, "several", with_top(nn.Sigmoid())),
}


@pytest.mark.parametrize("name", WRONG)
@settings(deadline=None, max_examples=5, derandomize=True)
@given(seed=seeds)
def test_wrong_runs_are_found_under_their_number_only(name, seed):
    number, kind, wrong = WRONG[name]
    assert numbers(lint(**wrong(right(kind, seed)))) == [number]


def everything(run, loader):
    import numpy
    tensors = [*run["model"].state_dict().values(), *(p.grad for p in run["model"].parameters() if p.grad is not None),
               *(v for s in run["optimizer"].state.values() for v in s.values()), torch.get_rng_state(), loader.generator.get_state()]
    return ([t.cpu().numpy().tobytes() for t in tensors], [m.training for m in run["model"].modules()], random.getstate(),
            repr(numpy.random.get_state()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed(kind, device):
    run = right(kind, 3, device)
    run["model"].drop.eval()
    look = Look(**{k: v for k, v in run.items() if k in ("model", "loader", "loss")})
    look.logits[0].square().mean().backward()
    run["optimizer"].step()
    loader = DataLoader(run["loader"], batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(1))
    before = everything(run, loader)
    hooks = [len(m._forward_hooks) for m in run["model"].modules()]
    assert lint(**(run | {"loader": loader, "eval_loader": loader})) is not None
    assert everything(run, loader) == before
    assert [len(m._forward_hooks) for m in run["model"].modules()] == hooks


def test_a_buffer_that_moves_in_eval_mode_is_put_back():
    class Counting(Net):
        def __init__(self):
            super().__init__(2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input_ids, attention_mask=None):
            self.calls += 1
            return super().forward(input_ids)
    run = right("classes", 0) | {"model": Counting(), "optimizer": None}
    lint(**run)
    assert run["model"].calls == 0


def test_the_same_batches_follow_after_a_lint():
    data = TensorDataset(torch.arange(20.0)[:, None].expand(20, 3), torch.arange(20) % 2)
    def order(ask):
        torch.manual_seed(0)
        loader = DataLoader(data, 4, shuffle=True)
        if ask: lint(nn.Linear(3, 2), loader, loss=F.cross_entropy)
        return [x[:, 0].tolist() for x, _ in loader]
    assert order(True)[0] != [0, 1, 2, 3]
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    loader = DataLoader(data, 4, shuffle=True)
    state = torch.get_rng_state()
    first = [x[:, 0].tolist() for x, _ in loader]
    torch.set_rng_state(state)
    lint(net, loader, loss=F.cross_entropy)
    assert [x[:, 0].tolist() for x, _ in loader] == first


class Raising:
    def __iter__(self): raise OSError("disk\nfull")


def row_of(labels, ids=None): return [(torch.ones(9, 2).long() if ids is None else ids, labels)]


ODD = {
    "no loader": None, "a number": 3, "empty": [], "texts": ["a"], "Nones": [None], "one tensor": [torch.ones(2)], "broken": Raising(),
    "strings": [{"input_ids": "a"}], "ragged": [{"input_ids": [[1], [1, 2]], "labels": [0, 1]}], "iterator": iter(row_of(torch.arange(9))),
    "labels of text": [{"input_ids": torch.ones(2, 2).long(), "labels": ["a", "b"]}], "no labels": [{"input_ids": torch.ones(9, 2).long()}],
    "words too large": row_of(torch.arange(9) % 2, torch.full((9, 2), V)), "float words": row_of(torch.arange(9) % 2, torch.ones(9, 2)),
    "empty rows": row_of(torch.ones(0).long(), torch.ones(0, 2).long()), "no tokens": row_of(torch.arange(9) % 2, torch.ones(9, 0).long())}


@pytest.mark.parametrize("name", ODD)
def test_odd_loaders_are_told_and_never_raise(name):
    for options in ({}, {"tokenizer": Letters(), "eval_loader": ODD[name], "score": 0.5, "loss": F.cross_entropy}):
        found = lint(Net(2), ODD[name], **options)
        assert found.skipped and all(why and "\n" not in why for why in found.skipped.values())
        assert set(found.skipped) <= set(DETECTORS) and repr(found)


@pytest.mark.parametrize("model", [None, "model", lambda x: x, object()])
def test_what_is_no_module_is_told(model):
    assert "expected an nn.Module" in lint(model, []).skipped["everything"]


@pytest.mark.parametrize("odd", [{"tokenizer": "text"}, {"optimizer": "adam"}, {"loss": lambda z, y: 1 / 0}, {"score": "high"}, {"call": 3},
                                 {"eval_loader": 5}])
def test_odd_options_are_told(odd):
    found = lint(**(right("tags", 0) | odd))
    assert found.skipped and repr(found)


def test_an_iterator_is_not_used_up():
    batches = iter(right("classes", 0)["loader"])
    found = lint(Net(5), batches)
    assert "use it up" in found.skipped["label shape"] and len(list(batches)) == 4


def test_a_model_that_raises_leaves_the_other_detectors_alone():
    class Broken(Net):
        def forward(self, input_ids, attention_mask=None): raise RuntimeError("shape")
    run = right("classes", 0) | {"model": Broken(2), "optimizer": None}
    run["loader"] = [b | {"labels": torch.ones_like(b["labels"])} for b in run["loader"]]
    found = lint(**run)
    assert numbers(found) == [9] and "RuntimeError: shape" in found.skipped["softmax"]


def test_own_losses_of_transformers_and_its_containers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                     num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    batches = [UserDict(input_ids=filled(texts(random.Random(i), 12)), labels=torch.arange(12) % 3) for i in range(3)]
    assert not lint(model, batches, tokenizer=Letters())
    floats = [b | {"labels": F.one_hot(b["labels"], 3).float()} for b in batches]
    assert numbers(lint(model, floats)) == [13] and model.config.problem_type is None
    model(**floats[0])
    assert numbers(lint(model, batches)) == [13]
    model.config.problem_type = None
    model.classifier = nn.Sequential(model.classifier, nn.Softmax(-1))
    assert numbers(lint(model, batches)) == [15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_under_a_loss_of_probabilities_are_right(dtype):
    run = right("classes", 1)
    run |= {"model": Net(run["model"].out.out_features, top=nn.Softmax(-1)).to(dtype), "optimizer": None,
            "loss": lambda p, y: F.nll_loss(p.log(), y)}
    assert not lint(**run)
    assert numbers(lint(**(run | {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}))) == [15]
    run["model"].top = nn.LogSoftmax(-1)
    assert not lint(**(run | {"loss": F.cross_entropy}))


@quick
@given(seeds, st.floats(0.01, 0.9))
def test_outputs_that_only_look_like_probabilities_are_no_finding(seed, bias):
    run = right("several", seed)
    nn.init.constant_(run["model"].out.bias, bias)
    run["model"].out.weight.data.mul_(0.01)
    assert not lint(**run)
    look = Look(run["model"], run["loader"])
    with unchanged(run["model"]): assert not squashed(look)


@quick
@given(seeds, st.booleans(), st.booleans())
def test_padding_is_found_without_a_mask(seed, left, end):
    dice = random.Random(seed)
    rows = [[dice.randrange(5, V) for _ in range(dice.randrange(1, 9))] + [0] * end for _ in range(6)]
    if left and end: return  # padding in front cannot be told from an end that is not there
    found = real_tokens(filled(rows, 0, 12, left), filler=0, end=0 if end else None)
    assert found.sum(1).tolist() == [len(r) for r in rows] or end and max(map(len, rows)) == 12
    mask = filled([[1] * len(r) for r in rows], 0, 12, left)
    assert torch.equal(real_tokens(filled(rows, 7, 12, left), mask), mask.bool())


def test_tags_of_another_kind_inside_a_word():
    run = right("tags", 0)
    run["model"].config = type("C", (), {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "problem_type": None})()
    word = torch.tensor([[2, 6, 7, 9, 8, 3]])  # one word of three pieces, another word
    for tags, expected in (([IGNORED, 1, 2, 2, 0, IGNORED], []), ([IGNORED, 1, IGNORED, IGNORED, 0, IGNORED], []),
                           ([IGNORED, 1, 0, 2, 0, IGNORED], [6]), ([1, 0, 0, 0, 0, IGNORED], [6])):
        batch = {"input_ids": word.repeat(8, 1), "attention_mask": torch.ones(8, 6), "labels": torch.tensor([tags] * 8)}
        assert numbers(lint(**(run | {"loader": [batch]}))) == expected, tags


def test_a_question_without_its_context():
    class Spans(Net):
        def forward(self, input_ids):
            z = super().forward(input_ids)
            return {"start_logits": z[..., 0], "end_logits": z[..., 1]}
    rows = [[2, 6, 3, *t[1:]] for t in texts(random.Random(0), 16)]
    batch = {"input_ids": filled(rows), "start_positions": torch.arange(16) % 4 + 3, "end_positions": torch.arange(16) % 4 + 4}
    given = {"model": Spans(2, True), "tokenizer": Letters()}
    assert not lint(loader=[batch], **given)
    assert numbers(lint(loader=[batch | {"input_ids": filled([r[:1] + r[3:] for r in rows])}], **given)) == [9]
    assert numbers(lint(loader=[batch | {"start_positions": torch.ones(16).long()}], **given)) == [9]


def test_the_score_is_compared_with_the_evaluation():
    run = right("classes", 0)
    held = [(filled(texts(random.Random(9), 10, 12, 14)), torch.tensor([1] * 9 + [0]))]
    assert numbers(lint(**run, eval_loader=held, score=0.9)) == [10] and not lint(**run, eval_loader=held, score=0.91)


def test_facts_are_told_without_a_finding():
    run = right("classes", 0)
    facts = lint(**run).facts
    ids = [b["input_ids"] for b in run["loader"]]
    assert facts["padding"] == pytest.approx(sum((i == 0).sum().item() for i in ids) / sum(i.numel() for i in ids))
    assert facts["unknown tokens"] == 0 and 0 < facts["most frequent label"] < 1


MODES = {(True, False, False): [], (False, False, False): [2], (True, True, False): [2], (True, False, True): [12], (True, True, True): [2]}


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_watch_tells_training_from_evaluation(modes, device):
    training, evaluating, graph = modes
    model, ids = Net(2).to(device), torch.ones(4, 3, dtype=torch.long, device=device)
    with watch(model) as seen:
        model.train(training)
        for _ in range(3): model(ids).sum().backward()
        model.train(evaluating)
        with torch.set_grad_enabled(graph): model(ids)
    assert numbers(seen) == MODES[modes] and not model._forward_hooks


def test_watch_lets_errors_pass_and_leaves_no_hook():
    model = Net(2)
    with pytest.raises(IndexError), watch(model): model(torch.full((1, 1), V))
    assert not model._forward_hooks


def test_watch_does_not_change_the_run():
    def train(look):
        torch.manual_seed(0)
        model = Net(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        def steps():
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.arange(12).reshape(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
                optimizer.step()
        if look:
            with watch(model) as seen: steps()
            assert not seen
        else: steps()
        return torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(train(True), train(False))


@quick
@given(seeds, st.integers(2, 5), st.integers(6, 40))
def test_right_metrics_pass_and_a_column_does_not(seed, classes, n):
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    if len(y.unique()) < 2: return
    def mean(p, y): return (p == y).double().mean()
    assert not audit_metric(mean, y)
    assert numbers(audit_metric(lambda p, y: (p == y).sum() / len(y), y[:, None])) == [3]
    assert numbers(audit_metric(lambda p, y: 1 - mean(p, y), y)) == [3]


def test_metrics_of_tags():
    rows = [["O", "O", "B-A", "I-A"], ["B-B", "O"], ["O"] * 6]
    def tokens(p, y): return sum(a == b for r, s in zip(p, y) for a, b in zip(r, s)) / sum(map(len, y))
    def exact(p, y): return sum(r == s and set(s) != {"O"} for r, s in zip(p, y)) / 2
    assert numbers(audit_metric(tokens, rows)) == [7] and not audit_metric(exact, rows)
    y = torch.tensor([[1, 0, 2, 0], [0, 1, IGNORED, IGNORED]])
    def counted(p, y): return ((p == y) & (y != IGNORED)).sum() / (y != IGNORED).sum()
    assert not audit_metric(counted, y) and numbers(audit_metric(lambda p, y: (p == y).double().mean(), y)) == [6]
    assert "ZeroDivisionError" in audit_metric(lambda p, y: 1 / 0, y).skipped["metric"]


@pytest.mark.parametrize("axes", [2, 3])
def test_predictions_come_back(axes):
    assert not audit_predict(lambda z: z.argmax(-1), axes) and not audit_predict(lambda z: z.softmax(-1).topk(1).indices[..., 0], axes)
    for wrong in (0, 2 if axes == 2 else 1): assert numbers(audit_predict(lambda z, d=wrong: z.argmax(d), axes)) == [8]
    assert numbers(audit_predict(lambda z: z, axes)) == [8]


@quick
@given(st.lists(st.floats(0, 10), min_size=2, max_size=70))
def test_evaluations(values):
    x = torch.tensor(values, dtype=torch.float64)
    assert not audit_evaluation(lambda n: sum(b.sum() for b in x.split(n)) / len(x))
    def means(n): return torch.stack([b.mean() for b in x.split(n)]).mean()
    assert bool(audit_evaluation(means)) == (max(abs(means(n) - x.mean()) for n in (7, 64)) > 1e-5 * max(1, abs(x.mean())))
    calls = []
    assert numbers(audit_evaluation(lambda n: calls.append(n) or len(calls))) == [12]
    assert numbers(audit_evaluation(lambda n: float("nan"))) == [12]


def test_runs_with_and_without_a_seed():
    found = audit_run(lambda seed: random.Random(seed).random())
    assert not found and found.facts["spread"] > 0
    assert numbers(audit_run(lambda seed: torch.rand(1).item())) == [14]


def test_findings_print_as_a_table():
    found = Findings([Finding(4, "what", "where", 0.25, "todo")])
    found.skipped["mode"], found.facts["padding"] = "why", 0.5
    assert repr(found) == " 4 shifted twice\n   where: what (0.25)\n   -> todo\nfacts: padding 0.5\nnot looked at: mode: why"
    assert sorted(MISTAKES) == list(range(1, 16))


def test_helpers_refuse_what_they_cannot_read():
    with pytest.raises(Blind, match="labels last"): split_batch(torch.ones(2))
    with pytest.raises(Blind, match="pass tokenizer"): real_tokens(torch.ones(2, 2))
    assert later_pieces([]) == [] and later_pieces(["a", "b"]) == [False, False] and later_pieces(["▁a", "b"]) == [False, True]


def test_a_detector_can_be_added():
    @pitfalls.detector("always")
    def always(look): yield Finding(10, "always", "here", 1.0, "nothing")
    try: assert numbers(lint(Net(2), [])) == [10]
    finally: del DETECTORS["always"]
