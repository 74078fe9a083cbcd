"""The shipped sets: the same bytes again, disjoint splits, tags and offsets that are right, held-out words that are held out."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import data, sets, streams, texts

ROOT = Path(__file__).resolve().parents[1]
SETS = sets.SETS | texts.SETS | streams.SETS
LABELLED = ("intents", "headlines")
few = settings(deadline=None, max_examples=6, derandomize=True)
seeds = st.integers(1, 2**31)


@pytest.fixture(scope="module")
def made(): return {name: d.make() for name, d in SETS.items()}


def every(splits): return [r for rows in splits.values() for r in rows]


def words(text): return re.findall(r"[\w'-]+", text)


def held(listed, *pools): return {w for k in pools for w in sets.pool(listed, k)}


# Files, cards and the ladder

@pytest.mark.parametrize("name", SETS)
def test_shipped_files_are_what_the_generator_makes(name, tmp_path):
    files = {p.name: p.read_bytes() for p in data.write(name, tmp_path)}
    assert files == {p.name: p.read_bytes() for p in (ROOT / "data" / name).iterdir()}
    assert max(map(len, files.values())) < 300_000


def test_the_sets_are_small_together():
    assert sum(p.stat().st_size for name in SETS for p in (ROOT / "data" / name).iterdir()) < 1_500_000


@pytest.mark.parametrize("name", SETS)
def test_every_rung_gives_the_same_rows(name, made, tmp_path, monkeypatch):
    monkeypatch.delenv("TUNEBOOK_DATA", raising=False)
    assert data.locate(name) == ("shipped", made[name])
    data.write(name, tmp_path / name)
    assert data.locate(name, tmp_path / name) == ("your path", made[name])
    monkeypatch.setattr(data, "checkout", lambda: None)
    assert data.locate(name) == ("generated", made[name])
    file = next((tmp_path / name).glob("train.*"))
    file.write_bytes(file.read_bytes().replace(b"e", b"E", 1))
    with pytest.raises(ValueError, match="not the file it should be"): data.locate(name, tmp_path / name)


def test_generation_does_not_depend_on_hash_order():
    code = ("from tunebook.kit import data, sets, streams, texts\n"
            "for m in (sets, streams, texts):\n    for d in m.SETS.values(): print(data.digest(d.make()) == d.digest)")
    for seed in ("0", "1"):
        out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout
        assert out.split() == ["True"] * len(SETS)


def test_importing_costs_no_heavy_package():
    code = ("import sys, tunebook.kit.sets, tunebook.kit.texts, tunebook.kit.streams\n"
            "print([m for m in ('torch', 'datasets', 'sklearn', 'numpy') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", SETS)
def test_load_keeps_rows_and_names_labels(name, made):
    ds = data.load(name)
    assert {s: ds[s].to_list() for s in data.SPLITS} == made[name]
    if name in LABELLED: assert tuple(ds["test"].features["label"].names) == SETS[name].labels
    else: assert "label" not in ds["test"].features


@pytest.mark.parametrize("name", SETS)
def test_the_card_counts_what_is_there(name, made):
    card = SETS[name].card(made[name])
    assert card == (ROOT / "data" / name / "card.md").read_text() and not re.search(r"[{}]", card)
    for split, rows in made[name].items():
        cells = [c.strip() for c in next(line for line in card.splitlines() if line.startswith(f"| {split} |")).strip("|").split("|")]
        assert cells[1] == str(len(rows))
        for cell in cells[2:]: assert sum(int(part.rsplit(" ", 1)[1]) for part in cell.split(", ")) == len(rows)
    for column in made[name]["train"][0]: assert f"`{column}`" in card, column
    assert "CC0" in card and "**Limits.**" in card


# Splits and English

@pytest.mark.parametrize(("name", "key"), [("entities", "tokens"), ("questions", "context"), ("intents", "text"), ("titles", "text"),
                                           ("reports", "text"), ("slips", "target"), ("headlines", "text"), ("items", "title")])
def test_splits_are_disjoint(name, key, made):
    seen = [{str(r[key]).lower() for r in rows} for rows in made[name].values()]
    assert len(set.union(*seen)) == sum(map(len, seen))
    if name != "questions": assert sum(map(len, seen)) == len(every(made[name]))


def english(name, row):
    """The texts of a row that ought to be right English."""
    return {"entities": [], "slips": [row.get("target")], "titles": [row.get("text"), *row.get("targets", [])],
            "reports": [*row.get("text", "").split("\n"), *row.get("targets", [])],
            "questions": [row.get("context"), row.get("question")],
            "items": [row.get("title"), row.get("text")], "clicks": []}.get(name, [row.get("text")])


@pytest.mark.parametrize("name", SETS)
def test_the_english_is_well_formed(name, made):
    for text in (t for r in every(made[name]) for t in english(name, r)):
        assert text[0].isupper() or text[0].isdigit(), text
        assert not re.search(r"[{}~\[\]|+]|  |\.\.| [.,?]|^ | $", text), text
        for a, after in re.findall(r"\b([Aa]n?) (\w+)", text):
            vowel = after[0].lower() in "aeiou" and not re.match(r"(?i)(use|uni|one\b|eu)", after) or after.startswith(("hour", "honest"))
            assert (len(a) == 2) == vowel, text


# entities

def check_entities(splits):
    new = held(sets.NAMES, 1, 2) | held(sets.FIRST, 1, 2)
    capitals = {"Grace", "Hope", "Joy", "Bill", "Mark"}  # ordinary words too
    for r in every(splits):
        assert len(r["tokens"]) == len(r["tags"]) and all(r["tokens"])
        assert set(r["tags"]) <= {"O", *(f"{b}-{k}" for b in "BI" for k in ("PER", "LOC", "ORG"))}
        for before, tag in zip(["O", *r["tags"]], r["tags"]): assert tag[0] != "I" or before[1:] == tag[1:]
    for r in splits["train"]: assert not ({t for t in r["tokens"]} & (new - capitals)), r
    for r in splits["test"]:
        names = held(sets.NAMES, 0) if r["words"] == "held-out" else new - capitals
        assert not {t.capitalize() for t, tag in zip(r["tokens"], r["tags"]) if tag != "O"} & (names - {"Reading", "Nice", "Bath"}), r


@few
@given(seeds)
def test_any_seed_gives_valid_entities(seed): check_entities(sets.generate_entities(seed))


def test_a_list_of_names_fails(made):
    def mentions(rows):
        for r in rows:
            for t, tag in zip(r["tokens"], r["tags"]):
                if tag[0] == "B": yield t, tag[2:]
    kinds = {}
    for name, kind in mentions(made["entities"]["train"]): kinds.setdefault(name, Counter())[kind] += 1
    bare = [(n, k) for n, k in mentions([r for r in made["entities"]["test"] if r["kind"] == "bare"])]
    right = sum(n in kinds and kinds[n].most_common(1)[0][0] == k for n, k in bare) / len(bare)
    assert right < 0.35, right
    for name in sets.pool(sets.NAMES, 0): assert kinds[name].most_common(1)[0][1] < 0.8 * kinds[name].total(), name


def test_words_that_are_names_elsewhere_are_not_tagged(made):
    ordinary = Counter(t for r in made["entities"]["train"] for t, tag in zip(r["tokens"], r["tags"]) if tag == "O")
    named = Counter(t for r in made["entities"]["train"] for t, tag in zip(r["tokens"], r["tags"]) if tag != "O")
    for word in ("May", "Will", "Rose", "Reading"): assert ordinary[word] > 3 and named[word] > 3, word


# questions

def check_questions(splits):
    by = {}
    for r in every(splits):
        assert len(r["answers"]) == len(r["starts"]) == (r["case"] != "missing")
        for a, s in zip(r["answers"], r["starts"]): assert r["context"][s:s + len(a)] == a
        by.setdefault(r["context"], []).append(r)
    for rows in by.values(): assert sorted(r["case"] for r in rows) == ["missing", "own", "shared"]
    ids = [r["id"] for r in every(splits)]
    assert len(set(ids)) == len(ids)
    for r in splits["test"]: assert sets.careful_answer(r) == (r["answers"], r["starts"]), r


@few
@given(seeds)
def test_any_seed_gives_valid_questions(seed): check_questions(sets.generate_questions(seed))


def test_missing_answers_have_a_tempting_one(made):
    """The relation asked for is told, of the other subject."""
    for r in made["questions"]["test"]:
        told = sets.facts_told(r["kind"], r["context"])
        assert 4 <= len(told) <= 6 and len({s for s, _ in told}) == 2
        if r["case"] == "missing":
            asked = {rel for rel, (_, _, listed) in sets.RELATIONS[r["kind"]].items() for k in range(3)
                     for q in sets.pool(listed, k) for s, _ in told if re.sub(r"\bS\b", s, q) == r["question"]}
            assert len(asked) == 1 and asked <= {rel for _, rel in told}


def test_a_sentence_of_no_known_form_is_an_error():
    row = {"kind": "firm", "context": "Talvik makes lamps.", "question": "Why?"}
    sung = "Talvik sings."
    with pytest.raises(ValueError, match=f"no form of a sentence about a firm fits {sung!r}"): sets.facts_told("firm", sung)
    with pytest.raises(ValueError, match="no question"): sets.careful_answer(row)


# intents

@few
@given(seeds)
def test_any_seed_gives_valid_intents(seed):
    splits, n = sets.generate_intents(seed), len(sets.INTENTS)
    for rows in splits.values():
        counts = Counter(r["label"] for r in rows)
        assert set(counts) == set(range(n + 1)) and len({counts[i] for i in range(n)}) == 1
        assert len({r["text"].lower() for r in rows}) == len(rows)
    new = held(sets.ITEMS, 1, 2)
    assert not [r for r in splits["train"] if any(item in r["text"] for item in new)]


def test_every_intent_has_an_answer_and_labels_end_with_oos():
    assert list(sets.ANSWERS) == list(sets.INTENTS) and SETS["intents"].labels == (*sets.INTENTS, "oos")


def test_no_phrasing_is_in_two_pools():
    for group in (*sets.INTENTS.values(), sets.OUT_OF_SCOPE):
        every_one = [t for pool in group for t in pool]
        assert len(set(every_one)) == len(every_one)


# titles, reports, slips

@few
@given(seeds)
def test_any_seed_gives_faithful_titles(seed):
    names = {n for source in (sets.PEOPLE, sets.PLACES, texts.FIRMS) for k in range(3) for n in sets.pool(source, k)}
    for r in every(texts.generate_titles(seed)):
        assert len(set(r["targets"])) == 3
        told = {n for n in names if re.search(rf"\b{n}\b", r["text"])}
        assert told == set(r["names"])
        for t in r["targets"]:
            assert {n for n in names if re.search(rf"\b{n}\b", t)} <= told
            assert {w for w in words(t) if w.isdigit()} <= set(words(r["text"]))
        assert not {n for n in names if n in re.split(r"(?<=[.?]) ", r["text"])[0]}  # the lead names nobody


@few
@given(seeds)
def test_any_seed_gives_valid_reports(seed):
    for r in every(texts.generate_reports(seed)):
        lines = r["text"].split("\n")
        assert 12 <= len(lines) <= 40 and len(set(lines)) == len(lines)
        assert all(line[-1] == "." and ". " not in line for line in lines)
        for t in r["targets"]: assert {w for w in words(t) if w.isdigit()} <= set(words(r["text"]))
        assert not any(t in r["text"] for t in r["targets"])


@few
@given(seeds)
def test_any_seed_gives_valid_slips(seed):
    splits = texts.generate_slips(seed)
    for r in every(splits): assert (r["text"] == r["target"]) == (r["kind"] == "correct"), r
    for rows in splits.values(): assert sum(r["kind"] == "correct" for r in rows) == 0.4 * len(rows)
    later = {"advise", "brake", "peace", "whether", "weather", "piece", "passed"}
    assert not {w for r in splits["train"] for w in words(r["text"])} & later
    for r in (r for r in every(splits) if r["kind"] == "spelling"):
        changed = [(a, b) for a, b in zip(words(r["target"]), words(r["text"])) if a != b]
        assert len(changed) == 1 and abs(len(changed[0][0]) - len(changed[0][1])) <= 1 and changed[0][0][0] == changed[0][1][0]


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=12), seeds)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_misspelling_is_one_edit_away(word, seed):
    wrong = texts.misspell(word, data.Dice(seed))
    assert wrong[0] == word[0] and abs(len(wrong) - len(word)) <= 1
    assert (sorted(wrong) == sorted(word)) or sum((Counter(wrong) - Counter(word)).values()) <= 1


def test_too_short_a_word_cannot_be_misspelt():
    with pytest.raises(ValueError, match="at least 3 small letters"): texts.misspell("at", data.Dice(0))
    with pytest.raises(ValueError, match="at least 3 small letters"): texts.misspell("déjà", data.Dice(0))


def test_no_shipped_misspelling_is_a_word_of_the_set(made):
    rows = every(made["slips"])
    known = {w for r in rows for w in words(r["target"])}
    for r in rows:
        if r["kind"] == "spelling": assert set(words(r["text"])) - known, r


# headlines, items, clicks

@few
@given(seeds)
def test_any_seed_gives_valid_headlines(seed):
    splits = streams.generate_headlines(seed)
    rows = every(splits)
    assert [r["date"] for r in rows] == sorted(r["date"] for r in rows) and len({r["text"] for r in rows}) == len(rows)
    planted = {e.id: e for e in streams.EVENTS}
    for r in rows:
        assert r["company"] in r["text"] and r["label"] in (0, 1, 2)
        if r["event"]:
            e = planted[r["event"]]
            first, last = (str(streams.FIRST_DAY + streams.timedelta(d)) for d in (e.start, e.start + e.days - 1))
            assert first <= r["date"] <= last and (r["company"], r["label"], r["topic"]) == (e.company, e.polarity, e.topic)
    assert {r["event"] for r in rows} == {"", *planted}
    dates = [{r["date"] for r in part} for part in splits.values()]
    assert max(dates[0]) < min(dates[1]) and max(dates[1]) < min(dates[2])


def test_a_quiet_stream_has_no_event():
    assert {r["event"] for r in every(streams.generate_headlines(0, ()))} == {""}


def test_an_event_that_cannot_happen_is_an_error():
    good = streams.EVENTS[0]
    for wrong, word in (({"company": "Nobody"}, "company"), ({"start": 500}, "day"), ({"polarity": 7}, "polarity"),
                        ({"topic": "sport"}, "topic")):
        with pytest.raises(ValueError, match=word): streams.generate_headlines(0, [good._replace(**wrong)])


def test_counting_words_does_not_tell_the_polarity(made):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    train, test = ([[r["text"] for r in made["headlines"][s]], [r["label"] for r in made["headlines"][s]]] for s in ("train", "test"))
    assert 0.6 < make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(*train).score(*test) < 0.8


@settings(deadline=None, max_examples=3, derandomize=True)
@given(seeds)
def test_any_seed_gives_valid_clicks(seed):
    items, clicks = streams.generate_items(seed), streams.generate_clicks(seed)
    rows = every(clicks)
    assert len({(c["user"], c["item"]) for c in rows}) == len(rows)
    assert [c["time"] for c in rows] == sorted(c["time"] for c in rows)
    assert {c["item"] for c in rows} <= {r["id"] for r in every(items)}
    later = {r["id"] for s in ("validation", "test") for r in items[s]}
    assert later and not later & {c["item"] for c in clicks["train"]}  # nobody clicks what has not appeared
    cold = {r["id"] for r in items["test"]}
    assert sum(c["item"] in cold for c in clicks["test"]) > 50 and not cold & {c["item"] for c in clicks["validation"]}
