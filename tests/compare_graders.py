"""The same submissions under nbgrader and under `tunebook grade`.

    python tests/compare_graders.py     # runs both, writes the table into tutorial/README.md; a few minutes

nbgrader's hidden tests are written as its documentation shows: the cell calls the student's function and asserts on what comes back.
"""

import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from tunebook.kit.editions import marks, student
from tunebook.kit.grading import Course, collect, grade, tasks_of
from tunebook.kit.sandbox import Limits

ROOT = Path(__file__).parent.parent
SOURCE = json.loads((ROOT / "tutorial" / "solutions" / "L1_attention.ipynb").read_text(encoding="utf-8"))
HIDDEN = """### BEGIN HIDDEN TESTS
from tunebook.kit.exercises import find
exercise = find("L1.{task}")
for case in exercise.cases(1):
    got, want = {task}(*case.args), exercise.solution(*case.args)
    if want.dtype == torch.bool: assert got.tolist() == want.tolist()
    else: assert torch.allclose(got, want, equal_nan=True)
### END HIDDEN TESTS"""
WRONG = "\ndef softmax(x): return x"
# what is done: (the cell of the task softmax, whether nbgrader, which limits neither memory nor processes, is spared it)
SUBMISSIONS = {
    "right": ("def softmax(x):\n    e = (x - x.amax(-1, keepdim=True)).exp()\n    return e / e.sum(-1, keepdim=True)", False),
    "wrong": ("def softmax(x): return x.exp() / x.exp().sum(-1, keepdim=True)", False),
    "an object that agrees with everything": (
        "class Yes:\n    __eq__ = lambda self, other: True\n    __torch_function__ = classmethod(lambda *a, **k: True)\n"
        "def softmax(x): return Yes()", False),
    "`torch.allclose` replaced": ("torch.allclose = lambda *a, **k: True" + WRONG, False),
    "the checker replaced": ("import types, tunebook.kit.exercises as e\n"
                             "e.find = lambda name: types.SimpleNamespace(cases=lambda seed: [], solution=None)" + WRONG, False),
    "the solution imported from the checkers": ("from tunebook.labs.attention import SOFTMAX\nsoftmax = SOFTMAX.solution", False),
    "the wanted value taken from the caller": ("import sys\ndef softmax(x): return sys._getframe(1).f_globals['exercise'].solution(x)",
                                               False),
    "another submission read": ("import json, pathlib\nfor folder in ('../../..', '..', '.'):\n"
                                "    for p in pathlib.Path(folder).glob('submitted/right/*/*.ipynb'):\n"
                                "        for c in json.loads(p.read_text())['cells']:\n"
                                "            if 'def softmax' in ''.join(c['source']): exec(''.join(c['source']))", False),
    "a pass printed": ("print('L1.softmax: passed')" + WRONG, False),
    "the process ended with status 0": ("import os\nos._exit(0)", False),
    "a loop without end": ("def softmax(x):\n    while True: pass", False),
    "a connection to this machine": ("import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
                                     "socket.create_connection(s.getsockname()).close()\nopen('/tmp/written-outside', 'w').close()\n"
                                     "def softmax(x): return x.softmax(-1)", False),
    "10 GB of memory": ("bytearray(10 * 2**30)" + WRONG, True),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", True),
}


def submission(cell):
    """The lab as it is handed out, with this cell for the task softmax."""
    made = student(SOURCE)
    for c in made["cells"]:
        if marks(c).get("grade_id") == "L1-softmax": c["source"] = cell
    return made


def under_nbgrader(folder, cells, seconds=15):
    """Points that nbgrader gives for the task softmax: name: points, or why there are none."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name
    folder = Path(folder)
    source = copy.deepcopy(SOURCE)
    for c in source["cells"]:
        if marks(c).get("grade"): c["source"] = HIDDEN.format(task=marks(c)["grade_id"].removeprefix("L1-").removesuffix("-check"))
    config = Config()
    config.CourseDirectory.root, config.ExecutePreprocessor.timeout, config.Execute.timeout = str(folder), seconds, seconds
    nb = folder / "source" / "L1" / "L1.ipynb"
    nb.parent.mkdir(parents=True)
    nb.write_text(json.dumps(source))
    quiet = logging.getLogger("nbgrader")
    quiet.setLevel(logging.CRITICAL)
    api = NbGraderAPI(config=config)
    api.log_level = logging.CRITICAL
    made = api.generate_assignment("L1")
    if not made["success"]: raise RuntimeError(made)
    found = {}
    for name, cell in cells.items():
        handed = folder / "submitted" / name / "L1" / "L1.ipynb"
        handed.parent.mkdir(parents=True)
        handed.write_text(json.dumps(submission(cell)))
        done = api.autograde("L1", name)
        if not done["success"]:
            found[name] = "none: its run fails"
            continue
        with Gradebook(f"sqlite:///{folder}/gradebook.db") as book:
            grades = book.find_submission_notebook("L1", "L1", name).grades
            found[name] = next(float(g.score) for g in grades if g.cell.name == "L1-softmax-check")
    return found


def under_ours(folder, cells):
    """Points that this grader gives for it, and what it says."""
    folder = Path(folder)
    for name, cell in cells.items():
        (folder / "submissions").mkdir(exist_ok=True)
        (folder / "submissions" / f"{name}.ipynb").write_text(json.dumps(submission(cell)))
    course = Course(tasks_of(SOURCE), folder / "grades", limits=Limits(cpu=6, wall=12, cell=4, call=2))
    results = grade(collect(folder / "submissions", "L1"), course)
    task = {r["student"]: next(t for t in r["tasks"] if t["name"] == "L1.softmax") for r in results}
    return {name: (t["points"], t["text"]) for name, t in task.items()}


def main():
    """Run both and write the table."""
    names = {f"s{i}": what for i, what in enumerate(SUBMISSIONS)} | {"right": "right"}
    del names["s0"]
    ids = {what: name for name, what in names.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        a, b = Path(folder, "a"), Path(folder, "b")
        a.mkdir(), b.mkdir()
        theirs = under_nbgrader(a, {ids[what]: cell for what, (cell, spared) in SUBMISSIONS.items() if not spared})
        ours = under_ours(b, {ids[what]: cell for what, (cell, _) in SUBMISSIONS.items()})
    rows = ["| the cell of the task softmax (2 points) | nbgrader 0.9.6 | `tunebook grade` |", "|---|---:|---:|"]
    for what in SUBMISSIONS:
        got = theirs.get(ids[what], "not run")
        rows.append(f"| {what} | {got if isinstance(got, str) else f'{got:g}'} | {ours[ids[what]][0]:g} |")
    text = "\n".join(rows)
    print(text, *(f"{what}: {ours[ids[what]]}, {theirs.get(ids[what])}" for what in SUBMISSIONS), sep="\n")
    readme = ROOT / "tutorial" / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- graders -->")
    after = rest.partition("<!-- /graders -->")[2]
    readme.write_text(f"{before}<!-- graders -->\n{text}\n<!-- /graders -->{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
