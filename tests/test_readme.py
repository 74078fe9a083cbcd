"""README's tables and figures are those of the ledger and the notebooks; `python tests/test_readme.py` writes them."""

import base64
import hashlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat

from tunebook.kit.cli import catalogue, read_ledger
from tunebook.kit.exercises import known, lab_of
from tunebook.kit.grading import tasks_of
from tunebook.kit.ledger import interval
from tunebook.tuning import splits_of
from tunebook.tuning.compare import BASELINES, Study, learned, percent, summary

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# the right side of an equality that README lists
THEIRS = (r" = .*(\bF\.|\bnn\.|\btorch|\btransformers|\bpeft|\bcaptum|\bshap|\blime|\bnetworkx|\brouge_score|\bsklearn|\bscipy|\bseqeval|"
          r"MiniLM|documents alone)")


def chapter_table():
    rows = ["| chapter | module | claims | seconds |", "|---|---|---:|---:|"]
    for r in catalogue(ROOT):
        seconds = f"{r['seconds']:.0f}" if r["seconds"] else "-"
        rows.append(f"| [{r['title']}](nbs/{r['name']}.ipynb) | `{r['module']}` | {r['claims']} | {seconds} |")
    return "\n".join(rows)


def pairs_of(ledger):
    """Of the claims about one pair and dtype, the one nearest to its bound: {(pair, dtype): claim}."""
    found = {}
    for c in ledger["claims"]:
        if c["kind"] == "statistical" or not re.search(THEIRS, c["name"]):
            continue
        key = re.split(r"[,:]", c["name"])[0], c.get("dtype", "exact")
        near = c["error"] / c["bound"] if c["kind"] == "numeric" else 0
        if key not in found or near > found[key][0]:
            found[key] = near, c
    return {key: c for key, (_, c) in found.items()}


def result_table():
    ledgers = {r["name"]: (r["title"], read_ledger(ROOT, r["name"])) for r in catalogue(ROOT)}
    ledgers = {name: (title, ledger) for name, (title, ledger) in ledgers.items() if ledger}
    machine = next(x["environment"] for _, x in ledgers.values())
    cpus = " and ".join(sorted({f"{e['cpu']} ({e['isa']})" for e in (x["environment"] for _, x in ledgers.values())}))
    dates = sorted(x["date"] for _, x in ledgers.values())
    claims = sum(len(x["claims"]) for _, x in ledgers.values())
    when = dates[0][:10] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    pairs = {title: pairs_of(x) for name, (title, x) in ledgers.items() if not name.startswith("kit/")}
    head = (f"{claims} claims hold in {len(ledgers)} chapters. Recorded {when} on {machine['cores']} cores of "
            f"{cpus}, Python {machine['python']}, torch {machine['packages']['torch']}, "
            f"{machine['threads']} thread.")
    short = ["| chapter | pairs equal to a library's | same bits | largest difference, float64 | float32 |", "|---|---:|---:|---:|---:|"]
    for title, found in pairs.items():
        worst = {d: max((c["error"] for (_, dtype), c in found.items() if dtype == d), default=None) for d in ("float64", "float32")}
        bits = sum(c["kind"] == "exact" or c["error"] == 0 for c in found.values())
        cells = (f"{worst[d]:.1e}" if worst[d] is not None else "" for d in worst)
        short += [f"| {title.split(':')[0]} | {len(found)} | {bits} | {' | '.join(cells)} |"] if found else []
    rows = ["| ours = theirs | dtype | largest difference | bound |", "|---|---|---:|---:|"]
    for (pair, dtype), c in (item for found in pairs.values() for item in found.items()):
        rows.append(f"| {pair} | {dtype} | " + (f"{c['error']:.1e} | {c['bound']:.1e} |" if c["kind"] == "numeric" else "none | none |"))
    fold = f"<details>\n<summary>All {len(rows) - 2} pairs, with the largest difference of each and its bound</summary>"
    return "\n".join([head, "", *short, "", fold, "", *rows, "", "</details>"])


def studies():
    """Name of a data set: (rows of the summary, tested trials, environment), from the trials that are kept."""
    found = {}
    for name in ("reviews", "rt_polarity"):
        path = ROOT / "data" / "comparisons" / f"minilm-{name}.json"
        tested = [t for t in Study(path).trials if t["job"]["test"]]
        group = [r["pair"] for r in splits_of(name)[0]["test"]] if name == "reviews" else None
        found[name] = summary(tested, group=group), tested, json.loads(path.read_text())["environment"]
    return found


def comparison_table():
    (reviews, tested, environment), (polarity, others, _) = studies().values()
    steps = json.loads((ROOT / "data" / "comparisons" / "minilm-steps.json").read_text())
    cost, other = steps["shapes"]["16 x 32"], {r["method"]: r for r in polarity}
    trained = [t for t in tested if t["job"]["method"] not in BASELINES]

    def found(method):
        mean, low, high = interval([100 * t["retrieval"]["tuned"] for t in trained if t["job"]["method"] == method])
        return f"{mean:.0f} [{low:.0f}, {high:.0f}]"

    def accuracy(row):
        count = learned(row, len((tested if row in reviews else others)[0]["right"]))
        return [percent(row["accuracy"]), "" if row["method"] in BASELINES else f"{count} of {len(row['seeds'])}", row["verdict"]]

    each = "% | learned | against full"
    rows = [f"| method | trains | reviews, {each} | rt_polarity, {each} | finds again, % | step | peak, MB |",
            "|---|---:|---:|---:|---|---:|---:|---|---:|---:|---:|"]
    for r in reviews:
        m, o, costs = r["method"], other[r["method"]], ["", "", ""]
        if m in cost["seconds"]:
            step = statistics.median(a / b for a, b in zip(cost["seconds"][m], cost["seconds"]["full"]))
            costs = [found(m), f"{step:.2f}", f"{cost['peak'][m] / 1e6:.0f}"]
        size = f"{r['trainable']:,}" if m not in BASELINES else ""
        rows.append("| " + " | ".join([m, size, *accuracy(r), *accuracy(o), *costs]) + " |")
    a, b, base = trained[0]["job"], others[0]["job"], 100 * trained[0]["retrieval"]["base"]
    told = (f"Reviews: {len(splits_of('reviews')[0]['train'])} sentences, {a['epochs']} epochs. "
            f"rt_polarity: {b['rows']} sentences, {b['epochs']} epoch. Batches of "
            f"{a['batch']}, no dropout. Before tuning the encoder finds {base:.0f} % again. {environment['cores']} cores of "
            f"{environment['cpu']}, {steps['from']['date']}.")
    return told + "\n\n" + "\n".join(rows)


def said_table():
    """The rows of all tables of verdicts in the chapters."""
    head, rows = "| said | verdict here | because |", []
    for r in catalogue(ROOT):
        for c in nbformat.read(ROOT / "nbs" / f"{r['name']}.ipynb", 4).cells:
            if c.cell_type == "markdown" and head in c.source:
                table = c.source.split(head)[1].strip().split("\n\n")[0].splitlines()[1:]
                rows += [f"{row} [{r['title'].split(':')[0]}](nbs/{r['name']}.ipynb) |" for row in table]
    return "\n".join([f"{head} chapter |", "|---|---|---|---|", *rows])


def labs_table():
    """Each lab with the answers that its checkers are held against; that all are told apart is a claim of the lab's chapter."""
    rows, every = ["| lab | tasks | points | wrong answers, all refused | right ones, all passed |", "|---|---:|---:|---:|---:|"], known()
    for lab in dict.fromkeys(map(lab_of, every)):
        (path,) = (ROOT / "tutorial" / "solutions").glob(f"{lab}_*.ipynb")
        nb, its = nbformat.read(path, 4), [e for e in every.values() if lab_of(e.name) == lab]
        title = nb.cells[0].source.splitlines()[0].removeprefix("# ").removeprefix("Lab ")
        points = f"{sum(t.points for t in tasks_of(nb)):g}"
        numbers = len(its), points, sum(len(e.mutants) for e in its), sum(1 + len(e.others) for e in its)
        rows.append(f"| [{title}](tutorial/{path.name}) | " + " | ".join(map(str, numbers)) + " |")
    wrong, right = sum(len(e.mutants) for e in every.values()), sum(1 + len(e.others) for e in every.values())
    return "\n".join([*rows, f"| all | {len(every)} | | {wrong} | {right} |"])


def filled(text):
    tables = {"labs": labs_table(), "chapters": chapter_table(),
              "comparison": comparison_table(), "said": said_table(), "results": result_table()}
    for block, table in tables.items():
        text = re.sub(rf"(<!-- {block}:.*?-->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def figure(path):
    """(bytes, alt text) of the figure a file name stands for: part-chapter-index.png."""
    part, chapter, index = Path(path).stem.split("-")
    nb = nbformat.read(ROOT / "nbs" / part / f"{chapter}.ipynb", 4)
    shown = [o for c in nb.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    output = shown[int(index)]
    return base64.b64decode(output["data"]["image/png"]), re.sub(r"([\[\]])", r"\\\1", output.metadata["image/png"]["alt"])


def images(text):
    """(alt text as written, path) of each figure of a chapter; brackets in an alt text are written with a backslash."""
    found = re.findall(r"!\[((?:\\.|[^\]\\])*)\]\(([^)]+)\)", text)
    return [(alt, path) for alt, path in found if not Path(path).name.startswith("labs-")]  # that one is test_browser_labs.py's


def test_the_tables_are_those_of_the_ledger():
    text = README.read_text()
    assert filled(text) == text, "run: python tests/test_readme.py"


def test_every_verdict_is_one_of_four():
    verdicts = [row.split("|")[2].strip().split()[0] for row in said_table().splitlines()[2:]]
    assert len(verdicts) >= 15 and set(verdicts) <= {"right", "wrong", "conditional", "open"}


def test_the_figures_are_those_of_the_executed_chapters():
    shown = images(README.read_text())
    assert len(shown) >= 2
    for alt, path in shown:
        assert ((ROOT / path).read_bytes(), alt) == figure(path), "run: python tests/test_readme.py"


def test_the_first_screen_holds_the_two_commands():
    top = README.read_text().splitlines()[:25]
    assert any(line.startswith("make run") for line in top) and any(line.startswith("make test") for line in top)
    assert any("pip install" in line for line in top)


def test_the_tuning_example_runs(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0].replace("rows=256", "rows=32")
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "parameters trained" in told.stdout and re.search(r"^\['(negative|positive)'\]$", told.stdout, flags=re.MULTILINE)
    assert (tmp_path / "_tune" / "mine" / "adapter" / "adapter_config.json").is_file()


def test_the_example_runs(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[1]
    told = subprocess.run([sys.executable, "-c", code + "\nprint(text.shape)"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout == "torch.Size([1, 11])\n"
    assert sorted(p.name for p in tmp_path.glob("my-model/*")) == ["config.json", "model.safetensors"]


def test_every_link_leads_somewhere():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (ROOT / path).exists(), path


def test_recorded_timings_say_where_they_come_from():
    told = (ROOT / "benchmarks" / "README.md").read_text()
    records = list(ROOT.glob("data/timings/*.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text())
        assert all(record["from"].get(k) for k in ("device", "driver, clocks", "torch", "date", "command")), path
        assert all(len(ms) >= 3 for row in record["rows"] for ms in row["ms"].values()), path
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in told, f"python benchmarks/gpu.py --render {path.relative_to(ROOT)}"


if __name__ == "__main__":
    text = filled(README.read_text())
    for alt, path in images(text):
        data, right = figure(path)
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(data)
        text = text.replace(f"![{alt}]({path})", f"![{right}]({path})")
    README.write_text(text)
