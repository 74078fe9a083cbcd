"""The training loop: the same run however it is cut, killed, resumed or spread over processes, and clear about what cannot be trained."""

import copy
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tunebook.tuning.train as loop
from tunebook.tuning.batches import IGNORED, next_tokens, pad
from tunebook.tuning.train import Recipe, causal, classify, evaluate, fit, gradient, predict, tokens, trackers

quick = settings(deadline=None, max_examples=12, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]

JOB = '''
import os, random, signal, sys, time
from types import SimpleNamespace
import torch
from torch import nn
import tunebook.tuning.train as loop
from tunebook.tuning.train import Recipe, fit

class Toy(nn.Module):
    """The mean of word vectors, dropout, two layers; `each` answers for every word."""
    def __init__(self, dropout=0.1, seed=0, classes=2, each=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words, self.inner, self.head = nn.Embedding(23, 8), nn.Linear(8, 8), nn.Linear(8, classes)
        self.dropout, self.each = nn.Dropout(dropout), each

    def forward(self, input_ids, attention_mask):
        seen = attention_mask[..., None].to(self.words.weight.dtype)
        x = self.words(input_ids) if self.each else (self.words(input_ids) * seen).sum(1) / seen.sum(1)
        return SimpleNamespace(logits=self.head(self.dropout(torch.tanh(self.inner(x)))))

def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 23, (int(torch.randint(2, 9, (1,), generator=g)),), generator=g).tolist() for _ in range(n)]
    return [{"input_ids": r, "label": int(sum(r) > 11.5 * len(r))} for r in ids]

def job(folder=None, dropout=0.1, report=(), **changes):
    recipe = Recipe(**dict(lr=0.03, epochs=4, batch=8, accumulate=2, every=3, patience=5) | changes)
    return fit(Toy(dropout).double(), rows(49, 0), rows(41, 1), recipe, folder=folder, report=report)

def flat(run): return torch.cat([p.detach().flatten() for p in run.model.parameters()])

def forked(work):
    """Exit signal of work in a child, None if it came to its end."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid

if __name__ == "__main__" and sys.argv[1] == "kill":
    whole, dice, folder = job(), random.Random(0), sys.argv[2]
    started = time.perf_counter()
    job(f"{folder}/timed")
    took, kills, at, same = time.perf_counter() - started, 0, 0, []
    for attempt in range(20):  # at random moments, until some have met it alive
        home = f"{folder}/random-{attempt}"
        for trial in range(60):
            pid = forked(lambda: job(home))
            time.sleep(dice.uniform(0, took / 2))
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
            if os.waitpid(pid, 0)[1] == 0: break
            kills += 1
        same.append(torch.equal(flat(whole), flat(again := job(home))) and again.history == whole.history)
        if kills >= 3: break
    print(kills, all(same))
    count, real = [0], {name: getattr(os, name) for name in ("fsync", "replace", "rename", "rmdir", "unlink")}
    def dies_at(k):
        def trap(name):
            def call(*args, **more):
                count[0] += 1
                if count[0] == k: os.kill(os.getpid(), signal.SIGKILL)
                return real[name](*args, **more)
            return call
        for name in real: setattr(os, name, trap(name))
        job(f"{folder}/written")
    for k in range(2, 40, 3):  # in the middle of writing
        pid = forked(lambda: dies_at(k))
        at += os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    print(at, torch.equal(flat(whole), flat(again := job(f"{folder}/written"))) and again.history == whole.history)
elif __name__ == "__main__":
    saves, real = [], loop.save
    loop.save = lambda *args: saves.append(1) or real(*args)
    run = job(sys.argv[2], dropout=0.0)
    torch.save([flat(run), len(saves)], f"{sys.argv[2]}/of-{os.environ['RANK']}.pt")
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.py").write_text(JOB)
    module = types.ModuleType("job")
    exec(compile(JOB, str(folder / "job.py"), "exec"), module.__dict__)
    module.path = folder / "job.py"
    return module


class Stop(Exception):
    pass


def stop_at(step):
    def report(row):
        if row["step"] == step:
            raise Stop
    return report


# Killed and resumed

def test_killed_at_random_moments_and_while_writing(toy, tmp_path):
    told = subprocess.run([sys.executable, str(toy.path), "kill", str(tmp_path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    (kills, *same), (writes, *same_again) = (line.split() for line in told.stdout.splitlines())
    assert same == same_again == ["True"] and int(kills) >= 3 and int(writes) >= 10, told.stdout
    assert not list(tmp_path.glob("*/.partial-*"))


@quick
@given(data=st.data(), dropout=st.sampled_from([0.0, 0.3]), batch=st.integers(3, 20), accumulate=st.integers(1, 4), every=st.integers(1, 9),
       patience=st.sampled_from([None, 2]), precision=st.sampled_from(["fp32", "bf16", "fp16"]), by=st.sampled_from(["loss", "accuracy"]))
def test_any_run_resumes_to_the_bit(toy, tmp_path_factory, data, dropout, batch, accumulate, every, patience, precision, by):
    recipe = Recipe(lr=0.05, epochs=3, batch=batch, accumulate=accumulate, every=every, patience=patience, precision=precision, by=by)
    train, valid, folder = toy.rows(33, 0), toy.rows(20, 1), tmp_path_factory.mktemp("run")
    whole = fit(toy.Toy(dropout), train, valid, recipe)
    for step in data.draw(st.lists(st.integers(1, len(whole.history)), max_size=3)):
        try:
            fit(toy.Toy(dropout), train, valid, recipe, folder=folder, report=[stop_at(step)])
        except Stop:
            pass
    again = fit(toy.Toy(dropout), train, valid, recipe, folder=folder)
    assert torch.equal(toy.flat(whole), toy.flat(again))
    assert (whole.history, whole.best, whole.metrics) == (again.history, again.best, again.metrics)
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    third = fit(toy.Toy(dropout), train, valid, recipe, folder=folder)  # a finished run is only read
    assert torch.equal(toy.flat(third), toy.flat(whole)) and files == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Masked:
    """Rows whose labels are drawn when they are looked at."""
    def __init__(self, rows):
        self.rows = [r["input_ids"] for r in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids, hidden = self.rows[i], torch.rand(len(self.rows[i])) < 0.5
        return {"input_ids": [0 if h else t for t, h in zip(ids, hidden)], "labels": [t if h else IGNORED for t, h in zip(ids, hidden)]}


def test_rows_that_are_drawn_when_looked_at_resume_too(toy, tmp_path):
    def run(**more):
        recipe = Recipe(lr=0.05, batch=8, every=2)
        return fit(toy.Toy(classes=23, each=True), Masked(toy.rows(30, 0)), Masked(toy.rows(9, 1)), recipe, loss=tokens, **more)
    model, before = toy.Toy(classes=23, each=True), torch.get_rng_state()
    fit(model, Masked(toy.rows(30, 0)), Masked(toy.rows(9, 1)), Recipe(batch=8, steps=2), loss=tokens)
    assert torch.equal(before, torch.get_rng_state())
    whole = run()
    with pytest.raises(Stop):
        run(folder=tmp_path, report=[stop_at(7)])
    assert torch.equal(toy.flat(run(folder=tmp_path)), toy.flat(whole))
    assert len({h["labels"] for h in whole.history}) > 3


def test_buffers_are_part_of_a_checkpoint(toy, tmp_path):
    class Normed(toy.Toy):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    torch.manual_seed(0)
    model = Normed()
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    args = toy.rows(32, 0), toy.rows(9, 1), Recipe(lr=0.05, batch=8, every=3)
    whole = fit(model, *args)
    with pytest.raises(Stop):
        fit(twin, *args, folder=tmp_path, report=[stop_at(5)])
    again = fit(third, *args, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))


# Checkpoints that do not fit

@pytest.fixture(scope="module")
def kept(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    run = toy.job(folder)
    return folder, run


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(bytes(raw))


@pytest.mark.parametrize("file", ["state.json", "weights.safetensors", "optimizer.safetensors", "best.safetensors", "seal.json"])
@pytest.mark.parametrize("how", ["missing", "short", "empty", "a bit"])
def test_damage_is_told_and_the_one_before_is_taken(toy, kept, tmp_path, file, how):
    import shutil
    folder, run = kept
    shutil.copytree(folder, tmp_path / "run")
    newest, older = sorted((tmp_path / "run").glob("step-*"), reverse=True)
    spoil(newest / file, how)
    with pytest.warns(UserWarning, match=f"checkpoint {newest.name} is damaged .*: looking for the one before"):
        again = toy.job(tmp_path / "run")
    assert torch.equal(toy.flat(again), toy.flat(run)) and again.history == run.history
    for path in (newest, older):
        spoil(path / file, how)
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged: begin again in another folder"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        toy.job(tmp_path / "run")


@pytest.mark.parametrize("change, told", [
    ({"lr": 0.01}, r"lr was 0.03, is 0.01; other rates"), ({"seed": 1}, "seed was 0, is 1"), ({"model": 1}, "other model"),
    ({"train": 1}, "other data"), ({"loss": 1}, "other loss")])
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(toy, kept, change, told):
    folder, _ = kept
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    changes = {k: v for k, v in change.items() if k in ("lr", "seed")}
    recipe = Recipe(**dict(lr=0.03, epochs=4, batch=8, accumulate=2, every=3, patience=5) | changes)
    model, train = toy.Toy(seed=change.get("model", 0)).double(), toy.rows(49, 0)[change.get("train", 0):]
    with pytest.raises(ValueError, match=f"is a checkpoint of another run: {told}.*a folder of its own"):
        fit(model, train, toy.rows(41, 1), recipe, folder=folder, loss=causal if "loss" in change else classify)
    assert files == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_cannot_be_written_is_told_before_training(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        toy.job(tmp_path / "file" / "run", report=[stop_at(1)])


# Parts and processes

@quick
@given(n=st.integers(1, 17), parts=st.integers(1, 20), seed=st.integers(0, 99), each=st.booleans())
def test_the_gradient_of_parts_is_the_batch_s(toy, n, parts, seed, each):
    rows = toy.rows(n, seed)
    if each:
        rows = [{"input_ids": r["input_ids"], "labels": [t % 2 if t % 3 else IGNORED for t in r["input_ids"]]} for r in rows]
    found = []
    for k in (1, parts):
        model = toy.Toy(0.0, each=each).double()
        value, labels = gradient(model, rows, accumulate=k)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append((value, labels, torch.cat([g.flatten() for g in grads])))
    assert found[0][1] == found[1][1] and abs(found[0][0] - found[1][0]) < 1e-12
    assert (found[0][2] - found[1][2]).abs().max() < 1e-13
    batch, logits = pad(rows), None
    model = toy.Toy(0.0, each=each).double()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    if found[0][1]:
        F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten()).backward()
        assert (torch.cat([p.grad.flatten() for p in model.parameters()]) - found[0][2]).abs().max() < 1e-13


def test_two_processes_under_torchrun_learn_what_one_does(toy, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node=2"]
    told = subprocess.run([*words, str(toy.path), "two", str(tmp_path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    (first, saves), (second, none) = (torch.load(tmp_path / f"of-{r}.pt") for r in "01")
    one = toy.job(dropout=0.0)
    assert torch.equal(first, second) and (first - toy.flat(one)).abs().max() < 1e-12
    assert saves == sum("validation_loss" in h for h in one.history) and none == 0


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_weights_keep_their_bits(toy, device):
    model = toy.Toy().to(device)
    model.words.requires_grad_(False)
    before = model.words.weight.clone()
    run = fit(model, toy.rows(30, 0), toy.rows(10, 1), Recipe(lr=0.1, batch=8, weight_decay=0.5))
    assert torch.equal(before, model.words.weight) and not torch.equal(toy.Toy().head.weight.to(device), model.head.weight)
    assert (run.trainable, run.total) == (90, 274) and not model.training


# Evaluation

def test_evaluation_restores_every_module_and_the_order(toy):
    model = toy.Toy()
    model.inner.eval()
    rows = toy.rows(150, 3)
    found = evaluate(model, rows, batch=7)
    assert [m.training for m in (model, model.inner, model.dropout)] == [True, False, True]
    logits = predict(model, rows, batch=7)
    alone = torch.cat([predict(model, [r]) for r in rows])
    assert torch.allclose(logits, alone, atol=1e-6) and logits.shape == (150, 2)
    labels = torch.tensor([r["label"] for r in rows])
    assert found["accuracy"] == (logits.argmax(-1) == labels).double().mean()
    assert abs(found["loss"] - F.cross_entropy(logits, labels)) < 1e-6
    each = predict(toy.Toy(each=True), rows[:3])
    assert [x.shape for x in each] == [(len(r["input_ids"]), 2) for r in rows[:3]]


def test_a_constant_model_scores_the_base_rate_and_size_does_not_matter(toy):
    rows, model = toy.rows(90, 4), toy.Toy()
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 9.0])
    assert evaluate(model, rows)["accuracy"] == sum(r["label"] for r in rows) / 90
    found = [evaluate(model, rows, batch=b) for b in (1, 7, 89, 90, 500)]
    losses = [f["loss"] for f in found]
    assert len({f["accuracy"] for f in found}) == 1 and max(losses) - min(losses) < 1e-6


def test_losses_are_those_of_transformers():
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=101)
    bert = BertForMaskedLM(config).eval()
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=101, n_positions=40, bos_token_id=1, eos_token_id=1)).eval()
    ids = [torch.randint(1, 101, (n,)).tolist() for n in (5, 9, 2)]
    masked = [{"input_ids": row, "labels": [t if i % 2 else IGNORED for i, t in enumerate(row)]} for row in ids]
    for model, loss, rows in ((bert, tokens, masked), (gpt, causal, [next_tokens(row, prompt=2) for row in ids])):
        batch = pad(rows)
        value, logits = loss(model, batch)
        count = int((batch["labels"] != IGNORED).sum())
        assert torch.allclose(value / count, model(**batch).loss, rtol=1e-5)
        hits = (logits.argmax(-1) == batch["labels"][:, -logits.shape[1]:]).sum().item()
        assert evaluate(model, rows, loss)["accuracy"] == pytest.approx(hits / count)
    with pytest.raises(ValueError, match="its label must be -100: make examples with batches.next_tokens"):
        causal(gpt, pad([{"input_ids": [1, 2], "labels": [1, 2]}]))


# What a recipe means

def test_choosing_by_accuracy_last_weights_steps_and_rates(toy):
    args = toy.rows(49, 0), toy.rows(41, 1)
    by = {b: fit(toy.Toy(), *args, Recipe(lr=0.05, epochs=6, batch=8, by=b)) for b in ("loss", "accuracy")}
    table = by["loss"].summary()
    assert by["loss"].best == min(table, key=lambda h: h["validation_loss"])["step"]
    assert by["accuracy"].best == max(table, key=lambda h: (h["validation_accuracy"], -h["validation_loss"]))["step"]
    for run in by.values():
        row = next(h for h in table if h["step"] == run.best)
        assert run.metrics == evaluate(run.model, args[1]) == {k: row[f"validation_{k}"] for k in ("loss", "accuracy")}
    last = fit(toy.Toy(), *args, Recipe(lr=0.05, batch=8, steps=10, keep_best=False))
    assert [h["step"] for h in last.history] == list(range(1, 11)) and last.best == 10 and last.metrics == evaluate(last.model, args[1])
    stopped = fit(toy.Toy(), *args, Recipe(lr=0.5, epochs=30, batch=8, patience=2))
    assert stopped.history[-1]["step"] == stopped.best + 2 * 7 < 210

    def rates(model, recipe):
        return [{"params": model.head.parameters(), "lr": 10 * recipe.lr, "weight_decay": 0.0}]
    only = toy.Toy()
    run = fit(only, args[0], None, Recipe(lr=0.01, batch=8, epochs=1), rates=rates)
    assert max(h["rate"] for h in run.history) == pytest.approx(0.1) and torch.equal(only.words.weight, toy.Toy().words.weight)
    assert run.metrics == {} and "validation" not in str(run) and str(run).endswith("274 of 274 parameters trained (100 %)")


def test_the_caller_s_generator_and_a_report(toy, capfd):
    before, seen = torch.get_rng_state(), []
    fit(toy.Toy(), toy.rows(20, 0), None, Recipe(batch=8, epochs=2), report=[seen.append], progress=True)
    assert torch.equal(before, torch.get_rng_state()) and [r["step"] for r in seen] == [1, 2, 3, 4, 5, 6]
    out, err = capfd.readouterr()
    assert out == "" and "6/6" in err


def test_overflows_of_float16_are_skipped_and_the_scale_is_kept(toy, tmp_path):
    calls = []

    def overflowing(model, batch):
        calls.append(1)
        value, logits = classify(model, batch)
        return value * (1e36 if len(calls) in (2, 3) else 1), logits
    recipe = Recipe(lr=0.05, batch=8, precision="fp16", epochs=1, every=1)
    run = fit(toy.Toy(), toy.rows(40, 0), None, recipe, loss=overflowing, folder=tmp_path)
    assert [math.isfinite(h["norm"]) for h in run.history] == [True, False, False, True, True]
    newest = max(tmp_path.glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["state"]["scale"] == 2.0**14
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())


# Guards

@pytest.mark.parametrize("field, value", [
    ("batch", 0), ("accumulate", 0), ("epochs", 1.5), ("steps", 0), ("every", 0), ("patience", 0), ("lr", 0.0), ("lr", math.nan),
    ("warmup", 1.5), ("clip", 0.0), ("precision", "int8"), ("by", "f1")])
def test_bad_recipes(field, value):
    with pytest.raises(ValueError, match=rf"^{field} (must|is)"):
        Recipe(**{field: value})


def test_what_cannot_be_trained(toy, tmp_path):
    model, rows = toy.Toy(), toy.rows(9, 0)
    for args, told in (((model, [], None, Recipe()), "got none: give it rows"), ((model, rows, [], Recipe()), "validation set is empty"),
                       ((model, rows, None, Recipe(patience=1)), "patience needs a validation set"),
                       ((toy.Toy().requires_grad_(False), rows, None, Recipe()), "no parameter requires a gradient: attach a method"),
                       ((model, [{"input_ids": [1], "label": 2}], None, Recipe()), "labels must be 0 to 1 or -100, got 2"),
                       ((model, rows, [{"input_ids": [1], "labels": [IGNORED]}], Recipe()), "no label of the validation examples counts"),
                       ((model, [{"input_ids": [1]}], None, Recipe()), "no label of the training examples counts")):
        with pytest.raises(ValueError, match=told):
            fit(*args)
    with pytest.raises(FloatingPointError, match="update 2: the loss is (nan|inf), .* smaller lr than 1e"):
        fit(model, rows, None, Recipe(lr=1e38, warmup=0.0, clip=None, batch=3, every=1), folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_who_gets_no_gradient_is_named_once(toy):
    model = toy.Toy()
    model.spare = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="no gradient in three updates for 1 of 6 parameters: spare; the loss does not reach them"):
        fit(model, toy.rows(40, 0), None, Recipe(batch=8, epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(toy.Toy(), toy.rows(40, 0), None, Recipe(batch=8, epochs=1))


@pytest.mark.parametrize("rate, told", [(1e-5, True), (0.1, False)])
def test_weights_of_16_bits_that_do_not_move(toy, rate, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(toy.Toy().bfloat16(), toy.rows(40, 0), None, Recipe(lr=rate, batch=8, epochs=1))
    assert ["keep the weights in float32 and pass precision='bf16'" in str(w.message) for w in found] == [True] * told


# Trackers

def test_trackers_are_those_installed_and_logged_in(monkeypatch, tmp_path, toy):
    made = []
    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")

    class SummaryWriter:
        def __init__(self, folder):
            made.append(("board", folder))

        def add_scalar(self, name, value, step):
            made.append((name, step))

        def flush(self):
            made.append("flushed")
    board.SummaryWriter = SummaryWriter
    wandb.init = lambda **k: types.SimpleNamespace(log=lambda row, step: made.append(("wandb", step)))
    found = {"tensorboard": importlib.machinery.ModuleSpec("tensorboard", None), "wandb": importlib.machinery.ModuleSpec("wandb", None)}
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    assert trackers(tmp_path, "p") == []
    monkeypatch.setattr(loop, "find_spec", found.get)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert len(trackers(tmp_path, "p")) == 1  # not logged in
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert len(trackers(tmp_path)) == 1  # no project was named
    made.clear()
    fit(toy.Toy(), toy.rows(8, 0), None, Recipe(batch=8, epochs=1), report=trackers(tmp_path, "p"))
    assert made[0] == ("board", str(tmp_path)) and ("loss", 1) in made and ("wandb", 1) in made and made[-1] == "flushed"
    assert os.environ["WANDB_API_KEY"]
