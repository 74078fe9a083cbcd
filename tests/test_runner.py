"""The runner as a whole: cache, resume, lock, shards, and files that are never half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_faults import GOOD, alive, kernels_below, write

from tunebook.kit.cli import main
from tunebook.kit.ledger import compare
from tunebook.kit.run import Spec, from_cache, outputs_of, run_all, run_notebook, shard

SLOW = GOOD + "\nimport time\ntime.sleep(120)"


def spec_of(path: Path, **options) -> Spec:
    return Spec(str(path), path.stem, str(path.parent / "out"), **options)


def start(folder: Path, *args: str) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it."""
    code = f"import sys; from tunebook.kit.cli import main; sys.exit(main({['run', *args]!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=-1, stderr=-1, text=True, start_new_session=True)


def until(condition, seconds=60):
    for _ in range(seconds * 10):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come about")


def gone(pids):
    until(lambda: not any(map(alive, pids)))


def test_an_unchanged_suite_is_served_and_a_changed_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("y = 1")
    write(tmp_path / "a.ipynb", "import helper\n" + GOOD)
    write(tmp_path / "b.ipynb", GOOD)
    assert main(["run", "a.ipynb", "b.ipynb"]) == 0
    capsys.readouterr()
    assert main(["run", "a.ipynb", "b.ipynb"]) == 0
    assert capsys.readouterr().out.count("unchanged") == 2
    (tmp_path / "helper.py").write_text("y = 2")
    assert main(["run", "a.ipynb", "b.ipynb", "--why"]) == 0
    told = capsys.readouterr().out
    assert "a: module helper changed" in told and "b: unchanged" in told and "✓ b: 1 claims, unchanged" in told
    assert main(["run", "b.ipynb", "--no-cache"]) == 0
    assert "unchanged" not in capsys.readouterr().out


def test_the_served_result_is_the_run_s(tmp_path):
    spec = spec_of(write(tmp_path / "a.ipynb", GOOD, "21 * 2"))
    first = run_notebook(spec)
    executed = outputs_of(spec)[0].read_text()
    for path in outputs_of(spec):
        path.unlink()
    second, why = from_cache(spec)
    assert why == [] and {k: v for k, v in second.items() if k != "cached"} == {k: v for k, v in first.items() if k != "cached"}
    assert outputs_of(spec)[0].read_text() == executed and json.loads(outputs_of(spec)[1].read_text()) == second


def test_a_failure_is_never_served(tmp_path):
    spec = spec_of(write(tmp_path / "a.ipynb", GOOD.replace("1, 1", "1, 2")))
    assert run_notebook(spec)["status"] == "failed"
    assert from_cache(spec) == (None, ["it has no kept result"])


def test_a_corrupt_cache_entry_is_not_served(tmp_path):
    spec = spec_of(write(tmp_path / "a.ipynb", GOOD), cached=True)
    run_notebook(spec)
    (entry,) = (tmp_path / "out" / ".cache").iterdir()
    entry.write_text(entry.read_text()[:-40])
    assert from_cache(spec) == (None, ["its kept result is damaged"])
    assert run_all([spec])[0]["status"] == "passed" and from_cache(spec)[1] == []


def test_a_notebook_changed_while_it_runs_is_told_and_not_kept(tmp_path):
    source = "import pathlib\np = pathlib.Path('a.ipynb')\np.write_text(p.read_text().replace('41', '42'))\n"
    spec = spec_of(write(tmp_path / "a.ipynb", source + GOOD, "41"))
    result = run_notebook(spec)
    assert result["status"] == "passed"
    assert result["notes"] == ["while it ran, code changed; this is the result of what was read at the start"]
    assert nbformat.read(outputs_of(spec)[0], 4).cells[2].outputs[0]["data"]["text/plain"] == "41"
    assert from_cache(spec) == (None, ["it has no kept result"])


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_suite_goes_on_where_it_stopped(how, status, tmp_path):
    write(tmp_path / "a.ipynb", GOOD)
    write(tmp_path / "b.ipynb", SLOW)
    process = start(tmp_path, "a.ipynb", "b.ipynb", "--workers", "1")
    until(lambda: (tmp_path / "_run" / "a.json").exists() and kernels_below(process.pid))
    kernels = kernels_below(process.pid)
    time.sleep(2)
    process.send_signal(how)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == status and complaint.count("\n") == 1 and "goes on from the results it kept" in complaint
    gone(kernels)
    assert json.loads((tmp_path / "_run" / "run.json").read_text())["status"] == "interrupted"
    write(tmp_path / "b.ipynb", GOOD)
    out, _ = start(tmp_path, "a.ipynb", "b.ipynb").communicate(timeout=120)
    assert "✓ a: 1 claims, unchanged" in out and "✓ b: 1 claims, " in out and "2 of 2 chapters passed" in out


def test_a_killed_runner_leaves_no_kernel_and_the_next_run_says_so(tmp_path):
    write(tmp_path / "a.ipynb", SLOW)
    process = start(tmp_path, "a.ipynb")
    kernels = until(lambda: kernels_below(process.pid))
    process.kill()
    process.communicate(timeout=30)
    gone(kernels)
    assert json.loads((tmp_path / "_run" / "run.json").read_text())["status"] == "running"
    write(tmp_path / "a.ipynb", GOOD)
    out, _ = start(tmp_path, "a.ipynb").communicate(timeout=120)
    assert f"was killed (process {process.pid} is gone); going on from the results it kept" in out and "1 of 1 chapters passed" in out


def test_two_runs_into_one_folder(tmp_path):
    write(tmp_path / "a.ipynb", SLOW)
    first = start(tmp_path, "a.ipynb")
    kernels = until(lambda: kernels_below(first.pid))
    second = start(tmp_path, "a.ipynb")
    _, complaint = second.communicate(timeout=60)
    assert second.returncode == 2
    assert complaint == f"tunebook: another run (process {first.pid}) writes into _run; wait, or use --out\n"
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=30)
    gone(kernels)


def test_of_runs_started_at_once_one_holds_the_folder_and_the_others_name_it(tmp_path):
    write(tmp_path / "a.ipynb", SLOW)
    runs = [start(tmp_path, "a.ipynb") for _ in range(4)]
    ended = until(lambda: [r for r in runs if r.poll() is not None] if sum(r.poll() is not None for r in runs) == 3 else None)
    (holder,) = [r for r in runs if r not in ended]
    complaint = f"tunebook: another run (process {holder.pid}) writes into _run; wait, or use --out\n"
    assert [(r.returncode, r.communicate()[1]) for r in ended] == [(2, complaint)] * 3
    holder.terminate()
    holder.communicate(timeout=30)


def test_a_worker_leaves_out_what_no_run_needs_and_gives_it_back():
    code = ("import sys; from tunebook.kit.run import UNUSED, library, register_engine; register_engine(); library('nbconvert')\n"
            "assert not set(UNUSED) & set(sys.modules); import pyarrow.fs, rfc3987_syntax")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_is_one_line(tmp_path):
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    write(tmp_path / "a.ipynb", "print('x' * 900_000)", GOOD)
    write(tmp_path / "b.ipynb", GOOD)
    (tmp_path / "small").mkdir()
    code = "import sys; from tunebook.kit.cli import main; sys.exit(main(['run', 'a.ipynb', 'b.ipynb', '--out', 'small/out']))"
    shell = f"mount -t tmpfs -o size=256k none small && exec {sys.executable} -c \"{code}\""
    run = subprocess.run(["unshare", "-m", "sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode in (1, 2), run.stdout + run.stderr
    assert "a: output: cannot write below small/out (No space left on device); choose another folder with --out" in run.stdout
    assert "✓ b" in run.stdout and "Traceback" not in run.stdout + run.stderr


def test_an_unwritable_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ipynb", GOOD)
    (tmp_path / "file").write_text("in the way")
    assert main(["run", "a.ipynb", "--out", "file/out"]) == 2
    assert capsys.readouterr().err == "tunebook: cannot write below file/out (Not a directory); choose another folder with --out\n"


def test_shards_cover_the_suite_once():
    names, seconds = [f"n{i}" for i in range(17)], {f"n{i}": float(i + 1) for i in range(15)}
    parts = [shard(names, i, 4, seconds) for i in range(1, 5)]
    assert sorted(n for p in parts for n in p) == sorted(names)
    loads = [sum(seconds.get(n, 8.0) for n in p) for p in parts]
    assert max(loads) - min(loads) <= 9.0


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_wrong_shard_is_refused(text, capsys):
    with pytest.raises(SystemExit) as e:
        main(["run", "--shard", text])
    assert e.value.code == 2 and "expected I/N" in capsys.readouterr().err


def test_the_longest_goes_first(tmp_path):
    specs = [spec_of(write(tmp_path / f"{n}.ipynb", GOOD)) for n in "abc"]
    seen = []
    results = run_all(specs, workers=1, on_done=lambda r: seen.append(r["name"]), seconds={"a": 1.0, "b": 3.0, "c": 2.0})
    assert seen == ["b", "c", "a"] and [r["name"] for r in results] == ["a", "b", "c"]


def test_a_kernel_that_starts_at_the_second_try_is_told(tmp_path):
    """The launcher fails once, then is the real one."""
    launcher = ("import pathlib, runpy, sys\nmark = pathlib.Path(__file__).with_name('tried')\n"
                "if not mark.exists():\n    mark.touch()\n    raise SystemExit('not today')\n"
                "sys.path.remove(str(mark.parent))\nsys.modules.pop('ipykernel_launcher', None)\n"
                "from ipykernel import kernelapp\nkernelapp.launch_new_instance()\n")
    hidden = tmp_path / "first"
    hidden.mkdir()
    (hidden / "ipykernel_launcher.py").write_text(launcher)
    result = run_notebook(spec_of(write(tmp_path / "a.ipynb", GOOD), env={"PYTHONPATH": str(hidden)}))
    assert result["failure"] is None and result["notes"] == ["the kernel started at the second try"]


def test_no_file_is_ever_half_written(tmp_path):
    """A tenth of the long lane: a process that writes results is killed again and again while readers look."""
    kills, reads = (200, 10_000) if os.environ.get("TUNEBOOK_LONG") else (20, 1_000)
    noise = "\n".join(f"print('{i}', 'x' * 20_000)" for i in range(40))
    specs = [spec_of(write(tmp_path / f"{n}.ipynb", noise)) for n in "ab"]
    assert [r["status"] for r in run_all(specs)] == ["passed", "passed"]
    code = ("import sys\nfrom tunebook.kit.run import Spec, from_cache, outputs_of\nprint('up', flush=True)\nwhile True:\n"
            "    for n in 'ab':\n        spec = Spec(f'{n}.ipynb', n, 'out')\n"
            "        for p in outputs_of(spec): p.unlink(missing_ok=True)\n        assert from_cache(spec)[0]")
    broken, seen = [], 0

    def look():
        nonlocal seen
        for path in [p for spec in specs for p in outputs_of(spec)]:
            try:
                text = path.read_text()
            except OSError:
                continue  # between two writes there is no file, never a part of one
            seen += 1
            try:
                json.loads(text)
            except ValueError:
                broken.append(path.name)

    for i in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=-1, text=True)
        process.stdout.readline()
        until_seen = seen + reads // kills
        for _ in range(5_000):
            look()
            if seen >= until_seen:
                break
        time.sleep(i % 7 * 0.003)
        process.kill()
        process.wait()
        process.stdout.close()
        look()
    assert seen >= reads and broken == []


def test_fork_and_cold_give_the_same_claims(tmp_path, root):
    names = ["attention/10_scores", "entropy/21_xent"]
    runs = {}
    for kernels in ("cold", "fork"):
        specs = [Spec(str(root / "nbs" / f"{n}.ipynb"), n, str(tmp_path / kernels), kernels=kernels) for n in names]
        runs[kernels] = {r["name"]: r for r in run_all(specs)}
    for name in names:
        cold, fork = runs["cold"][name], runs["fork"][name]
        assert cold["status"] == fork["status"] == "passed" and fork["notes"] == [], fork["notes"]
        assert compare(cold["claims"], fork["claims"]) == []
        assert [c["value"] for c in cold["claims"]] == [c["value"] for c in fork["claims"]]
