"""Forked kernels: the results of cold ones, refusals with reasons, and nothing left behind."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tunebook.kit import fork
from tunebook.kit.ledger import compare
from tunebook.kit.run import KERNEL_ENV, Spec, run_all, run_notebook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked kernels need Linux")
PIDS = "import os\nfrom pathlib import Path\nPath('pids').write_text(f'{os.getpid()} {os.getppid()}')"


def make(*sources: str, parameters: str = "x = 1\ndevice = 'cpu'", kernel: str = "python3"):
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}})


def run_one(folder: Path, *sources: str, **options) -> dict:
    """A notebook through the runner on a forked kernel."""
    nbformat.write(make(*sources), folder / "n.ipynb")
    return run_notebook(Spec(str(folder / "n.ipynb"), "n", str(folder / "out"), kernels="fork", **options))


def said(folder: Path) -> list[str]:
    """What the cells of the executed notebook printed."""
    return [o["text"] for c in nbformat.read(folder / "out" / "n.ipynb", 4).cells for o in c.outputs if "text" in o]


def pids(folder: Path) -> tuple[int, int]:
    """The kernel and the zygote, as the notebook wrote them down."""
    for _ in range(600):
        if (folder / "pids").exists() and (text := (folder / "pids").read_text()):
            return tuple(map(int, text.split()))
        time.sleep(0.1)
    raise AssertionError("the notebook wrote no pids")


def gone(*processes: int) -> bool:
    """Whether the processes end within ten seconds; one that waits to be reaped has ended."""
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False
    for _ in range(100):
        if not any(map(runs, processes)):
            return True
        time.sleep(0.1)
    return False


def zombies(parent: int) -> list[str]:
    """Children of a process that have ended and were not reaped."""
    states = [p.read_text().rsplit(")", 1)[1].split()[:2] for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    return [state for state, ppid in states if int(ppid) == parent and state == "Z"]


@pytest.fixture(scope="module", autouse=True)
def no_zygote_outlives_this_file():
    yield
    left = [z.process.pid for z in fork._zygotes]
    for z in fork._zygotes:
        z.stop()
    fork._zygotes.clear()
    assert gone(*left)


LATE = "import os\nos.environ['A'] = '1'"
REFUSED = {
    "its device is cuda": make("x", parameters="device = 'cuda'"),
    "its kernel is 'ir', not 'python3'": make("x", kernel="ir"),
    "a cell is not plain Python": make("x = !ls"),
    "In [2] changes the environment before the import of torch": make(LATE, "import torch"),
    "In [2] changes the environment before the import of torch.nn": make(LATE + "\nimport torch.nn"),
    "In [2] changes the environment before the import of a.b": make("%env A=1", "from a import b"),
    "In [2] changes the environment before the import of a1": make("%set_env A 1", "import a1"),
    "In [2] changes the environment before the import of a2": make("import os\nos.environ.update(A='1')\nimport a2"),
    "In [2] changes the environment before the import of a3": make("import os\nos.putenv('A', '1')", "import a3"),
    "In [2] changes the environment before the import of a4": make("import os\nos.environ.setdefault('A', '1')", "import a4"),
    "In [2] changes the environment before the import of a5": make("from os import environ\nenviron |= {'A': '1'}", "import a5"),
    "In [2] changes the environment before the import of a6": make("patch.dict(os.environ, A='1').start()", "import a6"),
    "In [2] changes the environment before the import of a7": make("with patch.dict(os.environ, A='1'):\n    import a7"),
    "In [2] changes the environment before the import of a8": make("e = os.environ\ne['A'] = '1'", "import a8"),
    "In [2] changes the environment before the import of a9": make("del os.environ['A']", "import a9"),
    "In [3] changes the environment before the import of b1": make("def f():\n    os.environ['A'] = '1'", "f()", "import b1"),
    "In [3] changes the environment before the import of b2": make("def f():\n    import b2", LATE, "f()"),
    "In [3] changes the environment before the import of b3": make("import torch", LATE, "import torch, b3"),
    "In [2] changes the environment before the import of (importlib": make(LATE, "import importlib\nimportlib.import_module('b4')"),
}
ALLOWED = {
    "after all imports": make("import torch", LATE),
    "only the standard library comes later": make(LATE, "import json"),
    "the same import again": make("import torch", LATE, "def f():\n    import torch"),
    "in a function nobody calls": make("def f():\n    os.environ['A'] = '1'", "import torch"),
    "a block at the end": make("import torch", "with patch.dict(os.environ, A='1'):\n    x = 2"),
    "reads": make("os.environ['A'], os.environ.get('A'), 'A' in os.environ, dict(os.environ), {**os.environ}", "import torch"),
    "another language": make("%%bash\nexport A=1", "import torch"),
    "magics": make("%matplotlib inline\n!ls", "%%time\nimport torch"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    options, why = fork.kernel_options(REFUSED[reason], KERNEL_ENV)
    assert options == {} and why.startswith(reason)


@pytest.mark.parametrize("case", ALLOWED)
def test_not_refused(case):
    assert fork.refusal(ALLOWED[case], KERNEL_ENV) is None


def test_an_injected_device_counts():
    nb = make("x")
    nb.cells.insert(1, new_code_cell("device = 'cuda:1'", metadata={"tags": ["injected-parameters"]}))
    assert fork.refusal(nb, KERNEL_ENV) == "its device is cuda"
    nb.cells[0].source, nb.cells[1].source = nb.cells[1].source, nb.cells[0].source
    assert fork.refusal(nb, KERNEL_ENV) is None


def test_another_system_and_many_threads_are_refused(monkeypatch):
    assert fork.refusal(make("x"), KERNEL_ENV | {"OMP_NUM_THREADS": "2"}).startswith("OMP_NUM_THREADS is not 1")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fork.kernel_options(make("x"), KERNEL_ENV) == ({}, "forked kernels need Linux")


def started_with(monkeypatch, code: str, **env: str) -> tuple[dict, str | None]:
    """kernel_options with a zygote that starts with other code, in an environment of its own."""
    monkeypatch.setattr(fork, "_START", code)
    return fork.kernel_options(make("x"), KERNEL_ENV | env)


def test_a_zygote_that_cannot_start_means_a_cold_kernel_that_says_why(monkeypatch, tmp_path):
    options, why = started_with(monkeypatch, "raise SystemExit(3)", NO="1")
    assert options == {} and why == "the process that kernels are forked from does not answer (it died)"
    monkeypatch.setattr(fork, "Zygote", None)  # it is not tried again
    result = run_one(tmp_path, "print(x)", env={"NO": "1"})
    assert result["status"] == "passed" and said(tmp_path) == ["1\n"] and f"cold kernel: {why}" in result["notes"]


@pytest.mark.parametrize("trouble, reason", {
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()": "imports started threads (2)",
    "torch.cuda.is_initialized = lambda: True": "CUDA was initialised by an import",
}.items())
def test_a_zygote_that_may_not_be_forked(trouble, reason, monkeypatch):
    code = f"import sys, threading, time\nfrom tunebook.kit import fork\n{'import torch' if 'torch' in trouble else ''}\n{trouble}\n"
    started = started_with(monkeypatch, code + "fork.warm.__defaults__ = ((),)\nfork.zygote(int(sys.argv[1]))", NO=reason)
    assert started == ({}, reason)


def test_a_fork_that_fails_at_the_last_moment_is_cold(monkeypatch, tmp_path):
    from nbclient import NotebookClient

    def refuse(*_, **__):
        raise fork.Cold("no more processes")
    monkeypatch.setattr(fork, "fork_kernel", refuse)
    nb, why = make("import os\nprint(os.getppid())"), []
    client = NotebookClient(nb, kernel_manager_class=fork.manager_class(), shutdown_kernel="immediate")
    client.on_cell_executed = lambda **_: why.append(client.km.provisioner.why)
    client.execute()
    assert int(nb.cells[1].outputs[0]["text"]) == os.getpid() and why == ["no more processes"] * 2
    assert run_one(tmp_path, "print(x)")["notes"] == ["cold kernel: no more processes"]


def test_environment_folder_and_name_space_arrive(tmp_path):
    (tmp_path / "beside.py").write_text("here = True")
    result = run_one(tmp_path, "import os, sys\nprint(os.environ['TUNEBOOK_X'], os.getcwd(), os.environ['OMP_NUM_THREADS'])",
                     "import beside\nassert beside.here", "assert not {'torch', 'json', 'fork'} & set(dir())",
                     "import __main__\nassert __main__.x == 1",
                     "import torch, matplotlib\nassert torch.get_num_threads() == 1\nprint(matplotlib.get_backend())",
                     "assert 'JE_ARROW_MALLOC_CONF' not in os.environ and os.getsid(0) == os.getpid()",
                     "import ctypes\nsent = ctypes.c_int()\nctypes.CDLL(None).prctl(2, ctypes.byref(sent))\nassert sent.value == 9",
                     "assert 'tunebook.kit.fork' not in sys.modules", env={"TUNEBOOK_X": "blue"})
    assert result["failure"] is None and result["notes"] == []
    assert said(tmp_path)[0] == f"blue {tmp_path} 1\n" and "inline" in said(tmp_path)[1]


SEEN = """import gc, json, locale, logging, os, signal, sys, threading
signals = {s.name: str(signal.getsignal(s)).split(" at ")[0] for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP")}
print(json.dumps({
    "path": sys.path, "argv": [os.path.basename(a)[:3] for a in sys.argv], "flags": str(sys.flags), "signals": signals,
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "threads": sorted(t.name for t in threading.enumerate()),
    "environment": {k: v for k, v in os.environ.items() if k != "TUNEBOOK_CLAIMS"}, "hash": hash("a"), "gc": gc.get_threshold(),
    "encodings": [sys.stdout.encoding, sys.getfilesystemencoding(), str(locale.getlocale())], "folder": os.getcwd(),
    "loggers": [logging.getLogger().level, len(logging.getLogger().handlers)], "leader": os.getsid(0) == os.getpid()}))"""


def test_a_fork_sees_what_a_cold_kernel_sees(tmp_path):
    nbformat.write(make(SEEN), tmp_path / "n.ipynb")
    seen = []
    for kernels in ("cold", "fork"):
        result = run_notebook(Spec(str(tmp_path / "n.ipynb"), "n", str(tmp_path / "out"), kernels=kernels))
        assert result["failure"] is None and result["notes"] == []
        seen.append(json.loads(said(tmp_path)[0]))
    cold, forked = seen
    assert {k: (v, forked[k]) for k, v in cold.items() if forked[k] != v} == {}


def test_two_kernels_share_the_zygote_and_no_random_number(tmp_path):
    drawn = []
    for _ in range(2):
        run_one(tmp_path, PIDS, "import random, numpy, torch, uuid",
                "print(random.random(), numpy.random.rand(), torch.rand(1).item(), torch.initial_seed(), uuid.uuid4())", "print(hash('a'))")
        drawn.append((said(tmp_path)[0].split(), said(tmp_path)[1], *pids(tmp_path)))
    (one, hash_one, kernel_one, parent_one), (two, hash_two, kernel_two, parent_two) = drawn
    assert parent_one == parent_two and kernel_one != kernel_two
    assert not set(one) & set(two)
    assert hash_one == hash_two  # strings hash alike: the seed is the interpreter's, and that was started once
    assert zombies(parent_one) == [] and gone(kernel_one, kernel_two)


DEATHS = {
    "os.kill(os.getpid(), 9)": "the kernel was killed by SIGKILL",
    "os.abort()": "the kernel was killed by SIGABRT",
    "os._exit(3)": "the kernel ended with exit status 3",
    # the zygote: its kernels die with it, as soon as the system has taken it down, and the next one gets another
    "import time; os.kill(os.getppid(), 9); time.sleep(60)": "the kernel was killed by SIGKILL",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_is_told_and_the_next_kernel_starts(death, tmp_path):
    result = run_one(tmp_path, PIDS, death, "print('never')")
    assert (result["failure"]["kind"], result["failure"]["message"]) == ("kernel died", DEATHS[death])
    assert gone(pids(tmp_path)[0])
    where = []

    def again():
        result = run_one(tmp_path, PIDS)
        assert result["status"] == "passed" and result["notes"] == []
        where.append(pids(tmp_path))

    thread = Thread(target=again)  # a zygote must outlive the thread that started it
    thread.start()
    thread.join()
    again()
    assert where[0][0] != where[1][0] and where[0][1] == where[1][1]


def test_a_time_out_ends_the_kernel(tmp_path):
    result = run_one(tmp_path, PIDS, "while True: pass", timeout=2)
    assert result["failure"]["kind"] == "time-out" and gone(pids(tmp_path)[0])


def test_an_interrupt_reaches_the_cell_and_its_children_and_the_kernel_lives_on():
    from nbclient import NotebookClient
    nb = make("import time\ntime.sleep(60)", "import subprocess\nsubprocess.run(['sleep', '60'])", "print(x)")
    options, why = fork.kernel_options(nb, KERNEL_ENV)
    client = NotebookClient(nb, timeout=2, interrupt_on_timeout=True, allow_errors=True, shutdown_kernel="immediate", **options)
    client.execute(env={**os.environ, **KERNEL_ENV})
    assert why is None and [c.outputs[0].get("ename") for c in nb.cells[1:3]] == ["KeyboardInterrupt"] * 2
    assert nb.cells[3].outputs[0]["text"] == "1\n"


CHAPTERS = ("attention/10_scores", "entropy/21_xent")
BLOCKED = "import socket\ntry: socket.create_connection(('example.org', 80))\nexcept ConnectionRefusedError as e: print(e)"
RUN = {"offline": (PIDS, BLOCKED), "heavy": (PIDS, "import transformers, datasets"), "sleeper": (PIDS, "import time\ntime.sleep(300)")}


@pytest.fixture(scope="module")
def together(root, offline_env, tmp_path_factory):
    """Two workers run chapters cold and forked, then small notebooks, with a module first on the path that refuses the network.

    One notebook sleeps; when all others are done, its worker is killed. (folder, results by name, the killed worker)
    """
    folder = tmp_path_factory.mktemp("together")
    paths = {f"{kernels}/{name}": root / "nbs" / f"{name}.ipynb" for kernels in ("cold", "fork") for name in CHAPTERS}
    for name, sources in RUN.items():
        (folder / name).mkdir()
        paths[f"fork/{name}"] = folder / name / "n.ipynb"
        nbformat.write(make(*sources), paths[f"fork/{name}"])
    specs = [Spec(str(path), name, str(folder / "out"), env=offline_env, kernels=name[:4]) for name, path in paths.items()]
    done, killed = [], []

    def kill_the_sleepers_worker(result):
        done.append(result["name"])
        if len(done) == len(specs) - 1:
            zygote = pids(folder / "sleeper")[1]
            killed.append(int(Path(f"/proc/{zygote}/stat").read_text().rsplit(")", 1)[1].split()[1]))
            os.kill(killed[0], signal.SIGKILL)

    results = run_all(specs, workers=2, on_done=kill_the_sleepers_worker)
    return folder, {r["name"]: r for r in results}, killed


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_fork_makes_the_claims_of_a_cold_kernel(name, together):
    _, results, _ = together
    cold, forked = results[f"cold/{name}"], results[f"fork/{name}"]
    assert cold["failure"] is None and forked["failure"] is None and forked["notes"] == []
    assert forked["claims"] and compare(cold["claims"], forked["claims"]) == []
    values = [[(c["name"], c["value"]) for c in r["claims"]] for r in (cold, forked)]
    assert values[0] == values[1] and cold["environment"] == forked["environment"]


def test_a_zygote_imports_under_the_environment_of_its_kernels(together):
    folder, results, _ = together
    assert results["fork/offline"]["failure"] is None and results["fork/offline"]["notes"] == []
    cells = nbformat.read(folder / "out" / "fork" / "offline.ipynb", 4).cells
    assert "the test run has no network" in cells[2].outputs[0]["text"]


def test_a_killed_worker_leaves_neither_zygote_nor_kernel_and_a_finished_one_neither(together):
    folder, results, killed = together
    assert results["fork/sleeper"]["failure"]["kind"] == "worker died" and results["fork/heavy"]["failure"] is None
    where = [pids(folder / name) for name in RUN]
    assert len({zygote for _, zygote in where}) <= 2 and len({kernel for kernel, _ in where}) == 3
    assert gone(*killed, *(pid for pair in where for pid in pair))
