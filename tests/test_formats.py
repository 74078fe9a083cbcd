"""The readers of real formats: counts of the real sets, one clear error for bad input, and files that are drawn or broken at random."""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import data
from tunebook.kit import formats as f

REAL = Path(os.environ.get("TUNEBOOK_DATA") or "/nonexistent").expanduser()
COUNTS = {  # rows of each split; they add up to those of the data's README
    "banking77": {"train": 9005, "validation": 998, "test": 3080}, "clinc150": {"train": 7600, "validation": 3100, "test": 5500},
    "sms_spam": {"train": 4463, "validation": 544, "test": 567}, "sib200_en": {"train": 701, "validation": 99, "test": 204},
    "sib200_zh": {"train": 701, "validation": 99, "test": 204}, "csl_zh_topics": {"train": 8000, "validation": 1000, "test": 1000},
    "csl_zh_titles": {"validation": 1000, "test": 1000}, "wnut17": {"train": 3394, "validation": 1009, "test": 1287},
    "wnut17_systems": {"arcada": 1287, "spinningbytes": 1287}, "uner_zh_gsdsimp": {"train": 3997, "validation": 500, "test": 500},
    "xquad_en": {"test": 1190}, "cmrc2018_trial": {"test": 1002}, "scitldr": {"validation": 619, "test": 618},
    "codespell": {"train": 64992}, "wikitext2": {"validation": 1, "test": 1}}
quick = settings(deadline=None, max_examples=60, derandomize=True)


def real(name):
    """The folder of a real set, or a skip that says why."""
    folder = REAL / f.SETS[name].folder
    if not folder.is_dir(): pytest.skip(f"TUNEBOOK_DATA names no folder that holds {folder.name}/")
    return folder


def splits(name):
    real(name)
    rung, found = data.locate(name)
    assert rung == "TUNEBOOK_DATA"
    return found


# The real sets

def test_every_set_has_its_counts_here():
    assert set(COUNTS) == set(f.SETS) == set(f.FILES) == {e[0] for e in f.ENTRIES}
    assert {d.folder for d in f.SETS.values()} == set(f.SOURCES)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_rows(name):
    found, d = splits(name), f.SETS[name]
    assert {s: len(rows) for s, rows in found.items()} == COUNTS[name]
    for rows in found.values():
        assert len({tuple(r) for r in rows}) == 1, "rows of one split have the same columns"
        for r in rows:
            if d.labels: assert r["text"] and r["label"] in range(len(d.labels))
            if d.task == "entities": assert len(r["tokens"]) == len(r["tags"]) > 0 and all(r["tokens"]) and f.mend(r["tags"]) == r["tags"]
            if d.task == "questions":
                assert r["answers"] and all(r["context"][s:s + len(a)] == a for a, s in zip(r["answers"], r["starts"], strict=True))
            if "targets" in r: assert r["text"] and r["targets"] and all(r["targets"])
    if "train" in found and d.labels: assert {r["label"] for r in found["train"]} == set(range(len(d.labels)))


@pytest.mark.parametrize("name", ["banking77", "wnut17_systems", "xquad_en", "codespell", "scitldr"])
def test_load_has_the_same_rows(name):
    found = splits(name)
    ds = data.load(name)
    assert {s: ds[s].to_list() for s in ds} == found
    if f.SETS[name].labels: assert tuple(ds["train"].features["label"].names) == f.SETS[name].labels


def test_what_the_readers_report_of_the_real_files():
    seen = {}
    for name, file, read in (
            ("wnut17", "wnut17train.conll", f.read_conll), ("uner_zh_gsdsimp", "zh_gsdsimp-ud-train.iob2", lambda p: f.read_conll(p, 1, 2)),
            ("cmrc2018_trial", "cmrc2018_trial.json", f.read_squad), ("xquad_en", "xquad.en.json", f.read_squad),
            ("wnut17", "submissions/spinningbytes.txt", f.read_conll)):
        seen[file] = read(real(name) / file)[1]
    assert seen["wnut17train.conll"].counts == {"sentence breaks that hold a space or tab": 2394}
    assert seen["zh_gsdsimp-ud-train.iob2"].counts == {"comment lines left out": 8128}
    assert seen["cmrc2018_trial.json"].counts == {"offsets that missed their answer, moved to it": 5}
    assert str(seen["cmrc2018_trial.json"]).endswith("moved to it: 5 (first: TRIAL_210_QUERY_0)")
    assert not seen["xquad.en.json"].counts
    assert seen["submissions/spinningbytes.txt"].counts["line ends of Windows"] == 24679


def test_the_five_wrong_offsets_are_utf_16():
    text = json.loads((real("cmrc2018_trial") / "cmrc2018_trial.json").read_text(encoding="utf-8"))
    wrong = [(p["context"], a) for x in text["data"] for p in x["paragraphs"] for q in p["qas"] for a in q["answers"]
             if f.place(p["context"], a["text"], a["answer_start"]) != a["answer_start"]]
    assert len(wrong) == 5
    for context, a in wrong:
        assert max(context) > "\uffff", "a character of two units in UTF-16"
        assert context.encode("utf-16-le")[2 * a["answer_start"]:].decode("utf-16-le").startswith(a["text"])


def test_sms_spam_keeps_quotes_rows_and_copies_together():
    found, path = splits("sms_spam"), real("sms_spam") / "SMSSpamCollection"
    texts = [r["text"] for rows in found.values() for r in rows]
    assert len(texts) == 5574 and len(texts) - len(set(texts)) == 403
    with open(path, newline="", encoding="utf-8") as file: assert len(list(csv.reader(file, delimiter="\t"))) == 5572
    keys = [{f.alike(r["text"]) for r in rows} for rows in found.values()]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 5574 - 444
    drawn = data.split_rows({y: [r["text"] for rows in found.values() for r in rows if r["label"] == y] for y in (0, 1)})
    leaked = {r["text"] for r in drawn["train"]} & {r["text"] for r in drawn["test"]}
    assert len(leaked) > 20, "a random split does leak"
    with pytest.raises(ValueError, match="readme, line 17: byte 0xe9 is not UTF-8"): f.decode(real("sms_spam") / "readme")


def test_traps_of_the_other_sets():
    bank = [r["text"] for rows in splits("banking77").values() for r in rows]
    assert (real("banking77") / "train.csv").read_bytes().count(b"\n") - 1 == 10016 and sum("\n" in t for t in bank) > 0
    en, zh = splits("sib200_en"), splits("sib200_zh")
    for s in en: assert [(r["id"], r["label"]) for r in en[s]] == [(r["id"], r["label"]) for r in zh[s]]
    clinc = splits("clinc150")
    assert [sum(r["label"] == 150 for r in rows) for rows in clinc.values()] == [100, 100, 1000] and f.SETS["clinc150"].labels[150] == "oos"
    words = splits("codespell")["train"]
    assert sum(len(r["right"]) > 1 for r in words) == 6065 and not any("," in w for r in words for w in r["right"])
    assert [len(r["text"].split()) for rows in splits("wikitext2").values() for r in rows] == [213886, 241211]
    assert splits("csl_zh_titles")["test"][0]["targets"] == [splits("csl_zh_topics")["test"][0]["text"]]  # the same papers
    assert sorted({len(r["targets"]) for rows in splits("scitldr").values() for r in rows}) == [1, 2, 3, 4]


def test_entities_have_the_counts_of_their_sources():
    def seen(name):
        return {s: (sum(len(r["tokens"]) for r in rows), sum(t[0] == "B" for r in rows for t in r["tags"]))
                for s, rows in splits(name).items()}
    assert seen("wnut17") == {"train": (62730, 1975), "validation": (15733, 836), "test": (23394, 1079)}
    assert seen("uner_zh_gsdsimp") == {"train": (98616, 6118), "validation": (12663, 753), "test": (12012, 763)}
    assert any(t.startswith("#") for r in splits("wnut17")["train"] for t in r["tokens"]), "hashtags are tokens"


def test_one_changed_byte_is_refused(tmp_path):
    (tmp_path / "dictionary.txt").write_bytes((real("codespell") / "dictionary.txt").read_bytes().replace(b"teh->the", b"teh->thy"))
    with pytest.raises(ValueError, match="not the file it should be"): data.locate("codespell", tmp_path)


# Bad input: one error, with the file, the place and what to do

def table(p): return f.read_delimited(p, ",", quoted=True)


def persons(p): return f.read_conll(p, types=("PER",))


def needing(p): return f.read_jsonl(p, ("text",))


def squad(paragraph): return json.dumps({"data": [{"paragraphs": [paragraph]}]}).encode()


BAD = [
    (f.read_delimited, b"", "x is empty: expected rows"),
    (f.read_delimited, b"\xef\xbb\xbf\n", "x is empty"),
    (f.read_delimited, b"text\tlabel\n", "x holds no rows"),
    (f.read_delimited, "a\tb\né".encode("latin-1"), "x, line 2: byte 0xe9"),
    (f.read_delimited, b"a\tb\n1\t2\n1\n", "x, line 3: 1 cells; expected 2 .a, b."),
    (f.read_delimited, b"a\ta\n1\t2\n", "x, line 1: the columns"),
    (f.read_delimited, b"\na\n", "x, line 1: the columns"),
    (table, b'a,b\n1,"2\n3,4\n', "x, line 2: unexpected end of data; mend the quotes"),
    (table, b'a,b\n1,"2" x\n', "x, line 2: .* mend the quotes"),
    (table, b'a,b\n"1\n1",2\n3\n', "x, line 4: 1 cells"),
    (f.read_jsonl, b'{"a": 1}\n{"a": ', "x, line 2: Expecting value; expected JSON"),
    (f.read_jsonl, b"[" * 100_000, "x, line 1: maximum recursion"),
    (f.read_jsonl, b'{"a": Infinity}', "x, line 1: Infinity is no JSON number"),
    (f.read_jsonl, b"3\n", "x, line 1: a JSON int; expected an object"),
    (needing, b'{"texts": 1}\n', "x, line 1: no text; it has texts"),
    (f.read_conll, b"Ada\tB-PER\n\nBob\tPER\n", "x, line 3: tag 'PER'; expected O, or B- or I-"),
    (f.read_conll, b"Ada\n", "x, line 1: 1 columns; expected two"),
    (persons, b"Ada\tB-LOC\n", "x, line 1: tag 'B-LOC'; expected .* PER"),
    (f.read_conll, b"Ada\tB-PER\nB\tx\tO\n", "x, line 2: 3 columns; expected 2"),
    (f.read_conll, b"\tO\n", "x, line 1: an empty token"),
    (lambda p: f.read_conll(p, 1, 2), b"Ada\tB-PER\n", "x, line 1: 2 columns; expected the token in column 1 and the tag in column 2"),
    (f.read_conll, b"# only\n# comments\n", "x holds no rows"),
    (f.read_squad, b"[]", "x, JSON: TypeError"),
    (f.read_squad, squad({"context": "a"}), "x, JSON: KeyError.'qas'.; expected data"),
    (f.read_squad, squad({"context": "a", "qas": [{"id": 1, "question": None, "answers": []}]}), "x, JSON: .*question of 1 is no text"),
    (f.read_squad, squad({"context": None, "qas": [{"id": 1, "question": "", "answers": []}]}), "x, JSON: .*context of 1 is no text"),
    (f.read_squad, b'{"data": []}', "x holds no rows"),
    (f.read_squad, b'{"data":\n}', "x, line 2: Expecting value"),
    (f.read_pairs, b"[]", "x, line 1: a JSON list; expected an object"),
    (f.read_pairs, b'{"train": [["a", "b"], ["a", 1]]}', r"x, train: \['a', 1\]; expected"),
    (f.read_pairs, b'{"train": 3}', "x, train: a JSON int; expected a list"),
    (f.read_corrections, b"teh->the\nteh->then\n", "x, line 2: 'teh' a second time"),
    (f.read_corrections, b"teh the\n", "x, line 1: teh the; expected wrong->right"),
    (f.read_corrections, b"teh->\n", "x, line 1"),
    (f.read_corrections, b"->the\n", "x, line 1"),
    (f.read_corrections, b"teh->the,,\n", "x, line 1")]


@pytest.mark.parametrize(("read", "content", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_clear_error(read, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as e: read("x")
    assert "\n" not in str(e.value) and len(str(e.value)) < 250


def test_ids_twice_and_offsets_out_of_the_text(tmp_path):
    path = tmp_path / "x"

    def read(*qas):
        path.write_bytes(squad({"context": "to be or not to be", "qas": qas}))
        return f.read_squad(path)

    def ask(id, *answers): return {"id": id, "question": "q", "answers": [{"text": t, "answer_start": s} for t, s in answers]}
    with pytest.raises(ValueError, match="a: an id twice"): read(ask("a"), ask("a"))
    rows, report = read(ask("far", ("be", 1000)), ask("minus", ("to", -1)), ask("empty", ("", 3)), ask("near", ("be", 9)), ask("none"))
    assert {r["id"]: r["starts"] for r in rows} == {"far": [16], "minus": [0], "near": [3], "none": []}
    assert report.counts == {"offsets that missed their answer, moved to it": 3, "answers that the text does not hold, left out": 1,
                             "questions that lost every answer, left out": 1}
    assert report.first["answers that the text does not hold, left out"] == "empty" and report.rows == 4


def test_labels_that_training_lacks():
    rows = {"train": [{"text": "a", "label": "x"}], "test": [{"text": "b", "label": "y"}, {"text": "c", "label": "y"}]}
    with pytest.raises(ValueError, match="test has 2 rows with labels that train does not have .y.: expected x"): f.numbered(rows)
    with pytest.raises(ValueError, match="train has no row with the label z"): f.numbered(rows, ("x", "z"))
    del rows["test"]
    assert f.numbered(rows) == ({"train": [{"text": "a", "label": 0}]}, ["x"])
    assert f.numbered({"test": rows["train"]}, ("w", "x"))[0] == {"test": [{"text": "a", "label": 1}]}


def test_tokens_of_other_texts_are_no_system_output(tmp_path):
    (tmp_path / "submissions").mkdir()
    (tmp_path / "emerging.test.annotated").write_text("a\tO\n")
    (tmp_path / "submissions/arcada").write_text("b O\n")
    with pytest.raises(ValueError, match="arcada has other tokens"): f.read_wnut17_systems(tmp_path)


# Files drawn at random

NASTY = ['"', "'", "\t", "\n", "\r", ",", "#", "\\", "\x00", "\x0b", "\x1c", "\x85", "\u200b", "\u2028",
         "\ufeff", "e\u0301", "👩\u200d💻", "𫚭", "中", "->", " "]
chars = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]), max_size=3))
texts = st.lists(chars, max_size=6).map("".join)
inline = texts.map(lambda t: "".join(c for c in t if c not in "\n\r\t"))  # legal in formats by lines and tabs
words = inline.filter(lambda t: t.strip(" "))
tags = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
sentences = st.lists(st.lists(st.tuples(words, tags), min_size=1, max_size=5), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory): return tmp_path_factory.mktemp("drawn") / "file"


def drawn_tables(cells):
    """At least two columns, so that no row is an empty line."""
    return st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5))


@quick
@given(cells=drawn_tables(texts), sep=st.sampled_from(",;\t"), end=st.sampled_from(["\n", "\r\n"]))
def test_quoted_tables_come_back(path, cells, sep, end):
    names, out = [f"c{i}" for i in range(len(cells[0]))], io.StringIO()
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL  # old writers quote "\r" only where lines end with it
    csv.writer(out, delimiter=sep, lineterminator=end, quoting=quoting).writerows([names, *cells])
    path.write_bytes(out.getvalue().encode())
    rows, report = f.read_delimited(path, sep, quoted=True)
    assert [list(r.values()) for r in rows] == cells and not report.counts


@quick
@given(cells=drawn_tables(inline), header=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_unquoted_tables_come_back(path, cells, header, end):
    names = [f"c{i}" for i in range(len(cells[0]))]
    path.write_bytes("".join("\t".join(row) + end for row in [names if header else ["-"] * len(names), *cells]).encode())
    rows, report = f.read_delimited(path, names=() if header else names)
    assert [list(r.values()) for r in rows[not header:]] == cells
    assert report.counts["line ends of Windows"] == (len(cells) + 1) * (end == "\r\n")


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(plain, lambda x: st.lists(x, max_size=3), max_leaves=5)


@quick
@given(rows=st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=5), escape=st.booleans())
def test_json_lines_come_back(path, rows, escape):
    path.write_bytes("".join(json.dumps(r, ensure_ascii=escape) + "\n" for r in rows).encode())
    assert f.read_jsonl(path)[0] == rows
    path.write_bytes(data.jsonl(rows))
    assert f.read_jsonl(path)[0] == rows


@quick
@given(drawn=sentences, end=st.sampled_from(["\n", "\r\n"]), gap=st.sampled_from(["", "\t", " \t"]), before=st.booleans())
def test_sentences_come_back(path, drawn, end, gap, before):
    def line(i, w, t): return f"{i}\t{w}\t{t}\t-{end}" if before else f"{w}\t{t}{end}"
    path.write_bytes(b"# drawn\n" + "".join("".join(line(i, *pair) for i, pair in enumerate(s)) + gap + end for s in drawn).encode())
    rows, report = f.read_conll(path, 1, 2) if before else f.read_conll(path)
    assert [r["tokens"] for r in rows] == [[w for w, _ in s] for s in drawn] and report.counts["comment lines left out"] == 1
    assert [r["tags"] for r in rows] == [f.mend([t for _, t in s]) for s in drawn]
    assert report.counts["I- that continue nothing, made B-"] == sum(a != t for r, s in zip(rows, drawn) for a, (_, t) in zip(r["tags"], s))


@quick
@given(found=st.lists(tags))
def test_mended_tags_are_legal_and_stay(found):
    ours = f.mend(found)
    assert f.mend(ours) == ours and [t[1:] for t in ours] == [t[1:] for t in found]
    for before, tag in zip(["O", *ours], ours): assert tag[0] != "I" or before[1:] == tag[1:]
    assert all(a == b or (a, b) == ("B" + b[1:], b) for a, b in zip(ours, found))


@quick
@given(context=texts, cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8), st.integers(-40, 40)), max_size=4), other=texts)
def test_questions_come_back_and_offsets_are_never_trusted(path, context, cuts, other):
    answers = [(context[a:a + n], a if shift % 2 else a + shift) for a, n, shift in cuts] + [(other, 0)]
    qa = {"id": "q", "question": other, "answers": [{"text": t, "answer_start": s} for t, s in answers]}
    path.write_bytes(squad({"context": context, "qas": [qa, qa | {"id": "none", "answers": []}]}))
    rows, report = f.read_squad(path)
    assert rows[-1]["id"] == "none" and rows[-1]["answers"] == rows[-1]["starts"] == []
    kept = rows[0] if rows[0]["id"] == "q" else {"answers": [], "starts": []}
    assert [a for a, _ in answers if a and a in context] == kept["answers"]
    for a, s in zip(kept["answers"], kept["starts"], strict=True): assert s >= 0 and context[s:s + len(a)] == a
    true = [(a, s) for a, s in answers if a and s >= 0 and context.startswith(a, s)]
    assert report.counts["offsets that missed their answer, moved to it"] == len(kept["answers"]) - len(true)
    assert report.counts["answers that the text does not hold, left out"] == len(answers) - len(kept["answers"])
    assert report.rows == len(rows) == 2 - report.counts["questions that lost every answer, left out"]


@quick
@given(pairs=st.dictionaries(texts, st.lists(st.tuples(texts, texts), max_size=4), min_size=1, max_size=3))
def test_pairs_come_back(path, pairs):
    path.write_text(json.dumps(pairs))
    if not any(pairs.values()):
        with pytest.raises(ValueError, match="holds no rows"): f.read_pairs(path)
        return
    found, report = f.read_pairs(path)
    assert {s: [(r["text"], r["label"]) for r in rows] for s, rows in found.items()} == pairs
    assert report.rows == sum(map(len, pairs.values()))


spelled = inline.map(lambda t: t.replace("->", "").replace(",", "").strip(" ")).filter(bool)


@quick
@given(entries=st.dictionaries(spelled.map(lambda t: f"w{t}w"), st.lists(spelled, min_size=1, max_size=3), min_size=1))
def test_corrections_come_back(path, entries):
    path.write_text("".join(f"{w}->{', '.join(r)}{',' * (len(r) > 1)}\n" for w, r in entries.items()), encoding="utf-8")
    assert {r["wrong"]: r["right"] for r in f.read_corrections(path)[0]} == entries


@quick
@given(found=st.dictionaries(st.integers(0, 2), st.lists(inline, max_size=12), min_size=1), seed=st.integers(0, 99))
def test_groups_are_split_whole(found, seed):
    parts = f.split_groups(found, seed=seed)
    given = Counter((y, t) for y, ts in found.items() for t in ts)
    assert Counter((r["label"], r["text"]) for rows in parts.values() for r in rows) == given
    keys = [{f.alike(r["text"]) for r in rows} for rows in parts.values()]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert f.split_groups({y: ts[::-1] for y, ts in found.items()}, seed=seed).keys() == parts.keys()


# Broken files: rows or a ValueError, nothing else, and no line without a trace

READERS = {
    "tsv": (f.read_delimited, b"text\tlabel\nhi there\tx\n\nbye\ty\n"),
    "csv": (table, b'text,label\r\n"hi,\r\n""you""",x\r\nbye,y\r\n'),
    "jsonl": (f.read_jsonl, b'{"a": ["x", 1.5, null], "b": "\\u00e9\\ud83d\\ude00"}\n{"a": [], "b": ""}\n'),
    "conll": (f.read_conll, b"# c\nAda\tB-PER\n#x\tI-PER\n\t\n.\tO\n"),
    "squad": (f.read_squad, squad({"context": "to be", "qas": [
        {"id": "1", "question": "?", "answers": [{"text": "be", "answer_start": 3}]}]})),
    "pairs": (f.read_pairs, b'{"train": [["hi", "x"]], "oos": [["\\u4e2d", "y"]]}'),
    "corrections": (f.read_corrections, b"teh->the\nacn->can, acne,\n")}
bits = st.binary(max_size=4) | st.sampled_from([b'"', b"\t", b"\n", b"{", b"]", b"NaN", b"\\ud800", b"null", b"-9", b"1e999"])
edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6), bits), max_size=4)


def broken(content, changes):
    for at, cut, new in changes: content = content[:at] + new + content[at + cut:]
    return content


@pytest.mark.parametrize("kind", READERS)
@quick
@given(noise=st.binary(max_size=60), changes=edits, mutate=st.booleans())
def test_any_bytes_give_rows_or_a_value_error(kind, path, noise, changes, mutate):
    read, content = READERS[kind]
    path.write_bytes(broken(content, changes) if mutate else noise)
    try: rows, report = read(path)
    except ValueError as e:
        assert str(path) in str(e)
        return
    size = sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
    assert size == report.rows > 0
    text = path.read_bytes().decode().removeprefix("\ufeff").removesuffix("\n").split("\n")
    if kind == "tsv": assert len(text) == 1 + size + report.counts["blank lines left out"]
    if kind in ("jsonl", "corrections"): assert len(text) == size + report.counts["blank lines left out"]
    if kind == "conll":
        blank = sum(not t.removesuffix("\r").strip(" \t") for t in text)
        assert len(text) == blank + report.counts["comment lines left out"] + sum(len(r["tokens"]) for r in rows)
