"""The chapter gate: what DESIGN asks of every notebook, as a list of problems in plain words."""

import ast
import base64
import re
import statistics

HEADINGS = ["Question", "Smallest example", "Derivation", "Code", "Check", "Picture", "When it breaks", "Exercises", "Recap"]
NEEDED = {part: {"Question", "Code", "Check", "Recap"} for part in ("kit", "labs")}
MAY_IMPORT = {"kit": {"kit"}, "attention": {"kit", "attention"}, "entropy": {"kit", "entropy"}, "timing": {"kit", "timing"},
              "tuning": {"kit", "attention", "entropy", "tuning"},
              **dict.fromkeys(("tasks", "labs"), {"kit", "attention", "entropy", "tuning", "timing", "tasks"})}
TORCH_ONLY = {"attention", "entropy", "timing"}
KINDS = ("measured here", "recorded on", "simulated")  # where a time or a rate may come from
TIME = r"\d[\d,.]*(e[+-]?\d+)? ?(ns|us|µs|ms|s|min|[KMGT]?B/s|[KMGT]?FLOP/s)(?![\w/])"


def exported(cell):
    return cell.cell_type == "code" and bool(re.match(r"#\|\s*export\b", cell.source))


def is_imports(source):
    return all(isinstance(n, (ast.Import, ast.ImportFrom, ast.If)) for n in ast.parse(source).body)


def body_lines(source):
    """Lines of code without signatures, docstrings, comments and blank lines; a table of constants counts as one."""
    tree, skip = ast.parse(source), set()
    for n in tree.body:
        if isinstance(n, ast.Assign) and not any(isinstance(x, (ast.Call, ast.Lambda, ast.comprehension)) for x in ast.walk(n.value)):
            skip |= set(range(n.lineno + 1, n.end_lineno + 1))
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            skip |= set(range(n.lineno - len(n.decorator_list), n.body[0].lineno))
            if ast.get_docstring(n, clean=False) is not None:
                skip |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    lines = source.splitlines()
    return sum(bool(t.strip()) and not t.strip().startswith("#") and i not in skip for i, t in enumerate(lines, 1))


def prose(source):
    """Markdown without code, formulas, links and headings."""
    text = re.sub(r"```.*?```|`[^`]*`", " ", source, flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def numbers_of(claims):
    """Every number the claims stand for."""
    found = set()

    def add(v):
        if isinstance(v, bool) or v is None:
            return
        if isinstance(v, (int, float)):
            found.add(float(v))
        elif isinstance(v, (list, tuple)):
            for x in v:
                add(x)
        elif isinstance(v, str):
            found.update(float(m.replace(",", "")) for m in re.findall(r"\d[\d,]*\.?\d*", v) if m.strip(","))

    for c in claims:
        for key in ("value", "expected", "mean", "low", "high"):
            add(c.get(key))
        for v in c.get("measured", {}).values():
            add(v)
    return found


def unclaimed(text, known):
    """Decimals, percentages and numbers from 100 on that no claim stands for; years in citations are not numbers."""
    text = re.sub(r"\b(1[89]|20)\d\d\b", " ", text)
    bad = []
    for m in re.finditer(r"(?<![\w.])(\d[\d,]*\.\d+|\d[\d,]*)( ?%)?(?![\w]|\.\d)", text):
        raw, percent = m.group(1).rstrip(","), bool(m.group(2))
        value, digits = float(raw.replace(",", "")), len(raw.split(".")[1]) if "." in raw else 0
        if not ("." in raw or percent or value >= 100):
            continue
        scales = (1, 100) if percent else (1,)
        if not any(round(abs(k) * s, digits) == value for k in known for s in scales):
            bad.append(m.group(0))
    return bad


def check_head(nb, part):
    first = nb.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# .+\n\n?> .+", first.source):
        yield "the first cell is '# Title' with a '> one line' below"
    code = [c for c in nb.cells if c.cell_type == "code"]
    if "parameters" not in code[0].metadata.get("tags", []):
        yield "the first code cell carries the tag 'parameters'"
    names = {t.id for n in ast.parse(code[0].source).body if isinstance(n, ast.Assign) for t in n.targets}
    if missing := {"fast", "seeds", "device"} - names:
        yield f"the parameters lack {sorted(missing)}"
    headings = [line[3:].strip() for c in nb.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("## ")]
    if headings != [h for h in HEADINGS if h in headings]:
        yield f"headings unknown, repeated or out of order: {headings}"
    if missing := NEEDED.get(part, set(HEADINGS)) - set(headings):
        yield f"headings missing: {sorted(missing)}"


def check_code(nb, part):
    sizes, run = [], 0
    for c in (c for c in nb.cells if c.cell_type == "code"):
        tree = ast.parse(c.source)
        if any(isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names) for n in ast.walk(tree)):
            yield "a star import"
        if re.search(r"^\s*#\s*(\d+[.)]|[Ss]tep \d)", c.source, flags=re.MULTILINE):
            yield f"a numbered comment: {c.source[:60]!r}"
        if not exported(c):
            run = 0 if "default_exp" not in c.source else run
            continue
        if is_imports(c.source):
            continue
        run += 1
        sizes.append(body_lines(c.source))
        if run > 2:
            yield f"three exported cells without a value between: {c.source[10:70]!r}"
        if sizes[-1] > 32:
            yield f"an exported cell of {sizes[-1]} lines: {c.source[10:70]!r}"
        yield from check_definitions(tree, part)
    usual, share = (12, 1 / 3) if part in ("kit", "labs") else (8, 1 / 5)  # machinery has longer steps than a lesson
    if sizes and statistics.median(sizes) > usual:
        yield f"exported cells have {statistics.median(sizes)} lines at the median"
    if sizes and sum(s > 15 for s in sizes) > max(1, len(sizes) * share):
        yield f"{sum(s > 15 for s in sizes)} of {len(sizes)} exported cells are longer than 15 lines"


def check_definitions(tree, part):
    for n in tree.body:
        if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith("_"):
            continue
        if not ast.get_docstring(n):
            yield f"{n.name} has no docstring"
        for f in [n] if isinstance(n, ast.FunctionDef) else [m for m in n.body if isinstance(m, ast.FunctionDef)]:
            args = [a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ("self", "cls", "ctx")]
            if bare := [a.arg for a in args if a.annotation is None]:
                yield f"{n.name}.{f.name}: no type for {bare}"


def check_text(nb, claims):
    known = numbers_of(claims)
    section = ""
    for c in (c for c in nb.cells if c.cell_type == "markdown"):
        for line in c.source.splitlines():
            section = line[3:].strip() if line.startswith("## ") else section
        words = len(prose(c.source).split())
        if words > (220 if section in ("Exercises", "Recap", "Derivation") else 110):
            yield f"{words} words in one cell of {section}: {c.source[:50]!r}"
        if re.search(r"!\[[^\]]*\]\(\s*https?:|<(img|script|iframe|link)\b", c.source):
            yield f"a remote resource: {c.source[:60]!r}"
        if re.search(r"\\\\[a-zA-Z]|[\x00-\x08\x0b-\x1f]", c.source):
            yield f"an escaped backslash or a control character in {c.source[:60]!r}"
        if section != "Exercises" and (bad := unclaimed(prose(c.source), known)):
            yield f"numbers that no claim stands for: {bad} in {c.source[:60]!r}"
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    if "## Exercises" in text:
        tasks = re.findall(r"\d+ min", text.split("## Exercises")[1].split("## Recap")[0])
        if not 2 <= len(tasks) <= 4:
            yield f"two to four exercises with their minutes, found {len(tasks)}"


def check_outputs(nb):
    for c in (c for c in nb.cells if c.cell_type == "code"):
        for o in c.outputs:
            text = "".join(o.get("text", "")) + "".join(v for k, v in o.get("data", {}).items() if k.startswith("text/"))
            where = f"in {c.source[:50]!r}"
            if o.output_type == "error":
                yield f"a committed error {where}"
            if o.get("name") == "stderr":
                yield f"a warning or stderr output {where}"
            if re.search(r" at 0x[0-9a-f]{6,}", text):
                yield f"a memory address {where}"
            if len(text) > 6000:
                yield f"{len(text)} characters of output {where}"
            if re.search(r"(src|href)=[\"']https?:", text):
                yield f"output that asks the network {where}"
            for mime in ("image/png", "image/svg+xml", "image/jpeg"):
                if mime not in o.get("data", {}):
                    continue
                data = o["data"][mime]
                size = len(base64.b64decode(data)) if mime != "image/svg+xml" else len(data)
                if size > 60_000:
                    yield f"a figure of {size} bytes {where}"
                if len(o.metadata.get(mime, {}).get("alt", "").split()) < 5:
                    yield f"a figure without alt text {where}"


def check_sources(nb):
    """A time or a rate says in the same output or the same cell of prose where it comes from."""
    for c in nb.cells:
        texts = [prose(c.source)] if c.cell_type == "markdown" and "## Exercises" not in c.source and "min)" not in c.source else []
        for o in c.get("outputs", []):
            alts = " ".join(m.get("alt", "") for m in o.get("metadata", {}).values() if isinstance(m, dict))
            texts.append("".join(o.get("text", "")) + "".join(v for k, v in o.get("data", {}).items() if k.startswith("text/")) + alts)
        for text in texts:
            if (found := re.search(TIME, text)) and not any(kind in text.lower() for kind in KINDS):
                yield f"{found[0]!r} does not say whether it was {', '.join(KINDS)}: {c.source[:50]!r}"


def check_module(source, part):
    allowed = MAY_IMPORT.get(part)
    tree = ast.parse(source)
    for n in ast.walk(tree):
        names = [n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names] if isinstance(n, ast.Import) else []
        if isinstance(n, ast.ImportFrom) and n.level == 1:
            names = [f"tunebook.{part}.{n.module or ''}"]
        if isinstance(n, ast.ImportFrom) and n.level == 2:
            names = [f"tunebook.{n.module}"] if n.module else [f"tunebook.{a.name}" for a in n.names if not a.name.startswith("_")]
        for name in names:
            bits = name.split(".")
            if bits[0] == "tunebook" and len(bits) > 1 and bits[1] and allowed and bits[1] not in allowed:
                yield f"{part} may not import {name}"
    if part in TORCH_ONLY:
        import sys
        for n in tree.body:
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else []
            if isinstance(n, ast.ImportFrom) and not n.level:
                names = [n.module]
            for name in names:
                if name.split(".")[0] not in {"torch", "tunebook", "__future__", *sys.stdlib_module_names}:
                    yield f"{part} modules import torch and the standard library only, not {name}"


def problems(nb, part, claims):
    """Everything that is wrong with a chapter; empty when the gate lets it pass."""
    ids = [c["id"] for c in nb.cells]
    twice = ["cell ids are not unique"] if len(set(ids)) < len(ids) else []
    sources = check_sources(nb) if part == "timing" else []
    return [*twice, *check_head(nb, part), *check_code(nb, part), *check_text(nb, claims), *check_outputs(nb), *sources]
