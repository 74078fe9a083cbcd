"""Shared fixtures: one offline run of all chapters serves every test that looks at a run."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; on a busy machine two threads can be many times slower than one

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name

from tunebook.kit.cli import catalogue
from tunebook.kit.run import Spec, chapters, run_all

ROOT = Path(__file__).parent.parent
CHAPTERS = chapters(ROOT)


def pytest_collection_modifyitems(items):
    """The long run of the notebooks first, so that a failure shows early."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI (TUNEBOOK_STRICT) nothing may be skipped."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("TUNEBOOK_STRICT") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in a strict run: {report.longrepr}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def offline_env(tmp_path_factory) -> dict[str, str]:
    """Environment of a kernel that can reach nothing but this machine."""
    log = tmp_path_factory.mktemp("net") / "refused.txt"
    return {"PYTHONPATH": str(ROOT / "tests" / "offline"), "TUNEBOOK_NETLOG": str(log)}


@pytest.fixture(scope="session")
def suite(tmp_path_factory, offline_env) -> tuple[Path, dict[str, dict]]:
    """Every chapter, run once through the runner with the network refused: (output folder, results by name).

    On forked kernels, which save a quarter of the time; that cold ones give the same is what the tests of the fork say."""
    out = tmp_path_factory.mktemp("run")
    specs = [Spec(str(ROOT / "nbs" / f"{name}.ipynb"), name, str(out), env=offline_env, kernels="fork") for name in CHAPTERS]
    results = run_all(specs, workers=2, seconds={r["name"]: r["seconds"] for r in catalogue(ROOT) if r["seconds"]})
    return out, {r["name"]: r for r in results}
