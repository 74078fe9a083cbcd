"""The package is what the notebooks export, and the notebooks are clean."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root):
    """A copy of the tree, so that a test never changes the checkout."""
    target = tmp_path_factory.mktemp("tree") / "tunebook-copy"
    target.mkdir()
    for item in ("nbs", "tunebook"):
        shutil.copytree(root / item, target / item, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked"))
    shutil.copy(root / "settings.ini", target)
    return target


def differing(a: Path, b: Path, suffix: str) -> list[str]:
    names = {p.relative_to(side).as_posix() for side in (a, b) for p in side.rglob(f"*{suffix}") if "checkpoint" not in str(p)}
    return sorted(n for n in names if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False)))


def nbdev(command: str, folder: Path):
    subprocess.run([str(BIN / command)], cwd=folder, check=True, capture_output=True, env={**os.environ, "HOME": str(folder)})


def test_export_leaves_no_diff(copy, root):
    nbdev("nbdev_export", copy)
    assert differing(root / "tunebook", copy / "tunebook", ".py") == []


def test_clean_leaves_no_diff(copy, root):
    nbdev("nbdev_clean", copy)
    assert differing(root / "nbs", copy / "nbs", ".ipynb") == []


def test_a_hand_edit_of_the_package_is_noticed(copy, root):
    """The comparison above can fail."""
    path = copy / "tunebook" / "kit" / "checks.py"
    before = path.read_text()
    path.write_text(before + "\nx = 1\n")
    assert differing(root / "tunebook", copy / "tunebook", ".py") == ["kit/checks.py"]
    path.write_text(before)


def test_ruff_is_clean(root):
    run = subprocess.run([str(BIN / "ruff"), "check", "."], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_pip_check_is_clean():
    run = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
