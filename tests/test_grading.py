"""A grade comes from values alone: cheating, accidents and odd hand-ins, all in one run, and nobody is stopped by another."""

import copy
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.kit import grading, sandbox
from tunebook.kit.cli import main
from tunebook.kit.editions import marks, student
from tunebook.kit.exercises import differ, examine, find
from tunebook.kit.grading import Comparer, Course, Submission, answers_of, collect, grade, judge, named, seed_of, sources_of, tasks_of
from tunebook.kit.sandbox import Limits, Sandbox, pack, unpack

SOURCE = json.loads((ROOT / "tutorial" / "solutions" / "L1_attention.ipynb").read_text(encoding="utf-8"))
HANDED = student(SOURCE)
TASKS = tasks_of(SOURCE)
USUAL = sorted(named(sources_of(SOURCE)))
SMALL = Limits(cpu=3, wall=6, cell=2, call=1, processes=24)
MARKER = "a remark that is only in the honest submission"


def with_answers(nb, **sources):
    """A notebook with other code in the cells of these tasks."""
    made = copy.deepcopy(nb)
    for c in made["cells"]:
        if (task := marks(c).get("grade_id", "").removeprefix("L1-")) in sources: c["source"] = sources[task]
    return made


def learned():
    """An answer that knows the cases of the notebook, and nothing else."""
    pairs = [(pack(c.args[0]), pack(find("L1.softmax").solution(*c.args))) for c in find("L1.softmax").cases(0)]
    return ("from tunebook.kit.sandbox import pack, unpack\n"
            f"def softmax(x): return unpack(dict(map(lambda p: (str(p[0]), p[1]), {pairs!r}))[str(pack(x))])")


WRONG = "\ndef softmax(x): return x"
FORGED = ("{'task': 'L1.softmax', 'case': i, 'value': 'passed'}", "{'task': 'L1.softmax', 'status': 'passed'}", "{'done': True}")
# name: (the cell of the task softmax, what the result must say); each gets no point
CHEATS = {
    "equal to all": ("class Yes:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
                     "def softmax(x): return Yes()", "got Yes"),
    "a tensor that agrees": ("class Yes(torch.Tensor):\n    @classmethod\n    def __torch_function__(c, *a, **k): return True\n"
                             "def softmax(x): return torch.zeros(1).as_subclass(Yes)", "got Yes"),
    "patched check": ("import tunebook.kit.exercises as e\ne.check = e.examine = e.judged = e.attempt = lambda *a, **k: 'passed'" + WRONG,
                      "expected"),
    "patched differ": ("import tunebook.kit.exercises as e\ne.differ = lambda *a: ''" + WRONG, "expected"),
    "patched torch": ("torch.testing.assert_close = torch.allclose = torch.equal = lambda *a, **k: True" + WRONG, "expected"),
    "patched grading": ("import tunebook.kit.grading as g\ng.judge = g.graded = lambda *a, **k: {'status': 'passed'}" + WRONG,
                        "expected"),
    "patched operators": ("torch.Tensor.__eq__ = lambda a, b: True\nimport math\nmath.isclose = lambda *a, **k: True" + WRONG, "expected"),
    "prints a pass": ("print('✓ L1.softmax: passed, 7 cases')\nprint({'status': 'passed', 'points': 12})" + WRONG, "expected"),
    "forged lines": ("import json, os\nfor fd in range(3, 30):\n    try:\n        for i in range(9):\n"
                     f"            for line in ({', '.join(FORGED)}):\n"
                     "                os.write(fd, json.dumps(line).encode() + b'\\n')\n    except OSError: pass\nos._exit(0)", "got str"),
    "no JSON in the channel": ("import os\nfor fd in range(3, 30):\n"
                               "    try: os.write(fd, b'[' * 100000 + b'\\n\\xff\\n{\"task\": {}}\\n')\n"
                               "    except OSError: pass" + WRONG, "expected"),
    "exit": ("import os\nos._exit(0)", "no answer"),
    "sys.exit": ("import sys\nsys.exit(0)", "softmax"),
    "exit in the call": ("import os\ndef softmax(x): os._exit(0)", "no answer"),
    "memory: objects": ("import gc, types\nfound = [o for o in gc.get_objects() if type(o).__name__ in ('Exercise', 'Case', 'Task')]\n"
                        "def softmax(x): return found[0].solution(x)", "IndexError"),
    "memory: modules": ("import sys\ndef softmax(x): return sys.modules['tunebook.labs.attention'].SOFTMAX.solution(x)", "KeyError"),
    "memory: frames": ("import inspect, sys\ndef softmax(x):\n    for f in inspect.stack():\n        for v in f.frame.f_locals.values():\n"
                       "            if hasattr(v, 'solution'): return v.solution(x)\n    raise LookupError('none')", "LookupError"),
    "learned by heart": (learned(), "KeyError"),
    "not a number": ("def softmax(x): return x * float('nan')", "NaN"),
    "an array of objects": ("import numpy as np\ndef softmax(x): return np.array([x, object()], dtype=object)", "got ndarray"),
    "an archive of objects": ("import io, numpy as np\ndef softmax(x):\n    f = io.BytesIO()\n"
                              "    np.savez(f, a=np.array([object()], dtype=object))\n"
                              "    return f.getvalue()", "got bytes"),
    "a giant tensor": ("def softmax(x): return torch.zeros(1).expand(10**12)", "bytes, and"),
    "a giant number": ("def softmax(x): return 10**4000", "got int"),
    "a list in itself": ("def softmax(x):\n    a = []\n    a.append(a)\n    return a", "RecursionError"),
    "a hostile error": ("class E(Exception):\n    def __str__(self): raise self\ndef softmax(x): raise E", "E"),
    "HTML": ("def softmax(x): raise ValueError('<script>alert(1)</script>')", "<script>"),
    "10 GB": ("def softmax(x): return torch.zeros(10 * 2**30, dtype=torch.uint8)", "allocate memory"),
    "10 GB in a cell": ("x = bytearray(10 * 2**30)\nsoftmax = 0", "NameError"),
    "100 MB of output": ("import os\nfor i in range(1000): os.write(1, b'x' * 10**5)\nprint('x' * 10**7)" + WRONG, "expected"),
    "100 MB of values": ("def softmax(x): return ['x' * 10**8]", "no answer: it gave more than"),
    "endless cell": ("while True: pass", "NameError"),
    "endless call": ("def softmax(x):\n    while True: pass", "TimeoutError"),
    "endless, deaf": ("import time\nwhile True:\n    try:\n        while True: time.sleep(1)\n    except BaseException: pass",
                      "it took longer than 6 seconds"),
    "endless, busy": ("import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
                      "it used more than 3 seconds of CPU"),
    "fork bomb": ("import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.05)", "NameError"),
    "deletes its folder": ("import os, shutil\nopen('x', 'w').close()\n"
                           "shutil.rmtree(os.getcwd(), ignore_errors=True)\nassert not os.listdir()"
                           + WRONG, "expected"),
    "a full disk": ("for i in range(99):\n    with open(str(i), 'wb') as f: f.write(bytes(10**8))" + WRONG, "softmax"),
}


def read_first(*paths):
    """A cell that reads the first of these that can be read, and has no answer if none can."""
    return (f"import os\nfor p in {[str(p) for p in paths]!r}:\n"
            "    try: found = os.listdir(p) if os.path.isdir(p) else open(p, 'rb').read()\n"
            "    except OSError: continue\n    if found: break\n"
            "else: raise LookupError('nothing to read')\ndef softmax(x): return x.softmax(-1)")


# what only a sandbox refuses; {submissions} and {out} are put in
INTRUDERS = {
    "reads the solution": read_first(ROOT / "tunebook" / "labs" / "attention.py", ROOT / "tutorial" / "solutions" / "L1_attention.ipynb",
                                     ROOT / "_labs", ROOT / "nbs" / "labs" / "71_attention.ipynb", ROOT / ".git", ROOT / "tests"),
    "reads another": read_first("{submissions}", "{submissions}/honest.ipynb", "{submissions}/honest"),
    "reads grades": read_first("{out}", "{out}/grades.csv"),
    "reads its parents": read_first(*(f"/proc/{p}/{what}" for p in ("1", "2", os.getpid()) for what in ("environ", "mem"))),
    "opens a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\ndef softmax(x): return x.softmax(-1)",
    "asks for a name": "import socket\nsocket.getaddrinfo('example.org', 80)\ndef softmax(x): return x.softmax(-1)",
    "overwrites its grade": "import pathlib\nfor n in ('grades/overwrites%20its%20grade.json', 'grades.csv', 'grades.json'):\n"
                            "    pathlib.Path('{out}', n).write_text('12 of 12')\ndef softmax(x): return x.softmax(-1)",
    "changes Python": "import torch\nopen(torch.__file__, 'a').write('#')\ndef softmax(x): return x.softmax(-1)",
    "writes elsewhere": "open('/tmp/tunebook-was-here', 'w')\ndef softmax(x): return x.softmax(-1)",
    "ends its parent": "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(1)\nos._exit(0)",
}

STUBBORN = with_answers(
    SOURCE,
    scores="class Scorer:\n    def __call__(self, q, k):\n        rows = torch.einsum('...td,...sd->...ts', q.double(), k.double())\n"
           "        return self.scaled(rows, q.shape[-1]).to(q.dtype)\n    def scaled(self, x, D): return x * D ** -0.5\nscores = Scorer()",
    softmax="def one(r):\n    e = [math.exp(v - max(r)) for v in r]\n    return [v / sum(e) for v in e]\n"
            "def softmax(x):\n    rows = x.reshape(-1, x.shape[-1]).tolist()\n"
            "    return torch.tensor([one(r) for r in rows], dtype=x.dtype).reshape(x.shape)",
    causal_mask="%matplotlib inline\ncausal_mask = lambda T, S: torch.tensor([[s <= S - T + t for s in range(S)] for t in range(T)])",
    padding_mask="import functools\n@functools.cache\ndef numbers(S): return torch.arange(S)\n"
                 "def padding_mask(lengths, S): return torch.stack([numbers(S) < n for n in lengths])[:, None]\ndisplay(numbers(3))")


def course(pages, *word):
    """Lab 1, with limits that a test can wait for."""
    return Course(TASKS, pages, *word, limits=SMALL, usual=USUAL)


def write(folder, name, content):
    """A submission; what is no text is a notebook."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def works():
    """The sandbox that works here."""
    place = Sandbox(SMALL, ("torch",))
    place.start()
    yield place
    place.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory, works):
    """Everything handed in and graded once: (results by name, submissions, folder of the results, who called the port)."""
    base = tmp_path_factory.mktemp("grading")
    folder, out = base / "submissions", base / "out"
    listener = socket.create_server(("127.0.0.1", 0))
    put = {"{submissions}": str(folder), "{out}": str(out), "{port}": str(listener.getsockname()[1])}
    honest = copy.deepcopy(SOURCE)
    honest["cells"][1]["source"] = f"# {MARKER}\n" + "".join(honest["cells"][1]["source"])
    write(folder, "honest.ipynb", honest)
    write(folder, "stubborn/L1.ipynb", STUBBORN)
    write(folder, "nbgrader/L1/L1_attention.ipynb", SOURCE)
    write(folder, "untouched.ipynb", HANDED)
    for name, (cell, _) in CHEATS.items(): write(folder, f"{name}.ipynb", with_answers(HANDED, softmax=cell))
    for name, cell in INTRUDERS.items() if works.rung != "limits" else ():
        for key, value in put.items(): cell = cell.replace(key, value)
        write(folder, f"{name}.ipynb", with_answers(HANDED, softmax=cell))
    mixed = with_answers(SOURCE, softmax="def softmax(x): return weights(x)")
    mixed["cells"].insert(3, {**mixed["cells"][1], "source": "weights = late + 1"})
    write(folder, "out of order.ipynb", {**SOURCE, "cells": SOURCE["cells"][::-1]})
    write(folder, "one cell too early.ipynb", mixed)
    write(folder, "missing exercise.ipynb", {**SOURCE, "cells": [c for c in SOURCE["cells"] if marks(c).get("grade_id") != "L1-softmax"]})
    write(folder, "borrowed.ipynb", with_answers(SOURCE, softmax="from tunebook.attention.scores import softmax"))
    write(folder, "no notebook.ipynb", "no JSON")
    write(folder, "old.ipynb", {"worksheets": [], "nbformat": 3})
    write(folder, "twice.ipynb", SOURCE)
    write(folder, "Twice/L1.ipynb", SOURCE)
    write(folder, "two/L1_a.ipynb", SOURCE)
    write(folder, "two/L1_b.ipynb", SOURCE)
    write(folder, "readme.txt", "not a submission")
    (folder / "empty").mkdir()
    (folder / "link.ipynb").symlink_to(folder / "honest.ipynb")
    (folder / "linked").symlink_to(ROOT / "tutorial" / "solutions")
    (folder / "inside").mkdir()
    (folder / "inside" / "L1.ipynb").symlink_to(ROOT / "tutorial" / "solutions" / "L1_attention.ipynb")
    results = grade(collect(folder, "L1"), course(out / "grades"), workers=2)
    grading._write(results, TASKS, out / "grades.csv", out / "grades")
    listener.setblocking(False)
    try: called = bool(listener.accept())
    except BlockingIOError: called = False
    listener.close()
    return {r["student"]: r for r in results}, folder, out, called


def of(r, task="L1.softmax"):
    return next(t for t in r["tasks"] if t["name"] == task)


def in_sandbox(works):
    if works.rung == "limits": pytest.skip("no sandbox works here: bubblewrap or unshare is needed")


def test_every_point_for_a_right_answer_in_whatever_style(run):
    results = run[0]
    for name in ("honest", "stubborn", "nbgrader"): assert (results[name]["total"], results[name]["note"]) == (12, ""), results[name]
    assert (results["untouched"]["total"], {t["status"] for t in results["untouched"]["tasks"]}) == (0, {"not yet"})


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_and_accidents_get_nothing(run, name):
    r = run[0][name]
    assert r["total"] == 0 and r["status"] in ("graded", "stopped")
    assert CHEATS[name][1] in of(r)["text"] + r["note"], (of(r), r["note"])


@pytest.mark.parametrize("name", INTRUDERS)
def test_a_sandbox_keeps_intruders_out(run, works, name):
    in_sandbox(works)
    results, _, _, called = run
    assert results[name]["total"] == 0 and of(results[name])["status"] in ("missing", "wrong"), results[name]
    assert not called
    if name != "ends its parent": assert "NameError" in of(results[name])["text"], results[name]


def test_nothing_was_changed(run, works):
    in_sandbox(works)
    results, folder, out, _ = run
    rows = {r["student"]: r for r in csv.DictReader(io.StringIO((out / "grades.csv").read_text()))}
    assert rows["overwrites its grade"]["total"] == "0" and rows["honest"]["total"] == "12"
    assert json.loads((folder / "honest.ipynb").read_text()) and len(results) == len(rows)
    assert not os.path.exists("/tmp/tunebook-was-here")
    assert json.loads((out / "grades.json").read_text())[0]["student"] in results


def test_the_order_of_cells_counts(run):
    results = run[0]
    for name in ("out of order", "one cell too early"): assert "run from top to bottom" in results[name]["note"], results[name]
    assert results["out of order"]["total"] < 12
    assert (results["one cell too early"]["total"], of(results["one cell too early"])["text"].split(": ", 1)[1]) == \
        (7, "NameError: name 'weights' is not defined")
    assert (results["missing exercise"]["total"], of(results["missing exercise"])["status"]) == (7, "missing")


def test_who_borrows_is_named(run):
    assert "names tunebook.attention.scores" in run[0]["borrowed"]["note"]


@pytest.mark.parametrize(("name", "words"), [
    ("no notebook", "it is not JSON"), ("old", "format 4"), ("empty", "no notebook in its folder"), ("link", "a symbolic link"),
    ("linked", "a symbolic link"), ("inside", "a symbolic link"), ("twice", "two submissions are called twice"),
    ("Twice", "two submissions are called Twice"), ("two", "2 notebooks in its folder")])
def test_what_cannot_be_graded_has_a_line_and_no_grade(run, name, words):
    r = run[0][name]
    assert (r["status"], r["total"]) == ("no grade", None) and words in r["note"]
    assert (run[2] / "grades" / f"{name.replace(' ', '%20')}.html").exists()


def test_pages_escape_what_students_write(run):
    page = (run[2] / "grades" / "HTML.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_same_submission_gets_the_same_grade_and_what_is_known_is_taken(run, tmp_path):
    results, folder, out, _ = run
    names = ("honest", "untouched", "equal to all", "learned by heart", "out of order")
    some = [s for s in collect(folder, "L1") if s.student in names]
    shutil.copytree(out / "grades", tmp_path, dirs_exist_ok=True)
    kept = course(tmp_path)
    assert all(r["kept"] for r in grade(some, kept, workers=2)) and not kept.places, "nothing was started"
    for name in ("honest", "learned by heart", "out of order"): (tmp_path / f"{name.replace(' ', '%20')}.json").write_text("{")
    changed = Submission("untouched", tmp_path / "changed.ipynb")
    write(tmp_path, "changed.ipynb", with_answers(HANDED, scores="def scores(q, k): return q @ k.mT / q.shape[-1] ** 0.5"))
    told = []
    again = grade([changed if s.student == "untouched" else s for s in some], course(tmp_path), 1, told.append)
    for r in again:
        if r["student"] == "untouched": assert r["total"] == 2
        elif r["student"] == "equal to all": assert r["kept"]
        else: assert r == results[r["student"]]
    assert len(told) == len(names) and grade(some[:1], course(tmp_path, "another word"), 1)[0].get("kept") is None


def test_an_interrupted_run_goes_on(run, tmp_path):
    some = [s for s in collect(run[1], "L1") if s.student in ("honest", "stubborn", "borrowed")]
    def stop(r): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): grade(some, course(tmp_path), 1, stop)
    kept = list(tmp_path.glob("*.json"))
    assert len(kept) == 1 and json.loads(kept[0].read_text())["total"] == 12


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def rung(request):
    """Each kind of sandbox for itself."""
    place = Sandbox(Limits(cpu=4, wall=8, cell=2, call=1), ("torch",), request.param)
    try: place.start()
    except OSError: pytest.skip(f"{request.param} is not installed, or this system refuses it")
    yield place
    place.stop()


def asked(place, *cells, call="f"):
    """The value that a call gives, unpacked, or the words of what stops the last cell."""
    lines = [json.loads(line) for line in place.run({"cells": cells, "tasks": [["f", call, [[1]]]]}).data.splitlines()]
    found = next(line for line in lines if "task" in line)
    return unpack(found["value"]) if "value" in found else next(line for line in lines if "stops" in line)["stops"][-1][1]


def test_what_a_sandbox_shows(rung):
    assert asked(rung, "import os\ndef f(x): return sorted(os.listdir('/tmp')) if os.path.isdir('/tmp') else []") in (
        [], [str(ROOT).split("/")[2]] if str(ROOT).startswith("/tmp/") else [])
    gone = [str(ROOT / n) for n in ("tests", ".git", "tutorial", "nbs")]
    assert asked(rung, f"import os\ndef f(x): return [os.path.exists(p) for p in {gone}]") == [False] * 4
    assert asked(rung, f"import os\ndef f(x): return os.listdir({str(ROOT / 'tunebook' / 'labs')!r})") == []
    assert "reviews" in asked(rung, f"import os\ndef f(x): return os.listdir({str(ROOT / 'data')!r})")
    assert asked(rung, "import os\ndef f(x): return [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 40]") == []
    names = asked(rung, "import os\ndef f(x): return list(os.environ)")
    assert not {"TUNEBOOK_DATA", "TUNEBOOK_STRICT", "PYTEST_CURRENT_TEST"} & set(names)
    if os.geteuid() == 0: assert asked(rung, "import os\ndef f(x): return [os.getuid() > 61183, os.getgroups()]") == [True, []]
    status = asked(rung, "def f(x): return open('/proc/self/status').read()")
    assert re.findall(r"(?:CapEff|CapPrm|NoNewPrivs):\s+(\w+)", status) == ["0" * 16, "0" * 16, "1"]


CLOSED = ["/", "/usr", "/tmp", "/root", "/dev", "/dev/shm", *(str(ROOT / n) for n in ("", "tunebook", "tunebook/labs"))]


@pytest.mark.parametrize("where", CLOSED)
def test_nothing_can_be_written_but_the_scratch_folder(rung, where):
    words = asked(rung, f"open({where!r} + '/new', 'w')")
    assert re.match("(PermissionError|FileNotFoundError|OSError: .Errno 30)", words), words
    assert asked(rung, "open('new', 'w').write('x')\ndef f(x): return open('new').read()") == "x"


LOOK = """
import ctypes, os, re
def f(x):
    found = 0
    for line in open("/proc/self/maps"):
        start, end, how = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
        if not how.startswith("rw") or "[v" in line: continue
        data = ctypes.string_at(int(start, 16), int(end, 16) - int(start, 16))
        found += sum(data[m.end():m.end() + len(b)] == b for m in re.finditer(re.escape(a), data))
    return [found, os.listdir(), len([p for p in os.listdir("/proc") if p.isdigit()])]
"""


def test_nothing_of_a_submission_is_left_for_the_next(rung):
    asked(rung, f"secret = {MARKER!r} * 1000\nimport os\nos.makedirs('a/b')\nos.chmod('a', 0)\nopen('c', 'w').write(secret)\n"
                "if os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(99)\ndef f(x): return 1")
    look = f"a, b = {MARKER[:20]!r}.encode(), {MARKER[20:]!r}.encode()\n" + LOOK
    found = asked(rung, look)
    assert found[:2] == [0, []] and found[2] <= 3, found
    assert asked(rung, f"kept = {MARKER!r}", look)[0] > 0, "it finds what is there"


def test_the_next_submission_is_graded_whatever_the_last_did_to_its_parent(rung):
    look = "import os, resource as r\ndef f(x): return [os.getpriority(os.PRIO_PROCESS, os.getppid()), r.getrlimit(r.RLIMIT_NOFILE)[0]]"
    for cell in ("os.kill(os.getppid(), 9)", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (4, 4))",
                 "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"):
        rung.run({"cells": [f"import os, resource\n{cell}"], "tasks": []})
        assert asked(rung, look) == [os.getpriority(os.PRIO_PROCESS, 0), 256], cell


def test_without_a_sandbox_the_limits_remain_and_a_warning():
    place = Sandbox(Limits(cpu=4, wall=6, cell=1, call=1), ("torch",), "limits")
    assert asked(place, "def f(x): return x + 1") == 2
    assert "MemoryError" in asked(place, "bytearray(10 * 2**30)") and "TimeoutError" in asked(place, "while True: pass")
    assert "no sandbox works here" in grading._warning(place)
    if sys.platform == "linux": assert "CapEff:\t0000000000000000" in asked(place, "def f(x): return open('/proc/self/status').read()")
    place.stop()
    assert grading._warning(Sandbox()) == ""


def test_the_warning_comes_before_the_first_submission_runs(tmp_path):
    told = []
    bare = Course(TASKS, tmp_path, limits=Limits(cpu=4, wall=6, cell=1, call=1), rung="limits", warn=told.append)
    try: bare.take(), bare.take()
    finally: bare.stop()
    assert len(told) == 1 and "no sandbox works here" in told[0]


def test_a_comparer_that_died_starts_again():
    comparer = Comparer()
    first = comparer.ask({"seed": 1, "tasks": ["L1.softmax"]})
    comparer.process.kill()
    comparer.process.wait()
    assert comparer.ask({"seed": 1, "tasks": ["L1.softmax"]}) == first != comparer.ask({"seed": 2, "tasks": ["L1.softmax"]})
    with pytest.raises(OSError, match="no answer"): comparer.ask({"seed": 1, "tasks": ["L1.nothing"]})
    comparer.stop()


def test_what_is_learned_by_heart_passes_in_the_notebook_only():
    space = {}
    exec(learned(), space)
    assert examine(find("L1.softmax"), space["softmax"], 0).status == "passed"
    assert examine(find("L1.softmax"), space["softmax"], seed_of("learned by heart", "L1")).status == "wrong"


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(),
                      lambda x: st.lists(x, max_size=3) | st.tuples(x) | st.dictionaries(st.text(max_size=2), x, max_size=3), max_leaves=6)
words = st.sampled_from(["tensor", "dict", "float32", "AAAA", "L1.softmax"])
lines = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | words,
                     lambda x: st.lists(x, max_size=4) | st.dictionaries(
                         st.sampled_from(["task", "case", "value", "failed", "stops", "absent", "done"]), x, max_size=4), max_leaves=12)


@given(values)
@settings(max_examples=80, deadline=None)
def test_values_come_back_as_they_were(value):
    assert repr(unpack(json.loads(json.dumps(pack(value))))) == repr(value)


@pytest.mark.parametrize("dtype", sandbox.TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_tensors_come_back_as_they_were(dtype, shape):
    t = torch.randn(shape).mul(3).to(getattr(torch, dtype))
    assert differ(unpack(json.loads(json.dumps(pack(t)))), t) == ""


@given(st.lists(lines, max_size=4), st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_into_the_channel_is_no_pass(said, noise):
    said = [*said, {"task": "L1.softmax", "case": 0, "value": said}]
    data = b"\n".join([noise, *(json.dumps(x).encode() for x in said)])
    assert judge("L1.softmax", 5, answers_of(data))["status"] in ("wrong", "not yet", "missing")


@pytest.mark.parametrize("got", [10**400, -(10**400), 2**63])
def test_giant_numbers_are_compared(got):
    assert differ(got, 1.5) and differ(got, 3) and differ(1.5, 10**400)


def test_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    write(tmp_path, "class/ann.ipynb", SOURCE)
    out = tmp_path / "out" / "grades.csv"
    assert main(["grade", str(tmp_path / "class"), "--lab", "L1", "--out", str(out), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "ann: 12 of 12" in said.out and "1 graded, 0 stopped" in said.out and ("warning" in said.err) == ("limits" in said.err)
    assert out.read_text().splitlines()[1] == "ann,2,2,2,1,3,2,12,12,graded,"
    write(tmp_path, "class/bob/notes.txt", "nothing")
    assert main(["grade", str(tmp_path / "class"), "--lab", "L1", "--out", str(out)]) == 1
    assert "ann: 12 of 12, unchanged" in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())[1]["note"] == "no notebook in its folder"


@pytest.mark.parametrize(("args", "words"), [
    (["{}", "--lab", "L1", "--out", "{}/../x.csv"], "no submissions in"), (["{}/none", "--lab", "L1"], "is no folder"),
    (["{}", "--lab", "L99"], "no lab is called 'L99'; there are: "),
    (["{}", "--lab", "L1", "--out", "{}/grades.csv"], "among the submissions"),
    (["{}", "--lab", "L1", "--out", "grades"], "a file such as grades.csv"),
    (["{}", "--lab", "L1", "--source", "{}/no.ipynb"], "No such file")])
def test_a_command_that_cannot_be_carried_out_says_why(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["grade", *(a.format(tmp_path) for a in args)]) == 2
    assert words in capsys.readouterr().err


def test_without_a_checkout_it_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunebook.kit.run.find_root", lambda start=".": None)
    write(tmp_path, "class/ann.ipynb", SOURCE)
    assert main(["grade", "class", "--lab", "L1"]) == 2
    assert "tutorial/solutions" in capsys.readouterr().err


def test_a_formula_and_a_cursor_in_a_name(tmp_path):
    r = {"student": "=1+1\x1b[2J", "status": "graded", "total": 1, "of": 2, "tasks": [], "stops": [], "note": "@x\ny"}
    assert grading.table([r], []).splitlines()[1] == "'=1+1\x1b[2J,1,2,graded,'@x y"
    assert grading._line(r).startswith("=1+1?[2J: 1 of 2")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_the_same_submissions_under_nbgrader(tmp_path):
    import compare_graders
    chosen = {"wrong": "wrong", "yes": "an object that agrees with everything"}
    cells = {name: compare_graders.SUBMISSIONS[what][0] for name, what in chosen.items()}
    (tmp_path / "nbgrader").mkdir()
    assert compare_graders.under_nbgrader(tmp_path / "nbgrader", cells) == {"wrong": 0, "yes": 2}
    assert {name: points for name, (points, _) in compare_graders.under_ours(tmp_path, cells).items()} == {"wrong": 0, "yes": 0}


def test_the_table_of_both_graders_is_that_of_its_script():
    import compare_graders
    text = (ROOT / "tutorial" / "README.md").read_text(encoding="utf-8").partition("<!-- graders -->")[2].partition("<!-- /graders -->")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.strip().splitlines()[2:]]
    assert [r[0] for r in rows] == list(compare_graders.SUBMISSIONS)
    assert [r[2] for r in rows] == ["2"] + ["0"] * (len(rows) - 1)
    paid = sum(r[1] == "2" for r in rows[1:])
    assert paid == 7 and "gives full points to seven of them" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_front_loads_no_torch():
    code = "import sys, tunebook.kit.grading as g\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
