"""README's tables and figures are those of the ledger and the notebooks; `python tests/test_readme.py` writes them."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import nbformat

from tunebook.kit.cli import catalogue, read_ledger
from tunebook.kit.run import chapters

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def chapter_table():
    rows = ["| chapter | module | claims | seconds |", "|---|---|---:|---:|"]
    for r in catalogue(ROOT):
        seconds = f"{r['seconds']:.0f}" if r["seconds"] else "-"
        rows.append(f"| [{r['title']}](nbs/{r['name']}.ipynb) | `{r['module']}` | {r['claims']} | {seconds} |")
    return "\n".join(rows)


def result_table():
    ledgers = {name: read_ledger(ROOT, name) for name in chapters(ROOT)}
    machine = next(x["environment"] for x in ledgers.values() if x)
    dates = sorted(x["date"] for x in ledgers.values() if x)
    claims = sum(len(x["claims"]) for x in ledgers.values() if x)
    when = dates[0][:10] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    rows = [f"{claims} claims hold in {len(ledgers)} chapters. Recorded {when} on {machine['cores']} cores of "
            f"{machine['cpu']} ({machine['isa']}), Python {machine['python']}, torch {machine['packages']['torch']}, "
            f"{machine['threads']} thread. Ours against the library's, the largest difference of each pair:", "",
            "| ours = theirs | dtype | largest difference | bound |", "|---|---|---:|---:|"]
    pairs = {}  # of the claims about one pair and dtype, the one nearest to its bound
    for name, ledger in ledgers.items():
        for c in ledger["claims"] if ledger and not name.startswith("kit/") else ():
            if c["kind"] == "statistical" or not re.search(r" = .*(\bF\.|\bnn\.|\btorch|\btransformers|MiniLM|documents alone)", c["name"]):
                continue
            key = re.split(r"[,:]", c["name"])[0], c.get("dtype", "exact")
            near = c["error"] / c["bound"] if c["kind"] == "numeric" else 0
            if key not in pairs or near > pairs[key][0]:
                pairs[key] = near, c
    for (pair, dtype), (_, c) in pairs.items():
        rows.append(f"| {pair} | {dtype} | " + (f"{c['error']:.1e} | {c['bound']:.1e} |" if c["kind"] == "numeric" else "none | none |"))
    return "\n".join(rows)


def filled(text):
    for block, table in (("chapters", chapter_table()), ("results", result_table())):
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
    """(alt text as written, path) of each; brackets in an alt text are written with a backslash."""
    return re.findall(r"!\[((?:\\.|[^\]\\])*)\]\(([^)]+)\)", text)


def test_the_tables_are_those_of_the_ledger():
    text = README.read_text()
    assert filled(text) == text, "run: python tests/test_readme.py"


def test_the_figures_are_those_of_the_executed_chapters():
    shown = images(README.read_text())
    assert len(shown) >= 2
    for alt, path in shown:
        assert ((ROOT / path).read_bytes(), alt) == figure(path), "run: python tests/test_readme.py"


def test_the_first_screen_holds_the_two_commands():
    top = README.read_text().splitlines()[:25]
    assert any(line.startswith("make run") for line in top) and any(line.startswith("make test") for line in top)
    assert any("pip install" in line for line in top)


def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    told = subprocess.run([sys.executable, "-c", code + "\nprint(text.shape)"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout == "torch.Size([1, 11])\n"
    assert sorted(p.name for p in tmp_path.glob("my-model/*")) == ["config.json", "model.safetensors"]


def test_every_link_leads_somewhere():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    text = filled(README.read_text())
    for alt, path in images(text):
        data, right = figure(path)
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(data)
        text = text.replace(f"![{alt}]({path})", f"![{right}]({path})")
    README.write_text(text)
