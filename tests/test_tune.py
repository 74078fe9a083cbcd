"""One call from data to a tuned model: every form of data, every fault one clear line, every run repeatable."""

import csv
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tunebook.kit import models
from tunebook.kit.checks import same
from tunebook.kit.cli import main
from tunebook.tuning import (
    METHODS,
    Recipe,
    build,
    encode,
    load_adapter,
    predict,
    sample,
    splits_of,
    tune,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)
WORDS = {0: ["bland", "stale", "dull"], 1: ["fresh", "tasty", "bright"]}
ROWS = [{"text": f"The {noun} was {word}.", "label": k} for noun in ("soup", "bread", "fish", "tea") for k in (0, 1) for word in WORDS[k]]
DATA = {"train": ROWS, "validation": ROWS[::2], "test": ROWS[1::3]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.locate("minilm")[1])


def tiny(seed=0, labels=2, **more):
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30522,
                        max_position_embeddings=64, num_labels=labels, **more)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def go(tokenizer):
    def call(method="lora", data=DATA, model=None, **more):
        return tune(model or tiny(), method, data, tokenizer=tokenizer, **{"steps": 4, "every": 2, "batch": 8} | more)
    return call


# The model

def test_a_models_configuration_can_be_given(tmp_path, tokenizer):
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run = tune(tmp_path, "head", DATA, options=quiet, steps=2, every=2, batch=8)
    assert run.model.config.hidden_dropout_prob == 0 and not any(m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout))
    assert tune(tmp_path, "head", DATA, steps=2, every=2, batch=8).model.config.hidden_dropout_prob > 0
    with pytest.raises(ValueError, match="has its configuration already"):
        tune(tiny(), "head", DATA, tokenizer=tokenizer, options=quiet)
    with pytest.raises(TypeError, match="hidden_dropuot"):
        tune(tmp_path, "head", DATA, options={"hidden_dropuot": 0.0})


# Data in every form

def write(path, rows, columns=("text", "label")):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, (r["text"], r["label"])))) + "\n" for r in rows), encoding="utf-8")
        return path
    with open(path, "w", newline="", encoding="utf-8") as f:
        w = csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",")
        w.writerow(columns)
        w.writerows([r["text"], r["label"]] for r in rows)
    return path


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl"])
def test_a_file_and_a_folder(tmp_path, end):
    named = [{"text": r["text"] + ' "quoted,\nin two lines"', "label": "no yes".split()[r["label"]]} for r in ROWS]
    splits, names = splits_of(write(tmp_path / f"all{end}", named))
    assert names == ["no", "yes"] and {s: len(x) for s, x in splits.items()} == {"train": 20, "validation": 2, "test": 2}
    assert sorted(r["text"] for x in splits.values() for r in x) == sorted(r["text"] for r in named)
    for s in ("train", "validation"):
        write(tmp_path / f"{s}{end}", named, columns=("review", "stars"))
    again, names = splits_of(str(tmp_path), columns=("review", "stars"))
    assert again == {s: [{"text": r["text"], "label": int(r["label"] == "yes")} for r in named] for s in ("train", "validation")}


def test_a_name_of_the_catalogue():
    splits, names = splits_of("reviews")
    assert names == ["negative", "positive"] and len(splits["train"]) == 2400 and splits["test"][0]["label"] in (0, 1)


@quick
@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=30))
def test_numbers_stay_numbers_and_gaps_are_refused(labels):
    rows = [{"text": "Word.", "label": k} for k in labels]
    complete = set(labels) == set(range(max(labels) + 1)) and len(set(labels)) > 1
    if complete:
        splits, names = splits_of({"train": rows})
        assert [r["label"] for r in splits["train"]] == labels and names == [str(i) for i in range(max(labels) + 1)]
    else:
        with pytest.raises(ValueError, match="at least two classes"):
            splits_of({"train": rows})


@quick
@given(names=st.lists(st.sampled_from(["good", "bad", "mixed"]), min_size=1, max_size=12), more=st.permutations(["good", "bad", "mixed"]))
def test_names_are_numbered_once_for_all_splits(names, more):
    every = [{"text": "Word.", "label": k} for k in ("bad", "good", "mixed")]
    splits, classes = splits_of({"train": every, "validation": [{"text": "Word.", "label": k} for k in [*names, *more]]})
    assert classes == ["bad", "good", "mixed"]
    assert [classes[r["label"]] for r in splits["validation"]] == [*names, *more]


@quick
@given(a=st.integers(1, 24), b=st.integers(1, 24), seed=st.integers(0, 999))
def test_a_smaller_sample_begins_the_larger(a, b, seed):
    few, more = sorted((sample(ROWS, a, seed), sample(ROWS, b, seed)), key=len)
    assert more[:len(few)] == few and len({r["text"] for r in more}) == len(more)


# Faults

def faulty(tmp_path):
    write(tmp_path / "stars.csv", ROWS, columns=("text", "stars"))
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "half").mkdir()
    write(tmp_path / "half" / "train.csv", ROWS)
    (tmp_path / "bad.jsonl").write_text('{"text": "Fine", "label": 1}\n{"text"\n')
    return {
        "stars.csv": "has the columns text, stars; expected 'label'",
        "empty.csv": "holds no rows",
        "half": "needs train and validation",
        "bad.jsonl": "bad.jsonl, line 2, is not JSON",
    }


@pytest.mark.parametrize("name", ["stars.csv", "empty.csv", "half", "bad.jsonl"])
def test_a_bad_file_is_one_clear_error(tmp_path, name):
    message = faulty(tmp_path)[name]
    with pytest.raises(ValueError, match=message):
        splits_of(tmp_path / name)


def test_bad_calls(go, tokenizer):
    with pytest.raises(ValueError, match="no data set is called 'nothing'"):
        tune(tiny(), data="nothing", tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match="no such file or folder: nothing.csv"):
        tune(tiny(), data="nothing.csv", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="row 1: expected a text"):
        go(data=DATA | {"train": [ROWS[0], {"text": "", "label": 0}, *ROWS]})
    with pytest.raises(ValueError, match="label 'x', which train does not have: 0, 1"):
        go(data=DATA | {"validation": [{"text": "Fine.", "label": "x"}]})
    with pytest.raises(ValueError, match="2 outputs for 3 classes"):
        go(data={"train": [*ROWS, {"text": "Hm.", "label": 2}], "validation": ROWS})
    with pytest.raises(ValueError, match="pass tokenizer"):
        tune(tiny(), data=DATA)
    with pytest.raises(ValueError, match="no test split"):
        go(data={"train": ROWS, "validation": ROWS}, test=True)
    with pytest.raises(TypeError, match="rank"):
        go(rank=8)
    with pytest.raises(ValueError, match="asked for 25 rows"):
        go(rows=25)
    with pytest.raises(ValueError, match="'quary'"):
        go(targets=["quary"])


# Runs

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:no gradient in three updates")
def test_every_method_trains_saves_and_loads(method, go, tmp_path, tokenizer):
    run = go(method, folder=tmp_path, test=True)
    assert 0 <= run.metrics["accuracy"] <= 1 and 0 <= run.metrics["test_accuracy"] <= 1 and run.trainable <= run.total
    first, last = run.history[0]["loss"], run.history[-1]["loss"]
    assert first != last
    fresh = load_adapter(tiny(), tmp_path / "adapter")
    asked = encode([r["text"] for r in ROWS], None, tokenizer)
    same(predict(fresh, asked), predict(run.model, asked))


def test_one_seed_one_run(go):
    a, b, c = go(seed=0, rows=12), go(seed=0, rows=12), go(seed=1, rows=12)
    assert a.history == b.history and a.history != c.history
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        same(x, y)


def test_settings_go_where_they_belong(go):
    run = go("lora", r=4, lr=2e-3, recipe=Recipe(lr=1.0, weight_decay=0.0))
    assert run.config["r"] == 4 and run.recipe.lr == 2e-3 and run.recipe.weight_decay == 0 and run.recipe.steps == 4
    assert go("ia3").recipe.lr == METHODS["ia3"].rate


def test_predict_names_the_class(go):
    run = go(data={s: [{"text": r["text"], "label": ["bad", "good"][r["label"]]} for r in rows] for s, rows in DATA.items()})
    assert set(run.predict(["The soup was fresh.", "The soup was bland."])) <= {"bad", "good"}
    assert "lora" in repr(run) and "parameters trained" in repr(run)


def test_dropout_is_drawn_from_the_seed(go):
    a, b = (go(model=tiny(hidden_dropout_prob=0.3), seed=3) for _ in range(2))
    assert a.history == b.history


def test_gpt_gets_a_padding_token(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2ForSequenceClassification
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30522, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = tune(tmp_path, "lora", DATA, targets=["c_attn"], steps=2, batch=8)
    assert run.model.config.pad_token_id == tokenizer.pad_token_id


# The command

def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.csv", ROWS)
    argv = ["tune", "ia3", "--data", "mine.csv", "--lr", "1e-2", "--set", "steps", "2", "--test"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "test_accuracy" in out and "_tune/ia3-0/adapter" in out
    net = load_adapter(build("minilm", ["0", "1"])[0], tmp_path / "_tune" / "ia3-0" / "adapter")
    assert sum(p.requires_grad for p in net.parameters()) > 2
    assert main(argv) == 0  # a finished run is not repeated


@pytest.mark.parametrize("argv, message", [
    (["tune", "lorra"], "no method is called 'lorra'; did you mean 'lora'"),
    (["tune", "lora", "--data", "none.csv"], "none.csv"),
    (["tune", "lora", "--model", "bertt"], "no model is called 'bertt'"),
    (["tune", "lora", "--rows", "0"], "asked for 0 rows"),
    (["tune", "lora", "--lr", "-1"], "lr must be a positive number"),
    (["tune", "lora", "--set", "rank", "8"], "rank"),
])
def test_the_command_complains_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_memory_that_cannot_suffice_is_told_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunebook.tuning.cost.free", lambda device: 10**8)
    write(tmp_path / "mine.csv", ROWS)
    assert main(["tune", "full", "--data", "mine.csv"]) == 2
    err = capsys.readouterr().err
    assert "takes at least" in err and "MB are free" in err and err.count("\n") == 1
