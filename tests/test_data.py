"""The catalogue and its ladder: real files when TUNEBOOK_DATA has them, bad inputs, and the shipped set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunebook.kit import data
from tunebook.kit.ladder import Missing, NotFound

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("TUNEBOOK_DATA") or "/nonexistent").expanduser()
needs_rt = pytest.mark.skipif(not (REAL / "rt_polarity").is_dir(), reason="TUNEBOOK_DATA names no folder that holds rt_polarity/")

needs_play = pytest.mark.skipif(not (REAL / "tinyshakespeare").is_dir(), reason="TUNEBOOK_DATA names no folder that holds tinyshakespeare/")


@pytest.fixture
def no_env(monkeypatch):
    monkeypatch.delenv("TUNEBOOK_DATA", raising=False)


@pytest.fixture
def no_hub(monkeypatch):
    def absent(*args): raise Missing("the hub is out of reach", "run: hf download")
    monkeypatch.setattr(data, "hub_snapshot", absent)


@pytest.fixture(scope="module")
def reviews(): return data.generate_reviews()


@pytest.fixture(scope="module")
def rt(): return data.locate("rt_polarity", REAL / "rt_polarity")[1]


def python(code, **env):
    """Standard output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def texts(rows): return [r["text"] for r in rows]


def test_shipped_files_are_what_the_generator_makes(tmp_path):
    made = {p.name: p.read_bytes() for p in data.write("reviews", tmp_path)}
    assert made == {p.name: p.read_bytes() for p in (ROOT / "data/reviews").iterdir()}
    assert sum(map(len, made.values())) < 700_000


def test_reviews_sizes_balance_and_disjoint_splits(reviews):
    assert {s: len(rows) for s, rows in reviews.items()} == {"train": 2400, "validation": 600, "test": 1000}
    every = [t.lower() for rows in reviews.values() for t in texts(rows)]
    assert len(set(every)) == len(every)
    for rows in reviews.values():
        for column in ("phenomenon", "words", "template", "domain", "pair"):
            for value in {r[column] for r in rows}:
                labels = [r["label"] for r in rows if r[column] == value]
                assert 2 * sum(labels) == len(labels), (column, value)


def test_reviews_text_is_well_formed(reviews):
    for rows in reviews.values():
        for t in texts(rows):
            assert t.isascii() and t[0].isupper() and t.endswith(".") and not set("{}~+|") & set(t) and "  " not in t, t
            words = t.lower().replace(",", "").split()
            assert all(w != "a" or after[0] not in "aeiou" or after.startswith(("use", "one-")) for w, after in zip(words, words[1:])), t


def test_generation_does_not_depend_on_hash_order():
    code = "from tunebook.kit import data; print(data.digest(data.generate_reviews()))"
    outs = {python(code, PYTHONHASHSEED=seed) for seed in ("0", "1")}
    assert outs == {data.CATALOGUE["reviews"].digest + "\n"}


def test_importing_costs_no_heavy_package():
    code = "import sys, tunebook.kit.data; print([m for m in ('torch', 'datasets', 'sklearn', 'pandas') if m in sys.modules])"
    assert python(code) == "[]\n"


def test_every_rung_gives_the_same_reviews(tmp_path, monkeypatch, no_env, reviews):
    assert data.locate("reviews") == ("shipped", reviews)
    data.write("reviews", tmp_path / "reviews")
    assert data.locate("reviews", tmp_path / "reviews") == ("your path", reviews)
    monkeypatch.setattr(data, "checkout", lambda: None)
    assert data.locate("reviews") == ("generated", reviews)
    monkeypatch.setenv("TUNEBOOK_DATA", str(tmp_path))
    assert data.locate("reviews") == ("TUNEBOOK_DATA", reviews)


def test_a_folder_without_the_set_falls_through_but_wrong_bytes_stop(tmp_path, monkeypatch, reviews):
    monkeypatch.setenv("TUNEBOOK_DATA", str(tmp_path))
    assert data.locate("reviews") == ("shipped", reviews)
    data.write("reviews", tmp_path / "reviews")
    (tmp_path / "reviews/train.csv").write_text("text,label\nnice,1\n")
    with pytest.raises(ValueError, match="not the file it should be"): data.locate("reviews")


def test_load_twice_is_identical_and_names_its_rung(no_env):
    first, second = data.load("reviews"), data.load("reviews")
    for split in data.SPLITS:
        assert first[split].to_list() == second[split].to_list()
        assert first[split].features["label"].names == ["negative", "positive"]
        assert "Served by: shipped" in first[split].info.description


def test_load_without_datasets_says_what_to_install(monkeypatch, no_env):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'tunebook\[labs\]'"): data.load("reviews")
    assert data.locate("reviews")[0] == "shipped"


@pytest.mark.parametrize(("name", "near"), [("review", "reviews"), ("rt-polarity", "rt_polarity"), ("Reviews", "reviews")])
def test_a_wrong_name_is_told_the_nearest(name, near):
    for call in (data.load, data.locate, data.rungs):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"): call(name)
    with pytest.raises(ValueError, match="Known: reviews, rt_polarity"): data.load("zzzzzz")


def test_a_given_path_must_serve(tmp_path):
    for name in data.CATALOGUE:
        with pytest.raises(NotFound, match="is not a folder"): data.load(name, tmp_path / "nowhere")
        with pytest.raises(NotFound, match="holds no"): data.load(name, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFound, match="is not a folder"): data.load("reviews", tmp_path / "file")


def test_wrong_bytes_on_a_path_are_refused(tmp_path):
    for name in ("rt-polarity.pos", "rt-polarity.neg"): (tmp_path / name).write_text("fine .\n")
    with pytest.raises(ValueError, match="not the file it should be"): data.load("rt_polarity", tmp_path)


def test_no_rung_serves_names_every_rung(no_env, no_hub):
    with pytest.raises(NotFound) as e: data.load("rt_polarity")
    for part in ("TUNEBOOK_DATA", "rt-polarity.pos", "hub", "hf download"): assert part in str(e.value)


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    data.write("reviews", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"): data.write("reviews", tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="not made by the kit"): data.write("rt_polarity", tmp_path)


@needs_rt
def test_rt_polarity_counts_and_splits(rt):
    rows = [r for split in rt.values() for r in split]
    assert [sum(r["label"] == y for r in rows) for y in (0, 1)] == [5331, 5331]
    assert {s: len(r) for s, r in rt.items()} == {"train": 8530, "validation": 1066, "test": 1066}
    assert len({r["text"] for r in rows}) == len(rows)
    assert all(r["text"] == r["text"].strip() and r["text"] for r in rows)
    assert not any("Ã" in r["text"] or "\x80" <= c <= "\x9f" for r in rows for c in r["text"])


@needs_rt
def test_rt_polarity_same_from_path_and_environment(rt):
    assert data.locate("rt_polarity") == ("TUNEBOOK_DATA", rt)
    ds = data.load("rt_polarity", REAL / "rt_polarity")
    assert {s: ds[s].to_list() for s in data.SPLITS} == rt


@needs_rt
@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_rt_polarity_same_from_the_hub(rt, tmp_path, monkeypatch, no_env, encoding):
    """The hub's builder reads the files as Latin-1 and strips them; whether they were cp1252 or UTF-8, the rows come out the same."""
    pd = pytest.importorskip("pandas")
    lines = {y: (REAL / f"rt_polarity/rt-polarity.{n}").read_text(encoding="utf-8").splitlines() for y, n in ((1, "pos"), (0, "neg"))}
    rows = [{"text": t.encode(encoding).decode("latin-1").strip(), "label": y} for y, part in lines.items() for t in part]
    for i, name in enumerate(("train", "validation", "test")): pd.DataFrame(rows[i::3]).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(data, "hub_snapshot", lambda *args: tmp_path)
    assert data.locate("rt_polarity") == ("hub", rt)


@needs_rt
def test_rt_polarity_baseline_is_the_published_one(rt):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    train, test = ([texts(rt[s]), [r["label"] for r in rt[s]]] for s in ("train", "test"))
    accuracy = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(*train).score(*test)
    assert 0.70 < accuracy < 0.80, accuracy


# A text without labels

def test_a_text_is_split_in_order(tmp_path):
    (tmp_path / "input.txt").write_bytes(b"0123456789" * 9 + "é\r\n\n".encode() + b"123456")
    splits = data.read_text(tmp_path)
    assert [len(splits[s][0]["text"]) for s in data.SPLITS] == [90, 5, 5]
    assert "".join(splits[s][0]["text"] for s in data.SPLITS).encode() == (tmp_path / "input.txt").read_bytes()


@needs_play
def test_tinyshakespeare_is_the_whole_file_and_has_no_labels():
    ds = data.load("tinyshakespeare")
    assert {s: list(ds[s].features) for s in ds} == {s: ["text"] for s in data.SPLITS} and set(ds.num_rows.values()) == {1}
    assert "".join(ds[s][0]["text"] for s in data.SPLITS) == (REAL / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
